"""What a Scenes picture is made of: objects on a background, their relations, and what is held out.

Everything else in this package (drawing, sampling, language, checker) is derived from these types.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "pairs", "triples")

HELD_OUT = 0.12  # the share of pairs, and of triples, that no training may see
_SALT = 12369  # no shape and no colour has more than two held-out pairs in any world
MARGIN = 0.05  # GenEval's 0.1 * (width_a + width_b) at the mean size of a Scenes object


@dataclass(frozen=True)
class Object:
    """One shape in the picture. `x`, `y`: its centre in 0..1, y down; `size`: "small" or "large".

    The jitter makes no two pictures equal and is never spoken of: `scale` (a factor near 1),
    `angle` (degrees, clockwise) and `tint` (added to the RGB value of the colour).
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    scale: float = 1.0
    angle: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """Objects that do not touch, on a plain background (its name). The order has no meaning."""

    objects: tuple[Object, ...]
    background: str


@dataclass(frozen=True)
class World:
    """The kind of pictures: which names exist, how they look and how many objects fit.

    `sizes` gives the radius of the circle around an object, `gap` the least distance of two such
    circles and `border` their distance to the edge, all in picture widths. `max_large[n - 1]` is
    how many of n objects may be large, so that they always fit.
    """

    name: str
    image_size: int
    shapes: tuple[str, ...]
    colors: Mapping[str, tuple[int, int, int]]
    backgrounds: Mapping[str, tuple[int, int, int]]
    sizes: Mapping[str, float]
    max_large: tuple[int, ...]
    gap: float
    border: float

    @property
    def max_objects(self) -> int:
        return len(self.max_large)

    @cached_property
    def pairs(self) -> dict[bool, tuple[tuple[str, str], ...]]:
        """(shape, colour) pairs by whether they are held out."""
        every = [(shape, color) for shape in self.shapes for color in self.colors]
        return {
            held: tuple(p for p in every if held_out_pair(*p) is held) for held in (False, True)
        }


_COLORS = {
    "red": (236, 20, 30),
    "green": (24, 148, 52),
    "blue": (34, 66, 224),
    "yellow": (250, 222, 20),
    "purple": (128, 30, 168),
    "orange": (250, 130, 10),
    "black": (16, 16, 18),
    "pink": (255, 124, 190),
    "brown": (106, 60, 20),
    "cyan": (0, 200, 224),
}
_BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "beige": (240, 220, 176),
    "mint": (176, 236, 202),
}
_SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "cross",
    "heart",
    "ring",
    "moon",
    "arrow",
    "hourglass",
    "bolt",
)


WORLDS = {
    "scenes": World(
        name="scenes",
        image_size=64,
        shapes=_SHAPES,
        colors=_COLORS,
        backgrounds=_BACKGROUNDS,
        sizes={"small": 0.113, "large": 0.18},
        max_large=(1, 2, 3, 2, 1),
        gap=0.047,
        border=0.025,
    ),
    "scenes-mini": World(
        name="scenes-mini",
        image_size=32,
        shapes=("circle", "square", "triangle", "star", "cross", "ring"),
        colors={c: _COLORS[c] for c in ("red", "green", "blue", "yellow", "purple", "black")},
        backgrounds={b: _BACKGROUNDS[b] for b in ("white", "gray")},
        sizes={"small": 0.16, "large": 0.225},
        max_large=(1, 1),
        gap=0.08,
        border=0.03,
    ),
}
WORLDS["scenes-128"] = replace(WORLDS["scenes"], name="scenes-128", image_size=128)


def get_world(world: str | World) -> World:
    """The world of that name. Raises ValueError for a name that is not in WORLDS."""
    if isinstance(world, World):
        return world
    if world not in WORLDS:
        raise ValueError(f"no world {world!r}: choose one of {', '.join(WORLDS)}")
    return WORLDS[world]


# ---------------------------------------------------------------------------- relations


def relation_holds(a: Object, relation: str, b: Object) -> bool:
    """GenEval's rule: a's offset from b in that direction, less a margin, is over half its length.

    A diagonal pair can satisfy two relations.
    """
    dx, dy = a.x - b.x, a.y - b.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along - MARGIN > 0.5 * math.hypot(dx, dy)


def main_relation(a: Object, b: Object) -> str | None:
    """The one relation of a to b when nobody would doubt it (within 30 degrees of an axis)."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= math.sqrt(3) * abs(dy):
        relation = "left of" if dx < 0 else "right of"
    elif abs(dy) >= math.sqrt(3) * abs(dx):
        relation = "above" if dy < 0 else "below"
    else:
        return None
    return relation if relation_holds(a, relation, b) else None


# ---------------------------------------------------------------------------- held out


@cache
def held_out_pair(shape: str, color: str) -> bool:
    """Whether no training picture or text may have this shape in this colour."""
    return share(f"pair: {color} {shape}") < HELD_OUT


def held_out_triple(a: Object, relation: str, b: Object) -> bool:
    """Whether no training picture or text may have a in this relation to b.

    "A left of B" and "B right of A" are one triple. Both objects are of seen pairs and differ.
    """
    return _held_out_triple((a.shape, a.color), relation, (b.shape, b.color))


def is_held_out(scene: Scene) -> str | None:
    """What is held out in it: "pairs" (an object's), else "triples" (one that holds), else None."""
    objects = scene.objects
    if any(held_out_pair(o.shape, o.color) for o in objects):
        return "pairs"
    for i, b in enumerate(objects):
        if any(breaks_triple(a, b) for a in objects[:i]):
            return "triples"
    return None


def breaks_triple(a: Object, b: Object) -> bool:
    """Whether some held-out triple holds between these two objects."""
    return any(relation_holds(a, r, b) and held_out_triple(a, r, b) for r in RELATIONS)


@cache
def _held_out_triple(a: tuple[str, str], relation: str, b: tuple[str, str]) -> bool:
    if a == b or held_out_pair(*a) or held_out_pair(*b):
        return False
    if relation in ("right of", "below"):
        a, relation, b = b, OPPOSITE[relation], a
    return share(f"triple: {a[1]} {a[0]} {relation} {b[1]} {b[0]}") < HELD_OUT


def share(text: str) -> float:
    """A number in 0..1 that depends on the text alone, on every machine and in every process."""
    digest = hashlib.sha256(f"unimm scenes {_SALT} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# ---------------------------------------------------------------------------- arrays

_FIELDS = 10  # shape, colour, size (indices; -1 where there is no object), x, y, scale, angle, tint
_MAX = WORLDS["scenes"].max_objects
_NAMES = tuple(tuple(names) for names in (_SHAPES, _COLORS, SIZES))
ARRAY_LENGTH = 1 + _MAX * _FIELDS


def to_array(scene: Scene) -> np.ndarray:
    """The scene as float32 (ARRAY_LENGTH,): the background, then ten numbers an object.

    The encoding is the same for all worlds. Raises ValueError for a name that no world has.
    """
    out = np.full(ARRAY_LENGTH, -1, np.float32)
    out[0] = tuple(_BACKGROUNDS).index(scene.background)
    for i, o in enumerate(scene.objects):
        names = [n.index(v) for n, v in zip(_NAMES, (o.shape, o.color, o.size), strict=True)]
        row = (*names, o.x, o.y, o.scale, o.angle, *o.tint)
        out[1 + i * _FIELDS : 1 + (i + 1) * _FIELDS] = row
    return out


def from_array(array: np.ndarray) -> Scene:
    """The scene that `to_array` encoded; exact for scenes made by `sample_scene` and `edits`."""
    objects = []
    for row in np.asarray(array)[1:].reshape(_MAX, _FIELDS).tolist():
        if row[0] < 0:
            break
        shape, color, size = (n[int(v)] for n, v in zip(_NAMES, row, strict=False))
        x, y, scale, angle = (round(v, 4) for v in row[3:7])
        r, g, b = (int(v) for v in row[7:])
        objects.append(Object(shape, color, size, x, y, scale, angle, (r, g, b)))
    return Scene(tuple(objects), tuple(_BACKGROUNDS)[int(array[0])])
