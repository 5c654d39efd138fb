"""The SigLIP encoder, from nothing: pictures and complete captions of Scenes agree or do not.

unimm train train/siglip.py options.text_tokenizer=runs/text/tokenizer.json out=runs/siglip

64 px pictures give 64 features of width 192. Eight pairs in a row differ in the shape of one object
alone (`variants`): without such negatives colours and numbers tell a batch apart, and shapes are
hardly learned. Cost: 0.75 s a step of 256 pairs on two cores, a process each (bf16, compiled).
The log shows retrieval among 512 pairs (chance: 0.2 %); figures reached are in train/README.md.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_pairs
from unimm.training.contrastive import contrastive_step, setup_contrastive

config = Run(
    out="runs/siglip",
    setup=setup_contrastive,
    step=contrastive_step,
    train=((r"log_scale|bias", 1e-2), (r".*", 1e-3)),
    optimizer="muon",
    data={
        "pairs": Source(
            scenes_pairs, options={"store": "runs/store", "variants": 8, "world": "scenes"}
        )
    },
    steps=1_500,
    batch_size=256,
    warmup=100,
    schedule="linear",
    weight_decay=0.05,
    options={
        "text_tokenizer": "runs/text/tokenizer.json",
        "vision": {
            "dim": 192,
            "layers": 6,
            "heads": 3,
            "hidden": 512,
            "image_size": 64,
            "patch_size": 8,
        },
        "text_dim": 192,
        "text_layers": 2,
        "text_heads": 3,
        "embed_dim": 192,
        "previews": 512,
    },
)
