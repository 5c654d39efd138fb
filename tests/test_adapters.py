"""Adapters in any run: they alone learn, at the rates of what they change; merged or kept apart."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_resume import run_for, same, stopped_after
from torch.autograd.graph import saved_tensors_hooks

from unimm import UniMM, cli
from unimm.checkpoints.adapters import merge_adapters, merged_copy
from unimm.checkpoints.native import load_model, save_model
from unimm.data.processor import assistant, user
from unimm.model.int8 import is_quantized, quantize_decoder
from unimm.training import trainer
from unimm.training.next_token import open_init, setup_unified
from unimm.training.previews import draw
from unimm.training.trainer import make_optimizers, train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_model(folder / "model", *tiny_model(dropout=0.2))
    return folder


def lora(root, out, **changes):
    rates = ((r"vision\..*", None), (r"connector\..*", 3e-2), (r".*", 1e-2))
    return run_for(root, out, **{"lora": 4, "train": rates, **changes})


def test_adapters_alone_learn_at_the_rates_of_their_weights(root):
    run = lora(root, "none")
    torch.manual_seed(0)
    model = setup_unified(run).model
    optimizer = make_optimizers(model, run)["main"]
    rates = {id(p): g["rate"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: rates.get(id(p)) for name, p in model.named_parameters()}
    assert all(("lora_" in name) == (rate is not None) for name, rate in found.items())
    parts = {name.split(".")[0] for name, rate in found.items() if rate}
    assert parts == {
        "decoder", "connector", "code_embed", "code_adapter", "image_head", "text_head",
    }  # fmt: skip
    assert {rate for name, rate in found.items() if rate and "connector" in name} == {3e-2}
    assert {rate for name, rate in found.items() if rate and "connector" not in name} == {1e-2}
    only = lora(root, "none", train=((r"image_head\..*", 1e-2), (r".*", None)))
    model = setup_unified(only).model
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.split(".")[0] for name in names} == {"image_head"}
    with pytest.raises(ValueError, match="nothing to adapt"):
        setup_unified(lora(root, "none", train=((r".*norm.*", 1e-2), (r".*", None))))


def test_merged_and_kept_apart_are_one_model_that_has_learned(root, monkeypatch):
    merged = train(lora(root, "merged", steps=10, save_every=0))
    apart = train(lora(root, "apart", steps=10, save_every=0, lora_merge=False))
    start, end = (load_file(f / "model.safetensors") for f in (root / "model", merged))
    assert start.keys() == end.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert "code_embed.weight" in moved and "decoder.layers.0.mlp.up_proj.weight" in moved
    assert not any("vision" in name or "norm" in name for name in moved)
    log = [json.loads(line) for line in (merged / "log.jsonl").read_text().splitlines()]
    log = [entry["main_loss"] for entry in log if "main_loss" in entry]
    assert log[-1] < log[0] - 0.1
    assert not (apart / "model.safetensors").exists()
    assert sum(f.stat().st_size for f in apart.glob("adapter*")) < 200_000
    model, processor, _ = open_init(run_for(root, "none", init=str(apart)))
    again = dict(model.state_dict())
    assert again.keys() == end.keys() | {n for n in again if n not in end}
    assert all(torch.allclose(again[name], end[name], atol=1e-7) for name in end)
    one = draw(load_model(merged)[0], processor, ["abc", "d"], 2.0)
    assert torch.equal(one, draw(model.eval(), processor, ["abc", "d"], 2.0))
    with torch.no_grad():  # kept apart they are a model that draws, and that can be converted
        loaded = UniMM.from_pretrained(apart)
    assert np.array_equal(loaded.generate("abc"), UniMM.from_pretrained(merged).generate("abc"))
    assert cli.main(["info", str(apart)]) == 0
    assert cli.main(["convert", str(apart), str(root / "converted"), "--to", "unimm"]) == 0
    whole = load_file(root / "converted/model.safetensors")
    assert all(torch.allclose(whole[name], end[name], atol=1e-7) for name in end)


def test_an_int8_base_stays_as_it_is_and_holds_less(root, monkeypatch):
    run = lora(root, "int8", steps=10, save_every=5, preview_every=5, lora_base="int8")
    made = []
    monkeypatch.setattr(trainer, "setup", lambda run: made.append(setup_unified(run)) or made[-1])
    stopped_after(monkeypatch, run, 5)
    base = {n: b.clone() for n, b in setup_unified(run).model.named_buffers()}
    kept = {name for name, value in base.items() if value.dtype == torch.int8}
    assert len(kept) == 14  # q, k, v, o and gate, up, down, in two layers
    merged = train(run)
    for parts in made:
        after = dict(parts.model.named_buffers())
        assert all(torch.equal(value, after[name]) for name, value in base.items())
    log = [json.loads(line) for line in (merged / "log.jsonl").read_text().splitlines()]
    log = [entry["main_loss"] for entry in log if "main_loss" in entry]
    assert log[-1] < log[0] - 0.1
    # merged into the float weights: what did not learn is theirs, bit for bit
    start, end = (load_file(f / "model.safetensors") for f in (root / "model", merged))
    assert start.keys() == end.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert "decoder.layers.0.mlp.up_proj.weight" in moved
    assert not any("vision" in name or "norm" in name for name in moved)
    apart = train(lora(root, "int8-apart", steps=10, save_every=0, preview_every=0,
                       lora_base="int8", lora_merge=False))  # fmt: skip
    assert not (apart / "model.safetensors").exists()
    again = open_init(run_for(root, "none", init=str(apart)))[0].state_dict()
    assert all(torch.allclose(again[name], end[name], atol=1e-6) for name in end)
    # and a merged copy, for previews, is what the model computes
    model, processor = made[-1].model.eval(), load_model(root / "model")[1]
    batch = processor.collate([processor.encode([user("abc"), assistant("de")])])
    with torch.no_grad():
        one, two = (m(batch).loss for m in (model, merged_copy(model)))
    assert float(one) == pytest.approx(float(two), rel=1e-5) and is_quantized(model)


def test_an_int8_layer_keeps_no_float_weight_for_the_backward():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.decoder = torch.nn.Sequential(torch.nn.Linear(32, 64))
    plainly = torch.nn.Linear(32, 64)
    quantize_decoder(model)
    layer, sizes = model.decoder[0], []
    with torch.no_grad():
        plainly.weight.copy_(layer.dequantized())
        plainly.bias.copy_(layer.bias)
    x = torch.randn(5, 32, requires_grad=True)
    with saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        layer(x).square().sum().backward()
    assert max(sizes) <= 64 * 32  # a byte a weight
    through, x.grad = x.grad, None
    plainly(x).square().sum().backward()
    assert torch.allclose(through, x.grad, rtol=1e-5, atol=1e-5)


def test_a_wrong_base_is_refused(root):
    for changes in ({"lora_base": "int4"}, {"lora_base": "int8", "lora": 0}):
        with pytest.raises(ValueError, match="lora_base is"):
            setup_unified(lora(root, "none", **changes))


def test_a_preview_shows_what_adapters_have_learned(root, tmp_path, monkeypatch):
    run = lora(root, "none")
    parts, shown = setup_unified(run), []
    where = "unimm.training.previews.save_grid"
    monkeypatch.setattr(where, lambda pixels, *_, **__: shown.append(pixels))
    parts.model.eval()
    parts.preview(tmp_path, 1)
    for name, parameter in parts.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    names = [name for name, _ in parts.model.named_parameters()]
    with torch.no_grad():
        assert parts.preview(tmp_path, 2)["preview_different_codes"] > 1
    assert [name for name, _ in parts.model.named_parameters()] == names  # adapters are still there
    merge_adapters(parts.model)
    parts.preview(tmp_path, 3)
    assert torch.equal(shown[1], shown[2]) and not torch.equal(shown[0], shown[1])


def test_adapters_go_on_exactly(root, monkeypatch):
    run = lora(root, "whole")
    train(run)
    cut = dataclasses.replace(run, out=str(root / "cut"))
    stopped_after(monkeypatch, cut, 20)
    train(cut)
    same(root, "whole", "cut")


def test_adapters_of_another_model_are_refused(root, tmp_path):
    out = train(lora(root, "small", steps=1, save_every=0, lora_merge=False))
    save_model(tmp_path / "other", *tiny_model(layers=3))
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "other")
    config["target_modules"] = [*config["target_modules"], "decoder.layers.2.mlp.up_proj"]
    (out / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another model"):
        open_init(run_for(root, "none", init=str(out)))
