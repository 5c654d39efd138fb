"""Prompts of many things, drawn thing by thing as the model itself has laid them out in words."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from unimm.data.places import around
from unimm.data.processor import user
from unimm.inference.sampling import Settings
from unimm.model.unified import CODE, Batch
from unimm.pipeline import UniMM, edit_messages

SAID = {
    "two": "a small red star (2,2) and a large blue ring (7,7) on a white background",
    "one": "a small red star (2,2) on a white background",
    "none": "i only know simple scenes",
}
SAMPLING = {"guidance": 2.0, "temperature": 0.0, "edit_guidance": 1.5, "edit_temperature": 0.0}


@pytest.fixture(scope="module")
def model():
    """A tiny model whose layouts are those of `SAID`; "asked" holds the settings they came with."""
    model = UniMM(*tiny_model(max_positions=512), {**SAMPLING, "layout_from": 2})
    texts, model.asked = model._texts, []

    def said(talks, settings, seeds):
        words = [talk[0]["content"][0]["text"] for talk in talks]
        if not words[0].startswith("layout: "):
            return texts(talks, settings, seeds)
        model.asked.append((settings, seeds))
        return [SAID[text.removeprefix("layout: ")] for text in words]

    model._texts = said
    return model


def by_hand(model, seed, temperature=0.0):
    """The codes of "two" by requests for one step after the other."""
    settings = Settings(2.0, temperature)
    ground = [user("a plain white background")]
    codes = model._draw([ground], Settings(2.0, 0.0), [0])[0]
    for words in ("add a small red star (2,2)", "add a large blue ring (7,7)"):
        before, near = codes, around(words, model.processor.grid)
        shown = {"image": model.pictures([codes])[0], "codes": codes}
        codes = model._draw([edit_messages(shown, words, near)], settings, [seed])[0]
        assert (np.array(codes)[~near] == np.array(before)[~near]).all()
        assert temperature or codes != before
    return codes


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_it_is_drawn_thing_by_thing(model):
    picture = model.generate("two", seed=5)
    assert same(picture, model.pictures([by_hand(model, 5)])[0])
    settings, seeds = model.asked[-1]
    assert settings.text_temperature == 0.5 and seeds == [5]
    warm = model.generate("two", seed=6, temperature=1.0)
    assert same(warm, model.pictures([by_hand(model, 6, 1.0)])[0]) and not same(warm, picture)


def test_a_background_is_drawn_once_for_the_same_weights(model):
    model.generate("two", seed=1)
    drawn, draw = [], model._draw

    def watched(talks, settings, seeds):
        drawn.extend(talk[0]["content"][0]["text"] for talk in talks)
        return draw(talks, settings, seeds)

    model._draw = watched
    first = model.generate("two", seed=1)
    assert drawn and "a plain white background" not in drawn
    with torch.no_grad():
        model.model.image_head.out.weight.mul_(-1.0)
    other = model.generate("two", seed=1)
    assert drawn.count("a plain white background") == 1 and not same(first, other)
    with torch.no_grad():
        model.model.image_head.out.weight.mul_(-1.0)
    model._draw = draw
    assert same(model.generate("two", seed=1), first)


def test_what_is_not_many_things_is_drawn_as_ever(model):
    plain = UniMM(model.model, model.processor, SAMPLING)
    for words in ("one", "none"):
        assert same(model.generate(words, seed=3), plain.generate(words, seed=3))
    assert not same(model.generate("two", seed=3), plain.generate("two", seed=3))


def test_in_a_batch_each_is_what_it_is_alone(model):
    words = ["one", "two", "none", "two"]
    together = model.generate(words, n=2, seed=7)
    for k, picture in enumerate(together):
        assert same(picture, model.generate(words[k // 2], seed=7 + k)), k


def test_a_stream_shows_every_thing_as_it_comes(model):
    pictures = list(model.generate_stream("two", seed=5))
    assert len(pictures) == 3 and same(pictures[-1], model.generate("two", seed=5))
    assert not same(pictures[0], pictures[1])


def test_a_chat_draws_the_same(model):
    """Where the model begins to draw, and one in plain words does so by itself."""
    talker = UniMM(model.model, model.processor, {**model.sampling, "plain": True})
    talker._texts = model._texts
    asked = user("two")

    class Draws:
        codes, text, parts, done = [1], [], [], False

    stream = talker.engine.stream

    def begins(requests, settings):
        talker.engine.stream = stream
        return iter([[Draws()]])

    talker.engine.stream = begins
    answer = talker.chat([asked], seed=5)[-1]
    (part,) = answer["content"]
    assert part["codes"] == by_hand(model, 5)
    assert same(part["image"], model.generate("two", seed=5))


def test_codes_that_are_kept_are_not_drawn_one_by_one(model):
    """Before the first that is drawn they are read with the prompt, between two they go in with
    the first of these, and behind the last it ends."""
    given, redrawn = np.arange(16), np.isin(np.arange(16), (5, 6, 9))
    shown = {"codes": given, "view": ["codes"], "redrawn": redrawn}
    (request,) = model._requests([[user("x", shown)]], "image", [4])
    settings = Settings(1.0, 0.0)
    steps = [len(answer[0].codes) for answer in model.engine.stream([request], settings)]
    assert steps == [6, 7, 16]  # two between are fed with the one before them
    (answer,) = model.engine.run([request], settings)
    assert (np.array(answer.codes)[~redrawn] == given[~redrawn]).all()
    rows = model.processor.collate([request.sample])
    for at in np.flatnonzero(redrawn):
        codes = torch.tensor([answer.codes[:at]])
        ids, kind = torch.cat([rows.ids, codes], 1), torch.full_like(codes, CODE)
        kind, slots = torch.cat([rows.kind, kind], 1), torch.arange(ids.shape[1])[None]
        batch = Batch(ids, kind, slots, torch.zeros(ids.shape), [])
        with torch.inference_mode():
            hidden = model.model.decoder(model.model.embed(batch), slots)
            assert int(model.model.logits(hidden[:, -1], CODE).argmax()) == answer.codes[at]
