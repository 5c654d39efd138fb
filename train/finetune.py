"""Fine-tuning on your own pictures: an index, a folder, tar shards, or messages.

unimm train train/finetune.py data.mine.path=INDEX.jsonl init=scenes out=runs/mine
unimm train train/finetune.py data.mine.path=PICTURES/ data.mine.task=draw out=runs/mine
unimm data check INDEX.jsonl                                       # first, what is wrong

INDEX has a picture ("file") and its text a row; data.mine.image and data.mine.text name other
columns, or a form of several ("a {style} picture of {name}"). A tenth of the rows is held out and
its loss reported (data.mine.keep, data.mine.keep_by); previews draw and describe eight of them, and
what options.prompts says. Other readers: unimm/data/readers.py.
"""

from unimm.config import Run, Source
from unimm.data.readers import own
from unimm.training.next_token import next_token, scored_weight

config = Run(
    init="scenes",
    out="runs/finetune",
    step=next_token,
    count=scored_weight,
    train=((r"vision\..*", 1e-4), (r".*", 3e-4)),
    data={"mine": Source(own, options={"path": "", "keep": 0.1})},
    steps=1_000,
    batch_size=64,
    accumulate=2,
    warmup=50,
    schedule="cosine",
    preview_every=100,
    options={
        "prompts": [],
        "previews": 8,
        "guidance": 2.0,
        "code_rows_only": False,
        # What is of Scenes:
        "sampling": {"plain": False, "edit_located": False, "layout_from": 0, "look_first": False},
    },
)
