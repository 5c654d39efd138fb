"""People's words put plainly, for a model that has read plain sentences alone."""

import numpy as np
import pytest
from conftest import tiny_model

from unimm.data.processor import assistant, user
from unimm.data.wording import plain, plain_prompt, plain_wish
from unimm.pipeline import UniMM


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("A RED CIRCLE.", "a red circle"),
        ("I would like a red circle", "a red circle"),
        ("I'd like to see two stars!", "two stars"),
        ("Hello, can you please draw a  red circle?", "draw a red circle"),
        ("could you make me a picture of two stars?", "a picture of two stars"),
        ("Create an image of a red star", "a picture of a red star"),
        ("make a green arrow", "draw a green arrow"),
        ("give me a red moon", "a red moon"),
        ("show me three blue hearts", "show me three blue hearts"),
        ("a gray hourglass", "a gray hourglass"),  # no word of it is a polite one
    ],
)
def test_prompts(said, meant):
    assert plain_prompt(said) == meant == plain_prompt(meant)


def test_questions_and_instructions():
    assert plain("What color is the circle") == "what color is the circle?"
    assert plain("Is there a star ?") == plain("is there a star.") == "is there a star?"
    assert plain("where: make it red") == "where: make it red"  # `places.WHERE` is no question
    assert plain("Describe the picture") == "describe the picture"
    assert plain_wish("Can you make the circle BLUE?") == "make the circle blue"
    assert plain_wish("now please remove the star.") == "remove the star"


@pytest.mark.parametrize("is_plain", [True, False])
def test_only_a_model_of_plain_sentences_has_its_input_changed(is_plain, monkeypatch):
    model = UniMM(*tiny_model(), {"plain": is_plain})
    asked, grey = [], np.full((16, 16, 3), 128, np.uint8)
    encode = model.processor.encode

    def noted(messages, answer=None):
        asked.append(messages[-1]["content"][-1].get("text"))
        return encode(messages, answer)

    monkeypatch.setattr(model.processor, "encode", noted)
    model.generate("A Star.")
    next(model.generate_stream("A Star."))
    model.ask(grey, "Is it RED")
    assert asked == (
        ["a star", "a star", "is it red?"] if is_plain else ["A Star."] * 2 + ["Is it RED"]
    )
    asked.clear()
    words = "Describe it"
    talk = model.chat([user(words)])
    assert set(asked) == {"describe it" if is_plain else words}
    assert talk[0]["content"][0]["text"] == words  # what is said stays as it was


def test_a_long_chat_forgets_its_oldest_turns(monkeypatch):
    model = UniMM(*tiny_model())
    talk = [m for k in range(40) for m in (user(f"number {k} of many"), assistant("so it is"))]
    asked = []
    requests = model._requests
    monkeypatch.setattr(model, "_requests", lambda t, *a: asked.append(t[0]) or requests(t, *a))
    assert len(model.chat([*talk, user("and then?")])) == len(talk) + 2
    kept = asked[0]
    assert (
        3 < len(kept) < len(talk)
        and kept[0]["role"] == "user"
        and kept == [*talk, kept[-1]][-len(kept) :]
    )
    size = len(model.processor.encode(kept, "text"))
    more = len(model.processor.encode([*talk, kept[-1]][-len(kept) - 2 :], "text"))
    room = model.processor.max_length - model.processor.codes_per_image
    assert size < room < more + 8  # with a picture behind it: no turn was left out needlessly
    with pytest.raises(ValueError, match="slots"):
        model.chat([user("long " * 1000)])
    for nothing in ("", "  ", []):
        with pytest.raises(ValueError, match="empty"):
            model.chat([*talk, {"role": "user", "content": nothing}])
