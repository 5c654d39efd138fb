"""Scenes in plain lower-case English: the caption a model learns, and what people would type.

`meaning.parse` understands every sentence made here; questions and edits use the same phrases.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .world import OPPOSITE, WORLDS, Object, Scene, held_out_pair, main_relation

NUMBERS = ("zero", "one", "two", "three", "four", "five")

RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath", "lower than"),
}

_MAX_LOOKS = max(world.max_objects for world in WORLDS.values())

_OPENINGS = (
    "a picture of {}",
    "an image of {}",
    "a photo of {}",
    "a drawing of {}",
    "draw {}",
    "please draw {}",
    "can you draw {}?",
    "paint {}",
    "show me {}",
    "make a picture of {}",
    "i want a picture of {}",
    "there {be} {}",
    "a picture with {}",
    "generate an image of {}",
)
_BACKGROUNDS = (
    "{} on a {b} background",
    "{} against a {b} background",
    "{}, {b} background",
    "{} with a {b} background",
    "{} on {b}",
)

# What a phrase says of a group of objects: how many, size, colour (None: not said) and shape.
Group = tuple[int, str | None, str | None, str]


def describe(scene: Scene) -> str:
    """The canonical complete caption.

    Every object with its colour, equal ones as one group, from left to right (by the leftmost of a
    group); two single objects with a clear relation are told by it ("left of" or "above"); the size
    is said when there is one object only; the background ends the sentence.
    """
    objects = scene.objects
    pair = _related(scene)
    if pair:
        a, relation, b = pair
        if relation in ("right of", "below"):
            a, relation, b = b, OPPOSITE[relation], a
        first, second = (phrase((1, None, o.color, o.shape)) for o in (a, b))
        body = f"{first} {relation} {second}"
    else:
        groups = grouped(
            objects, lambda o: (o.size if len(objects) == 1 else None, o.color, o.shape)
        )
        body = enumerate_words([phrase(g) for g in groups])
    return f"{body} on a {scene.background} background"


def prompt(scene: Scene, rng: np.random.Generator, ordered: bool = False) -> str:
    """One of many ways to ask for this scene, see `express`.

    Names every object; may leave out sizes, background and colours, may state a true relation.
    """
    return express(
        scene,
        rng,
        size=bool(rng.random() < 0.4),
        color=pick((0.0, 0.5, 0.5, *[1.0] * 7), rng),
        background=bool(rng.random() < 0.4),
        relation=bool(rng.random() < 0.6),
        ordered=ordered,
    )


def task_prompt(scene: Scene, task: str, rng: np.random.Generator) -> str:
    """The prompt with which a scene made for this task of GenEval is evaluated.

    Raises ValueError for an unknown task, or a scene without what the task speaks of.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    a = objects[0]
    if task == "single_object":
        return phrase((1, a.size, a.color, a.shape))
    if task == "colors":
        return phrase((1, None, a.color, a.shape))
    if task == "counting":
        return phrase((len(objects), None, a.color, a.shape))
    if task not in ("two_object", "position", "color_attr"):
        raise ValueError(f"no task {task!r}")
    if len(objects) != 2:
        raise ValueError(f"a {task} prompt needs two objects, not {len(objects)}")
    said = [phrase((1, None, o.color, o.shape)) for o in objects]
    if task == "color_attr":
        return " and ".join(said)
    if task == "position":
        relation = main_relation(*objects)
        if relation is None:
            raise ValueError("the two objects have no clear relation")
        return f"{said[0]} {relation} {said[1]}"
    colored = [held_out_pair(o.shape, o.color) for o in objects]
    if not any(colored):
        colored[int(rng.random() * 2)] = True
    groups = [
        (1, None, o.color if c else None, o.shape) for o, c in zip(objects, colored, strict=True)
    ]
    return " and ".join(map(phrase, groups))


def express(
    scene: Scene,
    rng: np.random.Generator,
    *,
    size: bool,
    color: float,
    background: bool,
    relation: bool,
    opening: bool = True,
    ordered: bool = False,
) -> str:
    """A random phrasing that says exactly the attributes asked for (a relation where one is clear).

    `color`: the share of looks whose colour is said. `opening`: whether it may begin with "draw ",
    "a picture of " and the like. `ordered`: objects without a relation are named in the order of
    `raster`, as a picture is drawn; else in any order.
    """
    looks = dict.fromkeys(map(_look, sorted(scene.objects, key=raster)))
    told = dict(zip(looks, rng.random(_MAX_LOOKS) < color, strict=False))  # draws as many always

    def key(o: Object) -> tuple:
        return o.size if size else None, o.color if told[_look(o)] else None, o.shape

    related = _related(scene) if relation else None
    frame = pick(_OPENINGS, rng) if opening and rng.random() < 0.6 else "{}"
    digits = bool(rng.random() < 0.25)
    if related:
        a, name, b = related
        if rng.random() < 0.5:
            a, name, b = b, OPPOSITE[name], a
        first, second = (phrase((1, *key(o)), digits=digits) for o in (a, b))
        words = pick(RELATION_PHRASES[name], rng)
        count = 1
        verb = " is" if frame == "{}" and rng.random() < 0.25 else ""
        body = f"{first}{verb} {words} {second}"
    else:
        groups = grouped(scene.objects, key, raster)
        shuffled = [groups[i] for i in rng.permutation(len(groups))]
        groups = groups if ordered else shuffled
        count = groups[0][0]
        body = _joined([phrase(g, digits=digits) for g in groups], rng)
    if background:
        form = pick(_BACKGROUNDS, rng)
        if frame == "{}" and rng.random() < 0.15:
            form = "on a {b} background, {}"
        body = form.format(body, b=scene.background)
    return frame.format(body, be="is" if count == 1 else "are")


# ---------------------------------------------------------------------------- phrases


def phrase(group: Group, *, digits: bool = False, article: bool = True) -> str:
    """In words: "a small green ring", "three green rings"; without the article "green ring"."""
    count, size, color, shape = group
    words = " ".join(w for w in (size, color, shape if count == 1 else plural(shape)) if w)
    if count > 1:
        return f"{count if digits else NUMBERS[count]} {words}"
    return with_article(words) if article else words


def with_article(words: str) -> str:
    vowel = words[0] in "aeiou" or words.startswith("hour")
    return f"{'an' if vowel else 'a'} {words}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith(("s", "x")) else "s")


def enumerate_words(words: list[str]) -> str:
    """In one list: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def grouped(
    objects: tuple[Object, ...],
    key: Callable[[Object], tuple],
    by: Callable[[Object], Any] = lambda o: o.x,
) -> list[Group]:
    """Objects of equal `key` (size, colour, shape) as groups, by their first (leftmost) member."""
    counts: dict[tuple, int] = {}
    for o in sorted(objects, key=by):
        counts[key(o)] = counts.get(key(o), 0) + 1
    return [(n, *k) for k, n in counts.items()]


def pick(options: tuple | list, rng: np.random.Generator):
    """One of the options; twenty times faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def raster(o: Object) -> tuple[int, float]:
    """The order in which a picture of 8 x 8 codes begins its objects: row by row, from the left."""
    return int(8 * (o.y - WORLDS["scenes"].sizes[o.size] * o.scale)), o.x


def _look(o: Object) -> tuple[str, str]:
    return o.shape, o.color


def _related(scene: Scene) -> tuple[Object, str, Object] | None:
    """Two single objects that differ, with the relation between them, if it is clear."""
    if len(scene.objects) != 2:
        return None
    a, b = scene.objects
    relation = main_relation(a, b)
    return (
        None if relation is None or (a.shape, a.color) == (b.shape, b.color) else (a, relation, b)
    )


def _joined(words: list[str], rng: np.random.Generator) -> str:
    if len(words) == 2:
        return pick((" and ", " and ", " next to ", ", ", " with ", " beside "), rng).join(words)
    form = rng.random()
    if len(words) == 1 or form < 0.5:
        return enumerate_words(words)
    if form < 0.7:
        return f"{', '.join(words[:-1])}, and {words[-1]}"
    return (" and " if form < 0.85 else ", ").join(words)
