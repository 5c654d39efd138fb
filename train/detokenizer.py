"""A diffusion de-tokenizer: a flow-matching decoder draws the picture that codes stand for.

unimm train train/detokenizer.py init=runs/image_tokenizer out=runs/detokenizer

The image tokenizer is frozen; previews and the log set its convolutional decoder beside the
diffusion one (PSNR on pictures that training does not see). 0.34 s a step of 32 on one core.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_pictures_only
from unimm.training.flow_matching import flow_matching, pictures, setup_detokenizer

config = Run(
    init="runs/image_tokenizer",
    out="runs/detokenizer",
    setup=setup_detokenizer,
    step=flow_matching,
    count=pictures,
    train=((r"decoder\..*", 2e-3), (r".*", None)),
    optimizer="muon",
    data={"pictures": Source(scenes_pictures_only, options={"store": "runs/store"})},
    steps=4_000,
    batch_size=64,
    warmup=50,
    schedule="cosine",
    options={
        "dim": 192,
        "layers": 6,
        "heads": 6,
        "patch": 8,
        "autoencoder": "",
        "decay": 0.99,
        "previews": 16,
        "sampling_steps": 30,
    },
)
