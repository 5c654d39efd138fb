"""What is in a picture, from its pixels alone: the judge of every drawing and the ground of every score.

Connected regions, the nearest named colour, and the nearest of a few thousand masks that our own
renderer drew: no learning, so no model can be in league with it.
"""

from functools import cache
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F

from .drawing import SHAPES, render
from .language import Spec
from .meaning import parse, satisfies
from .world import Object, Scene, World, get_world

UNKNOWN = "unknown"

_EDGE = 42.0  # how far from the background (Euclidean, RGB) a pixel of an object is
_NOISE = 0.003  # regions under this share of the picture are specks
_MISFIT = 0.24  # squared error of a mask over its energy, above which it is no shape
_OFF_COLOR = 75.0  # distance from every named colour above which it has none
_GRID, _REACH = 20, 1.05  # the canonical mask: cells, and half its width in units of sqrt(area)
_BATCH = 128


@overload
def look(pixels: np.ndarray, world: str | World = "scenes") -> "Scene | list[Scene]": ...
