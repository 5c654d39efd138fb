"""More of stage 3: how the bundled model goes on learning from its own weights.

unimm train train/longer.py init=unimm/assets/scenes out=runs/longer steps=2000

The stores of pictures are made by train/scenes.py. Compared with stage 3 half of the
samples are drawings, half of these of two objects in a plain relation, and there is no text alone. What this brought, step by step: train/README.md.
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
)

config = dataclasses.replace(
    load_recipe(Path(__file__).with_name("stage3_sft.py")).config,
    init="unimm/assets/scenes",
    out="runs/longer",
    data={
        "captions": Source(scenes_captions, weight=2, options={"store": "runs/store"}),
        "questions": Source(scenes_questions, weight=4, options={"store": "runs/store", "most": 8}),
        "pictures": Source(scenes_pictures, weight=3, options={"store": "runs/store"}),
        "related": Source(
            scenes_pictures, weight=3, options={"store": "runs/store", "related": True}
        ),
        "edits": Source(scenes_edits, weight=1, options={"store": "runs/edits"}),
        "chats": Source(scenes_chats, weight=0.5, options={"store": "runs/edits"}),
    },
    steps=2_000,
    warmup=20,
    compile=True,
)
