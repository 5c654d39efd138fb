"""Random scenes: natural mixes or the six tasks of GenEval, seen in training or held out of it.

Objects are placed and refused one by one, which keeps a scene far under a millisecond.
"""

import math
from dataclasses import replace
from itertools import repeat

import numpy as np

from unimm.data.places import PLACES

from .language import pick
from .world import (
    SPLITS,
    Object,
    Scene,
    World,
    breaks_triple,
    get_world,
    is_held_out,
    main_relation,
)

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_COUNTS = (0.25, 0.35, 0.18, 0.13, 0.09)  # how often a natural scene has 1, 2, ... objects
_SCALE, _ANGLE, _TINT = 0.08, 8.0, 8  # the jitter, plus or minus
_TRIES = 2000

Look = tuple[str, str]  # shape, colour


def sample_scene(
    world: str | World,
    rng: np.random.Generator,
    *,
    split: str = "train",
    task: str | None = None,
    count: int | None = None,
) -> Scene:
    """A random scene of this world.

    `split`: "train" has nothing held out anywhere, "pairs" at least one object of a held-out pair,
    "triples" seen pairs only and a held-out triple that holds. `task`: one of TASKS gives the scene
    that a GenEval prompt of this kind needs, None a natural mix. `count`: the number of objects,
    where the task leaves it open. Raises ValueError for what does not exist or cannot be had.
    """
    world = get_world(world)
    _refuse(world, split, task, count)
    for _ in range(_TRIES):
        looks = _looks(world, rng, split, task, count)
        scene = _place(world, rng, looks, split, task == "position")
        if scene is None:
            continue
        if split == "triples" and is_held_out(scene) != "triples":
            continue
        return scene
    raise ValueError(f"no scene found for split={split!r}, task={task!r}, count={count!r}")


def sample_placed(
    world: str | World,
    rng: np.random.Generator,
    *,
    task: str | None = None,
    count: int | None = None,
) -> Scene:
    """A random scene of the train split, each object upright in the middle of its place.

    So what is to be drawn follows from its words alone: "a small red star (6,6)". The places are
    those of `unimm.data.places`.
    """
    world = get_world(world)
    for _ in range(_TRIES):
        scene = sample_scene(world, rng, task=task, count=count)
        objects = tuple(map(upright, scene.objects))
        others = [[p for p in objects if p is not o] for o in objects]
        placed = replace(scene, objects=objects)
        apart = task != "position" or main_relation(*objects) is not None
        fitting = apart and all(map(fits, repeat(world), objects, others))
        if fitting and is_held_out(placed) is None:
            return placed
    raise ValueError(f"no scene of {count} objects in the middle of their places was found")


def upright(o: Object) -> Object:
    """The object without jitter in the middle of its place."""
    x, y = ((min(max(int(at * PLACES), 0), PLACES - 1) + 0.5) / PLACES for at in (o.x, o.y))
    return Object(o.shape, o.color, o.size, round(x, 4), round(y, 4))


def _refuse(world: World, split: str, task: str | None, count: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    if task is not None and task not in TASKS:
        raise ValueError(f"no task {task!r}: choose one of {', '.join(TASKS)}")
    least = 2 if task == "counting" else 1
    if count is not None and not least <= count <= world.max_objects:
        raise ValueError(f"count must be {least} to {world.max_objects}, not {count}")
    if task not in (None, "counting") and count not in (None, _task_count(task)):
        raise ValueError(f"a {task} scene has {_task_count(task)} objects, not {count}")
    if split == "triples" and (count == 1 or task in ("single_object", "colors", "counting")):
        raise ValueError("a held-out triple needs two different objects")


def _task_count(task: str | None) -> int:
    return 1 if task in ("single_object", "colors") else 2


# ---------------------------------------------------------------------------- what


def _looks(
    world: World, rng: np.random.Generator, split: str, task: str | None, count: int | None
) -> list[Look]:
    """The shapes and colours of a scene; with split "pairs" the first look is held out."""

    def look() -> Look:
        return pick(world.pairs[False], rng)

    first = pick(world.pairs[True], rng) if split == "pairs" else look()
    if task in ("single_object", "colors"):
        return [first]
    if task == "counting":
        return [first] * (count or 2 + int(rng.random() * (world.max_objects - 1)))
    if task is not None:
        while True:
            other = look()
            if other[0] != first[0] and (other[1] != first[1] or task == "two_object"):
                return [first, other]
            if task == "position" and other != first:
                return [first, other]
    n = count or _natural_count(world, rng, 2 if split == "triples" else 1)
    kind = rng.random()
    if kind < 0.2 and split != "triples":  # n equal ones
        return [first] * n
    if kind < 0.45 and n > 2:  # two groups of equal ones
        some = 1 + int(rng.random() * (n - 1))
        return [first] * some + [look()] * (n - some)
    return [first, *(look() for _ in range(n - 1))]


def _natural_count(world: World, rng: np.random.Generator, least: int) -> int:
    weights = _COUNTS[least - 1 : world.max_objects]
    u = rng.random() * sum(weights)
    for n, weight in enumerate(weights, least):
        u -= weight
        if u < 0:
            return n
    return world.max_objects


# ---------------------------------------------------------------------------- where


def _place(
    world: World, rng: np.random.Generator, looks: list[Look], split: str, position: bool
) -> Scene | None:
    """A scene of these looks, or None when there was no room or every place was held out."""
    n = len(looks)
    large = world.max_large[n - 1]
    sizes = sorted("large" if i < large and rng.random() < 0.5 else "small" for i in range(n))
    order = rng.permutation(n).tolist()
    placed: list[Object] = []
    for size, i in zip(sizes, order, strict=True):  # the large ones first: they are harder to place
        for _ in range(30):
            shape, color = looks[i]
            o = jitter(world, rng, shape, color, size)
            if not fits(world, o, placed):
                continue
            if split != "triples" and any(breaks_triple(o, other) for other in placed):
                continue
            if n == 2 and placed and not _clear(o, placed[0], position):
                continue
            placed.append(o)
            break
        else:
            return None
    return Scene(tuple(placed), pick(tuple(world.backgrounds), rng))


def jitter(world: World, rng: np.random.Generator, shape: str, color: str, size: str) -> Object:
    """An object of this look at a random place inside the picture, with random jitter."""
    u = rng.random(7).tolist()
    scale = round(1 + _SCALE * (2 * u[0] - 1), 4)
    edge = world.sizes[size] * scale + world.border
    x, y = (round(edge + v * (1 - 2 * edge), 4) for v in u[1:3])
    red, green, blue = (int(v * (2 * _TINT + 1)) - _TINT for v in u[4:])
    angle = round(_ANGLE * (2 * u[3] - 1), 4)
    return Object(shape, color, size, x, y, scale, angle, (red, green, blue))


def fits(world: World, o: Object, others: list[Object] | tuple[Object, ...]) -> bool:
    """Whether the object keeps its distance from the edge of the picture and from all others."""
    r = world.sizes[o.size] * o.scale
    edge = r + world.border - 1e-3  # places are rounded to 1e-4
    if not (edge <= o.x <= 1 - edge and edge <= o.y <= 1 - edge):
        return False
    for other in others:
        least = r + world.sizes[other.size] * other.scale + world.gap
        if math.hypot(o.x - other.x, o.y - other.y) < least:
            return False
    return True


def _clear(a: Object, b: Object, position: bool) -> bool:
    """Whether two objects are plainly beside, above or (no `position`) diagonal to each other."""
    if position and main_relation(a, b) is None:
        return False
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    angle = math.degrees(math.atan2(min(dx, dy), max(dx, dy)))
    return angle < 25 or (angle > 35 and not position)
