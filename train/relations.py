"""A push: the model learns what a relation is, and which colour goes with which shape.

unimm train train/relations.py init=MODEL out=runs/relations

Left alone with the next-token loss a small model can sit on a plateau for thousands of steps where
a prompt is a bag of words: objects and colours are right, and what belongs to what is a coin toss.
Here nearly every sample is about just that: pictures of two objects, told apart from the prompt
with the two (or their colours) exchanged, and questions about places. It takes some hundred steps;
longer.py then goes on with everything. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import load_recipe

longer = load_recipe(Path(__file__).with_name("longer.py")).config
WEIGHTS = {"related": 5.0, "relations": 3.0, "questions": 0.5, "captions": 0.5}

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
    options={**longer.options, "contrast": 30.0},
)
