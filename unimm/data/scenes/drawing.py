"""How a scene becomes pixels: twelve polygons, anti-aliased by drawing at four times the size.

The checker makes its templates with the same `coverage`, so that both always agree on the shapes.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .world import Object, Scene, World, get_world

OVERSAMPLING = 4

# A shape is a list of (polygon (K, 2) in the unit circle, y down; 1 to fill it or 0 to cut it out).
Polygons = list[tuple[np.ndarray, int]]


def render(
    scene: Scene, world: str | World | int = "scenes", size: int | None = None
) -> np.ndarray:
    """The picture, uint8 (size, size, 3). `size` is the world's own by default.

    A number in place of the world means "scenes" at that size. The same scene always gives the same
    pixels. Raises ValueError for an unknown world.
    """
    if isinstance(world, int):
        return render(scene, "scenes", world)
    world = get_world(world)
    size = size or world.image_size
    pixels = np.empty((size, size, 3), np.float32)
    pixels[:] = world.backgrounds[scene.background]
    for o in scene.objects:
        paint = np.add(world.colors[o.color], o.tint).clip(0, 255).astype(np.float32)
        mask, top, left = coverage(o, world.sizes[o.size] * size, size)
        h, w = mask.shape
        window = pixels[top : top + h, left : left + w]  # (h, w, 3)
        window += mask[..., None] * (paint - window)
    return (pixels + 0.5).astype(np.uint8)


def coverage(o: Object, radius: float, size: int) -> tuple[np.ndarray, int, int]:
    """How much of each pixel the object covers: float32 (h, w) in 0..1, and the window's top, left.

    `radius`: pixels of the circle around an unscaled object of this size, in a picture `size` wide.
    """
    r = radius * o.scale
    cx, cy = o.x * size, o.y * size
    left, top = max(0, math.floor(cx - r) - 1), max(0, math.floor(cy - r) - 1)
    right, bottom = min(size, math.ceil(cx + r) + 1), min(size, math.ceil(cy + r) + 1)
    k = OVERSAMPLING
    image = Image.new("L", ((right - left) * k, (bottom - top) * k))
    draw = ImageDraw.Draw(image)
    turn = math.radians(o.angle)
    cos, sin = r * k * math.cos(turn), r * k * math.sin(turn)
    matrix = np.array([[cos, sin], [-sin, cos]])
    # Pillow's integers are the centres of pixels, hence the half.
    origin = np.array([(cx - left) * k - 0.5, (cy - top) * k - 0.5])
    for polygon, fill in _polygons(o.shape):
        draw.polygon((polygon @ matrix + origin).ravel().tolist(), fill=255 * fill)
    return np.asarray(image.reduce(k), np.float32) / 255, top, left


@cache
def _polygons(shape: str) -> Polygons:
    if shape not in SHAPES:
        raise ValueError(f"no shape {shape!r}: choose one of {', '.join(SHAPES)}")
    return SHAPES[shape]


def _circle(radius: float, x: float = 0.0, points: int = 48) -> np.ndarray:
    turn = np.arange(points) * (2 * np.pi / points)
    return np.stack([x + radius * np.cos(turn), radius * np.sin(turn)], 1)


def _star(points: int, inner: float) -> np.ndarray:
    turn = np.arange(2 * points) * (np.pi / points) - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)


def _heart() -> np.ndarray:
    t = np.arange(60) * (2 * np.pi / 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 17, (y - 1.5) / 17], 1)


def _points(*xy: tuple[float, float]) -> np.ndarray:
    return np.array(xy)


_L, _W = 0.95, 0.29  # the length and half the width of the cross's arms

SHAPES: dict[str, Polygons] = {
    "circle": [(_circle(0.92), 1)],
    "square": [(_points((-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)), 1)],
    "triangle": [(_points((0, -0.95), (0.9, 0.65), (-0.9, 0.65)), 1)],
    "star": [(_star(5, 0.42), 1)],
    "diamond": [(_points((0, -1), (0.66, 0), (0, 1), (-0.66, 0)), 1)],
    "cross": [
        (_points((-_L, -_W), (_L, -_W), (_L, _W), (-_L, _W)), 1),
        (_points((-_W, -_L), (_W, -_L), (_W, _L), (-_W, _L)), 1),
    ],
    "heart": [(_heart(), 1)],
    "ring": [(_circle(0.95), 1), (_circle(0.5), 0)],
    "moon": [(_circle(0.95), 1), (_circle(0.78, 0.48), 0)],
    "arrow": [
        (_points((-0.95, -0.27), (0.1, -0.27), (0.1, 0.27), (-0.95, 0.27)), 1),
        (_points((0.05, -0.82), (1, 0), (0.05, 0.82)), 1),
    ],
    "bolt": [
        (
            _points(
                (0.35, -0.93),
                (-0.72, 0.27),
                (-0.16, 0.27),
                (-0.35, 0.93),
                (0.72, -0.27),
                (0.16, -0.27),
            ),
            1,
        )
    ],
    "hourglass": [
        (_points((-0.7, -0.72), (0.7, -0.72), (0.16, 0), (0.7, 0.72), (-0.7, 0.72), (-0.16, 0)), 1)
    ],
}
