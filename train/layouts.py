"""A push: the model learns to say what is to be where, and to draw one thing in its place.

unimm train train/stores.py model=scenes
unimm train train/layouts.py data.own.options.path=own.jsonl     # edits.py says what these are

A prompt is drawn one thing after the other (`UniMM.generate`): first the model says a layout in
words, "a large cyan moon (2,3) and a small red star (6,6) on a white background", then it draws the
background and adds each thing, of which only the codes around its place are drawn. Beside it goes
on with edits, in the same form, and with all that it understands. Less than an hour on two cores
with instructions for bfloat16. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import scenes_edits, scenes_grounds, scenes_layouts

edits = load_recipe(Path(__file__).with_name("edits.py")).config
talks = load_recipe(Path(__file__).with_name("talks.py")).config
WEIGHTS = {
    "additions": 6.0,
    "edits": 4.0,
    "layouts": 2.0,
    "layouts_many": 1.5,
    "layouts_related": 3.0,
    "located": 2.0,
    "own": 2.5,
    "grounds": 0.2,
    "questions": 3.5,
    "relations": 1.0,
    "captions": 1.2,
    "mixed": 1.0,
    "several": 1.0,
    "unknown": 0.3,
    "chats": 0.2,
}
kinds = {**edits.data["edits"].options["kinds"], "add": 0.0}  # these are in "additions"
changes = {**edits.data["edits"].options, "kinds": kinds}
absent = {**talks.data["questions"].options, "absent": 0.25}
sources = {
    **talks.data,
    "layouts": Source(scenes_layouts),
    "layouts_many": Source(scenes_layouts, options={"least": 3}),
    "layouts_related": Source(scenes_layouts, options={"related": True}),
    "additions": Source(scenes_edits, options={"store": "runs/additions", "located_share": 1.0}),
    "edits": dataclasses.replace(edits.data["edits"], options=changes),
    "grounds": Source(scenes_grounds),
    "questions": dataclasses.replace(edits.data["questions"], options=absent),
}

config = dataclasses.replace(
    edits,
    out="runs/layouts",
    train=((r"vision\..*", 5e-4), (r".*", 1.5e-3)),
    data={name: dataclasses.replace(sources[name], weight=w) for name, w in WEIGHTS.items()},
    steps=520,
    batch_size=96,
    options={
        **edits.options,
        "sampling": {"edit_located": True, "layout_from": 2, "layout_temperature": 0.25},
    },
    kind_weights={"text": 3.0, "code": 1.0},  # a layout is many words
)
