"""The diffusion baseline: a flow-matching decoder draws what a frozen model makes of the prompt.

unimm train train/diffusion.py init=runs/stage3 out=runs/diffusion

The language model as the condition, in the manner of MetaQuery and BLIP3-o. Its hidden states of
the user turn lead a transformer of 4 M parameters; the condition is dropped for a tenth of the
pictures. The flow ends in the vectors of the model's own image tokenizer, a token a code; in pixels
with options.autoencoder="" options.patch=8, in the latents of diffusers with a folder. The language
model learns too with 'train=(("decoder.*", 2e-3), ("conditioner.decoder.*", 1e-4), (".*", None))'.
The result is the model folder with diffusion_text.safetensors (averaged weights) in it.
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
    train=((r"decoder\..*", 2e-3), (r".*", None)),
    optimizer="muon",
    data={"pictures": Source(scenes_pictures, options={"store": "runs/store"})},
    steps=4_000,
    batch_size=64,
    warmup=50,
    schedule="cosine",
    options={
        "dim": 192,
        "layers": 6,
        "heads": 6,
        "patch": 1,
        "autoencoder": "codes",
        "decay": 0.99,
        "prompts": [],
        "guidance": 2.0,
        "sampling_steps": 30,
    },
)
