"""A push for talking: several pictures in a conversation, and what is not there.

unimm train train/stores.py model=scenes
unimm train train/talks.py data.own.options.path=own.jsonl

A question about a star where there is none is answered so; of two pictures each is spoken of by
itself, and both together. The rest is a little of everything, drawings (edits.py says how they are
made) and edits as edits.py has them, so that nothing is forgotten. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import scenes_several

edits = load_recipe(Path(__file__).with_name("edits.py")).config
WEIGHTS = {
    "questions": 4.0,
    "several": 2.5,
    "own": 5.0,
    "edits": 3.0,
    "located": 1.2,
    "captions": 1.0,
    "mixed": 0.7,
    "relations": 0.7,
    "unknown": 0.4,
    "chats": 0.3,
}
absent = {**edits.data["questions"].options, "absent": 0.5}
sources = {
    **edits.data,
    "several": Source(scenes_several, options={"store": "runs/store"}),
    "questions": dataclasses.replace(edits.data["questions"], options=absent),
}

config = dataclasses.replace(
    edits,
    out="runs/talks",
    train=((r"vision\..*", 2e-4), (r".*", 8e-4)),
    data={name: dataclasses.replace(sources[name], weight=w) for name, w in WEIGHTS.items()},
    steps=110,
    batch_size=80,
)
