"""A push: the model learns what an instruction changes in a picture, and to leave all else alone.

unimm train train/edits.py init=MODEL out=runs/edits_push

More than half of all slots are edits, in which a code that changes counts three times one that
stays; the rest is a little of everything, so that nothing is forgotten. What was seen:
train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe

longer = load_recipe(Path(__file__).with_name("longer.py")).config
WEIGHTS = {
    "edits": 6.0,
    "pictures": 2.0,
    "pairs": 1.5,
    "questions": 1.5,
    "captions": 1.0,
    "chats": 0.7,
    "single": 0.5,
    "alike": 0.5,
    "equal": 0.5,
    "relations": 0.5,
    "unknown": 0.3,
}


def alone(source: Source) -> dict:
    """The options of a source without rivals, which would double what a sample costs."""
    return {name: False if name == "rivals" else v for name, v in source.options.items()}


config = dataclasses.replace(
    longer,
    out="runs/edits_push",
    train=((r"vision\..*", 5e-4), (r".*", 1.5e-3)),
    data={
        name: dataclasses.replace(
            longer.data[name], weight=weight, options=alone(longer.data[name])
        )
        for name, weight in WEIGHTS.items()
    },
    steps=600,
    batch_size=96,
    warmup=10,
)
