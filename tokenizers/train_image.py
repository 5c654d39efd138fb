"""The image tokenizer of Scenes: pictures of 64 px as 8 x 8 codes of 1,024.

unimm train tokenizers/train_image.py out=runs/image_tokenizer data.pictures.options.store=STORE

STORE is a folder that `PictureStore.build` made. 0.23 s a step on one core at its quietest.
Reached, one seed: PSNR 31.7 dB, SSIM 0.956, 86 % of the codes in use, perplexity 351 (pictures of
the training store, before some were kept for validation); on 1,000 new
scenes the checker finds every object of 95.5 % of the reconstructions as it was. 1.9 M parameters.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_pictures_only
from unimm.training.image_tokenizer import image_tokenizer_step, setup_image_tokenizer

config = Run(
    out="runs/image_tokenizer",
    setup=setup_image_tokenizer,
    step=image_tokenizer_step,
    # The rows of the codebook are moving averages. The PatchGAN discriminator is off by default:
    # options.adversarial=0.5 options.adversarial_start=2000 puts it in.
    train={
        "main": ((r"tokenizer\.quantize\..*|discriminator\..*", None), (r".*", 1e-3)),
        "discriminator": ((r"discriminator\..*", 5e-4), (r".*", None)),
    },
    data={"pictures": Source(scenes_pictures_only, options={"store": "runs/store"})},
    steps=4_000,
    batch_size=32,
    warmup=50,
    schedule="linear",
    options={
        "image_size": 64,
        "codebook_size": 1024,
        "code_dim": 8,
        "z_channels": 64,
        "base_channels": 32,
        "multipliers": (1, 2, 4),
        "res_blocks": 1,
        "quantizer": "vq",
        "norm": "rms",
        "attention": False,
        "patch": 2,
        "local": True,
        "l1": 0.3,
        "l2": 3.0,
        "decay": 0.97,
        "dead_code": 0.1,
        "adversarial": 0.0,
        "adversarial_start": 0,
    },
)
