"""People's words put plainly, for a model that has read plain sentences alone."""

import numpy as np
import pytest
from conftest import tiny_model

from unimm.data.processor import assistant, user
from unimm.data.scenes import (
    UNKNOWN_ANSWER,
    absent_questions,
    describe,
    not_there,
    prompt,
    questions,
    read_out,
    sample_scene,
    unknown_question,
)
from unimm.data.sources import about_both
from unimm.data.stores import sample_edit
from unimm.data.wording import (
    no_ground,
    of_which,
    plain,
    plain_prompt,
    plain_wish,
    unknown_words,
)
from unimm.pipeline import UniMM

SCENES_ALONE = {"plain": True, "world": "scenes", "look_first": True}
GREY = np.full((16, 16, 3), 128, np.uint8)


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
    assert plain_wish("Make the heart bigger!") == "make the heart large"
    assert plain("How many red things were there") == "how many red objects are there?"
    assert plain("Which colour is the shape?") == "which color is the shape?"
    assert plain("What do you see") == plain("describe it") == "describe the picture"


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
    words = "Look at it"
    talk = model.chat([user(words)])
    assert set(asked) == {"look at it" if is_plain else words}
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


def test_every_word_of_scenes_is_known_and_no_other():
    for k in range(300):
        rng = np.random.default_rng((61, k))
        scene = sample_scene("scenes", rng)
        _, instruction, after = sample_edit("scenes", rng, "train")
        said = [prompt(scene, rng), describe(scene), instruction]
        said += [q.text for q in questions(scene, rng) + absent_questions(scene, rng)]
        said += [words for words, _ in about_both([scene, after], rng)]
        assert not [words for text in said for words in unknown_words(text)]
    asked = {unknown_question(np.random.default_rng((62, k)))[0] for k in range(500)}
    assert sum(not unknown_words(words) for words in asked) <= len(asked) // 100  # "the number"
    for text, words in {
        "Draw a cat and a red star": ["cat"],
        "six red circles": ["six"],
        "what is 2+2?": ["2+2"],
        "I'd like two blue stars, please": [],
    }.items():
        assert unknown_words(text) == words


def test_what_a_wish_or_a_question_is_about():
    assert no_ground("make the background red") == no_ground("use a red background") == "red"
    assert no_ground("make the background gray") is no_ground("a red star on a mint background")
    scene = read_out("a small red star (2,2) and a large blue moon (6,6) on a white background")
    assert scene is not None
    assert not_there("remove the heart", scene) == "heart"
    assert not_there("make the red star a large red star", scene) is None
    assert not_there("turn the large star into a heart", scene) == "large star"
    assert not_there("paint the crescent green", scene) is None  # another word for a moon
    assert of_which("how many stars are there?", 2) == (1, "how many stars are there?")
    first = "how many stars are in the first picture?"
    assert of_which(first, 2) == (0, "how many stars are in the picture?")
    assert of_which("in the second picture, is it red?", 2) == (1, "is it red?")
    assert of_which("what is in the last image?", 3) == (2, "describe the picture")
    assert of_which("which picture has more objects?", 2)[0] is None
    assert of_which("what is in the third picture?", 2)[0] is None


def test_a_model_of_scenes_alone_says_so(monkeypatch, caplog):
    model = UniMM(*tiny_model(max_positions=512), SCENES_ALONE)
    seen = "a small red star (2,2) on a white background"
    monkeypatch.setattr(model, "_look_at", lambda images: [seen] * len(images))
    shown = user({"image": GREY}, "what is it?")
    for words, answer in {
        "Hi!": UNKNOWN_ANSWER,
        "draw a cat": UNKNOWN_ANSWER,
        "make the background red": UNKNOWN_ANSWER,
        "remove the heart": "there is no heart",
    }.items():
        assert model.chat([shown, assistant("a star"), user(words)])[-1] == assistant(answer), words
    assert model.chat([user("is there a star?")])[-1] == assistant("there is no picture")
    assert model.ask(GREY, "is there a cat?") == UNKNOWN_ANSWER
    model.generate("a cat")
    assert "simple scenes only, and not: cat" in caplog.text
    other = UniMM(model.model, model.processor, {"plain": True, "look_first": True})
    monkeypatch.setattr(other, "_look_at", lambda images: [seen] * len(images))
    assert other.unknown("a cat") == [] and other.ask(GREY, "is there a cat?") != UNKNOWN_ANSWER


def test_a_model_of_scenes_alone_draws_what_it_knows_whatever_it_declined(monkeypatch):
    model = UniMM(*tiny_model(max_positions=512), SCENES_ALONE)
    monkeypatch.setattr(model, "_look_at", lambda images: [""] * len(images))
    heard = []
    monkeypatch.setattr(model, "_recent", lambda talk: heard.append(talk) or talk)
    before = [user("a moon"), assistant("yes")]
    talk = model.chat([*before, user("draw a cat")])[2:]
    talk = model.chat([*before, *talk, user("draw a red star")])[2:]
    assert talk[1] == assistant(UNKNOWN_ANSWER) and talk[-1]["content"][0]["type"] == "image"
    assert heard[-1] == [*before, user("draw a red star")]  # what was declined it does not read
    talk = model.chat([user({"image": GREY}, "is there a cat?")])
    talk = model.chat([*talk, user("is there a star?")])
    assert "image" in heard[-1][0]["content"][0]  # but sees what was shown
    assert talk[-1] != assistant("there is no picture")
    with pytest.raises(ValueError, match="empty"):
        model.edit(GREY, None)


def test_a_question_goes_to_the_picture_that_it_names(monkeypatch):
    model = UniMM(*tiny_model(max_positions=512), SCENES_ALONE)

    class Speaks:
        codes, text, parts, done = [], [1], [], False

    monkeypatch.setattr(model.engine, "stream", lambda *a: iter([[Speaks()]]))
    monkeypatch.setattr(model, "ask", lambda image, question: f"{image.mean()}: {question}")
    shown = [user({"image": GREY}, {"image": GREY + 1}, "how many stars are there?")]
    assert model.chat(shown)[-1] == assistant("129.0: how many stars are there?")
    shown += [assistant("two"), user("How many stars were in the first picture?")]
    assert model.chat(shown)[-1] == assistant("128.0: how many stars are in the picture?")
