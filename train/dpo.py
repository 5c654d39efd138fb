"""DPO: the model learns to prefer the better of two pictures or answers.

unimm preferences pairs.jsonl --judge checker --scenes 3000 --pairs 2 --hindsight
unimm train train/dpo.py init=runs/scenes/model data.pairs.options.path=pairs.jsonl out=runs/dpo

Everything but the encoder of seen pictures learns, with a next-token term on the chosen answers
(as Emu3 does; at 0.1 and three times the rate they lost 20 nats each, and pictures got worse).
Pairs of edits alone (`--edits 6000 --mended`) leave layouts: options.sampling.layout_from=2.
`steps` is one pass over the 10,000 pairs that come of it; of other pairs give their number / 64. A
second pass learns them by heart. Cost and what it brought: train/README.md.
"""

from unimm.config import Run, Source
from unimm.training.dpo import dpo_step, pair_count, preferences, setup_dpo

config = Run(
    init="unimm/assets/scenes",
    out="runs/dpo",
    setup=setup_dpo,
    step=dpo_step,
    count=pair_count,
    train=((r"vision\..*", None), (r".*", 2e-4)),
    data={"pairs": Source(preferences, options={"path": "pairs.jsonl"})},
    steps=155,
    batch_size=64,
    accumulate=2,
    warmup=20,
    schedule="linear",
    log_every=10,
    options={
        "beta": 0.2,
        "label_smoothing": 0.0,
        "next_token": 3.0,
        "per_slot": False,
        "reference": "cached",
        "lora_rank": 16,
        "prompts": [],
        "guidance": 2.0,
        "sampling": {"layout_from": 0},  # what is drawn is what was preferred: whole pictures
    },
)
