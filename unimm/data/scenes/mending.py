"""A wrong picture with the one thing changed that was wrong.

Two pictures that differ in the mistake alone say where it was made: preferences between the first
step that is wrong and a right one in its place (Step-DPO, Lai et al., 2024, arXiv 2406.18629).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from .drawing import render
from .world import Object, Scene, World, get_world

_EDGE = 12.0  # of 255: what differs more from the background is drawn
_REACH, _SOFT = 1.25, 0.03  # its pixels: so many radii and picture widths around its centre


def mend(
    scene: Scene, right: Callable[[Scene], bool], world: str | World = "scenes"
) -> tuple[int, Object | None] | None:
    """The change of one object that makes a scene right: its index, and the object in its place or
    None where it is one too many. None if no one change makes it right."""
    for k, new in _changes(scene, get_world(world)):
        rest = (*scene.objects[:k], *([new] if new else []), *scene.objects[k + 1 :])
        if rest and right(replace(scene, objects=rest)):
            return k, new
    return None


def _changes(scene: Scene, world: World) -> Iterator[tuple[int, Object | None]]:
    """Another shape, colour or size of each object; after these, one of them less."""
    for name, values in (("shape", world.shapes), ("color", world.colors), ("size", world.sizes)):
        for k, o in enumerate(scene.objects):
            if name == "shape" or o.shape in world.shapes:
                for value in values:
                    if value != getattr(o, name):
                        yield k, replace(o, **{name: value})  # type: ignore[arg-type]
    yield from ((k, None) for k in reversed(range(len(scene.objects))))


def repaint(
    pixels: np.ndarray, scene: Scene, k: int, new: Object | None, world: str | World = "scenes"
) -> tuple[np.ndarray, np.ndarray]:
    """The picture with another object in the place of object k, or with none.

    pixels: uint8 (S, S, 3) of the world's size, in which the checker found `scene`. Returns pixels
    like these, and which of them are changed, bool (S, S). All others are as they were.
    """
    world = get_world(world)
    size = len(pixels)
    picture = pixels.astype(np.float32)
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = np.median(edges, axis=0)
    centre = (np.arange(size) + 0.5) / size
    away = np.stack([np.hypot(centre - o.x, centre[:, None] - o.y) for o in scene.objects])
    reach = _REACH * world.sizes[scene.objects[k].size] + _SOFT
    near = (away.argmin(0) == k) & (away[k] < reach)
    changed = near & (np.linalg.norm(picture - ground, axis=-1) > _EDGE)
    picture[near] = ground
    if new is not None:
        empty = render(Scene((), scene.background), world, size).astype(np.float32)
        added = render(Scene((new,), scene.background), world, size) - empty
        drawn = (added != 0).any(-1)
        picture[drawn] = ground + added[drawn]
        changed |= drawn
    levels = (picture.clip(0, 255) + 0.5).astype(np.uint8)
    return np.where(changed[..., None], levels, pixels), changed
