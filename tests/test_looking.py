"""Questions about a picture, of which the model has first said what is where."""

import numpy as np
import pytest
from conftest import tiny_model

from unimm.data.places import LOOK
from unimm.data.processor import assistant, user
from unimm.inference.sampling import Settings
from unimm.pipeline import UniMM

RED, BLUE = (np.full((32, 32, 3), color, np.uint8) for color in ((200, 30, 30), (30, 30, 200)))


@pytest.fixture
def model():
    """A tiny model that looks first; "asked" holds what words were asked for."""
    model = UniMM(*tiny_model(max_positions=512), {"look_first": True, "plain": True})
    texts, model.asked = model._texts, []

    def watched(talks, settings, seeds):
        model.asked += talks
        return texts(talks, settings, seeds)

    model._texts = watched
    return model


def words_of(talk):
    return [
        [part.get("text", "a picture") for part in message["content"]]
        for message in talk
        if message["role"] == "user"
    ]


def said_by(model, *talk):
    """The model's answer to a conversation as it is."""
    requests = model._requests([list(talk)], "text", [0])
    return model.processor.text(model.engine.run(requests, Settings())[0].text)


def test_an_answer_comes_from_what_is_where(model):
    look = said_by(model, user(RED, LOOK))
    expected = said_by(model, user(f"{look}. how many stars?"))
    assert model.ask(RED, "How many stars?") == expected
    blind = UniMM(model.model, model.processor, {"plain": True})
    assert blind.ask(RED, "how many stars?") == said_by(model, user(RED, "how many stars?"))
    assert blind.ask(RED, "how many stars?") != expected


def test_it_looks_once_at_each_picture(model):
    pairs = [(RED, "a star?"), (BLUE, "a ring?"), (RED, "how many?")]
    answers = model.ask_all(pairs)
    looks = [said_by(model, user(picture, LOOK)) for picture in (RED, BLUE)]
    assert looks[0] != looks[1]
    asked = [[["a picture", LOOK]]] * 2
    asked += [[[f"{looks[picture is BLUE]}. {words}"]] for picture, words in pairs]
    assert [words_of(talk) for talk in model.asked] == asked
    assert answers == [model.ask(*pair) for pair in pairs]


def test_who_asks_what_is_where_is_told_so(model):
    assert model.ask(RED, LOOK) == said_by(model, user(RED, LOOK))


def test_an_edit_is_located_after_it(model):
    model.sampling["edit_located"] = True
    ((said,),) = model.edits([(RED, "make the star blue")])
    looked, located = (words_of(talk) for talk in model.asked)
    assert looked == [["a picture", LOOK]]
    assert located == [["a picture", LOOK], ["where: make the star blue"]]
    look = said_by(model, user(RED, LOOK))
    place = [user(RED, LOOK), assistant(look), user("where: make the star blue")]
    assert said["content"][0]["text"] == said_by(model, *place)


def test_a_chat_of_one_picture_answers_as_ask_does(model):
    """Whoever drew or showed it, whatever was said before; of several it speaks as it sees them."""
    drawn = assistant({"image": BLUE, "codes": list(range(model.processor.codes_per_image))})
    shown, more = (
        [user("i see", RED), assistant("yes"), user("how many?")],
        [drawn, user("a star?")],
    )
    stream = model.engine.stream

    class Begins:  # it has not chosen yet
        codes, text, parts, done = [], [], [], False

    class Speaks(Begins):
        text, parts = [1], [("text", [5])]

    def begins(requests, settings):
        model.engine.stream = stream
        return iter([[Begins()], [Speaks()]])

    def answer(talk):
        model.engine.stream = begins
        (part,) = model.chat(talk)[-1]["content"]
        return part["text"]

    assert answer(shown) == model.ask(RED, "how many?") != answer([*shown, *more])
    assert answer([user("draw a star"), *more]) == model.ask(BLUE, "a star?")
    assert answer([*shown, *more]) == model.processor.text([5]).strip()
    Speaks.text, Speaks.codes, painted = [], [1], []
    model._painted = lambda *given: painted.append(given) or assistant("a picture")
    assert answer(shown) == "a picture" and painted
