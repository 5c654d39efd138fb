"""Questions about a scene with their exact answers: open ones, and yes/no pairs as MME has them.

A pair asks about the same fact twice, once true and once false, so that a model that always says
"yes" is right half of the time and never on both. About a training scene nothing held out is asked.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .language import NUMBERS, RELATION_PHRASES, express, phrase, pick, plural, with_article
from .meaning import Spec
from .references import clear_relations, named, refer, two_of
from .world import (
    OPPOSITE,
    RELATIONS,
    SIZES,
    WORLDS,
    Scene,
    World,
    get_world,
    held_out_pair,
    held_out_triple,
    is_held_out,
    relation_holds,
)

QUESTION_TYPES = ("existence", "count", "color", "position", "size", "comparison")


@dataclass(frozen=True)
class Question:
    """`type` is one of QUESTION_TYPES; the two of a yes/no pair share `pair` (None: open)."""

    type: str
    text: str
    answer: str
    yes_no: bool
    pair: int | None = None


def questions(
    scene: Scene, rng: np.random.Generator, world: str | World | None = None
) -> list[Question]:
    """Every open question and every yes/no pair about this scene, each in one random phrasing.

    `world` bounds what is asked for in vain; by default the smallest one that the scene fits in.
    """
    return open_questions(scene, rng) + yes_no_pairs(scene, rng, world)


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, digits as words, single spaces: for comparing answers."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(
        NUMBERS[int(w)] if w.isascii() and w.isdigit() and int(w) < 6 else w for w in words
    )


def text_dialogue(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions of all types, in random order, that need no picture: each begins with the scene in
    words.

    ("a red circle left of a blue star. what color is the star?", "blue")
    """
    asked = [
        q
        for q in questions(scene, rng)
        if len(scene.objects) == 2 or q.type != "position"  # else the places are not in the words
    ]
    everything = dict.fromkeys(("size", "color", "background", "relation"), True)
    told = [express(scene, rng, opening=False, **everything) for _ in range(3)]
    order = rng.permutation(len(asked))
    return [(f"{pick(told, rng)}. {asked[k].text}", asked[k].answer) for k in order]


def implied_questions(spec: Spec) -> list[tuple[str, str]]:
    """Questions and answers that hold of every picture of what was said, in plain phrasings.

    Whether things are there comes first: that they are is taken for granted by what follows.
    """
    things = dict.fromkeys(phrase((1, None, color, shape)) for _, _, color, shape in spec.groups)
    asked = [(f"is there {thing}?", "yes") for thing in things]
    total = sum(count for count, *_ in spec.groups)
    asked += [("how many objects are there?", NUMBERS[total])] if total < len(NUMBERS) else []
    shapes: Counter[str] = Counter()
    for count, _, _, shape in spec.groups:
        shapes[shape] += count
    asked += [(f"how many {plural(s)} are there?", NUMBERS[n]) for s, n in shapes.items()]
    for count, size, color, shape in spec.groups:
        name = shape if shapes[shape] == 1 else phrase((1, None, color, shape), article=False)
        if color and shapes[shape] == 1:
            asked.append((f"what color is the {shape}?", color))
        if size and count == 1 and (color or shapes[shape] == 1):
            asked.append((f"is the {name} small or large?", size))
    for i, relation, j in spec.relations:
        first, second = spec.groups[i], spec.groups[j]
        if first[0] == second[0] == 1:
            a, b = (phrase((1, None, *g[2:]), article=False) for g in (first, second))
            asked.append((f"is the {a} {relation} the {b}?", "yes"))
    if spec.background:
        asked.append(("what color is the background?", spec.background))
    return asked


# ---------------------------------------------------------------------------- open questions


def open_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions answered in words: "two", "red", "left of the blue star", "small", "stars"."""
    found: list[Question] = []

    def ask(kind: str, forms: tuple[str, ...], answer: str, **words: str) -> None:
        found.append(Question(kind, pick(forms, rng).format(**words), answer, False))

    objects = scene.objects
    shapes = Counter(o.shape for o in objects)
    for shape, n in shapes.items():
        ask("count", _HOW_MANY, NUMBERS[n], what=plural(shape))
    ask("count", _HOW_MANY, NUMBERS[len(objects)], what=pick(("objects", "shapes", "things"), rng))
    colors = Counter(o.color for o in objects)
    for color, n in colors.items():
        ask("count", _HOW_MANY, NUMBERS[n], what=f"{color} objects")
        if n == 1:
            (o,) = (o for o in objects if o.color == color)
            ask("existence", _WHICH_SHAPE, o.shape, color=color)
    ask(
        "color",
        ("what color is the background?", "which color is the background?"),
        scene.background,
    )
    for o in objects:
        bare = refer(scene, o, color=False)
        if bare:
            ask("color", _WHAT_COLOR, o.color, what=bare)
        name = refer(scene, o, size=False, rng=rng)
        if name:
            ask("size", _WHAT_SIZE, o.size, what=name)
    for a, relation, b in clear_relations(scene) if len(objects) == 2 else ():
        name, other = refer(scene, a, size=False, rng=rng), refer(scene, b, size=False, rng=rng)
        full = phrase((1, None, b.color, b.shape), article=False)
        ask("position", _WHERE, f"{relation} the {full}", what=name or "")
        words = pick(RELATION_PHRASES[relation], rng)
        answer = phrase((1, None, a.color, a.shape))
        ask("position", _WHAT_IS, answer, relation=words, what=other or "")
    for a, b in two_of(list(shapes), rng):
        if shapes[a] != shapes[b]:
            answer = plural(a if shapes[a] > shapes[b] else b)
            ask("comparison", _MORE_OF, answer, a=plural(a), b=plural(b))
    for a, b in two_of(named(scene), rng):
        if a.size != b.size:
            first, second = (refer(scene, o, size=False, rng=rng) or "" for o in (a, b))
            ask(
                "comparison",
                _WHICH_BIGGER,
                first if a.size == "large" else second,
                a=first,
                b=second,
            )
    return found


def absent_questions(
    scene: Scene, rng: np.random.Generator, world: str | World | None = None
) -> list[Question]:
    """Open questions about what is not there, in the forms of those about what is: "zero", "there
    is no star". None of them is in `open_questions`, which scores rest on."""
    world = get_world(_world_of(scene) if world is None else world)
    shapes, colors = ({getattr(o, name) for o in scene.objects} for name in ("shape", "color"))
    shape = pick([s for s in world.shapes if s not in shapes], rng)
    color = pick([c for c in world.colors if c not in colors], rng)
    asked: list[tuple[str, tuple[str, ...], str, str]]
    asked = [("count", _HOW_MANY, plural(shape), NUMBERS[0])]
    asked += [("count", _HOW_MANY, f"{color} objects", NUMBERS[0])]
    here = pick(scene.objects, rng)
    other = _absent(scene, world, here.shape, here.color, rng, train=is_held_out(scene) is None)
    names = [shape] + ([phrase((1, None, other[1], other[0]), article=False)] if other else [])
    for name in names:
        answer = f"there is no {name}"
        asked += [("size", _WHAT_SIZE, name, answer), ("position", _WHERE, name, answer)]
    asked.append(("color", _WHAT_COLOR, shape, f"there is no {shape}"))
    return [
        Question(kind, pick(forms, rng).format(what=what), answer, False)
        for kind, forms, what, answer in asked
    ]


_HOW_MANY = (
    "how many {what} are there?",
    "how many {what} do you see?",
    "how many {what} are in the picture?",
    "count the {what}.",
    "what is the number of {what}?",
)
_WHICH_SHAPE = (
    "what shape is the {color} object?",
    "which shape is {color}?",
    "what is the {color} object?",
    "what shape is {color}?",
)
_WHAT_COLOR = (
    "what color is the {what}?",
    "what is the color of the {what}?",
    "which color does the {what} have?",
    "which color is the {what}?",
)
_WHAT_SIZE = (
    "is the {what} small or large?",
    "is the {what} large or small?",
    "what size is the {what}?",
    "how big is the {what}?",
    "what is the size of the {what}?",
)
_WHERE = (
    "where is the {what}?",
    "where is the {what} in the picture?",
    "where do you see the {what}?",
)
_WHAT_IS = ("what is {relation} the {what}?", "which object is {relation} the {what}?")
_MORE_OF = (
    "are there more {a} or more {b}?",
    "are there more {a} or {b}?",
    "which are more, {a} or {b}?",
)
_WHICH_BIGGER = (
    "which is larger, the {a} or the {b}?",
    "which is bigger, the {a} or the {b}?",
    "is the {a} or the {b} larger?",
)

# ---------------------------------------------------------------------------- yes and no


def yes_no_pairs(
    scene: Scene, rng: np.random.Generator, world: str | World | None = None
) -> list[Question]:
    """Pairs of questions, one to answer "yes" and one "no", side by side in random order.

    The false one changes a single word of the true one, to one that occurs elsewhere in the picture
    where it can.
    """
    world = _world_of(scene) if world is None else world
    world = WORLDS[world] if isinstance(world, str) else world
    found: list[Question] = []
    for kind, forms, true, false in _facts(scene, world, rng):
        form = pick(forms, rng)
        pair = [
            Question(kind, form.format(**words), answer, True, len(found) // 2)
            for words, answer in ((true, "yes"), (false, "no"))
        ]
        found += pair if rng.random() < 0.5 else pair[::-1]
    return found


Fact = tuple[str, tuple[str, ...], dict[str, str], dict[str, str]]


def _facts(scene: Scene, world: World, rng: np.random.Generator) -> Iterator[Fact]:
    """(type, forms, words that make them true, words that make them false)."""
    train = is_held_out(scene) is None  # then nothing held out may be named, not even to deny it
    yield from _existence(scene, world, rng, train)
    yield from _counts(scene, world, rng)
    yield from _attributes(scene, world, rng, train)
    yield from _positions(scene, rng, train)
    yield from _comparisons(scene, rng)


def _existence(scene: Scene, world: World, rng: np.random.Generator, train: bool) -> Iterator[Fact]:
    for shape, color in dict.fromkeys((o.shape, o.color) for o in scene.objects):
        other = _absent(scene, world, shape, color, rng, train)
        if other:
            there, absent = (phrase((1, None, c, s)) for s, c in ((shape, color), other))
            yield "existence", _IS_THERE, {"what": there}, {"what": absent}
    shapes = [o.shape for o in scene.objects]
    shown, missing = pick(shapes, rng), pick([s for s in world.shapes if s not in shapes], rng)
    there, absent = (phrase((1, None, None, s)) for s in (shown, missing))
    yield "existence", _IS_THERE, {"what": there}, {"what": absent}


def _counts(scene: Scene, world: World, rng: np.random.Generator) -> Iterator[Fact]:
    forms = ("{be} {exact}?", "{be} {exact} in the picture?", "do you see {exact}?")

    def words(k: int, shape: str) -> dict[str, str]:
        what = shape if k == 1 else plural(shape)
        return {
            "be": "is there" if k == 1 else "are there",
            "exact": f"exactly {NUMBERS[k]} {what}",
        }

    for shape, n in Counter(o.shape for o in scene.objects).items():
        wrong = pick([k for k in (n - 1, n + 1) if 1 <= k <= world.max_objects], rng)
        yield "count", forms, words(n, shape), words(wrong, shape)


def _attributes(
    scene: Scene, world: World, rng: np.random.Generator, train: bool
) -> Iterator[Fact]:
    """Colours and sizes of objects, and the background."""
    for o in scene.objects:
        bare, name = refer(scene, o, color=False), refer(scene, o, size=False, rng=rng)
        near = [p.color for p in scene.objects]
        colors = [c for c in (*near, *near, *world.colors) if c != o.color]
        colors = [c for c in colors if not (train and held_out_pair(o.shape, c))]
        if bare and colors:
            forms = ("is the {what} {color}?", "is the color of the {what} {color}?")
            fixed = {"what": bare}
            yield "color", forms, fixed | {"color": o.color}, fixed | {"color": pick(colors, rng)}
        if name:
            forms = ("is the {what} {size}?", "is the {what} a {size} one?")
            fixed, wrong = {"what": name}, SIZES[o.size == SIZES[0]]
            yield "size", forms, fixed | {"size": o.size}, fixed | {"size": wrong}
    ground = pick([b for b in world.backgrounds if b != scene.background], rng)
    forms = ("is the background {b}?", "is there a {b} background?")
    yield "color", forms, {"b": scene.background}, {"b": ground}


def _positions(scene: Scene, rng: np.random.Generator, train: bool) -> Iterator[Fact]:
    forms = ("is the {a} {r} the {b}?", "is there {an} {r} the {b}?")
    for a, relation, b in clear_relations(scene):
        wrongs = [OPPOSITE[relation]] * 3 + [r for r in RELATIONS if r != relation]
        wrongs = [r for r in wrongs if not relation_holds(a, r, b)]
        wrongs = [r for r in wrongs if not (train and held_out_triple(a, r, b))]
        if wrongs:
            first, second = (refer(scene, o, size=False, rng=rng) or "" for o in (a, b))
            fixed = {"a": first, "an": with_article(first), "b": second}
            level = int(rng.random() * min(map(len, RELATION_PHRASES.values())))
            said, denied = (RELATION_PHRASES[r][level] for r in (relation, pick(wrongs, rng)))
            yield "position", forms, fixed | {"r": said}, fixed | {"r": denied}


def _comparisons(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    """Of numbers ("more", "fewer", "as many") and of sizes ("larger", "smaller")."""
    forms: tuple[str, ...] = ("are there {m} {a} {than} {b}?", "do you see {m} {a} {than} {b}?")
    shapes = Counter(o.shape for o in scene.objects)
    for a, b in two_of(list(shapes), rng):
        more = pick(("more", "fewer"), rng)
        words = {"a": plural(a), "b": plural(b), "m": more, "than": "than"}
        if shapes[a] == shapes[b]:
            yield "comparison", forms, words | {"m": "as many", "than": "as"}, words
        else:
            swapped = words | {"a": words["b"], "b": words["a"]}
            right = (more == "more") == (shapes[a] > shapes[b])
            yield "comparison", forms, *((words, swapped) if right else (swapped, words))
    forms = ("is the {a} {m} than the {b}?",)
    for a, b in two_of(named(scene), rng):
        if a.size != b.size:
            fixed = {k: refer(scene, o, size=False, rng=rng) or "" for k, o in (("a", a), ("b", b))}
            more = pick(("larger", "bigger"), rng)
            true, false = (more, "smaller") if a.size == "large" else ("smaller", more)
            yield "comparison", forms, fixed | {"m": true}, fixed | {"m": false}


_IS_THERE = (
    "is there {what}?",
    "is there {what} in the picture?",
    "do you see {what}?",
    "can you see {what}?",
    "does the picture show {what}?",
)


def _absent(
    scene: Scene, world: World, shape: str, color: str, rng: np.random.Generator, train: bool
) -> tuple[str, str] | None:
    """A look that is not in the scene and differs from this one in shape or in colour alone."""
    here = [(o.shape, o.color) for o in scene.objects]
    near = [(shape, c) for _, c in here] + [(s, color) for s, _ in here]
    far = [(shape, c) for c in world.colors] + [(s, color) for s in world.shapes]
    for options in (near, far) if rng.random() < 0.7 else (far,):
        options = [p for p in options if p not in here and not (train and held_out_pair(*p))]
        if options:
            return pick(options, rng)
    return None


def _world_of(scene: Scene) -> World:
    """The smallest world that has everything in this scene."""
    mini = WORLDS["scenes-mini"]
    fits = (
        len(scene.objects) <= mini.max_objects
        and scene.background in mini.backgrounds
        and all(o.shape in mini.shapes and o.color in mini.colors for o in scene.objects)
    )
    return mini if fits else WORLDS["scenes"]
