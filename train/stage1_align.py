"""Stage 1: the connector, the code embedding and the image head learn to talk to a frozen decoder.

unimm train train/stage1_align.py init=runs/stage0 out=runs/stage1

Understanding : text : generation = 1 : 0 : 3, rate 1e-3, as in Janus-Pro (report, Table 2).
(The shared pathway has only rows for codes: its stage 1 trains the table and the head, with
options.code_rows_only=True, which leaves the rows of the words alone.) Cost and expected loss on
2 cores: see train/README.md.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_captions, scenes_pictures
from unimm.training.next_token import next_token, scored_weight

config = Run(
    init="runs/stage0",
    out="runs/stage1",
    step=next_token,
    count=scored_weight,
    train=((r"connector\..*|code_(embed|adapter)\..*|image_head\..*", 1e-3), (r".*", None)),
    data={
        "captions": Source(scenes_captions, weight=1, options={"store": "runs/store"}),
        "pictures": Source(scenes_pictures, weight=3, options={"store": "runs/store"}),
    },
    steps=500,
    batch_size=128,
    accumulate=2,
    warmup=10,
    options={"prompts": [], "guidance": 2.0, "code_rows_only": False},
)
