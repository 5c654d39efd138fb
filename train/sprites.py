"""A model of your own cut-outs: it draws them, names them and puts two beside each other.

unimm train train/sprite_pictures.py index=emoji/index.jsonl out=runs/sprites
unimm train tokenizers/train_own_image.py data.mine.path=runs/sprites/train/index.jsonl \\
    init=scenes steps=1500 out=runs/sprites/image
unimm convert unimm/assets/scenes runs/sprites/base --to unimm
cp runs/sprites/image/image_tokenizer.* runs/sprites/base/
unimm train tokenizers/encode_images.py source=runs/sprites/train/index.jsonl \\
    model=runs/sprites/base out=runs/sprites/codes
unimm train train/sprites.py out=runs/sprites/model

It begins with the bundled model, which knows "left of" and "above". Each sprite, large, is learned
by heart; so most samples are of these, drawn and named. Cost and what came: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.readers import captions, messages

FOLDER = "runs/sprites"


def pictures(name: str, task: str, text: str, weight: float) -> Source:
    """To draw or to describe the pictures of an index that sprite_pictures.py has made."""
    options = {"path": f"{FOLDER}/train/{name}.jsonl", "text": text, "task": task}
    if task == "draw":
        options["codes"] = f"{FOLDER}/codes"
    return Source(captions, weight=weight, options=options)


finetune = load_recipe(Path(__file__).with_name("finetune.py")).config
greedy = {"temperature": 0.0, "guidance": 1.5}  # what is known by heart has one right code
config = dataclasses.replace(
    finetune,
    init=f"{FOLDER}/base",
    out=f"{FOLDER}/model",
    train=((r"vision\..*", 1e-3), (r".*", 2e-3)),
    optimizer="muon",
    kind_weights={"text": 2.0, "code": 1.0},
    data={
        "one": pictures("one", "draw", "prompt", 5),
        "few": pictures("few", "draw", "prompt", 2),
        "named": pictures("one", "describe", "caption", 2),
        "described": pictures("few", "describe", "caption", 1),
        "questions": Source(
            messages, weight=0.7, options={"path": f"{FOLDER}/train/questions.jsonl"}
        ),
    },
    steps=900,
    accumulate=1,
    packing=256,
    warmup=10,
    schedule="linear",
    compile=True,
    options={**finetune.options, "sampling": {**finetune.options["sampling"], **greedy}},
)
