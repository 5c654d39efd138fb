"""More of stage 3: how the bundled model goes on learning from its own weights.

unimm train train/stores.py model=scenes                                # pictures, edits and codes
unimm train train/longer.py init=scenes out=runs/longer steps=2000

Compared with stage 3 there is no text alone, and drawings and edits also tell their prompt from a
false one; drawings of two objects, of two that share a shape or a colour, and of equal ones come
more often than their share. What this brought, step by step: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.sources import (
    scenes_captions,
    scenes_chats,
    scenes_edits,
    scenes_pictures,
    scenes_questions,
    scenes_unknown,
)
from unimm.training.contrast import contrast_step, contrast_weight, setup_contrast

STORE, EDITS = {"store": "runs/store"}, {"store": "runs/edits"}
stage3 = load_recipe(Path(__file__).with_name("stage3_sft.py")).config

config = dataclasses.replace(
    stage3,
    init="unimm/assets/scenes",
    out="runs/longer",
    setup=setup_contrast,
    step=contrast_step,
    count=contrast_weight,
    data={
        "captions": Source(scenes_captions, weight=2, options=STORE),
        "questions": Source(scenes_questions, weight=2.5, options={**STORE, "most": 8}),
        "relations": Source(
            scenes_questions,
            weight=1,
            options={**STORE, "most": 8, "only": "related", "types": ("position",)},
        ),
        "unknown": Source(scenes_unknown, weight=0.4, options=STORE),
        "pictures": Source(scenes_pictures, weight=2, options={**STORE, "rivals": True}),
        "single": Source(
            scenes_pictures, weight=0.7, options={**STORE, "only": "single", "rivals": True}
        ),
        "pairs": Source(
            scenes_pictures, weight=2.5, options={**STORE, "only": "pairs", "rivals": True}
        ),
        "alike": Source(
            scenes_pictures, weight=1.5, options={**STORE, "only": "alike", "rivals": True}
        ),
        "equal": Source(
            scenes_pictures, weight=1, options={**STORE, "only": "equal", "rivals": True}
        ),
        "edits": Source(scenes_edits, weight=2, options={**EDITS, "rivals": 0.5}),
        "chats": Source(scenes_chats, weight=0.5, options=EDITS),
    },
    steps=2_000,
    warmup=20,
    compile=True,
    accumulate=2,
    packing=448,
    options={**stage3.options, "contrast": 4.0},
)
