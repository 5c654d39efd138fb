"""The diffusion baseline: a flow-matching decoder draws what a frozen model makes of the prompt.

unimm train train/diffusion.py init=runs/stage3 out=runs/diffusion

The language model as the condition, in the manner of MetaQuery and BLIP3-o. Its hidden states of
the user turn lead a transformer of 4 M parameters (64 px in 8 px squares); the condition is
dropped for a tenth of the pictures. 0.34 s a step of 32 on one core. To train the language model
too: 'train=(("decoder.*", 1e-3), ("conditioner.decoder.*", 1e-4), (".*", None))'. The result is
the model folder with diffusion_text.safetensors (averaged weights) in it.
"""

from unimm.config import Run, Source
from unimm.data.sources import scenes_pictures
from unimm.training.flow_matching import flow_matching, pictures, setup_diffusion

config = Run(
    init="runs/stage3",
    out="runs/diffusion",
    setup=setup_diffusion,
    step=flow_matching,
    count=pictures,
    train=((r"decoder\..*", 1e-3), (r".*", None)),
    data={"pictures": Source(scenes_pictures, options={"store": "runs/store"})},
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
        "prompts": [],
        "guidance": 2.0,
        "sampling_steps": 30,
    },
)
