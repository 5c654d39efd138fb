"""The bench on a model of no size: the figures are consistent, the two sides are one model."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from unimm import cli
from unimm.evaluation import bench
from unimm.evaluation.bench_pair import Size
from unimm.inference import stepper

SMALL = Size(64, 2, 2, 96, 128, 64, 64, 32, (32, 1, 2))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "tiny", SMALL)


def test_every_row_has_its_figures(small, tmp_path, capsys):
    out, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    words = "bench draw answer --sizes tiny --dtypes float32 --batches 2 --rounds 1"
    assert (
        cli.main([*words.split(), "--steps", "3", "--json", str(out), "--chart", str(chart)]) == 0
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(r["what"], r.get("part")) for r in rows] == [
        ("draw", "step"), ("draw", "code"), ("answer", "first"), ("answer", "further"),
    ]  # fmt: skip
    for row in rows:
        times = row["transformers"]
        assert set(times) == {f"{c}, {a}" for c in bench.CACHES for a in bench.ATTENTION}
        assert row["best"] == min(times, key=times.get)
        assert row["ratio"] == pytest.approx(times[row["best"]] / row["unimm"])
        assert row["unimm"] > 0 and min(times.values()) > 0
    for row in (rows[0], *rows[2:]):
        assert row["share"] > 0 and row["floor"] == pytest.approx(row["share"] * row["unimm"])
    assert rows[0]["deepseek_ratio"] == pytest.approx(rows[0]["deepseek"] / rows[0]["unimm"])
    assert rows[0]["agreement"] == 1.0
    assert 1 <= rows[1]["codes_a_step"] <= 16
    assert Image.open(chart).size[0] > 500
    assert capsys.readouterr().out.count("tiny") == 4


def test_without_a_kernel_packed_weights_count_and_what_trains_is_not_packed(small, monkeypatch):
    pair = bench.random_pair(SMALL, torch.float32)
    counted = bench.step_bytes(pair, 1, 40)
    monkeypatch.setattr(stepper, "make_kernel", lambda model: None)
    stepper.prepare(pair.engine.model)
    assert bench.step_bytes(pair, 1, 40) == counted
    found = bench.bench(["tiny"], ["float32"], [1], ["draw", "train"], rounds=1, steps=3)
    drawn, _, *trained = found["rows"]
    assert drawn["agreement"] == 1.0 and trained


def test_both_sides_answer_alike_and_draw_alike(small):
    pair = bench.random_pair(SMALL, torch.float32)
    ids = bench.prompts(pair, 2, bench.PROMPT)
    assert bench.agreement(pair, ids, 16) == 1.0
    theirs = bench.their_codes(pair, ids, 16, "dynamic", "sdpa", greedy=True)
    assert bench.deepseek_codes(pair, ids, 16, greedy=True).equal(theirs)
    with torch.no_grad():
        pair.engine.model.code_embed.weight.add_(1)  # the bench would see it
    assert bench.agreement(pair, ids, 16) < 1.0


def test_operations_of_a_first_word_are_those_of_its_products(small):
    """Two for each weight of the decoder and slot, at least, and nothing near twice as many."""
    pair = bench.random_pair(SMALL, torch.float32)
    sample = bench.question(pair)
    weights = sum(p.numel() for p in pair.engine.model.decoder.layers.parameters() if p.ndim == 2)
    with FlopCounterMode(display=False) as counted:
        bench.their_words(pair, sample, 1, "dynamic", "sdpa")
    products = 2 * weights * len(sample)
    assert products < counted.get_total_flops() < 2 * products


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "mid"])
def test_greedy_codes_are_those_of_transformers(name):
    """Every code of a tiny picture, 64 of a mid one, in float32."""
    pair = bench.random_pair(bench.SIZES[name], torch.float32)
    assert bench.agreement(pair, bench.prompts(pair, 1, bench.PROMPT), 64) == 1.0


@pytest.mark.parametrize(
    "words", ["--sizes huge", "--dtypes int3", "sleep", "--rounds 0", "--batches 0"]
)
def test_wrong_words_end_in_one_line(words, capsys):
    assert cli.main(["bench", *words.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
