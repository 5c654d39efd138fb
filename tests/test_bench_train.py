"""The training rows of the bench on a model of no size: consistent figures of one loss."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from unimm import cli
from unimm.evaluation import bench, bench_train
from unimm.evaluation.bench_clock import alternate
from unimm.evaluation.bench_pair import ATTENTION, Size, random_pair
from unimm.model import unified

SMALL = Size(64, 2, 2, 96, 128, 64, 64, 32, (32, 1, 2))
WAYS = {part: [f"{part}, {attention}" for attention in ATTENTION] for part in ("packed", "padded")}


@pytest.fixture
def pair():
    return random_pair(SMALL, torch.float32)


def test_rows_have_speeds_memory_and_equal_losses(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.SIZES, "tiny", SMALL)
    out, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    words = "bench train --sizes tiny --rounds 1"
    assert cli.main([*words.split(), "--json", str(out), "--chart", str(chart)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["what"], r["dtype"], r["part"]) for r in rows] == [
        ("train", dtype, part) for dtype in ("float32", "bfloat16") for part in ("packed", "padded")
    ]
    for row in rows:
        packed = row["part"] == "packed"
        assert set(row["transformers"]) == {*WAYS["padded"], *(WAYS["packed"] if packed else [])}
        speeds = row["tokens_per_second"]
        assert row["ratio"] == pytest.approx(speeds["unimm"] / speeds["transformers"])
        assert speeds["unimm"] == pytest.approx(row["tokens"] / row["unimm"] * 1e3)
        assert row["share"] == pytest.approx(row["floor"] / row["unimm"]) and row["floor"] > 0
        assert set(row["losses"]) == {"packed", "padded", *WAYS["packed"], *WAYS["padded"]}
        near = 1e-4 if row["dtype"] == "float32" else 1e-2
        assert list(row["losses"].values()) == [pytest.approx(row["losses"]["packed"], near)] * 6
    for packed, padded in (rows[:2], rows[2:]):
        assert packed["tokens"] == padded["tokens"] <= packed["slots"] < padded["slots"]
        over = packed["over_padded"]
        assert over["unimm"]["ratio"] == pytest.approx(padded["unimm"] / packed["unimm"])
        best = padded["transformers"][padded["best"]]
        assert over["transformers"]["ratio"] == pytest.approx(best / packed["unimm"])
    assert Image.open(chart).size[0] > 500
    assert capsys.readouterr().out.count("tokens/s") == 4


def test_all_ways_are_one_loss(pair):
    row = bench_train.train(pair, 1, 1, 1)[0]
    assert row["apart"]["loss"] < 1e-5 and row["apart"]["gradient"] < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_see_each_other_are_refused(pair, monkeypatch, dtype):
    def causal(segment):
        size = segment.shape[1]
        return torch.ones(len(segment), 1, size, size, dtype=torch.bool).tril()

    monkeypatch.setattr(unified, "block_mask", causal)
    with pytest.raises(ValueError, match="do not train alike"):
        bench_train.train(replace(pair, dtype=dtype), 1, 1, 1)


def test_other_weights_are_refused(pair):
    with torch.no_grad():
        pair.engine.model.text_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="do not train alike"):
        bench_train.train(pair, 1, 1, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to set back")
def test_memory_is_what_a_turn_needs_whatever_came_before():
    """Small pieces stay with the allocator: a turn that reuses them would seem to need none."""
    kept = []

    def turn(count):
        pieces = [torch.ones(2**14) for _ in range(count * 16)]  # 64 KiB each
        kept.append(pieces[-1])  # the heap cannot shrink below it
        return [1.0]

    _, memory = alternate({"large": lambda: turn(64), "small": lambda: turn(32)}, 1)
    assert memory["large"] / 2**20 == pytest.approx(64, abs=8)
    assert memory["small"] / 2**20 == pytest.approx(32, abs=8)
