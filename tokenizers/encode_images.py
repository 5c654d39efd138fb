"""Pictures into codes, once: training on them then reads codes in the place of pixels.

unimm train tokenizers/encode_images.py source=PICTURES/ out=CODES/ model=runs/mine
unimm train train/finetune.py data.mine.path=PICTURES/ data.mine.codes=CODES/ init=runs/mine

source: a folder, an index (.jsonl, .csv, .parquet; image=COLUMN) or tar shards ("data/*.tar").
Several processes: part=0 parts=4 and so on, or torchrun. Stopped, it goes on where it was, with
any number of processes. What cannot be read is named and left out.
"""

import os
from pathlib import Path

from unimm.checkpoints.native import BUNDLED
from unimm.data.codes import encode_pictures, made_by
from unimm.data.readers import list_pictures
from unimm.pipeline import UniMM


def main(
    source: str = "",
    out: str = "",
    model: str = "scenes",
    image: str = "file",
    shard: int = 1024,
    part: int = int(os.environ.get("RANK", 0)),
    parts: int = int(os.environ.get("WORLD_SIZE", 1)),
    device: str = "auto",
) -> str:
    """Make the shards that are not there yet; returns what to print."""
    if not source or not out:
        raise ValueError("say what to encode and where to: source=PICTURES/ out=CODES/")
    if not 0 <= part < parts or shard < 1:
        raise ValueError("part counts from 0 and is below parts, and shard is 1 or more")
    folder = BUNDLED if model == "scenes" else Path(model)
    processor = UniMM.from_pretrained(folder, device).processor
    pictures = list_pictures(source, image)
    done, wrong = encode_pictures(
        pictures, processor, Path(out), made_by(folder), shard, part, parts
    )
    return "\n".join([*wrong, f"{done} of {len(pictures)} pictures encoded here, in {out}"])
