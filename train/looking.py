"""A push: the model says what is where in a picture, and answers from these words.

unimm train train/stores.py model=scenes
unimm train train/looking.py data.own.options.path=own.jsonl     # edits.py says what these are

As layouts.py has the model say what is to be where before it draws, so here what is where before it
speaks: "a large cyan moon (2,3) and a small red star (6,6) on a white background". What is asked is
then answered from the words alone (`UniMM.ask_all`), and an edit is located with them in sight.
Three samples in five are such words without a picture. Beside them goes on all of layouts.py, in
which a layout and an addition are now told from such ones as have no room. 40 minutes on two cores
with instructions for bfloat16, after 350 steps with other weights. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import scenes_said

layouts = load_recipe(Path(__file__).with_name("layouts.py")).config
LOOKED = {"looked": 0.8}
SAMPLING = {"look_first": True, "tries": 6, "try_temperature": 1.0}
CHANGES = {  # weights, and what else is said
    "additions": (3.0, {}),
    "edits": (4.0, {"kinds": {**layouts.data["edits"].options["kinds"], "reshape": 2.5}}),
    "layouts": (0.6, {"rivals": 0.3}),
    "layouts_many": (1.2, {"rivals": 0.5}),
    "layouts_related": (0.8, {}),
    "located": (2.0, {"added": 0.5, **LOOKED}),
    "own": (1.5, {}),
    "grounds": (0.2, {}),
    "questions": (2.0, LOOKED),
    "relations": (0.5, LOOKED),
    "captions": (1.2, LOOKED),
    "mixed": (1.2, LOOKED),
    "several": (0.6, LOOKED),
    "unknown": (0.3, LOOKED),
    "chats": (0.2, LOOKED),
}
data = {
    name: dataclasses.replace(
        layouts.data[name], weight=weight, options={**layouts.data[name].options, **options}
    )
    for name, (weight, options) in CHANGES.items()
}
data["said"] = Source(scenes_said, weight=10.0)
data["said_harder"] = Source(
    scenes_said, weight=18.0, options={"types": ("count", "comparison", "position")}
)

config = dataclasses.replace(
    layouts,
    out="runs/looking",
    train=((r"vision\..*", 3e-4), (r".*", 1.2e-3)),
    data=data,
    steps=400,
    options={
        **layouts.options,
        "sampling": {**layouts.options["sampling"], **SAMPLING},
    },
    kind_weights={"text": 2.0, "code": 1.0},
)
