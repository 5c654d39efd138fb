"""The decoder against transformers' Llama, Qwen2 and Qwen3, and its cache against itself.

All comparisons are float32 on tiny random weights, loaded by name without any key map.
"""

from dataclasses import replace

import pytest
import torch

from unimm.model.decoder import Decoder, DecoderConfig, KVCache, block_mask, plain_attention

TINY = DecoderConfig(
    vocab_size=61,
    dim=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden=48,
    rope_theta=5000.0,
    norm_eps=1e-5,
    max_positions=64,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}


def oracle(config: DecoderConfig, family: str):
    """transformers' model of the same sizes, with weights large enough to matter."""
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}
        | (config.rope_scaling or {}),
    }
    if family != "Qwen2":
        options["attention_bias"] = config.attention_bias
    if family == "Llama":
        options["mlp_bias"] = config.mlp_bias
    torch.manual_seed(0)
    settings = getattr(transformers, family + "Config")(**options)
    model = getattr(transformers, family + "ForCausalLM")(settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def copy_of(model, config: DecoderConfig) -> Decoder:
    decoder = Decoder(config).eval()
    decoder.load_state_dict(model.model.state_dict(), strict=True)
    return decoder


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(TINY).eval()
    model.init_weights(std=0.3)
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"kv_heads": 4, "head_dim": 8}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tied_embeddings": True}),
        ("Llama", {"rope_scaling": LINEAR}),
        ("Llama", {"rope_scaling": LLAMA3}),
        ("Qwen2", {"attention_bias": True, "output_bias": False, "head_dim": 8}),
        ("Qwen3", {"qk_norm": True}),
        ("Qwen3", {"qk_norm": True, "attention_bias": True, "tied_embeddings": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_same_logits_as_transformers(family, changes):
    config = replace(TINY, **changes)
    model = oracle(config, family)
    decoder = copy_of(model, config)
    ids = torch.randint(config.vocab_size, (2, 50))  # beyond the 16 original positions of LLAMA3
    expected = model(ids).logits
    head = decoder.embed_tokens if config.tied_embeddings else model.lm_head
    x, positions = decoder.embed_tokens(ids), torch.arange(50)[None].expand(2, -1)
    logits = decoder(x, positions) @ head.weight.T
    assert (logits - expected).abs().max() < 1e-5

    cache, parts = decoder.new_cache(2, 50), []  # a prefill, chunks and single steps
    for part in (slice(0, 20), slice(20, 33), slice(33, 34), slice(34, 49), slice(49, 50)):
        parts.append(decoder(x[:, part], positions[:, part], cache=cache))
        cache.advance(part.stop - part.start)
    cached = torch.cat(parts, 1) @ head.weight.T
    assert (cached - expected).abs().max() < 1e-5


def test_nothing_but_llama_names_is_saved(decoder):
    names = set(decoder.state_dict())
    assert "layers.2.self_attn.k_proj.weight" in names
    assert len(names) == 2 + 9 * TINY.layers


@torch.no_grad()
def test_rows_of_different_lengths(decoder):
    """Right-padded prefill, then steps and a chunk: every row is as it would be alone."""
    lengths = torch.tensor([7, 3, 5])
    tails = torch.randn(3, 6, TINY.dim)
    prompts = torch.randn(3, 7, TINY.dim)
    cache = decoder.new_cache(3, 16)
    together = [decoder(prompts, torch.arange(7)[None], cache=cache)]
    cache.advance(lengths)
    assert cache.length.tolist() == [7, 3, 5]
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6)):
        positions = cache.length[:, None] + torch.arange(stop - start)
        together.append(decoder(tails[:, start:stop], positions, cache=cache))
        cache.advance(stop - start)
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat((prompts[row, :length], tails[row]))[None]
        expected = decoder(alone, torch.arange(length + 6)[None])[0]
        got = torch.cat((together[0][row, :length], *(part[row] for part in together[1:])))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("before", [(0, 0), (4, 4), (4, 2)], ids=["empty", "even", "uneven"])
def test_the_last_slots_alone_are_those_of_the_whole(decoder, before):
    """last=True gives the last slot's hidden state, and leaves the same cache for what follows."""
    torch.manual_seed(1)
    lengths, first, x, more = torch.tensor(before), *torch.randn(3, 2, 5, TINY.dim)
    mask = torch.randn(2, 1, 5, 5) > 0
    mask |= torch.eye(5, dtype=torch.bool)
    found = []
    for last in (False, True):
        cache = decoder.new_cache(2, 16)
        decoder(first, torch.arange(5)[None], cache=cache)
        cache.advance(lengths)
        positions = cache.length[:, None] + torch.arange(5)
        got = [decoder(x, positions, cache=cache, last=last)]
        cache.advance(5)
        got.append(decoder(more, positions + 5, cache=cache))
        got += [decoder(x, torch.arange(5)[None], mask=m, last=last) for m in (None, mask)]
        found.append(got)
    for whole, last in zip(*found, strict=True):
        torch.testing.assert_close(last, whole[:, -last.shape[1] :], atol=1e-5, rtol=1e-5)
    assert [part.shape[1] for part in found[1]] == [1, 5, 1, 1]


@torch.no_grad()
def test_packed_rows_equal_separate_rows(decoder):
    first, second = torch.randn(1, 5, TINY.dim), torch.randn(1, 4, TINY.dim)
    packed = torch.cat((first, second, torch.zeros(1, 2, TINY.dim)), 1)
    segment = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 2])
    positions = torch.tensor([[*range(5), *range(4), 0, 0]])
    out = decoder(packed, positions, block_mask(segment))
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :5], decoder(first, positions[:, :5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        out[:, 5:9], decoder(second, positions[:, 5:9]), atol=1e-5, rtol=1e-5
    )


def test_block_mask_pads_see_only_themselves():
    mask = block_mask(torch.tensor([[0, 0, 1, -1, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@torch.no_grad()
def test_select_repeats_and_drops_rows(decoder):
    prompts, step = torch.randn(2, 6, TINY.dim), torch.randn(3, 1, TINY.dim)
    cache = decoder.new_cache(2, 8)
    decoder(prompts, torch.arange(6)[None], cache=cache)
    cache.advance(torch.tensor([6, 4]))
    chosen = cache.select([1, 1, 0])
    assert chosen.length.tolist() == [4, 4, 6] and chosen.rows == 3 and not chosen.equal
    assert cache.select(torch.tensor([1, 1])).longest == 4
    out = decoder(step, chosen.length[:, None], cache=chosen)
    for row, source in enumerate((1, 1, 0)):
        length = (6, 4)[source]
        alone = torch.cat((prompts[source, :length], step[row]))[None]
        expected = decoder(alone, torch.arange(length + 1)[None])[0, -1]
        torch.testing.assert_close(out[row, 0], expected, atol=1e-5, rtol=1e-5)


def test_too_long_is_said():
    cache = KVCache(layers=1, rows=1, kv_heads=1, head_dim=2, capacity=3)
    cache.advance(2)
    with pytest.raises(ValueError, match="longer than the context"):
        cache.update(0, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("autocast", [False, True])
def test_every_weight_learns(autocast):
    config = replace(TINY, qk_norm=True, attention_bias=True, mlp_bias=True, dropout=0.1)
    decoder = Decoder(config)
    ids = torch.randint(61, (2, 9))
    segment = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = decoder.embed_tokens(ids)
        out = decoder(x, torch.arange(9)[None]) + decoder(
            x, torch.arange(9)[None], block_mask(segment)
        )
        (out * torch.randn_like(out)).sum().backward()
    for name, weight in decoder.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        # a key bias shifts all scores of a query alike only without rotation: it does learn here
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("packed", [False, True])
def test_training_attention_is_the_same(packed):
    """Short bfloat16 training rows on a CPU take plain products instead of the fused kernel."""
    torch.manual_seed(0)
    decoder = Decoder(replace(TINY, kv_heads=4))
    decoder.init_weights(std=0.2)
    x, positions = torch.randn(2, 12, TINY.dim), torch.arange(12)[None]
    mask = block_mask(torch.tensor([[0] * 12, [0] * 5 + [1] * 5 + [-1] * 2])) if packed else None
    with torch.autocast("cpu", torch.bfloat16):
        plain = decoder(x, positions, mask)
        assert decoder.attention(x, torch.bfloat16, mask, None).func is plain_attention
        with torch.no_grad():
            fused = decoder(x, positions, mask)
    assert (plain - fused).abs().mean() < 0.01 * fused.abs().mean()


@torch.no_grad()
def test_bfloat16_keeps_float32_positions():
    torch.manual_seed(0)
    decoder = Decoder(replace(TINY, max_positions=4096)).eval()
    x = torch.randn(1, 8, TINY.dim)
    positions = torch.arange(3001, 3009)[None]  # bfloat16 cannot tell these apart
    exact = decoder(x, positions)
    half = decoder.to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16(), positions).float(), exact, atol=0.1, rtol=0.1)
    cos, _ = half.rope(positions, torch.float32)
    assert len(cos[0, 0, :, 0].unique()) == 8


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="yarn"):
        replace(TINY, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ValueError, match="kv heads"):
        replace(TINY, kv_heads=3)
    with pytest.raises(NotImplementedError, match="memory"):
        Decoder(TINY)(torch.zeros(1, 1, 32), torch.zeros(1, 1), memory=torch.zeros(1, 1, 32))
