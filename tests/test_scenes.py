"""Scenes must be what they say: the words, the pixels, the checker and what is held out agree.

Answers are verified by a second, plain implementation in this file, on the words of the question.
"""

import hashlib
import io
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from unimm.data import scenes as S
from unimm.data.places import drawing_steps
from unimm.data.scenes.language import NUMBERS, RELATION_PHRASES, plural
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.pipeline import BUNDLED

WORLDS = tuple(S.WORLDS)
NO_TRIPLE = ("single_object", "colors", "counting")
KINDS = [
    (split, task)
    for split in S.SPLITS
    for task in (None, *S.TASKS)
    if not (split == "triples" and task in NO_TRIPLE)
]


def sample(world, n, seed=0, split=None, task=None):
    """n scenes over all splits and tasks, or of the given one, as (scene, split, task)."""
    rng = np.random.default_rng(seed)
    kinds = [k for k in KINDS if split in (None, k[0]) and task in (None, k[1])]
    for i in range(n):
        split_, task_ = kinds[i % len(kinds)]
        yield S.sample_scene(world, rng, split=split_, task=task_), split_, task_


def degraded(pixels, rng):
    """Light blur, noise, a colour shift and JPEG, as a picture is after a VQ tokenizer (30 dB)."""
    blur = ImageFilter.GaussianBlur(0.6 * len(pixels) / 64)
    x = np.asarray(Image.fromarray(pixels).filter(blur)) + rng.normal(0, 3, pixels.shape)
    file = io.BytesIO()
    x = (x + rng.normal(0, 3, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(x).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


# ---------------------------------------------------------------------------- held out


def test_an_eighth_is_held_out_and_every_word_is_seen():
    for world in map(S.get_world, WORLDS):
        held, seen = world.pairs[True], world.pairs[False]
        assert abs(len(held) / len(held + seen) - 0.12) < 0.01
        for names, i in ((world.shapes, 0), (world.colors, 1)):
            counts = Counter(pair[i] for pair in seen)
            assert all(counts[name] >= 4 for name in names)
    objects = [S.Object(s, c, "small", 0, 0) for s, c in S.get_world("scenes").pairs[False]]
    triples = [
        S.held_out_triple(a, r, b)
        for a in objects
        for b in objects
        for r in ("left of", "above")
        if (a.shape, a.color) != (b.shape, b.color)
    ]
    assert abs(np.mean(triples) - 0.12) < 0.01


def test_held_out_triples_have_no_direction_and_need_two_seen_objects():
    rng = np.random.default_rng(0)
    pairs = S.get_world("scenes").pairs
    for _ in range(500):
        a, b = (
            S.Object(*pairs[False][rng.integers(len(pairs[False]))], "small", 0, 0) for _ in "ab"
        )
        assert S.held_out_triple(a, "left of", b) == S.held_out_triple(b, "right of", a)
        assert S.held_out_triple(a, "below", b) == S.held_out_triple(b, "above", a)
        assert not S.held_out_triple(a, "above", a)
        c = S.Object(*pairs[True][rng.integers(len(pairs[True]))], "small", 0, 0)
        assert not S.held_out_triple(a, "above", c)


def test_what_is_held_out_never_changes():
    """Models are trained on it, so a change would make every published figure wrong."""
    assert S.get_world("scenes-mini").pairs[True] == (
        ("circle", "purple"),
        ("square", "blue"),
        ("triangle", "red"),
        ("star", "yellow"),
    )
    world = S.get_world("scenes")
    objects = [S.Object(s, c, "small", 0, 0) for s, c in world.pairs[False][::5]]
    held = [S.held_out_triple(a, r, b) for a in objects for r in S.RELATIONS for b in objects]
    digest = hashlib.sha256(repr((world.pairs[True], held)).encode()).hexdigest()
    assert digest[:16] == "b521ed9880eccb71"


@pytest.mark.parametrize("world", WORLDS)
def test_splits(world):
    want = {"train": None, "pairs": "pairs", "triples": "triples"}
    for scene, split, _ in sample(world, 1500):
        assert S.is_held_out(scene) == want[split]


def test_nothing_held_out_is_named_in_training():
    """Not even to deny it: a model would learn that the answer is always no."""
    held = {f"{c} {s}" for s, c in S.get_world("scenes").pairs[True]}
    held |= {f"{c} {plural(s)}" for s, c in S.get_world("scenes").pairs[True]}
    rng = np.random.default_rng(1)
    relations = [(r, p) for r, ps in RELATION_PHRASES.items() for p in ps]
    for world in WORLDS:
        for scene, _, _ in sample(world, 400, split="train"):
            instruction, edited = S.edits(world, scene, rng)
            assert S.is_held_out(edited) is None
            asked = S.questions(scene, rng, world)
            texts = [S.describe(scene), S.prompt(scene, rng), instruction, *(q.text for q in asked)]
            for text in texts + [q for q, _ in S.text_dialogue(scene, rng)]:
                assert not any(re.search(rf"\b{h}\b", text) for h in held), text
            for q in asked:
                if q.type == "position" and q.yes_no:
                    a, r, b = position_of(q.text, scene, relations)
                    assert not S.held_out_triple(a, r, b), q.text


def test_every_word_is_seen_in_training():
    rng = np.random.default_rng(2)
    words = set()
    for scene, _, _ in sample("scenes", 1500, split="train"):
        words |= set(re.findall(r"[a-z0-9]+", f"{S.describe(scene)} {S.prompt(scene, rng)}"))
    world = S.get_world("scenes")
    expected = {*world.shapes, *map(plural, world.shapes), *world.colors, *world.backgrounds}
    expected |= {*S.SIZES, *NUMBERS[2:], *"2345", "left", "right", "above", "below", "under"}
    assert expected <= words


# ---------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("world", WORLDS)
def test_tasks_give_the_scenes_they_need(world):
    for scene, split, task in sample(world, 1200, seed=3):
        objects = scene.objects
        looks = {(o.shape, o.color) for o in objects}
        if task in ("single_object", "colors"):
            assert len(objects) == 1
        elif task == "counting":
            assert len(objects) >= 2 and len(looks) == 1
        elif task is not None:
            a, b = objects
            assert task == "position" or a.shape != b.shape
            assert task != "color_attr" or a.color != b.color
            if task == "position":
                relation = S.main_relation(a, b)
                assert relation
                assert split != "triples" or S.held_out_triple(a, relation, b)


@pytest.mark.parametrize("world", WORLDS)
def test_objects_keep_their_distance(world):
    w = S.get_world(world)
    counts = Counter()
    for scene, _, _ in sample(world, 800, seed=4, task=None):
        counts[len(scene.objects)] += 1
        for i, a in enumerate(scene.objects):
            r = w.sizes[a.size] * a.scale
            assert min(a.x, a.y, 1 - a.x, 1 - a.y) * w.image_size > r * w.image_size + 0.8
            for b in scene.objects[:i]:
                gap = np.hypot(a.x - b.x, a.y - b.y) - r - w.sizes[b.size] * b.scale
                assert gap * w.image_size > (2.9 if world == "scenes" else 2.4)
    assert set(counts) == set(range(1, w.max_objects + 1))


def test_count_is_obeyed_and_nonsense_refused():
    rng = np.random.default_rng(0)
    for n in range(1, 6):
        assert len(S.sample_scene("scenes", rng, count=n).objects) == n
    assert len(S.sample_scene("scenes", rng, task="counting", count=5).objects) == 5
    for bad in (
        {"split": "test"},
        {"task": "poetry"},
        {"count": 6},
        {"count": 0},
        {"task": "colors", "count": 2},
        {"task": "counting", "split": "triples"},
    ):
        with pytest.raises(ValueError):
            S.sample_scene("scenes", rng, **bad)
    with pytest.raises(ValueError):
        S.sample_scene("atlantis", rng)


def test_arrays_keep_everything():
    for world in WORLDS:
        for scene, _, _ in sample(world, 300, seed=5):
            array = S.to_array(scene)
            assert array.shape == (S.ARRAY_LENGTH,) and array.dtype == np.float32
            assert S.from_array(array) == scene


def test_relations():
    a = S.Object("circle", "red", "small", 0.2, 0.5)
    b = S.Object("star", "blue", "small", 0.8, 0.6)
    assert S.relation_holds(a, "left of", b) and S.relation_holds(b, "right of", a)
    assert not S.relation_holds(a, "right of", b) and not S.relation_holds(a, "above", b)
    assert S.main_relation(a, b) == "left of" and S.main_relation(b, a) == "right of"
    c = replace(b, y=0.99)  # diagonal: two relations, none of them the main one
    assert S.relation_holds(a, "left of", c) and S.relation_holds(a, "above", c)
    assert S.main_relation(a, c) is None
    assert not S.relation_holds(a, "left of", replace(a, x=0.24))  # within the margin


# ---------------------------------------------------------------------------- drawing


def test_drawing_is_the_same_everywhere_and_at_every_size():
    code = (
        "import hashlib, numpy as np; from unimm.data import scenes as S;"
        "r = np.random.default_rng(7); h = hashlib.sha256()\n"
        "for _ in range(5):\n"
        "    s = S.sample_scene('scenes', r); h.update(S.render(s).tobytes())\n"
        "    h.update(repr((S.questions(s, r), S.edits('scenes', s, r))).encode())\n"
        "import sys; assert 'torch' not in sys.modules; print(h.hexdigest())"
    )
    environments = [{"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)} for seed in "12"]
    runs = [subprocess.check_output([sys.executable, "-c", code], env=e) for e in environments]
    assert runs[0] == runs[1]
    for scene, _, _ in sample("scenes", 10, seed=6):
        small, large = S.render(scene), S.render(scene, 256)
        assert small.shape == (64, 64, 3) and small.dtype == np.uint8
        assert large.shape == S.render(scene, "scenes", 256).shape == (256, 256, 3)
        reduced = np.asarray(Image.fromarray(large).reduce(4)).astype(int)
        assert np.abs(reduced - small).mean() < 1.5


def test_jitter_shows_and_colors_are_the_named_ones():
    o = S.Object("circle", "red", "large", 0.5, 0.5)
    plain = S.render(S.Scene((o,), "gray"))
    world = S.get_world("scenes")
    assert tuple(plain[32, 32]) == world.colors["red"]
    assert tuple(plain[0, 0]) == world.backgrounds["gray"]
    for change in ({"scale": 1.08}, {"tint": (-8, 8, 8)}, {"x": 0.52}):
        assert not np.array_equal(plain, S.render(S.Scene((replace(o, **change),), "gray")))


# ---------------------------------------------------------------------------- language


@pytest.mark.parametrize("world", WORLDS)
def test_every_sentence_is_understood_and_true(world):
    rng = np.random.default_rng(8)
    for scene, _, task in sample(world, 800, seed=8):
        sentences = [S.describe(scene), S.prompt(scene, rng), S.prompt(scene, rng)]
        sentences += [S.task_prompt(scene, task, rng)] if task else []
        for sentence in sentences:
            spec = S.parse(sentence)
            assert spec is not None and S.satisfies(scene, spec), sentence
            assert sentence == sentence.lower()
        assert S.complete(S.parse(sentences[0]), scene)


@pytest.mark.parametrize(
    "text, groups, relations, background",
    [
        ("A red circle left of a blue star.",
         [(1, "red", "circle"), (1, "blue", "star")], "left of", 0),
        ("three red circles", [(3, "red", "circle")], None, 0),
        ("Draw 3 red discs, please", [(3, "red", "circle")], None, 0),
        ("a ring on a grey background", [(1, None, "ring")], None, "gray"),
        ("the background is mint and there is an arrow", [(1, None, "arrow")], None, "mint"),
        ("one heart, two black moons and a cross on white",
         [(1, None, "heart"), (2, "black", "moon"), (1, None, "cross")], None, "white"),
        ("a star and a ring. the star is underneath the ring",
         [(1, None, "star"), (1, None, "ring")], "below", 0),
        ("a pair of violet diamonds", [(2, "purple", "diamond")], None, 0),
    ],
)  # fmt: skip
def test_parse_by_hand(text, groups, relations, background):
    spec = S.parse(text)
    assert [(n, color, shape) for n, _, color, shape in spec.groups] == groups
    assert spec.relations == (((0, relations, 1),) if relations else ())
    assert spec.background == (background or None)


@pytest.mark.parametrize(
    "text",
    ["", "hello", "a red", "a red dog", "circle left of", "a red and a blue star", "some stars",
     "left of a star", "a star on a white background on a gray background", "the", "six stars"],
)  # fmt: skip
def test_parse_refuses_to_guess(text):
    assert S.parse(text) is None


def test_satisfies_is_strict():
    a = S.Object("circle", "red", "small", 0.2, 0.5)
    scene = S.Scene((a, replace(a, x=0.5), S.Object("star", "blue", "large", 0.8, 0.5)), "white")
    for text in ("two red circles and a blue star", "two circles left of a star",
                 "a circle, a red circle and a star",
                 "a large star and two small circles on white"):  # fmt: skip
        assert S.satisfies(scene, S.parse(text)), text
    for text in ("a red circle and a blue star", "three red circles", "two circles and two stars",
                 "two red circles", "two circles right of a star", "two circles and a small star",
                 "two circles and a star on a gray background",
                 "two blue circles and a star"):  # fmt: skip
        assert not S.satisfies(scene, S.parse(text)), text
    assert not S.complete(S.parse("two circles and a blue star on a white background"), scene)
    assert not S.complete(S.parse("two red circles and a blue star"), scene)
    two = S.Scene(scene.objects[1:], "white")
    assert S.complete(S.parse("a blue star right of a red circle on white"), two)
    assert not S.complete(S.parse("a blue star and a red circle on white"), two)


def test_describe_by_hand():
    a = S.Object("circle", "red", "small", 0.2, 0.5)
    b = S.Object("arrow", "orange", "large", 0.8, 0.5)
    assert S.describe(S.Scene((a,), "gray")) == "a small red circle on a gray background"
    assert S.describe(S.Scene((b, a), "gray")) == (
        "a red circle left of an orange arrow on a gray background"
    )
    below = replace(b, x=0.25, y=0.9)
    assert S.describe(S.Scene((below, a), "mint")) == (
        "a red circle above an orange arrow on a mint background"
    )
    three = S.Scene((b, a, replace(a, x=0.9, y=0.9)), "white")
    assert S.describe(three) == "two red circles and an orange arrow on a white background"


# ---------------------------------------------------------------------------- questions


def things(scene, words):
    """The objects that "small blue stars" or "red objects" means, by plain matching of words."""
    found = list(scene.objects)
    for word in words.split():
        if word in S.SIZES:
            found = [o for o in found if o.size == word]
        elif word in S.get_world("scenes").colors:
            found = [o for o in found if o.color == word]
        elif word not in ("objects", "object", "shapes", "things", "a", "an", "the"):
            found = [o for o in found if word in (o.shape, plural(o.shape))]
    return found


def position_of(text, scene, relations):
    """The objects and the relation of "is the red star left of the circle?"."""
    relation, words = max(
        ((r, p) for r, p in relations if f" {p} " in text), key=lambda x: len(x[1])
    )
    left, right = text.rstrip("?").split(f" {words} ")
    (a,), (b,) = things(scene, left.split(" ", 2)[2]), things(scene, right)
    return a, relation, b


def true_answer(q, scene):
    """The answer to any question, from its words and the scene alone."""
    text = q.text.rstrip("?.")
    relations = [(r, p) for r, ps in RELATION_PHRASES.items() for p in ps]
    yes = {True: "yes", False: "no"}
    if "background" in text:
        return yes[scene.background in text.split()] if q.yes_no else scene.background
    if q.yes_no and q.type == "existence":
        what = re.search(r"\ban? (.+?)(?: in the picture)?$", text.replace("does the picture", ""))
        return yes[bool(things(scene, what[1]))]
    if q.yes_no and q.type == "count":
        number, what = re.search(r"exactly (\w+) (.+?)(?: in the picture)?$", text).groups()
        return yes[len(things(scene, what)) == NUMBERS.index(number)]
    if q.yes_no and q.type in ("color", "size"):
        words = [w for w in text.split() if w not in ("is", "the", "of", "a", "one", "color")]
        return yes[bool(things(scene, " ".join(words)))]
    if q.yes_no and q.type == "position":
        a, relation, b = position_of(text, scene, relations)
        return yes[S.relation_holds(a, relation, b)]
    if q.yes_no:
        if "as many" in text:
            a, b = re.search(r"as many (.+) as (.+)", text).groups()
            return yes[len(things(scene, a)) == len(things(scene, b))]
        if " more " in text or " fewer " in text:
            how, a, b = re.search(r"(more|fewer) (.+) than (.+)", text).groups()
            n, m = len(things(scene, a)), len(things(scene, b))
            return yes[n > m if how == "more" else n < m]
        a, how, b = re.search(r"is the (.+) (larger|bigger|smaller) than the (.+)", text).groups()
        (a,), (b,) = things(scene, a), things(scene, b)
        return yes[
            (a.size, b.size) == (("small", "large") if how == "smaller" else ("large", "small"))
        ]
    if q.type == "count":
        what = re.search(
            r"(?:how many|count the|number of) (.+?)(?: are| do|$)",
            text.replace(" in the picture", ""),
        )
        return NUMBERS[len(things(scene, what[1]))]
    if q.type == "existence":
        (o,) = [o for o in scene.objects if o.color in text.split()]
        return o.shape
    if q.type == "color":
        return things(scene, re.search(r"the ((?:small |large )?\w+)(?: have)?$", text)[1])[0].color
    if q.type == "size":
        names = " ".join(w for w in text.split() if w not in ("small", "large"))
        shapes = "|".join(S.get_world("scenes").shapes)
        return things(scene, re.search(rf"the ((?:\w+ )?(?:{shapes}))\b", names)[1])[0].size
    if q.type == "comparison" and ("larger" in text or "bigger" in text):
        names = re.search(r"the (.+) or the (.+?)(?: larger)?$", text).groups()
        (large,) = [n for n in names if [o.size for o in things(scene, n)] == ["large"]]
        return large
    if q.type == "comparison":
        a, b = re.search(r"(?:more|,) (\w+) or (?:more )?(\w+)", text).groups()
        return a if len(things(scene, a)) > len(things(scene, b)) else b
    one, two = scene.objects
    if text.startswith("where"):
        (o,) = things(scene, re.search(r"the (.+?)(?: in the picture)?$", text)[1])
        other = two if o is one else one
        return f"{S.main_relation(o, other)} the {other.color} {other.shape}"
    (o,) = things(scene, text[text.rindex(" the ") + 5 :])
    other = two if o is one else one
    assert any(f" {p} the" in text for p in RELATION_PHRASES[S.main_relation(other, o)])
    return f"{'an' if other.color[0] == 'o' else 'a'} {other.color} {other.shape}"


@pytest.mark.parametrize("world", WORLDS)
def test_answers_are_right(world):
    rng = np.random.default_rng(9)
    kinds = Counter()
    for scene, _, _ in sample(world, 500, seed=9):
        for q in S.questions(scene, rng, world):
            assert q.answer == true_answer(q, scene), (q, S.describe(scene))
            kinds[q.type, q.yes_no] += 1
    assert {t for t, yes_no in kinds if yes_no} == set(S.QUESTION_TYPES)
    assert {t for t, yes_no in kinds if not yes_no} == set(S.QUESTION_TYPES)


def test_yes_and_no_come_in_pairs():
    rng = np.random.default_rng(10)
    first = Counter()
    for scene, _, _ in sample("scenes", 300, seed=10):
        found = S.yes_no_pairs(scene, rng)
        for i in range(0, len(found), 2):
            a, b = found[i], found[i + 1]
            assert {a.answer, b.answer} == {"yes", "no"}
            assert a.yes_no and b.yes_no and a.type == b.type and a.pair == b.pair == i // 2
            first[a.answer] += 1
    assert abs(first["yes"] / first.total() - 0.5) < 0.05
    assert all(not q.yes_no and q.pair is None for q in S.open_questions(scene, rng))


def test_text_dialogue_says_what_it_asks():
    rng = np.random.default_rng(11)
    for scene, _, _ in sample("scenes", 200, seed=11):
        for question, answer in S.text_dialogue(scene, rng):
            told, asked = question.split(". ", 1)
            assert S.satisfies(scene, S.parse(told)) and answer
            words = re.search(r"what color is the (\w+)\?", asked)
            if words and words[1] != "background":
                assert f"{answer} {words[1]}" in told


def test_normalize_answer():
    assert S.normalize_answer(" Two. ") == S.normalize_answer("2") == "two"
    assert S.normalize_answer("Left of the  blue star!") == "left of the blue star"


# ---------------------------------------------------------------------------- edits


@pytest.mark.parametrize("world", WORLDS)
def test_edits_change_exactly_one_thing(world):
    rng = np.random.default_rng(12)
    changes, w = Counter(), S.get_world("scenes")
    for before, _, _ in sample(world, 500, seed=12, split="train"):
        instruction, after = S.edits(world, before, rng)
        gone = [o for o in before.objects if o not in after.objects]
        new = [o for o in after.objects if o not in before.objects]
        words = instruction.split()
        assert after.objects and S.edit_holds(before, after, after)
        assert not S.edit_holds(before, before, after)
        if not gone and not new:
            assert before.background != after.background and after.background in words
            changes["background"] += 1
            continue
        assert before.background == after.background
        if gone and new:
            (a,), (b,) = gone, new
            fields = [f for f in vars(a) if getattr(a, f) != getattr(b, f)]
            assert len(fields) == 1 and getattr(b, fields[0]) in words
            changes[fields[0]] += 1
        else:
            assert len(gone + new) == 1
            changes["remove" if gone else "add"] += 1
            if new:
                assert {new[0].shape, new[0].color, new[0].size} <= set(words)
                moved = replace(new[0], x=1 - new[0].x)
                assert S.edit_holds(
                    before, S.Scene((*before.objects, moved), after.background), after
                )
        if gone:  # what is spoken of is this object and no other
            noun = f"(?:{'|'.join(w.shapes)})"
            said = re.search(rf"the ((?:small |large )?(?:\w+ )?{noun})\b", instruction)[1]
            meant = said.split(" the ")[-1]
            assert things(before, meant) == gone, instruction
    assert set(changes) == {"background", "color", "shape", "size", "remove", "add"}


@pytest.mark.parametrize("world", WORLDS)
def test_located_instructions_say_what_is_meant_and_where(world):
    """From the words and the scene before alone, the scene after is made again."""
    rng, kinds = np.random.default_rng(15), Counter()
    thing = r"(small|large) (\w+) (\w+)"
    for before, _, _ in sample(world, 400, seed=15, split="train"):
        after = S.edits(world, before, rng)[1]
        said, kind = S.located(before, after), S.edit_kind(before, after)
        kinds[kind] += 1
        if kind == "background":
            assert said == f"make the background {after.background}"
            continue
        verb, *named = re.match(rf"(make|remove|add) (?:the|a) {thing}\b", said).groups()
        if verb == "add":
            new = after.objects[-1]
            assert named == [getattr(new, n) for n in ("size", "color", "shape")]
            assert said.endswith(f" ({int(new.x * 8) + 1},{int(new.y * 8) + 1})")
            assert len(said.split()) == 6
            continue
        column, row = (int(n) for n in re.search(r"\((\d),(\d)\)", said).groups())
        (o,) = [
            o
            for o in before.objects
            if [o.size, o.color, o.shape] == named
            and column - 1 <= o.x * 8 <= column
            and row - 1 <= o.y * 8 <= row
        ]
        off = S.located(before, after, (1, -1))
        assert off == said.replace(f"({column},{row})", f"({min(column + 1, 8)},{max(row - 1, 1)})")
        left = [p for p in before.objects if p != o]
        if verb == "make":
            new = re.search(rf"\) a {thing}$", said).groups()
            made = replace(o, **dict(zip(("size", "color", "shape"), new, strict=True)))
            left.insert(before.objects.index(o), made)
        else:
            assert said.endswith(")")
        assert tuple(left) == after.objects
    assert set(kinds) == {*S.EDITS}


@pytest.mark.parametrize("world", WORLDS)
def test_a_layout_says_all_that_a_prompt_leaves_open(world):
    """Read again it is the scene, to within a place; things come in the order of the prompt."""
    thing = r"an? (small|large) (\w+) (\w+) \((\d),(\d)\)"
    scenes, rng = sample(world, 300, seed=16, split="train"), np.random.default_rng(16)
    for scene, _, _ in scenes:
        words = S.prompt(scene, rng)
        spec = S.parse(words)
        said = S.laid_out(scene, spec)
        found = re.findall(thing, said)
        looks = [(size, color, shape) for size, color, shape, _, _ in found]
        assert Counter(looks) == Counter((o.size, o.color, o.shape) for o in scene.objects)
        places = Counter((*look, int(c), int(r)) for *look, c, r in found)
        true = (
            (o.size, o.color, o.shape, int(o.x * 8) + 1, int(o.y * 8) + 1) for o in scene.objects
        )
        assert places == Counter(true)
        assert said.endswith(f" on a {scene.background} background")
        shapes = [shape for n, _, _, shape in spec.groups for _ in range(n)]
        assert [shape for *_, shape in looks] == shapes
        assert drawing_steps(said)[0] == f"a plain {scene.background} background"
        after = scene.objects[0]
        alone = replace(scene, objects=(after,))
        assert S.located(replace(scene, objects=()), alone) in drawing_steps(said)
        assert len(drawing_steps(said)) == 1 + len(scene.objects)
        other = replace(
            scene, background=next(b for b in S.WORLDS[world].backgrounds if b != scene.background)
        )
        if spec.background:
            with pytest.raises(ValueError, match="not what the prompt says"):
                S.laid_out(other, spec)
    assert drawing_steps("i only know simple scenes") == []


def test_edits_into_what_is_held_out():
    rng = np.random.default_rng(13)
    for scene, _, _ in sample("scenes", 30, seed=13, split="train", task="two_object"):
        assert S.is_held_out(S.edits("scenes", scene, rng, split="pairs")[1]) == "pairs"
    moved = replace(scene.objects[0], x=(scene.objects[0].x + 0.3) % 1)
    after = S.Scene(scene.objects, "gray")
    assert not S.edit_holds(scene, S.Scene((moved, scene.objects[1]), "gray"), after)


def test_misdirected_edits_do_the_same_to_another_object():
    rng, found = np.random.default_rng(14), Counter()
    for before, _, _ in sample("scenes", 400, seed=14, split="train"):
        after = S.edits("scenes", before, rng)[1]
        wrong = S.misdirected(before, after, rng)
        kind = S.edit_kind(before, after)
        if wrong is None:
            continue
        assert kind not in ("add", "background") and len(before.objects) > 1
        assert wrong.background == before.background and S.is_held_out(wrong) is None
        assert not S.edit_holds(before, wrong, after)
        meant = next(o for o in before.objects if o not in after.objects)
        gone = [o for o in before.objects if o not in wrong.objects]
        both = meant in gone
        assert len(gone) == 1 + both, (before, after, wrong)
        new = [o for o in wrong.objects if o not in before.objects]
        if kind == "remove":
            assert not new
        else:
            name = {"recolor": "color", "reshape": "shape", "resize": "size"}[kind]
            (wanted,) = (getattr(o, name) for o in after.objects if o not in before.objects)
            assert [getattr(o, name) for o in new] == [wanted] * len(gone)
            assert [replace(o, **{name: 0}) for o in new] == [replace(o, **{name: 0}) for o in gone]
        found[kind, both] += 1
    assert len(found) == 8, found  # four kinds, of one object and of both


def test_what_is_not_there_is_asked_for_in_vain():
    """Of 300 scenes: nothing named is in the picture, and nothing held out is named in training."""
    kinds = Counter()
    for k in range(300):
        rng = np.random.default_rng(k)
        scene = S.sample_scene("scenes", rng)
        usual = {q.text for q in S.open_questions(scene, np.random.default_rng(k))}
        for q in S.absent_questions(scene, rng):
            assert q.text not in usual and not q.yes_no
            kinds[q.type] += 1
            words = set(re.findall(r"[a-z]+", q.text))
            colors = words & {*S.WORLDS["scenes"].colors}
            shapes = {s for s in S.WORLDS["scenes"].shapes if words & {s, S.language.plural(s)}}
            there = [o for o in scene.objects if {o.color} >= colors and {o.shape} >= shapes]
            assert (colors or shapes) and not there, (q, scene)
            assert not (colors and shapes and S.held_out_pair(*shapes, *colors)), q
            if q.type == "count":
                assert q.answer == "zero"
            else:
                assert q.answer == f"there is no {' '.join([*colors, *shapes])}"
    assert set(kinds) == {"count", "size", "position", "color"} and min(kinds.values()) >= 300


# ---------------------------------------------------------------------------- checker


def near_misses(spec, world, scene):
    """The spec with one thing changed, so that it is not true of the scene any more."""
    world = S.get_world(world)
    wrong = [replace(spec, background=b) for b in world.backgrounds if spec.background]
    wrong += [replace(spec, relations=((i, S.world.OPPOSITE[r], j),)) for i, r, j in spec.relations]
    for k, (n, size, color, shape) in enumerate(spec.groups):
        changed = [(m, size, color, shape) for m in (n - 1, n + 1) if m]
        changed += [(n, s, color, shape) for s in S.SIZES if size]
        changed += [(n, size, c, shape) for c in world.colors if color]
        changed += [(n, size, color, s) for s in world.shapes]
        for group in changed:
            groups = (*spec.groups[:k], group, *spec.groups[k + 1 :])
            wrong.append(replace(spec, groups=groups))
    return [w for w in wrong if not S.satisfies(scene, w)]


@pytest.mark.parametrize(
    ("world", "quality", "least"),
    [
        ("scenes", "clean", 0.995),
        ("scenes", "degraded", 0.98),
        ("scenes", "decoded", 0.93),  # what the bundled image tokenizer leaves of a picture
        ("scenes-mini", "clean", 0.995),
        ("scenes-mini", "degraded", 0.98),
    ],
)
def test_the_checker_sees_what_is_there(world, quality, least):
    rng = np.random.default_rng(14)
    made = list(sample(world, N_CHECKER, seed=14))
    pixels = np.stack([S.render(scene, world) for scene, _, _ in made])
    if quality == "degraded":
        pixels = np.stack([degraded(p, rng) for p in pixels])
    if quality == "decoded":
        pixels = decoded(pixels)
    right, fooled, off, total = 0, 0, [], 0
    for (scene, _, task), found in zip(made, S.look(pixels, world), strict=True):
        prompts = [S.describe(scene), S.prompt(scene, rng)]
        prompts += [S.task_prompt(scene, task, rng)] if task else []
        specs = [S.parse(p) for p in prompts]
        right += all(S.satisfies(found, spec) for spec in specs)
        for spec in specs:
            misses = near_misses(spec, world, scene)
            misses = [misses[i] for i in rng.permutation(len(misses))[:12]]
            total += len(misses)
            fooled += sum(S.satisfies(found, miss) for miss in misses)
        if len(found.objects) == len(scene.objects):
            off += [
                min(np.hypot(o.x - f.x, o.y - f.y) for f in found.objects) for o in scene.objects
            ]
    print(f"{world} {quality}: right {right / len(made):.4f}, fooled {fooled}/{total}")
    assert right / len(made) >= least
    assert fooled / total <= 0.01
    assert np.mean(off) < 0.005


N_CHECKER = 2000


def decoded(pixels):
    """Pictures after a round trip through the bundled image tokenizer, which uses most codes."""
    tokenizer = ImageTokenizer.load(BUNDLED)
    made, used = [], set()
    with torch.inference_mode():
        for part in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(64):
            codes = tokenizer.encode(part.float() / 127.5 - 1)
            used.update(codes.flatten().tolist())
            back = tokenizer.decode(codes, (8, 8))
            made.append(((back.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    share = len(used) / tokenizer.config.codebook_size
    print(f"{share:.3f} of the codes used")
    assert share > 0.5
    return torch.cat(made).permute(0, 2, 3, 1).numpy()


def test_the_checker_works_at_other_sizes_and_one_by_one():
    for scene, _, _ in sample("scenes", 16, seed=15):
        spec = S.parse(S.describe(scene))
        for size in (64, 128, 256):
            assert S.check(S.render(scene, size), spec)
    assert isinstance(S.look(S.render(scene)), S.Scene)
    assert S.check(S.render(scene), S.describe(scene))
    with pytest.raises(ValueError):
        S.check(S.render(scene), "a purple dog")
    with pytest.raises(ValueError):
        S.look(np.zeros((64, 64, 3)))


def test_the_checker_rejects_what_is_no_shape():
    """An outline, a letter, a picture half of one colour, and noise specks (which do not count)."""
    paper = Image.new("RGB", (64, 64), "white")
    red = S.get_world("scenes").colors["red"]

    def found(draw):
        image = paper.copy()
        draw(ImageDraw.Draw(image))
        return [o.shape for o in S.look(np.asarray(image)).objects]

    assert found(lambda d: d.rectangle((20, 20, 42, 42), outline=red, width=2)) == ["unknown"]
    corner = [(20, 20), (40, 20), (40, 25), (26, 25), (26, 42), (20, 42)]
    assert found(lambda d: d.polygon(corner, fill=red)) == ["unknown"]
    assert found(lambda d: d.rectangle((20, 20, 22, 21), fill=red)) == []
    assert found(lambda d: d.rectangle((10, 10, 52, 52), fill=red)) == ["unknown"]

    def half(d):
        d.pieslice((20, 20, 42, 42), 0, 180, fill=red)
        d.pieslice((20, 20, 42, 42), 180, 360, fill=(34, 66, 224))

    assert found(half) == ["unknown"]
    assert found(lambda d: None) == []
