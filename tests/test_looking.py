"""Questions about a picture, of which the model has first said what is where."""

from collections import Counter

import numpy as np
import pytest
from conftest import tiny_model

from unimm.data.places import LOOK, THING
from unimm.data.processor import assistant, user
from unimm.data.scenes import (
    EDITS,
    Scene,
    alike,
    carried_out,
    edit_kind,
    edits,
    laid_out,
    located,
    read_out,
    sample_scene,
)
from unimm.inference.judging import as_asked, as_changed
from unimm.inference.sampling import Settings
from unimm.pipeline import AGAIN, UniMM

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


def test_a_chat_answers_as_ask_does(model):
    """Whoever drew or showed the picture, whatever was said before; of the last where it does not
    say which; about two at once it speaks as it sees them."""
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

    assert answer(shown) == model.ask(RED, "how many?")
    assert answer([user("draw a star"), *more]) == model.ask(BLUE, "a star?")
    assert answer([*shown, *more]) == model.ask(BLUE, "a star?") != answer(shown)
    both = [*shown, *more[:-1], user("are there stars in both?")]
    assert answer(both) == model.processor.text([5]).strip()
    Speaks.text, Speaks.codes, painted = [], [1], []
    model._painted = lambda *given: painted.append(given) or assistant("a picture")
    assert answer(shown) == "a picture" and painted


def test_layouts_are_read_as_they_were_said():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene("scenes", rng)
        said = laid_out(scene)
        read = read_out(said)
        assert alike(read, scene)
        assert sorted(THING.findall(laid_out(read))) == sorted(THING.findall(said))
    for words in ("", "a star", "on a white background", "a small red star (2,2) on a white"):
        assert read_out(words) is None


def test_instructions_are_carried_out_as_they_were_meant():
    rng, kinds = np.random.default_rng(0), Counter()
    while min(kinds[kind] for kind in EDITS) < 10:
        before = sample_scene("scenes", rng)
        after = edits("scenes", before, rng)[1]
        said, seen = located(before, after), laid_out(before)
        assert alike(carried_out(said, read_out(seen)), after), said
        assert as_changed(seen, said, laid_out(after)) and not as_changed(seen, said, seen)
        kinds[edit_kind(before, after)] += 1
    assert carried_out("make it red", before) is None
    assert carried_out("remove the small red star (1,1)", Scene((), "white")) is None
    assert as_changed(seen, "make it red", seen)  # who can tell?


def test_of_equal_things_the_nearest_is_meant():
    scene = read_out("a small red star (2,2) and a small red star (6,6) on a white background")
    left = carried_out("remove the small red star (5,6)", scene)
    assert laid_out(left) == "a small red star (2,2) on a white background"


def test_a_picture_that_reads_as_asked():
    seen = "a small red star (2,2) and a large blue ring (6,2) on a white background"
    assert as_asked("a red star left of a blue ring", seen)
    assert not as_asked("a red star right of a blue ring", seen)
    assert not as_asked("a red star", seen) and not as_asked("a red star", "a blur")
    assert as_asked("a castle by the sea", seen)  # who can tell?


def sees(model, *looks):
    """Let the model see this in the pictures that it looks at, try after try."""
    coming = iter(looks)
    model._look_at = lambda images: [next(coming) for _ in images]


RIGHT, WRONG = (f"a small {name} star (4,4) on a white background" for name in ("red", "blue"))


@pytest.mark.parametrize("looks, taken", [
    ([RIGHT], 0), ([WRONG, RIGHT], 1), ([WRONG, WRONG, RIGHT], 2), ([WRONG] * 3, 0),
])  # fmt: skip
def test_what_is_seen_to_be_wrong_is_drawn_again(model, looks, taken):
    """The first try that is seen to be right, or the first of all; edits and streams too."""
    model.sampling |= {"tries": 3, "try_temperature": 1.0}
    settings, talk = Settings(1.0, 0.0), [user("a red star")]
    tries = [model._draw([talk], settings, [7])[0]]
    for again in (1, 2):
        sampled = Settings(1.0, 1.0)
        tries += model._draw([talk], sampled, [7 + again * AGAIN])
    assert len({tuple(codes) for codes in tries}) == 3
    sees(model, *looks)
    assert model.draw_codes([talk], settings, 7) == [tries[taken]]
    assert model.draw_codes([talk], settings, 7, tries=1) == [tries[0]]
    sees(model, *looks)
    *_, last = model.generate_stream("a red star", guidance=1.0, temperature=0.0, seed=7)
    assert np.array_equal(last, model.pictures([tries[taken]])[0])


def test_only_what_is_wrong_is_drawn_again(model):
    """Of several pictures, each with its own seed; and an edit by what it was to change."""
    model.sampling |= {"tries": 2, "edit_located": True}
    ((edit,),) = model.edits([(RED, "make the star blue")])
    said, shown = edit["content"]
    edit["content"] = [{**said, "text": "make the small red star (4,4) a small blue star"}, shown]
    shown["seen"] = RIGHT
    talks = [[user("a red star")], [edit], [user("a red star")]]
    firsts, again = (
        model._draw(talks, Settings(), [3, 4, 5]),
        model._draw(talks[1:2], Settings(), [4 + AGAIN]),
    )
    sees(model, RIGHT, RIGHT, RIGHT, WRONG)
    assert model.draw_codes(talks, Settings(), 3) == [firsts[0], again[0], firsts[2]]
    model.sampling["look_first"] = False
    assert model.draw_codes(talks, Settings(), 3) == firsts


SEEN = "a small red star (2,2) and a large blue ring (6,2) on a white background"
TRUE, FALSE = (
    f"a {name} star left of a blue ring on a white background" for name in ("red", "blue")
)


@pytest.mark.parametrize("said, kept", [
    ([TRUE], TRUE), ([FALSE, FALSE, TRUE], TRUE), ([FALSE, "yes", FALSE], FALSE),
    (["a red star"], "a red star"), (["yes"], "yes"),
])  # fmt: skip
def test_a_description_that_is_not_what_was_seen_is_said_again(model, said, kept):
    """Three times in all, with other noise each; an answer that describes no picture is kept."""
    model.sampling |= {"tries": 3, "try_temperature": 1.0}
    coming, noise = iter(said), []

    def texts(talks, settings, seeds):
        if words_of(talks[0]) == [["a picture", LOOK]]:
            return [SEEN]
        noise.append((settings.text_temperature, *seeds))
        return [next(coming)]

    model._texts = texts
    assert model.caption(RED) == kept
    assert noise == [(0.0, 0), (1.0, 1), (1.0, 2)][: len(said)] and not list(coming)
    coming, noise = iter(said[:1]), []
    assert model.ask_all([(RED, "describe the picture")], tries=1) == said[:1] and len(noise) == 1
