"""The unified model and the processor: slots, scores, losses, the unguided prompt."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model

from unimm.data.places import around, place
from unimm.data.processor import MARKED, assistant, user
from unimm.model.unified import CODE, PATCH, TEXT, Batch, UnifiedConfig, UnifiedModel


def drawing(processor, picture, text="a red circle"):
    return processor.encode([user(text), assistant(picture)])


def test_slots_of_a_drawing(tiny, picture):
    _, processor = tiny
    t = processor.template
    s = drawing(processor, picture, "ab")
    words = processor.words("ab")
    assert s.ids[: 3 + len(words)].tolist() == [t.bos, t.user, *words, t.end_of_turn]
    codes = processor.codes(picture)
    begin = list(s.ids).index(t.begin_image)
    assert (s.ids[begin + 1 : begin + 17] == codes).all()
    assert (s.kind[begin + 1 : begin + 17] == CODE).all()
    assert s.ids[begin + 17 :].tolist() == [t.end_image, t.end_of_turn]
    assert (s.score[:begin] == 0).all() and (s.score[begin:] == 1).all()  # and the first code


def test_patches_and_prompts_are_never_scored(picture):
    _, processor = tiny_model()
    s = processor.encode([user(picture, "what?"), assistant("a dot")])
    assert (s.score[s.kind == PATCH] == 0).all() and (s.kind == PATCH).sum() == 16
    assert s.score.sum() == len(processor.words("a dot")) + 1


def test_the_first_code_is_learned_from_begin_image(tiny, picture):
    """The loss of the first code reaches the model through the begin-of-image slot alone."""
    model, processor = tiny
    batch = processor.collate([drawing(processor, picture)])
    first = int((batch.kind[0] == CODE).nonzero()[0])
    batch.score = torch.zeros_like(batch.score)
    batch.score[0, first] = 1
    x = model.embed(batch).detach().requires_grad_()
    hidden = model.decoder(x, batch.positions)
    logits = model.logits(hidden[0, first - 1], CODE, full=True)
    offset = model.config.decoder.vocab_size if model.config.pathway == "shared" else 0
    expected = F.cross_entropy(logits, batch.ids[0, first] + offset)
    assert torch.isclose(model(batch).loss, expected)
    (gradient,) = torch.autograd.grad(expected, x)
    assert gradient[0, first - 1].abs().sum() > 0 and gradient[0, first:].abs().sum() == 0


def test_loss_is_the_weighted_mean_over_scored_slots(tiny, picture):
    model, processor = tiny
    samples = [drawing(processor, picture), processor.encode([user("hi"), assistant("yes")])]
    batch = processor.collate(samples)
    weights = {"text": 2.0, "code": 0.5}
    hidden = model.decoder(model.embed(batch), batch.positions)
    top, bottom = 0.0, 0.0
    for row in range(2):
        for slot in range(1, batch.ids.shape[1]):
            if batch.score[row, slot]:
                kind = int(batch.kind[row, slot])
                logits = model.logits(hidden[row, slot - 1], kind, full=True)
                shared = model.config.pathway == "shared" and kind == CODE
                offset = model.config.decoder.vocab_size if shared else 0
                w = weights["code" if kind == CODE else "text"]
                top += w * float(F.cross_entropy(logits, batch.ids[row, slot] + offset))
                bottom += w
    output = model(batch, weights)
    assert batch.weight(weights) == bottom
    assert float(output.loss) == pytest.approx(top / bottom, rel=1e-5)
    assert output.nats["code"][1] == 16


def test_padding_changes_nothing(tiny, picture):
    model, processor = tiny
    short = processor.encode([user("hi"), assistant("yes")])
    long = drawing(processor, picture)
    alone = (
        model(processor.collate([short]), total=1.0).loss
        + model(processor.collate([long]), total=1.0).loss
    )
    together = model(processor.collate([short, long]), total=1.0).loss
    assert torch.isclose(alone, together, rtol=1e-5)


def test_the_unguided_prompt_hides_words_and_nothing_else(picture):
    _, processor = tiny_model()
    s = processor.encode([user(picture, "make it red")], "image")
    u = processor.unguided(s)
    changed = s.ids != u.ids
    assert changed.sum() == len(processor.words("make it red"))
    assert (u.ids[changed] == processor.template.pad).all()
    assert len(u) == len(s) and u.images == s.images and (u.kind == s.kind).all()


def test_what_is_redrawn_is_alone_learned_and_the_rest_kept(picture):
    _, processor = tiny_model()
    codes = processor.codes(picture)
    redrawn = around("the dot (8,1)", processor.grid)
    assert 0 < redrawn.sum() < 16
    part = {"image": picture, "view": ["patches", "codes"]}
    plain, asked = [user("a", part)], [user("a", {**part, "redrawn": redrawn.tolist()})]
    answer = assistant({"codes": codes[::-1].copy(), "redrawn": redrawn})
    whole, part_of = processor.encode([*plain, answer]), processor.encode([*asked, answer])
    assert (whole.ids == part_of.ids).all() and (whole.kind == part_of.kind).all()
    drawn = (part_of.kind == CODE) & (part_of.score > 0)
    assert (part_of.ids[drawn] == codes[::-1][redrawn]).all()
    assert part_of.score.sum() == redrawn.sum() + 3 and part_of.score.max() == 1  # and three words
    begun = processor.encode(asked, "image")
    assert (begun.kept == np.where(redrawn, -1, codes)).all()
    assert (processor.unguided(begun).kept == begun.kept).all()
    marked = processor.encode([user("a", {**part, "redrawn": redrawn, "view": MARKED})], "image")
    shown, marks = np.split(np.flatnonzero(marked.kind == CODE)[0] + np.arange(33), [16])
    assert (marked.ids[shown] == codes).all() and (marked.kind[marks[1:]] == TEXT).all()
    signs = np.where(redrawn, processor.template.begin_image, processor.template.pad)
    assert (marked.ids[marks[1:]] == signs).all()
    assert (processor.unguided(marked).ids[marks[1:]] == signs).all() and not marked.images
    assert (marked.kept == begun.kept).all()
    for talk, ending in ((plain, "image"), (asked, "text"), ([*asked, user("b")], None)):
        assert processor.encode(talk, ending).kept is None
    with pytest.raises(ValueError, match="view holds codes, patches, redrawn, not"):
        processor.encode([user({**part, "view": ["pixels"]})], "image")
    with pytest.raises(ValueError, match="redrawn says of each of 16 codes"):
        processor.encode([user({**part, "redrawn": [True]})], "image")


@pytest.mark.parametrize(("grid", "count"), [((8, 8), 25), ((4, 4), 4), ((24, 24), 225)])
def test_around_a_place(grid, count):
    assert place(0.6, 0.3) == "(5,3)" and place(-0.1, 1.0) == "(1,8)"
    assert around("the red circle", grid) is None
    near = around(f"remove it {place(0.5, 0.49)} now", grid).reshape(grid)
    assert near.sum() == count
    corner = around("(8,1)", grid).reshape(grid)
    assert corner[0, -1] and not corner[-1, -1] and not corner[0, 0]
    assert (around("(1,8)", grid).reshape(grid) == corner.T).all()


def test_every_parameter_has_a_gradient_in_a_batch_of_one_kind(tiny, picture):
    model, processor = tiny
    model.train()
    for sample in (drawing(processor, picture), processor.encode([user("a"), assistant("b")])):
        model.zero_grad()
        model(processor.collate([sample])).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []


def test_codes_and_words_have_their_own_ways():
    decoupled, shared = UnifiedModel(tiny_config()), UnifiedModel(tiny_config("shared"))
    assert decoupled.decoder.embed_tokens.num_embeddings == 263
    assert shared.decoder.embed_tokens.num_embeddings == 263 + 32
    ids, kinds = torch.tensor([[5, 5]]), torch.tensor([[TEXT, CODE]])
    for model in (decoupled, shared):
        x = model.embed_ids(ids, kinds)
        assert not torch.allclose(x[0, 0], x[0, 1])
    assert torch.equal(
        shared.embed_ids(ids, kinds)[0, 1], shared.decoder.embed_tokens.weight[263 + 5]
    )
    part_of = torch.randn(1, 32)
    assert decoupled.logits(part_of, CODE).shape == (1, 32)
    assert shared.logits(part_of, CODE).shape == (1, 32)
    assert shared.logits(part_of, CODE, full=True).shape == (1, 295)


def test_code_rows_only_leaves_words_alone():
    model, processor = tiny_model("shared")
    model.train_code_rows_only()
    before = model.decoder.embed_tokens.weight.detach().clone()
    optimizer = torch.optim.AdamW([model.decoder.embed_tokens.weight], lr=0.1, weight_decay=0.0)
    batch = Batch(
        torch.tensor([[1, 2, 3, 4]]),
        torch.tensor([[TEXT, TEXT, CODE, CODE]]),
        torch.arange(4)[None],
        torch.tensor([[0.0, 1.0, 1.0, 1.0]]),
    )
    model(batch).loss.backward()
    optimizer.step()
    moved = (model.decoder.embed_tokens.weight != before).any(1)
    assert not moved[:263].any() and moved[263:].any()
    with pytest.raises(ValueError, match="shared"):
        tiny_model()[0].train_code_rows_only()


def test_packed_rows_give_the_loss_of_separate_rows(tiny, picture):
    model, processor = tiny
    if model.config.pathway == "decoupled":
        samples = [drawing(processor, picture), processor.encode([user(picture), assistant("b")])]
    else:
        samples = [drawing(processor, picture), processor.encode([user("a"), assistant("b")])]
    apart = sum(model(processor.collate([s]), total=1.0).loss for s in samples)
    rows = [processor.collate([s]) for s in samples]
    images = [image for row in rows for image in row.images]
    for image in images:
        image.start += len(samples[0])
    packed = Batch(
        torch.cat([r.ids for r in rows], 1),
        torch.cat([r.kind for r in rows], 1),
        torch.cat([r.positions for r in rows], 1),
        torch.cat([r.score for r in rows], 1),
        images,
        torch.cat([torch.full_like(r.ids, k) for k, r in enumerate(rows)], 1),
    )
    packed.score[0, len(samples[0])] = 0
    assert torch.isclose(model(packed, total=1.0).loss, apart, rtol=1e-5)


def test_seen_images_change_the_answer_and_only_theirs(picture):
    model, processor = tiny_model()
    a = processor.encode([user(picture, "what?")], "text")
    b = processor.encode([user(255 - picture, "what?")], "text")
    batch = processor.collate([a, b])
    both = model.decoder(model.embed(batch), batch.positions)[:, -1]
    one = processor.collate([a])
    alone = model.decoder(model.embed(one), one.positions)[:, -1]
    assert torch.allclose(both[:1], alone, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ],
)
def test_malformed_messages_are_refused(messages):
    _, processor = tiny_model()
    with pytest.raises(ValueError):
        processor.encode(messages)


def test_no_text_becomes_a_special_token():
    _, processor = tiny_model()
    t = processor.template
    for text in ("<bos>", "<image>", "</s>", "日本語 🦀", "\x00"):
        assert max(processor.words(text)) < t.bos
        assert processor.text(processor.words(text)) == text.strip()


def test_config_round_trip_and_checks():
    config = tiny_config()
    assert UnifiedConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="pathway"):
        tiny_config("other")
