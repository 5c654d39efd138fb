"""Stage 2: everything but the two encoders learns, on all kinds of data.

unimm train train/stage2_pretrain.py init=runs/stage1 out=runs/stage2

Understanding : text : generation = 2 : 3 : 5 as in Janus-Pro (report, Table 2); the rate is higher
than its 1e-4, as suits a decoder a hundred times smaller that starts from little. Cost and
expected loss on 2 cores: see train/README.md.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_captions, scenes_pictures, scenes_questions, scenes_text
from unimm.training.next_token import next_token, scored_weight

config = Run(
    init="runs/stage1",
    out="runs/stage2",
    step=next_token,
    count=scored_weight,
    train=((r"vision\..*", None), (r".*", 2e-3)),
    optimizer="muon",
    data={
        "captions": Source(scenes_captions, weight=1, options={"store": "runs/store"}),
        "questions": Source(scenes_questions, weight=1, options={"store": "runs/store"}),
        "text": Source(scenes_text, weight=3, options={"world": "scenes"}),
        "pictures": Source(scenes_pictures, weight=5, options={"store": "runs/store"}),
    },
    steps=3_000,
    batch_size=128,
    accumulate=2,
    warmup=50,
    schedule="constant",
    options={"prompts": [], "guidance": 2.0, "code_rows_only": False},
)
