"""What a dry run says of a run, and that it leaves nothing."""

import dataclasses
import re

import pytest
import torch
from conftest import tiny_model
from test_resume import run_for
from torch import nn

from unimm.checkpoints.native import load_model, save_model
from unimm.cli import main
from unimm.training.cost import activations, dry_run, one_step
from unimm.training.next_token import setup_unified
from unimm.training.trainer import Parts, Piece


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    save_model(folder / "model", *tiny_model())
    return folder


def test_a_dry_run_says_what_a_run_costs_and_leaves_nothing(root, capsys):
    run = run_for(root, "none", train=((r"vision\..*", None), (r".*", 1e-3)), steps=120)
    text = dry_run(run)
    print(text)
    model = load_model(root / "model")[0]
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.vision.parameters())
    assert f"{total:,}, of which {total - frozen:,} trained and {frozen:,} frozen" in text
    assert f"vision {frozen:,}: frozen" in text and "rate 0.001" in text
    parts = setup_unified(run)
    slots = sum(piece.slots for piece in one_step(parts, run))
    assert f"8 samples in 2 pieces, {slots:,} tokens that fill" in text
    weights = float(re.search(r"weights ([\d.]+) KiB", text)[1])
    moments = float(re.search(r"optimizer ([\d.]+) KiB", text)[1])
    assert weights == pytest.approx(4 * total / 1024, rel=0.01)
    assert moments == pytest.approx(8 * (total - frozen) / 1024, rel=0.01)
    flops, whole = map(
        float, re.search(r"compute: (\S+) FLOPs a step, (\S+) in 120", text).groups()
    )
    assert whole == pytest.approx(120 * flops, rel=0.01) and flops > 4 * slots * 1e4
    assert re.search(r"time: [\d.e-]+ s a step, [\d,]+ tokens a second", text)
    assert not (root / "none").exists()


def test_frozen_layers_cost_less(root):
    every = run_for(root, "none")
    heads = run_for(root, "none", train=((r".*_head\..*", 1e-3), (r".*", None)))
    from unimm.training.cost import sample_flops

    assert sample_flops(heads) < 0.7 * sample_flops(every)


def test_the_products_of_muon_are_counted(root):
    """Five iterations for each matrix (m, n), m the shorter: X X^T, its square, times X."""
    from unimm.training.cost import sample_flops

    matrices = ((r"decoder\.layers\..*", 1e-3), (r".*", None))
    adamw = run_for(root, "none", train=matrices)
    muon = dataclasses.replace(adamw, optimizer="muon")
    sides = [
        sorted(p.shape)
        for n, p in load_model(root / "model")[0].named_parameters()
        if n.startswith("decoder.layers.") and p.ndim == 2
    ]
    assert len(sides) > 5
    expected = sum(5 * 2 * (2 * m * m * n + m**3) for m, n in sides)
    extra = (sample_flops(muon) - sample_flops(adamw)) * adamw.batch_size
    assert extra == pytest.approx(expected, rel=1e-6)


def test_what_a_forward_holds(root):
    """A linear layer holds its input, and tanh what comes out of it: by hand."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    parts = Parts(model, torch.stack)

    def step(model, batch, total, run):
        yield "main", model(batch).sum(), {}

    run = dataclasses.replace(run_for(root, "none"), step=step)
    piece = Piece(torch.zeros(10, 4), [], 0, 0)
    assert activations(parts, run, piece) == 4 * (10 * 4 + 10 * 8)


def test_on_the_command_line(root, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        '"""A run."""\nfrom pathlib import Path\nfrom test_resume import run_for\n'
        f"config = run_for({str(root)!r}, 'none')\n"
    )
    assert main(["train", str(recipe), "--dry-run", "steps=7"]) == 0
    assert "in 7 steps" in capsys.readouterr().out and not (root / "none").exists()
    recipe.write_text('"""Several."""\ndef main(size="quick"):\n    pass\n')
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert "no one cost" in capsys.readouterr().err
