"""A push: the model says what is where in a picture before it answers about it.

unimm train train/stores.py model=scenes
unimm train train/looking.py data.own.options.path=own.jsonl     # edits.py says what these are

As layouts.py has the model say what is to be where before it draws, so here what is where before
it speaks: "a large cyan moon (2,3) and a small red star (6,6) on a white background". What is
asked then is answered from these words (`UniMM.ask_all`). Beside it goes on all of layouts.py, in
which a layout and an addition are now told from such ones as have no room. What was seen:
train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import scenes_said

layouts = load_recipe(Path(__file__).with_name("layouts.py")).config
LOOKED = {"looked": 0.8}
CHANGES = {  # weights, and what else is said
    "additions": (5.0, {}),
    "edits": (6.0, {"kinds": {**layouts.data["edits"].options["kinds"], "reshape": 2.5}}),
    "layouts": (1.2, {"rivals": 0.3}),
    "layouts_many": (2.5, {"rivals": 0.5}),
    "layouts_related": (1.5, {}),
    "located": (4.0, {"added": 0.5, **LOOKED}),
    "own": (2.5, {}),
    "grounds": (0.3, {}),
    "questions": (5.0, LOOKED),
    "relations": (1.0, LOOKED),
    "captions": (2.5, LOOKED),
    "mixed": (2.5, LOOKED),
    "several": (1.2, LOOKED),
    "unknown": (0.4, LOOKED),
    "chats": (0.3, LOOKED),
}
data = {
    name: dataclasses.replace(
        layouts.data[name], weight=weight, options={**layouts.data[name].options, **options}
    )
    for name, (weight, options) in CHANGES.items()
}

data["said"] = Source(scenes_said, weight=6.0)

config = dataclasses.replace(
    layouts,
    out="runs/looking",
    train=((r"vision\..*", 5e-4), (r".*", 1e-3)),
    data=data,
    steps=560,
    options={
        **layouts.options,
        "sampling": {**layouts.options["sampling"], "look_first": True},
    },
    kind_weights={"text": 2.0, "code": 1.0},
)
