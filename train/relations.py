"""A push: the model learns what belongs to what in a prompt: colours, places, numbers.

unimm train train/relations.py init=MODEL out=runs/relations

Left alone with the next-token loss a small model can sit on a plateau for thousands of steps where
a prompt is a bag of words: objects and colours are right, and what belongs to what is a coin toss.
Here nearly every sample is about just that: drawings and edits, each told apart from a prompt that
is false in one thing, and questions about places. It takes some hundred steps; longer.py then goes
on with everything. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import load_recipe

longer = load_recipe(Path(__file__).with_name("longer.py")).config
WEIGHTS = {
    "pairs": 4.0,
    "equal": 2.0,
    "pictures": 2.0,
    "edits": 1.5,
    "relations": 1.0,
    "questions": 0.5,
    "captions": 0.5,
}

config = dataclasses.replace(
    longer,
    out="runs/relations",
    train=((r"vision\..*", 1e-3), (r".*", 2e-3)),
    data={
        name: dataclasses.replace(longer.data[name], weight=weight)
        for name, weight in WEIGHTS.items()
    },
    steps=400,
    accumulate=3,
    schedule="constant",
    options={**longer.options, "contrast": 10.0},
)
