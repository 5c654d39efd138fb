"""Scenes of cut-outs: your own sprites with names and styles in the place of the twelve shapes.

A folder of pictures with transparent backgrounds and an index (.jsonl: "file", "name", "style",
and if you like "group" and "keywords") becomes pictures of one sprite, large or small, and of two
beside each other, with their captions, prompts, questions and answers. A share of the names is held
out, and of the (name, style) pairs whose name is left; so every word is seen elsewhere.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .language import phrase, pick
from .world import OPPOSITE, Object, held_out_pair, main_relation, share

HELD_OUT_NAMES = 0.05
SPLITS = ("train", "pairs", "names")
WIDTH = {"large": 1.0, "small": 0.5}  # of a sprite's box, in picture widths
STEP = 0.125  # places are multiples of this, a code of 8 x 8: a sprite has the same codes anywhere

Look = tuple[str, str]  # name, style


@dataclass(frozen=True)
class Sprite:
    name: str
    style: str
    file: Path
    group: str = ""
    keywords: tuple[str, ...] = ()

    @property
    def look(self) -> Look:
        return self.name, self.style


class Sprites:
    """The cut-outs of an index, of these groups (all by default), by split.

    "names": of a name that is held out in every style; "pairs": in this style alone. Raises
    ValueError for a file that is no such index.
    """

    def __init__(self, index: str | Path, groups: tuple[str, ...] = ()):
        found: dict[Look, Sprite] = {}
        folder = Path(index).parent
        for number, line in enumerate(read_lines(index), 1):
            try:
                row = json.loads(line)
                words = tuple(map(str.strip, row.get("keywords", ())))
                place, group = folder / row["file"], row.get("group", "")
                sprite = Sprite(row["name"], row["style"], place, group, words)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index}, line {number}: no sprite: {error!r}") from None
            if not groups or sprite.group in groups:
                found.setdefault(sprite.look, sprite)
        if not found:
            of = f" of {', '.join(groups)}" if groups else ""
            raise ValueError(f"{index} holds no sprite{of}")
        self.sprites = found
        self.split: dict[str, list[Look]] = {name: [] for name in SPLITS}
        for look in found:
            self.split[split_of(look)].append(look)

    def render(self, objects: list[Object], background: tuple[int, int, int], size: int) -> Any:
        """uint8 (size, size, 3): the sprites (`shape` a name, `color` a style) at their places."""
        picture = Image.new("RGBA", (size, size), (*background, 255))
        for o in objects:
            width = round(WIDTH[o.size] * size)
            corner = (round(o.x * size - width / 2), round(o.y * size - width / 2))
            picture.alpha_composite(cut_out(self.sprites[o.shape, o.color].file, width), corner)
        return np.asarray(picture.convert("RGB"))


def split_of(look: Look) -> str:
    if share(f"sprite: {look[0]}") < HELD_OUT_NAMES:
        return "names"
    return "pairs" if held_out_pair(*look) else "train"


def one(look: Look, size: str, rng: np.random.Generator) -> list[Object]:
    """A large sprite in the middle, or a small one at some place."""
    x, y = places(rng) if size == "small" else (0.5, 0.5)
    return [Object(*look, size, x, y)]


def two(looks: tuple[Look, Look], rng: np.random.Generator) -> list[Object]:
    """Two small sprites that do not overlap, in a plain relation three times of four."""
    plain = rng.random() < 0.75
    while True:
        a, b = (Object(*look, "small", *places(rng)) for look in looks)
        apart = max(abs(a.x - b.x), abs(a.y - b.y)) >= WIDTH["small"]
        if apart and (not plain or main_relation(a, b)):
            return [a, b]


def places(rng: np.random.Generator) -> tuple[float, float]:
    edge = WIDTH["small"] / 2
    count = round((1 - WIDTH["small"]) / STEP) + 1
    x, y = (edge + STEP * int(v) for v in rng.integers(count, size=2))
    return x, y


def said(o: Object, size: bool = False) -> str:
    """ "a crying cat in flat style", "a small crying cat in flat style"."""
    return f"{phrase((1, o.size if size else None, None, o.shape))} in {o.color}"


def caption(objects: list[Object]) -> str:
    """The canonical words for it: the size of one sprite, the relation of two where it is plain."""
    if len(objects) == 1:
        return said(objects[0], size=objects[0].size == "small")
    a, b = objects
    relation = main_relation(a, b)
    if relation in ("right of", "below"):
        a, relation, b = b, OPPOSITE[relation], a
    if relation is None:
        a, b = sorted(objects, key=lambda o: o.x)
    return f"{said(a)} {relation or 'and'} {said(b)}"


def questions(
    sprites: Sprites, objects: list[Object], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Questions about a picture, and their answers."""
    a = objects[int(rng.integers(len(objects)))]
    sprite = sprites.sprites[a.shape, a.color]
    other = sprites.split["train"][int(rng.integers(len(sprites.split["train"])))][0]
    names = [o.shape for o in objects]
    asked = [
        (f"what style is the {a.shape}?", a.color),
        (f"is there {phrase((1, None, None, a.shape))}?", "yes"),
        (f"is there {phrase((1, None, None, other))}?", "yes" if other in names else "no"),
    ]
    if len(objects) == 1:
        asked += [("what is it?", a.shape), ("is it small or large?", a.size)]
        asked += [("what kind of thing is it?", sprite.group.lower())] if sprite.group else []
        asked += [("what goes with it?", ", ".join(sprite.keywords[:3]))] if sprite.keywords else []
    elif relation := main_relation(*objects):
        asked.append((f"what is {relation} the {names[1]}?", names[0]))
        asked.append((f"where is the {names[0]}?", f"{relation} the {names[1]}"))
    return [asked[k] for k in rng.permutation(len(asked))]


def compose(
    sprites: Sprites, split: str, count: int, rng: np.random.Generator
) -> list[list[Object]]:
    """All sprites of a split, large; `count` small ones; and `count` pictures of two, of which one
    is of the split and the other of training."""
    looks, known = sprites.split[split], sprites.split["train"]
    made = [one(look, "large", rng) for look in looks]
    made += [one(pick(looks, rng), "small", rng) for _ in range(count)]
    while looks and len(made) < len(looks) + 2 * count:
        pair = pick(looks, rng), pick(known, rng)
        if pair[0][0] != pair[1][0]:
            made.append(two(pair if rng.random() < 0.5 else pair[::-1], rng))
    return made


def read_lines(index: str | Path) -> list[str]:
    if not Path(index).is_file():
        raise ValueError(f"no such index of sprites: {index}")
    return [line for line in Path(index).read_text(encoding="utf-8").splitlines() if line.strip()]


@lru_cache(maxsize=20_000)
def cut_out(file: Path, width: int) -> Image.Image:
    """RGBA, scaled into a square of this width."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        raise ValueError(f"{file} cannot be read as a sprite: {error}") from None
    scale = width / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    square = Image.new("RGBA", (width, width))
    shown = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    square.paste(shown, ((width - size[0]) // 2, (width - size[1]) // 2))
    return square
