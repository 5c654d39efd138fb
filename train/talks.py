"""A push for talking: several pictures, what is not there, and drawings of many things.

unimm train train/stores.py model=scenes
unimm train train/talks.py data.own.options.path=own.jsonl

A question about a star where there is none is answered so; of two pictures each is spoken of by
itself; prompts of three to five objects come often. The rest is a little of everything, edits as
edits.py has them, so that nothing is forgotten. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import scenes_several

edits = load_recipe(Path(__file__).with_name("edits.py")).config
longer = load_recipe(Path(__file__).with_name("longer.py")).config
STORE = {"store": "runs/store"}
WEIGHTS = {
    "questions": 2.0,
    "several": 1.5,
    "many": 3.0,
    "own": 3.0,
    "edits": 3.0,
    "located": 1.5,
    "captions": 1.0,
    "mixed": 0.7,
    "relations": 0.5,
    "unknown": 0.5,
    "chats": 0.5,
}
many = {**longer.data["pictures"].options, "only": "mixed", "rivals": False}
sources = {
    **edits.data,
    "several": Source(scenes_several, options=STORE),
    "many": dataclasses.replace(longer.data["pictures"], options=many),
}
absent = {**sources["questions"].options, "absent": 0.5}
sources["questions"] = dataclasses.replace(sources["questions"], options=absent)

config = dataclasses.replace(
    edits,
    out="runs/talks",
    data={name: dataclasses.replace(sources[name], weight=w) for name, w in WEIGHTS.items()},
    steps=240,
)
