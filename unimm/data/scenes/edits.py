"""Instructions that change one thing in a scene, and the scene after it: for training and scoring.

Everything that is not spoken of stays where it is to the last digit, jitter included.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unimm.data.places import GROUND, PLACES, place

from .language import enumerate_words, phrase, pick, raster
from .meaning import Spec, assigned
from .references import refer
from .sampling import fits, jitter
from .world import SPLITS, Object, Scene, World, get_world, is_held_out

EDITS = ("recolor", "remove", "add", "reshape", "resize", "background")

_SAYINGS = {
    "recolor": (
        "make the {it} {new}",
        "change the color of the {it} to {new}",
        "paint the {it} {new}",
    ),
    "remove": ("remove the {it}", "delete the {it}", "take away the {it}"),
    "add": ("add {new}", "draw {new} as well", "put {new} somewhere"),
    "reshape": (
        "turn the {it} into {new}",
        "change the {it} into {new}",
        "replace the {it} with {new}",
    ),
    "resize": ("make the {it} {new}", "change the size of the {it} to {new}"),
    "background": (
        "make the background {new}",
        "change the background to {new}",
        "use a {new} background",
    ),
}
_TRIES = 500
_PLACED = r"(small|large) ([a-z]+) ([a-z]+) \((\d),(\d)\)"  # what `_placed` says, with no article
_NEAR = 0.08  # how far an object may be from its place, in picture widths


def edits(
    world: str | World, scene: Scene, rng: np.random.Generator, *, split: str = "train"
) -> tuple[str, Scene]:
    """A random instruction and the scene after it.

    With split "train" nothing in the new scene is held out; with "pairs" or "triples" it is held
    out in that way. Raises ValueError when this scene has no such edit.
    """
    world = get_world(world)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    for _ in range(_TRIES):
        made = _edit(world, scene, rng, pick(EDITS, rng))
        if made and (is_held_out(made[1]) or "train") == split:
            return made
    raise ValueError(f"no edit of this scene gives a scene of split {split!r}")


def edit_kind(before: Scene, after: Scene) -> str:
    """Which of EDITS made the one scene of the other."""
    if before.background != after.background:
        return "background"
    if len(before.objects) != len(after.objects):
        return "add" if len(before.objects) < len(after.objects) else "remove"
    for old, new in zip(before.objects, after.objects, strict=True):
        for name, kind in (("shape", "reshape"), ("color", "recolor"), ("size", "resize")):
            if getattr(old, name) != getattr(new, name):
                return kind
    raise ValueError("the scenes are equal")


def located(before: Scene, after: Scene, off: tuple[int, int] = (0, 0)) -> str:
    """The instruction that makes the one scene of the other, with all that there is to say:
    "make the small red circle (5,3) a large red circle".

    The numbers are the place (`unimm.data.places`) of the object's centre, or, to learn from
    mistakes, one that is `off` by so many columns and rows. What is new has the place where it is
    to be: "add a small green star (2,7)".
    """
    kind = edit_kind(before, after)
    if kind == "background":
        return f"make the background {after.background}"
    old = next((o for o in before.objects if o not in after.objects), None)
    new = next((o for o in after.objects if o not in before.objects), None)
    if old is None:
        assert new is not None
        return f"add {_placed(new)}"
    it = f"{_name(old, article=False)} {place(old.x + off[0] / PLACES, old.y + off[1] / PLACES)}"
    return f"remove the {it}" if new is None else f"make the {it} {_name(new)}"


def laid_out(scene: Scene, spec: Spec | None = None) -> str:
    """A scene with all that a prompt leaves open, in the order in which that names things:
    "a large cyan moon (2,3) and a small red star (6,6) on a white background".

    Equal ones come in the order of `raster`, without a prompt all. Raises ValueError where the
    prompt is not true.
    """
    ordered = replace(scene, objects=tuple(sorted(scene.objects, key=raster)))
    groups = assigned(ordered, spec) if spec else [list(ordered.objects)]
    if groups is None:
        raise ValueError("the scene is not what the prompt says")
    said = [_placed(o) for group in groups for o in group]
    return f"{enumerate_words(said)} on a {scene.background} background"


def read_out(words: str) -> Scene | None:
    """The scene of a layout (`laid_out`), each thing in the middle of its place; None of others."""
    ground, things = GROUND.search(words), re.findall(rf"an? {_PLACED}", words)
    return Scene(tuple(map(_thing, things)), ground[1]) if ground and things else None


def carried_out(words: str, scene: Scene) -> Scene | None:
    """The scene after an instruction as `located` says it; None where it is of nothing there."""
    if ground := re.fullmatch(r"make the background ([a-z]+)", words):
        return replace(scene, background=ground[1])
    if added := re.fullmatch(rf"add an? {_PLACED}", words):
        return replace(scene, objects=(*scene.objects, _thing(added.groups())))
    found = re.fullmatch(
        rf"(?:make|remove) the {_PLACED}(?: an? (small|large) ([a-z]+) ([a-z]+))?", words
    )
    if not found:
        return None
    meant, new = _thing(found.groups()[:5]), found.groups()[5:]
    equal = [o for o in scene.objects if _kind(o) == _kind(meant)]
    if not equal:
        return None
    old = min(equal, key=lambda o: math.hypot(o.x - meant.x, o.y - meant.y))
    size, color, shape = new
    made = () if size is None else (replace(old, size=size, color=color, shape=shape),)
    return replace(scene, objects=(*(o for o in scene.objects if o is not old), *made))


def alike(a: Scene, b: Scene) -> bool:
    """Whether two scenes have the same background and the same things, wherever these are."""
    return a.background == b.background and Counter(map(_kind, a.objects)) == Counter(
        map(_kind, b.objects)
    )


def _thing(said: Sequence[str]) -> Object:
    size, color, shape, *at = said
    x, y = ((int(number) - 0.5) / PLACES for number in at)
    return Object(shape, color, size, x, y)


def _kind(o: Object) -> tuple[str, str, str]:
    return o.size, o.color, o.shape


def _name(o: Object, article: bool = True) -> str:
    return phrase((1, o.size, o.color, o.shape), article=article)


def _placed(o: Object) -> str:
    return f"{_name(o)} {place(o.x, o.y)}"


def edit_holds(before: Scene, found: Scene, after: Scene) -> bool:
    """Whether the scene found in an edited picture is the wanted one: shapes, colours, sizes,
    background, and every object that was there before at its place. A new one may be anywhere."""
    if found.background != after.background or len(found.objects) != len(after.objects):
        return False
    places = {(o.x, o.y) for o in before.objects}
    kept = [o for o in after.objects if (o.x, o.y) in places]
    added = [o for o in after.objects if (o.x, o.y) not in places]
    left = list(found.objects)
    for o in kept + added:
        matches = [f for f in left if _kind(f) == _kind(o)]
        if not matches:
            return False
        best = min(matches, key=lambda f: math.hypot(f.x - o.x, f.y - o.y))
        if o in kept and math.hypot(best.x - o.x, best.y - o.y) > _NEAR:
            return False
        left.remove(best)
    return True


def misdirected(before: Scene, after: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with the same done to another object instead, or (two in five) to both of them.

    Nothing in it is held out. None where there is no such scene, as of a new object or background.
    """
    gone = [k for k, o in enumerate(before.objects) if o not in after.objects]
    if len(gone) != 1:
        return None
    removed = len(after.objects) < len(before.objects)
    old, new = before.objects[gone[0]], None if removed else after.objects[gone[0]]
    names = [n for n in ("shape", "color", "size") if new and getattr(new, n) != getattr(old, n)]
    others = [k for k in range(len(before.objects)) if k != gone[0]]
    both = bool(rng.random() < 0.4)
    for other in rng.permutation(others).tolist():
        objects: list[Object] = []
        for k, o in enumerate(before.objects):
            if k == other or (both and k == gone[0]):
                objects += [replace(o, **{n: getattr(new, n) for n in names})] if new else []
            else:
                objects.append(o)
        scene = replace(before, objects=tuple(objects))
        if objects and scene != before and not is_held_out(scene):
            if not edit_holds(before, scene, after):
                return scene
    return None


def _edit(
    world: World, scene: Scene, rng: np.random.Generator, kind: str
) -> tuple[str, Scene] | None:
    """One edit of this kind, or None when a random try cannot be done or said."""
    saying = pick(_SAYINGS[kind], rng)
    if kind == "background":
        ground = pick([b for b in world.backgrounds if b != scene.background], rng)
        return saying.format(new=ground), replace(scene, background=ground)
    if kind == "add":
        o = _new_object(world, scene, rng)
        if o is None:
            return None
        new = phrase((1, o.size, o.color, o.shape))
        return saying.format(new=new), replace(scene, objects=(*scene.objects, o))

    o = pick(scene.objects, rng)
    it = refer(scene, o)
    if it is None or (kind == "remove" and len(scene.objects) == 1):
        return None
    if kind == "remove":
        return saying.format(it=it), replace(
            scene, objects=tuple(p for p in scene.objects if p != o)
        )
    if kind == "recolor":
        changed = replace(o, color=pick([c for c in world.colors if c != o.color], rng))
        new = changed.color
    elif kind == "reshape":
        changed = replace(o, shape=pick([s for s in world.shapes if s != o.shape], rng))
        new = phrase((1, None, None, changed.shape))
    else:
        changed = replace(o, size="large" if o.size == "small" else "small")
        new = changed.size
        if not fits(world, changed, [p for p in scene.objects if p != o]):
            return None
    objects = tuple(changed if p == o else p for p in scene.objects)
    return saying.format(it=it, new=new), replace(scene, objects=objects)


def _new_object(world: World, scene: Scene, rng: np.random.Generator) -> Object | None:
    if len(scene.objects) == world.max_objects:
        return None
    size = pick(tuple(world.sizes), rng)
    o = jitter(world, rng, pick(world.shapes, rng), pick(tuple(world.colors), rng), size)
    return o if fits(world, o, scene.objects) else None
