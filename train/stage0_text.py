"""Stage 0: the decoder learns the language of Scenes from text alone.

unimm train train/stage0_text.py init=runs/pieces out=runs/stage0

Janus starts from a language model; aligning to a random decoder would align to noise. Only the
decoder and its text head learn. Cost and expected loss on 2 cores: see train/README.md.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_text
from unimm.training.next_token import next_token, scored_weight

config = Run(
    init="runs/pieces",
    out="runs/stage0",
    step=next_token,
    count=scored_weight,
    train=((r"decoder\..*|text_head\..*", 2e-3), (r".*", None)),
    data={"text": Source(scenes_text, options={"world": "scenes"})},
    steps=1_000,
    batch_size=128,
    accumulate=2,
    warmup=30,
    schedule="cosine",
    options={"prompts": [], "guidance": 2.0, "code_rows_only": False},
)
