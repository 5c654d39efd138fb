"""Two processes on one machine (gloo) train what one process trains on the same global batch.

Whole in each (DDP) or in parts (FSDP2), and each goes on from what the other has begun.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from unimm.checkpoints.native import load_model, save_model
from unimm.config import Source, load_recipe
from unimm.data.codes import encoder
from unimm.data.processor import assistant, user
from unimm.data.stores import PictureStore
from unimm.data.streams import Stream
from unimm.training import state, trainer
from unimm.training.trainer import train

ROOT = Path(__file__).parent.parent
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --master-port 0 --standalone".split(),
    # not with --cpu, with which accelerate starts one process whatever --num_processes says
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2".split()
    + ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    + ["--num_machines", "1"],
}
pytestmark = pytest.mark.timeout(1500)  # all of it is in the fixture


def stage3(root: Path, out: str, **changes):
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
    settings = dict(
        init=f"{root}/model", data=data, out=f"{root}/{out}", steps=3, batch_size=12,
        accumulate=2, precision="float32", optimizer="adamw", log_every=1, preview_every=0,
        train=((r"vision\..*", 2e-4), (r".*", 6e-4)), save_every=2,
    )  # fmt: skip
    return dataclasses.replace(config, **{**settings, **changes})


def stopped(run, step=2):
    """Train and leave when the checkpoint of `step` is written."""

    class Stop(Exception):
        pass

    def save(*args, save=state.save_checkpoint):
        save(*args)
        if args[3]["step"] == step:
            raise Stop

    trainer.save_checkpoint = save
    with contextlib.suppress(Stop):
        train(run)
    trainer.save_checkpoint = state.save_checkpoint


def streamed(run):
    """Rows of uneven shards, in one direction."""
    shards = [partial(map, str, range(100 * s, 100 * s + size)) for s, size in enumerate((3, 5, 4))]
    talk = lambda row, rng: {"messages": [user(row), assistant(row[::-1])]}  # noqa: E731
    return Stream(run.seed, shards, talk, lambda row: False, block=2)


def without_rounding():
    """torch's Muon with its iteration in the gradient's own precision: in bfloat16 it makes of a
    last bit, which two processes add up otherwise, several per cent of a step."""

    def orthogonal(grad, coefficients, steps, eps):
        a, b, c = coefficients
        x = grad if len(grad) <= grad.shape[1] else grad.T
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return x if len(grad) <= grad.shape[1] else x.T

    return mock.patch("torch.optim._muon._zeropower_via_newtonschulz", orthogonal)


def runs_of_two(root: Path):
    """What two processes do: in DDP, sharded, sharded with all else that changes no loss, and
    half of a run each way."""
    train(stage3(root, "ddp"))
    train(stage3(root, "sharded", shard=True))
    train(stage3(root, "all", shard=True, recompute=True, packing=512, accumulate=3))
    train(stage3(root, "lora", lora=4))
    train(stage3(root, "half", shard=True, precision="bf16"))
    stopped(stage3(root, "sharded-then-one", shard=True))
    stopped(stage3(root, "ddp-then-one"))
    train(stage3(root, "one-then-sharded", shard=True))
    train(stage3(root, "one-then-ddp"))
    with without_rounding():
        train(stage3(root, "muon-sharded", shard=True, optimizer="muon", batch_size=24))
    rows = {"rows": Source(streamed)}
    train(stage3(root, "streamed", data=rows, steps=5))
    stopped(stage3(root, "streamed-again", data=rows, steps=5, save_every=3), step=3)
    train(stage3(root, "streamed-again", data=rows, steps=5))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder with the runs of one process and of two."""
    root = tmp_path_factory.mktemp("ranks")
    save_model(root / "model", *tiny_model(max_positions=1024))
    for name, edited in (("store", False), ("edits", True)):
        store = PictureStore.build(root / name, "scenes-mini", 24, edited=edited)
        store.add_codes(encoder(load_model(root / "model")[1]))
    train(stage3(root, "one"))
    with without_rounding():
        train(stage3(root, "muon", optimizer="muon", batch_size=24))
    train(stage3(root, "lora-one", lora=4))
    train(stage3(root, "half-one", precision="bf16"))
    for name in ("one-then-sharded", "one-then-ddp"):
        stopped(stage3(root, name))
    for launcher, words in LAUNCHERS.items():
        run = subprocess.run(
            [sys.executable, "-m", *words, __file__, str(root), launcher],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    for name in ("sharded-then-one", "ddp-then-one"):
        train(stage3(root, name))
    return root


@pytest.mark.parametrize(
    "name",
    ["accelerate", "ddp", "sharded", "all", "sharded-then-one", "ddp-then-one", "one-then-sharded",
     "one-then-ddp"],
)  # fmt: skip
def test_two_ranks_equal_one(done, name):
    one, two = (load_file(done / n / "model.safetensors") for n in ("one", name))
    start = load_file(done / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    apart = max(float((one[key] - two[key]).abs().max()) for key in one)
    moved = max(float((one[key] - start[key]).abs().max()) for key in one)
    assert apart < (1e-4 if name == "all" else 1e-5) and moved > 5e-4, (apart, moved)
    logs = [
        [json.loads(line) for line in (done / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", name)
    ]
    assert [x["step"] for x in logs[0]] == [x["step"] for x in logs[1]] == [1, 2, 3]
    for a, b in zip(*logs, strict=True):
        for key in ("main_loss", "text_nats", "code_nats", "main_gradient", "edits_nats"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


def test_adapters_of_two_ranks_equal_those_of_one(done):
    start = load_file(done / "model" / "model.safetensors")
    one, two = (load_file(done / n / "model.safetensors") for n in ("lora-one", "lora"))
    name = "decoder.layers.0.self_attn.q_proj.weight"
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
    assert float((one[name] - start[name]).abs().max()) > 1e-5
    assert np.linalg.matrix_rank((one[name] - start[name]).numpy(), tol=1e-6) <= 4


def test_losses_in_bfloat16_are_those_of_one_process(done):
    one, two = (
        [json.loads(line) for line in (done / n / "log.jsonl").read_text().splitlines()]
        for n in ("half-one", "half")
    )
    exact = [json.loads(line) for line in (done / "one/log.jsonl").read_text().splitlines()]
    for key in ("main_loss", "text_nats", "code_nats"):
        values = [[line[key] for line in log] for log in (one, two, exact)]
        assert values[1] == pytest.approx(values[0], rel=3e-3), key
        assert values[0] != values[2] and values[0] == pytest.approx(values[2], rel=3e-2), key


def test_each_rank_has_random_numbers_of_its_own(done):
    """Seen in a checkpoint of two by `main` below; masks of dropout would else be equal."""
    assert json.loads((done / "drawn.json").read_text()) == {"rank 1 differs": True}


def test_muon_works_on_shards(done):
    start = load_file(done / "model" / "model.safetensors")
    one, two = (load_file(done / n / "model.safetensors") for n in ("muon", "muon-sharded"))
    for key in start:
        if ".layers." in key and start[key].ndim == 2:
            apart, moved = (
                float((one[key] - two[key]).norm()),
                float((one[key] - start[key]).norm()),
            )
            assert 0 < moved and apart < 0.001 * moved, (key, apart / moved)


def test_each_rank_goes_on_with_its_own_part_of_a_stream(done):
    whole, again = (
        load_file(done / name / "model.safetensors") for name in ("streamed", "streamed-again")
    )
    assert whole and all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_sharded_checkpoint_is_in_parts(done):
    """Seen while it was there, by `main` below."""
    names = (done / "sharded-then-one.txt").read_text().split()
    assert sum(name.startswith("shard-") for name in names) == 2
    assert "random-1.safetensors" in names and "model.safetensors" not in names


if __name__ == "__main__":
    torch.set_num_threads(1)
    state.to_disk = lambda path: None
    where, launcher = Path(sys.argv[1]), sys.argv[2]
    assert os.environ["WORLD_SIZE"] == "2"
    if launcher == "accelerate":
        train(stage3(where, "accelerate"))
    else:
        runs_of_two(where)
    if launcher == "torchrun" and os.environ["RANK"] == "0":
        both = [where / "ddp-then-one/checkpoint-2" / state.random_name(rank) for rank in (0, 1)]
        drawn = [load_file(path) for path in both]
        apart = any(not torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
        (where / "drawn.json").write_text(json.dumps({"rank 1 differs": apart}))
        found = (where / "sharded-then-one" / "checkpoint-2").rglob("*")
        (where / "sharded-then-one.txt").write_text("\n".join(path.name for path in found))
