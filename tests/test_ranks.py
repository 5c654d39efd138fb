"""Two processes on one machine (gloo) train what one process trains on the same global batch."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from unimm.checkpoints.native import save_model
from unimm.config import load_recipe
from unimm.data.sources import PictureStore
from unimm.training.trainer import train

ROOT = Path(__file__).parent.parent


def stage3(root: Path, out: str):
    """Stage 3 (all kinds of data, uneven lengths) in float32, three steps of twelve samples.

    With AdamW at 6e-4: Muon's iteration is in bfloat16, which enlarges what rounding leaves, and a
    difference is in proportion to the rate.
    """
    config = load_recipe(ROOT / "train/stage3_sft.py").config
    places = {"runs/store": f"{root}/store", "runs/edits": f"{root}/edits", "scenes": "scenes-mini"}
    data = {
        name: dataclasses.replace(
            source, options={k: places.get(v, v) for k, v in source.options.items()}
        )
        for name, source in config.data.items()
    }
    return dataclasses.replace(
        config, init=f"{root}/model", data=data, out=f"{root}/{out}", steps=3, batch_size=12,
        accumulate=2, precision="float32", optimizer="adamw", log_every=1, preview_every=0,
        train=((r"vision\..*", 2e-4), (r".*", 6e-4)),
    )  # fmt: skip


def test_two_ranks_equal_one(tmp_path):
    save_model(tmp_path / "model", *tiny_model(max_positions=1024))
    for name, edited in (("store", False), ("edits", True)):
        store = PictureStore.build(tmp_path / name, "scenes-mini", 24, edited=edited)
        rng = np.random.default_rng(0)
        store.add_codes(lambda pictures, rng=rng: rng.integers(0, 32, (len(pictures), 16)))
    train(stage3(tmp_path, "one"))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*words, "--master-port", "0", "--standalone", __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(tmp_path / "model" / "model.safetensors")
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert apart < 1e-5 < 1e-4 < moved, (apart, moved)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(stage3(Path(sys.argv[1]), "two"))
