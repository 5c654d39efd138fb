"""Places in a picture, in words and in codes: how an edit says where something is.

A place is "(column,row)", each 1 to 8, from the left and the top.
"""

import re

import numpy as np

PLACES = 8  # columns, and rows
REACH = 2.5  # what is around a place, in columns or rows: half of the side of a square
WHERE = "where: "  # before an instruction of which the model is to say what is meant, and where
LAYOUT = "layout: "  # before a prompt of which the model is to say what is to be where
LOOK = "what is where?"  # of a picture: asked before all else that is asked of it
THING = re.compile(r"\ban? [a-z ]+ \(\d,\d\)")
GROUND = re.compile(r"on an? ([a-z]+) background")


def place(x: float, y: float) -> str:
    """Of a point in 0..1, y down: (0.6, 0.3) is in "(5,3)"."""
    column, row = (min(max(int(at * PLACES), 0), PLACES - 1) + 1 for at in (x, y))
    return f"({column},{row})"


def around(words: str, grid: tuple[int, int]) -> np.ndarray | None:
    """Which codes of a grid (rows, columns) are around the place in the words, bool (rows *
    columns); None where no place is said."""
    found = re.search(r"\((\d+),(\d+)\)", words)
    if found is None:
        return None
    near = []
    for at, count in zip((found[2], found[1]), grid, strict=True):
        middles = (np.arange(count) + 0.5) / count
        near.append(np.abs(middles - (int(at) - 0.5) / PLACES) * PLACES < REACH)
    return np.outer(*near).reshape(-1)


def drawing_steps(layout: str) -> list[str]:
    """What is drawn one after the other: "a plain white background", "add a large cyan moon (2,3)"
    and so on. Nothing where the words are no layout."""
    ground, things = GROUND.search(layout), THING.findall(layout)
    return [plain_ground(ground[1]), *(f"add {thing}" for thing in things)] if ground else []


def plain_ground(name: str) -> str:
    """The prompt for a picture of nothing but a background."""
    return f"a plain {name} background"
