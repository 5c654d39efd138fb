"""An image tokenizer for your own pictures: a folder, an index, or tar shards.

unimm train tokenizers/train_own_image.py data.mine.path=INDEX.jsonl init=scenes out=runs/own_image
unimm convert unimm/assets/scenes runs/base --to unimm
cp runs/own_image/image_tokenizer.* runs/base/
unimm train train/finetune.py data.mine.path=INDEX.jsonl init=runs/base out=runs/mine

The bundled image tokenizer has only seen Scenes. One of the same size can take its place in a model
folder, which then learns to draw with the new codes. With init=scenes (or another folder) it goes
on from what is known, else it begins anew. A tenth of the pictures is held out: previews and their
PSNR are of these. image_size and codebook_size are those of the bundled model; a new model takes
others.
"""

from dataclasses import replace
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.readers import pictures

scenes = load_recipe(Path(__file__).with_name("train_image.py")).config

config = replace(
    scenes,
    out="runs/own_image",
    data={"mine": Source(pictures, options={"path": ""})},
)
