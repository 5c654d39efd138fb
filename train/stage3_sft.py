"""Stage 3: fine-tuning on conversations, the vision encoder included: answers, edits and chats.

unimm train train/stage3_sft.py init=runs/stage2 out=runs/stage3

Understanding : text : generation = 5 : 1 : 4 as in Janus-Pro (report, Table 2); edits and chats
count as generation. The rate falls to zero. Cost and expected loss on 2 cores: see train/README.md.
"""

from unimm.config import Run, Source
from unimm.data.sources import (
    scenes_captions,
    scenes_chats,
    scenes_edits,
    scenes_pictures,
    scenes_questions,
    scenes_text,
)
from unimm.training.next_token import next_token, scored_weight

config = Run(
    init="runs/stage2",
    out="runs/stage3",
    step=next_token,
    count=scored_weight,
    train=((r"vision\..*", 1e-3), (r".*", 2e-3)),
    optimizer="muon",
    kind_weights={"text": 8.0, "code": 1.0},  # 64 codes drown a one-word answer
    data={
        "captions": Source(scenes_captions, weight=2, options={"store": "runs/store"}),
        "questions": Source(scenes_questions, weight=3, options={"store": "runs/store", "most": 8}),
        "text": Source(scenes_text, weight=1, options={"world": "scenes"}),
        "pictures": Source(scenes_pictures, weight=2, options={"store": "runs/store"}),
        "edits": Source(scenes_edits, weight=1, options={"store": "runs/edits"}),
        "chats": Source(scenes_chats, weight=1, options={"store": "runs/edits"}),
    },
    steps=1_500,
    batch_size=128,
    accumulate=4,
    warmup=0,
    schedule="linear",
    options={"prompts": [], "guidance": 2.0, "code_rows_only": False},
)
