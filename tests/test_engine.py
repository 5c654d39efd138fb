"""The generation loop against independent loops without a cache, and against itself in batches."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from unimm.data.places import around
from unimm.data.processor import assistant, user
from unimm.inference import products, sampling
from unimm.inference.engine import Engine, Request
from unimm.inference.sampling import Ahead, Settings, choose, guide, gumbel, keep_likely
from unimm.model.unified import CODE, TEXT

PROMPTS = ["a red circle", "a blue star above a green ring", "x"]


def image_request(processor, prompt, seed=0):
    return Request(processor.encode([user(prompt)], answer="image"), "image", seed)


def slow_codes(model, processor, prompt, settings, seed):
    """No cache, no batch, no padding: the definition."""
    sample = processor.encode([user(prompt)], answer="image")
    rows = [processor.collate([sample]), processor.collate([processor.unguided(sample)])]
    codes = []
    for position in range(processor.codes_per_image):
        logits = []
        for batch in rows:
            extra = torch.tensor([codes], dtype=torch.long)
            batch = type(batch)(
                torch.cat([batch.ids, extra], 1),
                torch.cat([batch.kind, torch.full_like(extra, CODE)], 1),
                torch.arange(batch.ids.shape[1] + len(codes))[None],
                batch.score,
                batch.images,
            )
            hidden = model.decoder(model.embed(batch), batch.positions)
            logits.append(model.logits(hidden[:, -1], CODE))
        guided = guide(*logits, settings.guidance)
        where = torch.tensor([seed]), torch.tensor([position])
        codes.append(int(choose(guided, *where, settings.temperature)))
    return codes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_cached_codes_equal_the_definition(tiny, temperature):
    model, processor = tiny
    settings = Settings(guidance=3.0, temperature=temperature)
    requests = [image_request(processor, p, 7 + k) for k, p in enumerate(PROMPTS)]
    batch = Engine(model, processor).run(requests, settings)
    for k, prompt in enumerate(PROMPTS):
        single = Engine(model, processor).run([requests[k]], settings)[0].codes
        with torch.inference_mode():
            assert slow_codes(model, processor, prompt, settings, 7 + k) == single
        assert batch[k].codes == single
        assert len(single) == 16
    assert batch[0].codes != batch[1].codes


def test_codes_that_are_kept_are_context_for_those_that_are_drawn(picture):
    """Kept ones stand in the answer, the others are what the definition draws after them; so in a
    batch with whole pictures, in windows, and where a GPU would take steps of fixed shape."""
    model, processor = tiny_model(max_positions=256)
    settings = Settings(guidance=2.0, temperature=1.0)
    redrawn = around("(2,7)", processor.grid)
    part = {"image": picture, "view": ["patches", "codes"], "redrawn": redrawn}
    sample = processor.encode([user("x", part)], "image")
    kept, given = sample.kept, processor.codes(picture)
    request = Request(sample, "image", 5)
    whole = image_request(processor, PROMPTS[0], 3)
    codes = Engine(model, processor).run([request], settings)[0].codes
    assert (np.array(codes)[~redrawn] == given[~redrawn]).all()
    assert (np.array(codes)[redrawn] != given[redrawn]).any()
    free = dataclasses.replace(sample, kept=None)
    for at in np.flatnonzero(redrawn):  # one code after the true ones before it
        forced = np.where(np.arange(16) < at, codes, -1)
        forced[at + 1 :] = 0
        again = Request(dataclasses.replace(free, kept=forced), "image", 5)
        assert Engine(model, processor).run([again], settings)[0].codes[at] == codes[at]
    plain = Engine(model, processor).run([whole], settings)[0].codes
    for window, static in ((1, None), (4, None), (1, True)):
        engine = Engine(model, processor, window)
        engine.static = static
        both = engine.run([whole, request], settings)
        assert [answer.codes for answer in both] == [plain, codes], (window, static)
    assert (kept >= 0).sum() == 16 - redrawn.sum()


def test_guidance_and_seed_matter(tiny):
    model, processor = tiny
    engine = Engine(model, processor)

    def codes(seed, guidance):
        request = image_request(processor, PROMPTS[1], seed)
        return engine.run([request], Settings(guidance=guidance))[0].codes

    assert codes(0, 1.0) != codes(1, 1.0)
    assert codes(0, 1.0) != codes(0, 8.0)
    assert codes(0, 2.0) == codes(0, 2.0)


def test_words_batched_equal_single(tiny, picture):
    model, processor = tiny
    engine = Engine(model, processor)
    talks = [[user(picture, "what?")], [user("a long question about nothing at all")], [user("y")]]
    requests = [Request(processor.encode(talk, "text"), "text", k) for k, talk in enumerate(talks)]
    for temperature in (0.0, 1.0):
        settings = Settings(max_text=12, text_temperature=temperature)
        together = engine.run(requests, settings)
        for request, answer in zip(requests, together, strict=True):
            assert engine.run([request], settings)[0].text == answer.text
    assert all(i < processor.template.bos for answer in together for i in answer.text)


def test_greedy_words_equal_a_loop_without_cache(tiny, picture):
    model, processor = tiny
    sample = processor.encode([user(picture, "what?")], "text")
    answer = Engine(model, processor).run([Request(sample, "text")], Settings(max_text=8))[0].text
    batch, found = processor.collate([sample]), []
    banned = torch.ones(model.config.decoder.vocab_size, dtype=torch.bool)
    banned[: processor.template.bos] = False
    banned[processor.template.end_of_turn] = False
    with torch.inference_mode():
        for _ in range(8):
            extra = torch.tensor([found], dtype=torch.long)
            longer = type(batch)(
                torch.cat([batch.ids, extra], 1),
                torch.cat([batch.kind, torch.full_like(extra, TEXT)], 1),
                torch.arange(batch.ids.shape[1] + len(found))[None],
                batch.score,
                batch.images,
            )
            hidden = model.decoder(model.embed(longer), longer.positions)[:, -1]
            logits = model.logits(hidden, TEXT).masked_fill(banned, -torch.inf)
            token = int(logits.argmax(-1))
            if token == processor.template.end_of_turn:
                break
            found.append(token)
    assert answer == found and len(answer) > 2


def test_a_free_answer_draws_when_the_model_says_so(tiny):
    """With a text head that says begin-of-image, then end-of-turn, `any` holds one picture."""
    model, processor = tiny
    t, head = processor.template, model.text_head
    loud = Loud(head, [t.begin_image, t.end_of_turn])
    model.text_head = loud
    sample = processor.encode([user("draw")], "text")
    engine = Engine(model, processor)
    answer = engine.run([Request(sample, "any", 5)], Settings(guidance=2.0, max_text=6))[0]
    assert [kind for kind, _ in answer.parts] == [CODE]
    assert len(answer.codes) == 16 and answer.done
    model.text_head = head
    drawn = engine.run([image_request(processor, "draw", 5)], Settings(guidance=2.0))[0]
    assert drawn.codes == answer.codes
    model.text_head = Loud(head, [t.begin_image, t.end_of_turn])
    text_only = engine.run([Request(sample, "text", 5)], Settings(max_text=6))[0]
    assert not text_only.codes


class Loud(torch.nn.Module):
    """A text head that insists on the given ids, one a call, while no code is asked of it."""

    def __init__(self, head, ids):
        super().__init__()
        self.head, self.ids, self.calls = head, ids, 0
        self.weight = head.weight

    def forward(self, hidden):
        scores = self.head(hidden).clone()
        if hidden.shape[0] == 1:
            scores[..., self.ids[min(self.calls, len(self.ids) - 1)]] = 1e4
            self.calls += 1
        return scores


def test_context_too_short_is_refused():
    model, processor = tiny_model(max_positions=40)
    processor.max_length = 40
    engine = Engine(model, processor)
    with pytest.raises(ValueError, match="context"):
        engine.run([image_request(processor, "a" * 25)], Settings())
    with pytest.raises(ValueError, match="context"):
        processor.encode([user("a" * 60)], "image")


def test_a_window_is_of_one_code_at_least(tiny):
    with pytest.raises(ValueError, match="window must be 1 or more"):
        Engine(*tiny, window=0)


@pytest.mark.parametrize("window", [1, None])
def test_stream_ends_with_what_run_gives(tiny, window):
    model, processor = tiny
    engine = Engine(model, processor, window)
    request = image_request(processor, PROMPTS[0], 3)
    lengths = []
    for answers in engine.stream([request], Settings(guidance=2.0)):
        lengths.append(len(answers[0].codes))
    assert lengths == sorted(set(lengths)) and lengths[-1] == 16  # each step adds, by itself 1
    assert window is None or len(lengths) == 16
    assert answers[0].codes == engine.run([request], Settings(guidance=2.0))[0].codes


def test_gumbel_noise_is_gumbel_and_depends_on_everything():
    seeds, positions = torch.arange(64), torch.arange(64) % 7
    noise = gumbel(seeds, positions, 4096)
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01  # Euler's constant
    assert abs(float(noise.var()) - 1.6449) < 0.02  # pi squared over 6
    one = gumbel(torch.tensor([5]), torch.tensor([3]), 100)
    assert torch.equal(one, gumbel(torch.tensor([9, 5]), torch.tensor([0, 3]), 100)[1:])
    for other in (
        gumbel(torch.tensor([6]), torch.tensor([3]), 100),
        gumbel(torch.tensor([5 + 2**32]), torch.tensor([3]), 100),
        gumbel(torch.tensor([5]), torch.tensor([4]), 100),
        gumbel(torch.tensor([5]), torch.tensor([3]), 100, stream=1),
    ):
        assert abs(float(torch.corrcoef(torch.cat([one, other]))[0, 1])) < 0.4


def test_noise_made_ahead_is_the_same(monkeypatch):
    """One request, several at different places, a window, words and codes: never other noise."""
    made, ahead = [], Ahead()
    plain = gumbel
    monkeypatch.setattr(sampling, "gumbel", lambda *a: made.append(a) or plain(*a))
    asked = [([3], [k], 1024, 0) for k in range(20)]
    asked += [([3, 7], [k, k + 9], 1024, 0) for k in range(12)]
    asked += [([5, 5, 5], [4, 5, 6], 100, 0), ([5], [4], 100, 1), ([5], [4], 90, 1)]
    asked += [([1], [0], 2 * sampling.AHEAD, 0), ([1], [1], 2 * sampling.AHEAD, 0)]
    for seeds, places, size, stream in asked:
        where = torch.tensor(seeds), torch.tensor(places)
        expected = plain(*where, size, stream)
        assert torch.equal(ahead(*where, size, stream), expected), (seeds, places, size, stream)
    assert len(made) == 2 + 2 + 3 + 2  # 16 places of one, 8 of two; nothing ahead of many codes


def test_choose_samples_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    picks = choose(logits, torch.arange(20_000), torch.zeros(20_000, dtype=torch.long), 1.0)
    shares = picks.bincount(minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.012)
    assert (choose(logits[:1], torch.tensor([1]), torch.tensor([0]), 0.0) == 0).all()


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_likely(logits, 2, 1.0).isfinite().tolist() == [[True, True, False, False]]
    assert keep_likely(logits, 0, 0.8).isfinite().tolist() == [[True, True, False, False]]
    assert keep_likely(logits, 0, 0.81).isfinite().tolist() == [[True, True, True, False]]
    assert keep_likely(logits, 0, 0.01).isfinite().tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        Settings(**wrong)


def test_drawn_images_in_history_are_seen_both_ways(picture):
    model, processor = tiny_model()
    history = [user("draw"), assistant(picture), user("what is it?")]
    sample = processor.encode(history, "text")
    assert (sample.kind == CODE).sum() == 16 and len(sample.images) == 1
    last = processor.encode(history[:2])
    assert (last.kind == CODE).sum() == 16 and not last.images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_prompts_are_the_same_by_another_library(dtype, monkeypatch):
    """Only products of many rows without a gradient are taken, and come out equal."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(products, "intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    name = "by_onednn" if dtype == torch.float32 else "by_float32"
    taken, suits = [], getattr(products, name)
    monkeypatch.setattr(products, name, lambda *args: taken.append(suits(*args)) or taken[-1])
    near = {"atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-3}
    layer = torch.nn.Linear(48, 40).to(dtype)
    x = torch.randn(2, 64, 48).to(dtype)
    for bias in (layer.bias, None):
        wanted = F.linear(
            x.double(), layer.weight.double(), None if bias is None else bias.double()
        )
        with torch.inference_mode(), products.ManyRows():
            found = F.linear(x, layer.weight, bias)
            assert found.dtype == dtype and torch.allclose(found, wanted.to(dtype), **near)
    with products.ManyRows():
        layer(x).sum().backward()
        with torch.inference_mode():
            layer(x[:, :4])
            layer.double()(x.double())
    assert taken == [True, True, False, False] and layer.weight.grad is not None


@pytest.mark.parametrize("mask", [None, torch.bool, torch.bfloat16])
def test_attention_of_prompts_is_the_same_by_float32(mask, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    q, k, v = torch.randn(3, 2, 4, 40, 16).bfloat16().unbind()
    seen = None if mask is None else torch.ones(40, 40, dtype=torch.bool).tril()
    how = {} if mask is None else {"attn_mask": seen}
    if mask == torch.bfloat16:
        how = {"attn_mask": torch.zeros(40, 40).masked_fill(~seen, -torch.inf).bfloat16()}
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), seen)
    with torch.inference_mode(), products.ManyRows():
        found = F.scaled_dot_product_attention(q, k, v, **how)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=0.01, atol=2e-3)
