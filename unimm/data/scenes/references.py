"""How to speak of one object in a scene and no other: shared by questions and edits.

A question or an instruction about "the star" is fair only where there is one star.
"""

import numpy as np

from .language import phrase, pick
from .world import Object, Scene, main_relation


def refer(
    scene: Scene,
    o: Object,
    *,
    color: bool = True,
    size: bool = True,
    rng: np.random.Generator | None = None,
) -> str | None:
    """The shortest words that mean this object alone: "star", "blue star" or "small blue star".

    `color`, `size`: whether those words may be used. With `rng` a longer name is taken at times.
    None when no such words exist.
    """
    names = [
        (with_size, with_color)
        for with_size, with_color in ((False, False), (False, True), (True, False), (True, True))
        if with_size <= size and with_color <= color
    ]
    good = []
    for with_size, with_color in names:
        same = [
            p
            for p in scene.objects
            if p.shape == o.shape
            and (not with_size or p.size == o.size)
            and (not with_color or p.color == o.color)
        ]
        if len(same) == 1:
            group = (1, o.size if with_size else None, o.color if with_color else None, o.shape)
            good.append(phrase(group, article=False))
    if not good:
        return None
    return pick(good, rng) if rng is not None else good[0]


def named(scene: Scene) -> list[Object]:
    """The objects that shape and colour alone can refer to."""
    return [o for o in scene.objects if refer(scene, o, size=False)]


def clear_relations(scene: Scene) -> list[tuple[Object, str, Object]]:
    """Objects that can be named, with every unambiguous relation between two of them."""
    objects = named(scene)
    pairs = ((a, main_relation(a, b), b) for a in objects for b in objects if a is not b)
    return [(a, relation, b) for a, relation, b in pairs if relation]


def two_of(items: list, rng: np.random.Generator) -> list[tuple]:
    """Every two of the items, in random order."""
    pairs = [(a, b) for i, b in enumerate(items) for a in items[:i]]
    return [(a, b) if rng.random() < 0.5 else (b, a) for a, b in pairs]
