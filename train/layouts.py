"""A push: the model learns to say what is to be where, and to draw one thing in its place.

unimm train train/stores.py model=scenes
unimm train train/layouts.py data.own.options.path=own.jsonl     # edits.py says what these are

A prompt of many things is drawn one thing after the other (`UniMM.generate`): first the model says
a layout in words, "a large cyan moon (2,3) and a small red star (6,6) on a white background", then
it draws the background and adds each thing, of which only the codes around its place are drawn.
What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import scenes_edits, scenes_grounds, scenes_layouts

edits = load_recipe(Path(__file__).with_name("edits.py")).config
WEIGHTS = {
    "layouts": 4.0,
    "layouts_many": 3.0,
    "additions": 4.0,
    "grounds": 0.2,
    "edits": 2.0,
    "located": 2.0,
    "own": 2.5,
    "questions": 1.5,
    "captions": 0.7,
    "mixed": 0.7,
    "relations": 0.4,
    "unknown": 0.3,
}
kinds = {**edits.data["edits"].options["kinds"], "add": 0.0}  # these are in "additions"
changes = {**edits.data["edits"].options, "kinds": kinds}
sources = {
    **edits.data,
    "layouts": Source(scenes_layouts),
    "layouts_many": Source(scenes_layouts, options={"least": 3}),
    "additions": Source(scenes_edits, options={"store": "runs/additions", "located_share": 1.0}),
    "edits": dataclasses.replace(edits.data["edits"], options=changes),
    "grounds": Source(scenes_grounds),
}

config = dataclasses.replace(
    edits,
    out="runs/layouts",
    data={name: dataclasses.replace(sources[name], weight=w) for name, w in WEIGHTS.items()},
    steps=400,
    batch_size=96,
)
