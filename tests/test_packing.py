"""Packing, chunked cross-entropy and recomputation change what a step costs, not what it learns."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_resume import run_for

from unimm.checkpoints.native import save_model
from unimm.data.packing import collate_packed, pack
from unimm.data.processor import assistant, user
from unimm.model import unified
from unimm.training.trainer import train

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 255, (16, 16, 3), np.uint8)
TALKS = [
    [user("draw it"), assistant({"codes": RNG.integers(0, 32, 16)})],
    [user(PICTURE, "what is this?"), assistant("a picture of noise")],
    [user("one"), assistant("two"), user("three"), assistant("four")],
    [user(PICTURE), assistant("x", {"codes": RNG.integers(0, 32, 16)}), user("?"), assistant("y")],
    [user("?"), assistant("!")],
]


def gradients(model, batch, total):
    model.zero_grad()
    output = model(batch, {"text": 2.0, "code": 1.0}, total)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, found


def apart(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_rows_are_filled_and_hold_every_item_once():
    rng = np.random.default_rng(1)
    sizes = rng.integers(5, 90, 200).tolist()
    rows = pack(sizes, 128)
    assert sorted(k for row in rows for k in row) == list(range(200))
    lengths = [sum(sizes[k] for k in row) for row in rows]
    assert max(lengths) <= 128 and sum(sizes) / (128 * len(rows)) > 0.95
    assert pack([200, 10, 20], 128) == [[0], [2, 1]] and pack([], 128) == []


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("pathway", ["decoupled", "shared"])
def test_a_packed_batch_has_the_losses_of_its_samples(pathway, grouped):
    model, processor = tiny_model(pathway, kv_heads=2 if grouped else 4)
    samples = [processor.encode(talk) for talk in TALKS]
    order = [3, 0, 4, 1, 2]
    packed = collate_packed([[samples[k] for k in order[:3]], [samples[1], samples[2]]], processor)
    lengths = [len(samples[k]) for k in order]
    begun = [place for length in lengths[:3] for place in range(length)]
    assert packed.positions[0, : len(begun)].tolist() == begun  # rotary attention would not tell
    plain = processor.collate([samples[k] for k in order])
    model.train()
    total = plain.weight({"text": 2.0, "code": 1.0})
    assert packed.weight({"text": 2.0, "code": 1.0}) == total
    a, of_plain = gradients(model, plain, total)
    b, of_packed = gradients(model, packed, total)
    assert float(a.loss.detach()) == pytest.approx(float(b.loss.detach()), rel=1e-6)
    assert torch.allclose(a.log_probs, b.log_probs, rtol=1e-6, atol=1e-5)
    for name in ("text", "code"):
        assert a.nats[name] == pytest.approx(b.nats[name], rel=1e-6)
    assert of_plain.keys() == of_packed.keys() and apart(of_plain, of_packed) < 1e-5
    # and the first slot of a packed sample is not predicted from the one before it
    samples[0].score[0] = 1.0
    assert collate_packed([[samples[1], samples[0]]], processor).score.sum() == (
        samples[0].score[1:].sum() + samples[1].score.sum()
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    save_model(folder / "model", *tiny_model())
    return folder


def trained(root, name, **changes):
    settings = dict(steps=4, log_every=1, save_every=0, preview_every=0, warmup=1, **changes)
    out = train(run_for(root, name, **settings))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return load_file(out / "model.safetensors"), log


def test_a_packed_run_is_the_run_without(root):
    _, one = trained(root, "plain")
    _, two = trained(root, "packed", packing=256)
    for a, b in zip(one, two, strict=True):
        for key in ("main_loss", "text_nats", "code_nats", "draw_nats", "see_nats", "broken_nats"):
            assert a[key] == pytest.approx(b[key], rel=2e-5), key
        assert a["fill"] < 0.96 < b["fill"]  # padded rows, and two rows of eight samples
    run = run_for(root, "no", packing=64)

    def without(run):
        from unimm.training.next_token import setup_unified

        return dataclasses.replace(setup_unified(run), pack=None)

    with pytest.raises(ValueError, match="cannot pack"):
        train(dataclasses.replace(run, setup=without))


def test_sources_add_up_to_the_kinds(root):
    _, log = trained(root, "sources")
    for entry in log:
        by_source = [entry[f"{name}_nats"] for name in ("draw", "see", "broken")]
        assert all(2 < nats < 20 for nats in by_source)
    # one source: its loss is that of the kinds together
    from test_resume import talks

    from unimm.config import Source

    one = {"see": Source(talks, 1.0, {"kind": "see"}), "off": Source(talks, 0.0, {"kind": "draw"})}
    _, log = trained(root, "one", data=one)
    assert all(x["see_nats"] == pytest.approx(x["text_nats"], rel=1e-4) for x in log)


@pytest.mark.parametrize("pathway", ["decoupled", "shared"])
def test_logits_in_parts_are_those_in_one(pathway, monkeypatch):
    model, processor = tiny_model(pathway)
    batch = processor.collate([processor.encode(talk) for talk in TALKS])
    model.train()
    seen = []
    head = model.text_head.register_forward_hook(lambda m, i, o: seen.append(o.numel()))
    a, whole = gradients(model, batch, 7.0)
    one = max(seen)
    seen.clear()
    monkeypatch.setattr(unified, "LOGITS_AT_ONCE", 1000)
    b, parts = gradients(model, batch, 7.0)
    head.remove()
    assert max(seen) <= 1000 < one
    assert float(a.loss.detach()) == pytest.approx(float(b.loss.detach()), rel=1e-6)
    assert torch.allclose(a.log_probs, b.log_probs, rtol=1e-6)
    assert whole.keys() == parts.keys() and apart(whole, parts) < 1e-5


def test_recomputed_layers_hold_less_and_learn_the_same(root):
    from torch.autograd.graph import saved_tensors_hooks

    model, processor = tiny_model(dropout=0.3)
    batch = processor.collate([processor.encode(talk) for talk in TALKS])
    model.train()
    found, held = [], []
    for again in (False, True):
        for layer in model.decoder.layers:
            layer.recompute = again
        sizes = []
        torch.manual_seed(5)

        def hold(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(hold, lambda tensor: tensor):
            found.append(gradients(model, batch, 7.0)[1])
        held.append(sum(sizes))
    assert apart(*found) == 0  # dropout too
    assert held[1] < 0.7 * held[0], held
    a, b = (trained(root, f"again{k}", recompute=k)[0] for k in (False, True))
    assert apart(a, b) < 1e-6
