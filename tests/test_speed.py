"""What makes the engine fast must not change what it gives: kernel, sharing, batching, windows."""

import copy
import itertools
import logging
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from unimm import UniMM, cpu
from unimm.checkpoints.native import load_model, save_model
from unimm.data.processor import Sample, assistant, user
from unimm.evaluation.bench_clock import start_peak
from unimm.inference import kernel, packed, stepper
from unimm.inference.engine import Engine, Request
from unimm.inference.prefill import Prompts, common, grouped, slot_keys
from unimm.inference.sampling import Settings, choose
from unimm.model import decoder
from unimm.model.decoder import rotate
from unimm.model.int8 import quantize_decoder
from unimm.model.unified import CODE

PROMPTS = ["a red circle", "a blue star above a green ring", "x", "a red circle", "a red cross"]
NEEDS_KERNEL = pytest.mark.skipif(kernel.load_library() is None, reason="no C++ compiler")
NEEDS_HALVES = pytest.mark.skipif(not cpu.halves(), reason="no FBGEMM in this torch")
NEEDS_PACKED = pytest.mark.skipif(not packed.suits(torch.empty(1)), reason="nothing to pack for")
SHAPES = [
    {},
    {"qk_norm": True, "attention_bias": True, "mlp_bias": True},
    {"heads": 2, "kv_heads": 1, "head_dim": 64},
]


def drawn(engine, settings, count=5):
    processor = engine.processor
    requests = [
        Request(processor.encode([user(p)], "image"), "image", 3 + k)
        for k, p in enumerate(PROMPTS[:count])
    ]
    return [answer.codes for answer in engine.run(requests, settings)]


def by_torch(model, processor):
    """An engine that has no kernel, and computes what the modules say."""
    engine = Engine(model, processor)
    engine._stepper._signature = kernel.signature(model)
    assert engine._stepper.kernel is None
    return engine


def lively(model):
    """Biases and norms that matter."""
    with torch.no_grad():
        for name, p in model.decoder.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


@NEEDS_KERNEL
@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_gives_the_tokens_of_torch(shape, few, monkeypatch):
    monkeypatch.setitem(stepper.FEW, torch.float32, few)
    for pathway in ("decoupled", "shared"):
        model, processor = tiny_model(pathway, **shape)
        lively(model)
        engine = Engine(model, processor)
        for settings in (Settings(3.0), Settings(1.0, temperature=0.0), Settings(2.0, top_k=9)):
            codes = drawn(engine, settings)
            assert engine._stepper.kernel is not None
            assert codes == drawn(by_torch(model, processor), settings)
        assert len(set(sum(codes, []))) > 8


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True])
def test_hidden_states_of_the_kernel(dtype, small):
    """Rows of different lengths, a window, and weights in every form, against the modules."""
    model, _ = tiny_model(heads=4, head_dim=16, qk_norm=True)
    lively(model).to(dtype)
    if small:
        quantize_decoder(model)
    made = kernel.make_kernel(model)
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.randn(3, 4, 32, dtype=dtype)
        caches = [model.decoder.new_cache(3, 20) for _ in range(2)]
        begin = torch.randn(3, 7, 32, dtype=dtype)
        for cache in caches:
            model.decoder(begin, torch.arange(7)[None], cache=cache)
            cache.advance(torch.tensor([7, 3, 5]))
        slots = caches[0].slots(4)
        there = model.decoder(x, slots, cache=caches[0]).float()
        row = torch.arange(3).repeat_interleave(4)
        here = made.step(x.flatten(0, 1), row, slots.flatten(), caches[1]).view(3, 4, 32)
        off = (here - there).norm() / there.norm()
        assert off < (1e-5 if dtype == torch.float32 else 0.03), off
        k, other = caches[0].k[1][1, :, 3:7].float(), caches[1].k[1][1, :, 3:7].float()
        assert (k - other).norm() / k.norm() < (1e-5 if dtype == torch.float32 else 0.03)


@NEEDS_PACKED
@pytest.mark.parametrize("form", ["float32", "bfloat16", "halves"])
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_of_packed_layers(form, shape, intel, monkeypatch):
    """Rows of different lengths, one slot and a window, against the modules as they were."""
    monkeypatch.setattr(packed, "intel", lambda: intel)
    if form == "halves":  # as on a processor that does not multiply bfloat16
        monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: False)
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    if (
        not packed.suits(torch.empty(1, dtype=dtype))
        or form == "bfloat16"
        and packed.by_halves(dtype)
    ):
        pytest.skip("not on this processor")
    monkeypatch.setattr(packed, "PIECE", 200)  # numbers: the rows of keys come in several pieces
    model, _ = tiny_model(**shape)
    lively(model).to(dtype)
    quick = copy.deepcopy(model)
    packed.pack(quick)
    assert packed.is_packed(quick.decoder) and not packed.is_packed(model.decoder)
    if form == "halves":
        assert type(quick.decoder.layers[0].mlp.up_proj.packed) is packed.Halves
        model, dtype = model.float(), torch.float32  # by which 16 bits lose nothing
        assert {p.dtype for p in quick.parameters()} == {torch.float32}
    torch.manual_seed(0)
    for lengths, new in (([0, 0, 0], 4), ([7, 3, 5], 4), ([7, 3, 5], 1), ([7, 7, 7], 1)):
        with torch.inference_mode():
            x = torch.randn(3, new, 32, dtype=dtype)
            begin = torch.randn(3, 7, 32, dtype=dtype)
            caches = [model.decoder.new_cache(3, 20) for _ in range(2)]
            for cache in caches:
                model.decoder(begin, torch.arange(7)[None], cache=cache)
                cache.advance(torch.tensor(lengths))
            slots = caches[0].slots(new)
            there = model.decoder(x, slots, cache=caches[0])
            here = packed.Steps(quick.decoder)(x, slots, caches[1])
            modules = quick.decoder(begin, torch.arange(7)[None])
            expected = model.decoder(begin, torch.arange(7)[None])
        parts = [(here, there), (modules, expected)]
        for a, b in [*parts, (caches[1].k[1][:, :, :7], caches[0].k[1][:, :, :7])]:
            off = (a.double() - b.double()).norm() / b.double().norm()
            assert off < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("x86", [False, True])
def test_an_older_torch_knows_x86_alone(known, x86, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: known)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu, "x86", lambda: x86)
    assert cpu.multiplies_bfloat16() == (known or not x86)


@NEEDS_HALVES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 0.02, 3e4])
def test_weights_of_16_bits_stay_as_they_are(dtype, size):
    """Whatever their range; a bare float16 would lose small ones of bfloat16, and the largest."""
    torch.manual_seed(0)
    weight = (torch.randn(24, 64).double() * size).clamp(-6e4, 6e4).to(dtype)
    kept = packed.Halves(weight)
    assert kept.dense().equal(weight.float())
    x = torch.randn(5, 64)
    torch.testing.assert_close(kept(x), x @ weight.float().T, rtol=1e-4, atol=1e-4 * size)
    assert not packed.Halves(torch.zeros(8, 16, dtype=dtype))(x[:, :16]).any()


@NEEDS_PACKED
@pytest.mark.parametrize("pathway, tied", [("decoupled", False), ("shared", True)])
def test_without_a_kernel_a_loaded_model_is_packed(pathway, tied, monkeypatch, tmp_path):
    """The same tokens; each weight once; saved as any other; what cannot be is refused."""
    monkeypatch.setattr(stepper, "make_kernel", lambda model: None)
    model, processor = tiny_model(pathway, qk_norm=True, tied_embeddings=tied)
    save_model(tmp_path / "a", model, processor)
    loaded = UniMM.from_pretrained(tmp_path / "a", device="cpu")
    kept = [m for m in loaded.model.modules() if type(m) is torch.nn.Linear]
    assert kept == ([loaded.model.text_head] if tied else [])
    assert not any(p.ndim == 2 for p in loaded.model.decoder.layers.parameters())
    for settings in (Settings(2.0), Settings(1.0, temperature=0.0)):
        assert drawn(loaded.engine, settings) == drawn(by_torch(model, processor), settings)
    loaded.save_pretrained(tmp_path / "b")
    for name, tensor in load_model(tmp_path / "b")[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    codes = drawn(loaded.engine, Settings(2.0))
    assert not any(p.requires_grad for p in loaded.model.parameters())
    for learn in (lambda: loaded.model.decoder(*states(True)), loaded.model.train):
        with pytest.raises(RuntimeError, match="load_model"):
            learn()
    loaded.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        loaded.model.decoder(*states(False))
    for kin in (copy.deepcopy(loaded.model), loaded.model.to("cpu")):
        assert packed.is_packed(kin.decoder)
        assert drawn(Engine(kin, processor), Settings(2.0)) == codes
    loaded.model.to(torch.float64).float()  # plain again
    assert not packed.is_packed(loaded.model.decoder)
    assert drawn(Engine(loaded.model, processor), Settings(2.0)) == codes


@NEEDS_HALVES
def test_a_model_in_bfloat16_draws_as_its_weights_do_in_float32(monkeypatch, tmp_path):
    """Where the processor does not multiply that and there is no kernel; saved, it is itself."""
    monkeypatch.setattr(stepper, "make_kernel", lambda model: None)
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: False)
    model, processor = tiny_model(qk_norm=True, attention_bias=True)
    save_model(tmp_path / "a", model, processor)
    loaded = UniMM.from_pretrained(tmp_path / "a", device="cpu", dtype="bfloat16")
    assert isinstance(loaded.model.decoder.layers[0].self_attn.q_proj.packed, packed.Halves)
    rounded = copy.deepcopy(model).bfloat16().float()
    for settings in (Settings(2.0), Settings(1.0, temperature=0.0)):
        assert drawn(loaded.engine, settings) == drawn(by_torch(rounded, processor), settings)
    loaded.save_pretrained(tmp_path / "b")
    for name, tensor in load_model(tmp_path / "b")[0].state_dict().items():
        assert torch.equal(tensor, rounded.state_dict()[name]), name
    kin = copy.deepcopy(loaded.model)
    assert drawn(Engine(kin, processor), Settings(2.0)) == drawn(loaded.engine, Settings(2.0))


@NEEDS_PACKED
@pytest.mark.parametrize("bias", [True, False])
def test_layers_packed_together_are_each_itself(bias):
    model, _ = tiny_model(attention_bias=bias)
    plain = lively(model).decoder.layers[0].self_attn.eval()
    together = copy.deepcopy(plain)
    packed.pack(together)
    names, x = ("q_proj", "k_proj", "v_proj"), torch.randn(2, 3, 32)
    assert len({id(together.get_submodule(name).packed) for name in names}) == 1
    again = copy.deepcopy(together)  # apart from now on
    moved = copy.deepcopy(together).double().float()
    with torch.inference_mode():
        for attention in (together, again, moved):
            layers = [attention.get_submodule(name) for name in names]
            beside = decoder.side_by_side(x, *layers)
            for name, layer, found in zip(names, layers, beside, strict=True):
                wanted = plain.get_submodule(name)(x)
                torch.testing.assert_close(layer(x), wanted)
                torch.testing.assert_close(layer(x[0, :1]), wanted[0, :1])
                torch.testing.assert_close(found, wanted)
                assert layer.state_dict()["weight"].equal(plain.get_submodule(name).weight)
        wanted = torch.cat([plain.get_submodule(name)(x) for name in names], -1)
        for attention in (together, again):
            layers = [attention.get_submodule(name) for name in names]
            torch.testing.assert_close(packed.product(*layers, x=x), wanted)


def states(learn):
    return torch.randn(1, 5, 32, requires_grad=learn), torch.arange(5)[None]


@NEEDS_PACKED
def test_packing_frees_each_weight_before_the_next():
    model, _ = tiny_model()
    weights = [weakref.ref(p) for p in model.decoder.layers.parameters() if p.ndim == 2]
    alive = []

    def form(weight, made=packed.form):
        alive.append(sum(ref() is not None for ref in weights))
        return made(weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "form", form)
        packed.pack(model.decoder.layers)
    assert alive == [14, 11, 10, 8, 7, 4, 3, 1]  # of a layer: q, k and v, o, gate and up, down


def test_a_loaded_model_learns_where_there_is_a_kernel_or_none_to_pack(monkeypatch, tmp_path):
    model, processor = tiny_model()
    save_model(tmp_path, model, processor)
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "make_kernel", lambda model: "a kernel")
        loaded = UniMM.from_pretrained(tmp_path, device="cpu")
    assert not packed.is_packed(loaded.model.decoder)
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "make_kernel", lambda model: None)
        patch.setattr(packed, "x86", lambda: False)
        loaded = UniMM.from_pretrained(tmp_path, device="cpu")
    assert not packed.is_packed(loaded.model.decoder)
    loaded.model.decoder(torch.randn(1, 5, 32), torch.arange(5)[None]).square().sum().backward()
    assert loaded.model.decoder.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_kernel_of_any_size(dtype):
    """Rows are read as streams far apart; what does not divide into them is read as well."""
    made = kernel.make_kernel(tiny_model()[0])
    for rows, count in itertools.product((1, 3, 4, 7, 21, 64), (1, 2, 3, 4, 5, 8, 9)):
        layer = torch.nn.Linear(96, rows).to(dtype)
        x = torch.randn(count, 96).to(dtype).float()
        with torch.inference_mode():
            found, expected = (
                made.linear(layer, x),
                torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float()),
            )
        made._weights.clear()  # kept by the id of the layer
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_head_of_the_kernel(dtype, near):
    made = kernel.make_kernel(tiny_model()[0])
    for rows, count in itertools.product((1, 7, 64), (1, 2, 5, 128)):
        first, last = torch.nn.Linear(96, 160).to(dtype), torch.nn.Linear(160, rows).to(dtype)
        x = torch.randn(count, 96)
        with torch.inference_mode():
            found = made.head(first, last, x)
            inner = torch.nn.functional.linear(x, first.weight.float(), first.bias.float())
            inner = torch.nn.functional.gelu(inner)
            expected = torch.nn.functional.linear(inner, last.weight.float(), last.bias.float())
        made._weights.clear()
        assert (found - expected).norm() < near * expected.norm()


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("width", [16, 64])
def test_attention_of_the_kernel(width, dtype, near):
    """Sharp attention over any number of slots, against its formula."""
    model, _ = tiny_model(heads=4, kv_heads=2, head_dim=width)
    made = kernel.make_kernel(model.to(dtype))
    torch.manual_seed(0)
    with torch.inference_mode():
        slot = torch.tensor([0, 1, 14, 15, 16, 17, 31, 32, 40])
        cache = model.decoder.new_cache(len(slot), 41)
        for part in (cache.k[1], cache.v[1]):
            part.normal_()
        q, k, v = (torch.randn(len(slot), heads, width) for heads in (4, 2, 2))
        found = made.attend(1, 4 * q, k, v, torch.arange(len(slot)), slot, cache)
        q = rotate(4 * q[:, :, None], *model.decoder.rope(slot[:, None], torch.float32))
        for m, last in enumerate(slot.tolist()):
            keys, values = (part[1][m, :, : last + 1].float() for part in (cache.k, cache.v))
            torch.testing.assert_close(values[:, -1], v[m].to(dtype).float())
            scores = q[m].view(2, 2, width) @ keys.mT / width**0.5  # (K, H / K, S)
            wanted = (scores.softmax(-1) @ values).flatten()
            assert (found[m] - wanted).norm() < near * wanted.norm(), m


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("window", [1, 3])
def test_codes_drawn_in_one_call_are_those_of_single_steps(dtype, guided, window):
    model = tiny_model()[0].to(dtype)
    model.image_head.out.weight.data.mul_(50)  # the logits outweigh the noise
    ready = stepper.Stepper(model)
    ready.refresh()
    rows = [[0, 3], [2, 1]] if guided else [[1], [0]]
    seeds, places, last = [5, 2**40], [0, 4], [3, 8]
    with torch.inference_mode():
        cache = ready.model.decoder.new_cache(4 if guided else 2, 20)
        for part in cache.k + cache.v:
            part.normal_()
        cache.advance(torch.tensor([7, 3, 0, 9][: cache.rows]))
        before = cache.length.clone()
        wanted = one_at_a_time(ready, copy.deepcopy(cache), last, rows, seeds, places, 10)
        right = [[code, *line[: window - 1]] for code, line in zip(last, wanted, strict=True)]
        wrong = [[code] * window for code in last]
        for tries, left, passes in ((wrong, [10, 10], 4), (right, [10, 10], 2), (right, [7, 4], 9)):
            again = copy.deepcopy(cache)
            codes, after = ready.draw(again, tries, rows, seeds, places, left, 2.5, 0.9, passes)
            counts = [len(line) for line in codes]
            assert codes == [line[:n] for line, n in zip(wanted, counts, strict=True)]
            assert all(len(line) == window - 1 for line in after)
            assert all(n <= most for n, most in zip(counts, left, strict=True))
            assert max(counts) >= passes or 4 in counts, "fewer than one a pass"
            if tries is right and passes == 2:
                assert min(counts) > window, "right guesses do not count"
            for row, length in enumerate(again.length - before):
                assert length == counts[next(n for n, own in enumerate(rows) if row in own)]
            assert again.longest == int(again.length.max())


def one_at_a_time(ready, cache, codes, rows, seeds, places, steps):
    """Codes (N, steps) by one slot a step and row."""
    found = []
    for step in range(steps):
        ids = [0] * cache.rows
        for code, branches in zip(codes, rows, strict=True):
            for row in branches:
                ids[row] = code
        logits = ready.logits(
            ready.forward(ready.embed(torch.tensor(ids), [CODE] * len(ids)), cache), CODE
        )
        own, rest = logits[[a for a, *_ in rows]], logits[[b for *_, b in rows]]
        other = rest if len(rows[0]) == 2 else None
        codes = ready.choose(own, other, 2.5, seeds, [p + step for p in places], 0.9)
        found.append(codes)
        cache.advance(1)
    return [list(line) for line in zip(*found, strict=True)]


@NEEDS_KERNEL
def test_the_kernel_chooses_what_the_definition_chooses():
    model, _ = tiny_model()
    made = kernel.make_kernel(model)
    torch.manual_seed(0)
    own, other = torch.randn(2, 40, 1000)
    seeds, places = torch.arange(40) * 2**29 + 5, torch.arange(40) * 31
    for temperature in (0.0, 0.7, 1.0):
        logits = other + 2.5 * (own - other)
        wanted = choose(logits, seeds, places, temperature).tolist()
        rows = zip(own, other, seeds.tolist(), places.tolist(), strict=True)
        assert [made.choose(a, b, 2.5, temperature, s, p) for a, b, s, p in rows] == wanted
        assert made.choose(own[3], None, 1.0, temperature, 7, 9) == int(
            choose(own[3:4], torch.tensor([7]), torch.tensor([9]), temperature)
        )


@NEEDS_KERNEL
def test_a_model_that_goes_on_training_draws_with_its_new_weights():
    model, processor = tiny_model()
    engine = Engine(model, processor)
    before = drawn(engine, Settings(2.0))
    with torch.no_grad():
        model.code_embed.weight.mul_(-3)  # what the table was made of
        model.decoder.norm.weight.mul_(2)  # of which the kernel has a copy
    after = drawn(engine, Settings(2.0))
    assert after != before and after == drawn(by_torch(model, processor), Settings(2.0))
    model.to(torch.float64)  # which the kernel does not take
    assert drawn(engine, Settings(2.0)) and engine._stepper.kernel is None
    model.train().float()
    assert all(p.requires_grad for p in model.parameters())


def test_without_a_compiler_one_line_is_logged_and_torch_computes(monkeypatch, tmp_path, caplog):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "no-such-compiler")
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    kernel.load_library.cache_clear()
    try:
        model, processor = tiny_model()
        engine = Engine(model, processor)
        with caplog.at_level(logging.WARNING):
            codes = drawn(engine, Settings(2.0)) + drawn(Engine(model, processor), Settings(2.0))
        assert len(caplog.records) == 1 and "no-such-compiler" in caplog.text
        assert engine._stepper.kernel is None
    finally:
        kernel.load_library.cache_clear()
    assert codes[:5] == drawn(Engine(model, processor), Settings(2.0))


@pytest.mark.parametrize("window", [2, 5, 16, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parallel_decoding_equals_one_code_at_a_time(tiny, window, temperature):
    model, processor = tiny
    settings = Settings(2.0, temperature)
    wanted = drawn(Engine(model, processor, window=1), settings)
    for count in (5, 1, 2):  # None: 1, several and fewer codes of each picture
        assert drawn(Engine(model, processor, window), settings, count) == wanted[:count]
        torch_alone = by_torch(model, processor)
        torch_alone.window = window
        assert drawn(torch_alone, settings, count) == wanted[:count]


@NEEDS_KERNEL
@pytest.mark.parametrize("form", [torch.bfloat16, torch.int8])
def test_by_the_kernel_a_window_gives_the_same_in_any_form(form):
    model, processor = tiny_model()
    model = model.to(torch.bfloat16) if form == torch.bfloat16 else model
    if form == torch.int8:
        quantize_decoder(model)
    for count in (1, 2, 5):
        wanted = drawn(Engine(model, processor, window=1), Settings(2.0), count)
        for window in (None, 3):
            assert drawn(Engine(model, processor, window), Settings(2.0), count) == wanted


def test_parallel_decoding_takes_fewer_steps_where_codes_can_be_guessed():
    model, processor = tiny_model()
    with torch.no_grad():
        model.image_head.out.bias[7] = 30  # nearly always the same code
    request = Request(processor.encode([user("x")], "image"), "image")
    for engine in (Engine(model, processor, window=8), Engine(model, processor)):
        assert len(list(engine.stream([request], Settings()))) <= 6
    both = [replace(request, seed=seed) for seed in range(2)]
    assert len(list(engine.stream(both, Settings()))) <= 9


def mixed_requests(processor, picture):
    talks = [("image", "a red circle"), ("text", "what?"), ("any", "draw"), ("image", "x")]
    return [
        Request(processor.encode([user(picture, w)], "text" if m != "image" else m), m, 11 + k)
        for k, (m, w) in enumerate(talks)
    ]


MIXED = [Settings(3.0, max_text=5), Settings(text_temperature=1.0, max_text=9),
         Settings(2.0, max_text=4), Settings(1.0, top_k=5)]  # fmt: skip


@pytest.mark.parametrize("window", [1, None, "torch"])
def test_a_request_gets_the_same_whatever_else_is_in_the_batch(tiny, picture, window):
    model, processor = tiny
    requests = mixed_requests(processor, picture)
    alone = [
        Engine(model, processor, window=1).run([r], s)[0].parts
        for r, s in zip(requests, MIXED, strict=True)
    ]
    engine = by_torch(model, processor) if window == "torch" else Engine(model, processor, window)
    answers, ids = {}, {}
    for wave in range(4):  # one joins every third step
        ids[engine.add(requests[wave], MIXED[wave])] = wave
        for _ in range(3):
            answers |= engine.step()
    while found := engine.step():
        answers |= found
    assert {ids[name]: answer.parts for name, answer in answers.items()} == dict(enumerate(alone))
    assert all(answer.done for answer in answers.values())


@pytest.mark.parametrize("window", [1, None])
def test_a_cancelled_request_leaves_the_others_alone(tiny, picture, window):
    model, processor = tiny
    requests = mixed_requests(processor, picture)
    wanted = Engine(model, processor, window=1).run([requests[3]], MIXED[3])[0].codes
    engine = Engine(model, processor, window)
    first, queued, kept = (engine.add(requests[k], MIXED[k]) for k in (0, 1, 3))
    engine.cancel(queued)
    engine.cancel(99)
    seen = [engine.step() for _ in range(5)]
    assert set(seen[0]) == {first, kept}
    engine.cancel(first)
    while found := engine.step():
        seen.append(found)
    assert set(seen[5]) == {kept} and seen[-1][kept].codes == wanted
    count = len(seen[0][first].codes)
    assert count == 5 if window else count >= 5


def test_a_prompt_that_does_not_fit_is_refused_when_it_is_added():
    model, processor = tiny_model(max_positions=40)
    processor.max_length = 40
    sample = processor.encode([user("a" * 25)], "image")
    with pytest.raises(ValueError, match="context"):
        Engine(model, processor).add(Request(sample, "image"), Settings())


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_samples_of_one_prompt_and_questions_on_one_picture_share_a_prefill(
    tiny, picture, dtype, near
):
    model, processor = tiny
    model.to(dtype)
    other = np.flip(picture).copy()
    talks = [(picture, "what color is it?"), (other, "what?"), (picture, "how many stars?"),
             (picture, "what color is it?"), (other, "how many?")]  # fmt: skip
    samples = [processor.encode([user(p, w)], "text") for p, w in talks]
    ready = stepper.Stepper(model)
    ready.refresh()
    together = Prompts(ready, processor)
    with torch.inference_mode():
        cache, hidden = together.fill(samples, 120)
        for k, sample in enumerate(samples):
            single, last = Prompts(ready, processor).fill([sample], 120)
            n = len(sample)
            assert int(cache.length[k]) == n
            pairs = [(hidden[k], last[0])]
            for a, b in zip(cache.k + cache.v, single.k + single.v, strict=True):
                pairs.append((a[k, :, :n], b[0, :, :n]))
            for a, b in pairs:
                assert (a - b).norm() < near * b.norm()
    shared = common(slot_keys(samples[0]), slot_keys(samples[2]))
    assert shared >= processor.codes_per_image
    unique = {s.ids.tobytes() + slot_keys(s).tobytes(): len(s) for s in samples}
    assert len(unique) == 4 and together.computed < sum(unique.values()) - 20


def test_pictures_that_differ_share_nothing_of_themselves(picture):
    _, processor = tiny_model()
    other = picture.copy()
    other[0, 0, 0] ^= 255
    keys = [slot_keys(processor.encode([user(p, "x")], "text")) for p in (picture, other)]
    assert common(*keys) <= 3
    assert [shared for _, shared in grouped(keys)] == [0, 0]


def test_a_chat_goes_on_where_it_was(picture):
    model, processor = tiny_model()
    engine = Engine(model, processor)
    talk = [user(picture, "what is it, what is it?")]
    settings = Settings(2.0, max_text=12)

    def turn(engine, talk):
        return engine.run([Request(processor.encode(talk, "text"), "any", 4)], settings)[0]

    first = turn(engine, talk)
    assert engine._prompts.kept is not None
    words = processor.text(first.text)
    talk += [assistant(words or "yes"), user("and what is that?")]
    engine._prompts.computed = 0
    second = turn(engine, talk)
    slots = len(processor.encode(talk, "text"))
    fresh = Engine(model, processor)
    assert second.parts == turn(fresh, talk).parts
    assert engine._prompts.computed < fresh._prompts.computed - 16
    assert fresh._prompts.computed >= slots


def test_a_sample_may_be_the_beginning_of_another():
    def sample(size):
        ids = np.arange(size, dtype=np.int64)
        none = np.zeros(size)
        return Sample(ids, none.astype(np.int64), none.astype(np.float32), none.astype(bool))

    model, processor = tiny_model()
    samples = [sample(40), sample(30), sample(40)]
    with torch.inference_mode():
        cache, hidden = Prompts(stepper.Stepper(model), processor).fill(samples, 50)
        for k, size in enumerate((40, 30, 40)):
            last = Prompts(stepper.Stepper(model), processor).fill([sample(size)], 50)[1]
            assert torch.allclose(hidden[k], last[0], atol=1e-4)
            assert int(cache.length[k]) == size


@pytest.mark.parametrize("multiplies", [True, False])
def test_pixels_in_bfloat16_are_nearly_those_in_float32(multiplies, monkeypatch):
    """And are these on a processor where bfloat16 would take longer."""
    _, processor = tiny_model()
    monkeypatch.setattr("unimm.data.processor.multiplies_bfloat16", lambda: multiplies)
    codes = [[k % 32 for k in range(16)], [7] * 16]
    exact, half = processor.pixels(codes), processor.pixels(codes, torch.bfloat16)
    assert half.dtype == torch.float32 and torch.equal(exact, half) != multiplies
    assert (exact - half).abs().mean() < 0.02


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_pictures():
    model, processor = tiny_model()
    engine = Engine(model, processor)
    held = []
    for k in range(10):
        prompts = [f"a red circle number {k} {j}" for j in range(100)]
        requests = [
            Request(processor.encode([user(p)], "image"), "image", j) for j, p in enumerate(prompts)
        ]
        answers = engine.run(requests, Settings(2.0))
        processor.pixels([answer.codes for answer in answers])
        held.append(start_peak())
    assert held[0] and held[-1] - held[1] < 8 * 2**20, held
