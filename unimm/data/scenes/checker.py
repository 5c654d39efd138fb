"""What is in a picture, from its pixels alone: the judge of every drawing.

Connected regions, the nearest named colour, and the nearest of a few thousand masks that our own
renderer drew. Nothing here is learned, so no model can be in league with it.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from .drawing import render
from .meaning import Spec, parse, satisfies
from .world import Object, Scene, World, get_world

UNKNOWN = "unknown"

_EDGE = 40.0  # how far from the background (Euclidean, RGB) the pixels of an object are
_SPECK = 0.0025  # regions under this share of the picture are noise
_MISFIT = 0.10  # squared error of the mask over its energy, above which it is none of the shapes
_OFF_COLOR = 100.0  # distance from every named colour above which it has none
_MIXED = 0.2  # share of the energy that is not of the one colour, above which it is several
_OFF_SIZE = 1.25  # how far the radius may be outside the range of the world's sizes
_GRID, _REACH = 20, 1.05  # the canonical mask: cells, and half its width in units of sqrt(area)
_BLURS = 2  # templates are kept sharp and blurred this many times by a pixel's width
_BATCH = 64


def look(pixels: np.ndarray, world: str | World = "scenes") -> Scene | list[Scene]:
    """The scene in a picture, uint8 (H, W, 3), or the scenes in a batch (N, H, W, 3).

    Pictures of another size are resized to the world's. A blob that is none of the world's shapes
    or colours is an Object of shape "unknown", which satisfies no prompt. Scale, angle and tint are
    not estimated. Raises ValueError for another shape or dtype.
    """
    world = get_world(world)
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise ValueError(
            f"expected uint8 (H, W, 3) or (N, H, W, 3), got {pixels.dtype} {pixels.shape}"
        )
    batch = pixels if pixels.ndim == 4 else pixels[None]
    with torch.inference_mode():
        scenes = [
            s for i in range(0, len(batch), _BATCH) for s in _look(batch[i : i + _BATCH], world)
        ]
    return scenes if pixels.ndim == 4 else scenes[0]


def check(pixels: np.ndarray, prompt: str | Spec, world: str | World = "scenes") -> bool:
    """Whether the picture, uint8 (H, W, 3), shows exactly what the prompt says.

    Raises ValueError for a prompt that cannot be understood.
    """
    spec = parse(prompt) if isinstance(prompt, str) else prompt
    if spec is None:
        raise ValueError(f"cannot understand the prompt {prompt!r}")
    scene = look(pixels, world)
    assert isinstance(scene, Scene)
    return satisfies(scene, spec)


def _look(pixels: np.ndarray, world: World) -> list[Scene]:
    size = world.image_size
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    ground = _border(x).median(-1).values  # (N, 3)
    offset = x - ground[:, :, None, None]
    labels = _regions(offset.norm(dim=1) > _EDGE)  # (N, H, W)
    picture, crop, center = _crops(offset, labels, world)
    backgrounds = _nearest(ground, world.backgrounds)[0]
    names = tuple(world.backgrounds)
    found: list[list[Object]] = [[] for _ in pixels]
    if len(picture):
        for n, o in zip(
            picture.tolist(), _objects(crop, center, ground[picture], world), strict=True
        ):
            found[n].append(o)
    return [
        Scene(tuple(objects), names[b])
        for objects, b in zip(found, backgrounds.tolist(), strict=True)
    ]


def _border(x: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) -> the outermost pixels (N, 3, 2H + 2W)."""
    return torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)


def _regions(solid: torch.Tensor) -> torch.Tensor:
    """Connected regions (8 neighbours) of a mask (N, H, W): labels from 1, 0 outside.

    Each pixel takes the greatest label around it, then that label's own: paths halve at each turn.
    """
    n, h, w = solid.shape
    inside = solid.long()
    labels = torch.arange(1, h * w + 1).view(1, h, w) * inside
    while True:
        new = _spread(labels) * inside
        for _ in range(2):
            flat = new.view(n, -1)
            new = flat.gather(1, (flat - 1).clamp_(min=0)).view(n, h, w) * inside
        if torch.equal(new, labels):
            return labels
        labels = new


def _spread(labels: torch.Tensor) -> torch.Tensor:
    """The greatest label around each pixel (N, H, W), its own included; beats max_pool2d."""
    for dim in (1, 2):
        length = labels.shape[dim] - 1
        wide = labels.clone()
        for here, there in ((0, 1), (1, 0)):
            target = wide.narrow(dim, here, length)
            torch.maximum(target, labels.narrow(dim, there, length), out=target)
        labels = wide
    return labels


def _crops(
    offset: torch.Tensor, labels: torch.Tensor, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each region alone in a window: picture index (M,), offsets from the background (M, 3, S, S)
    with nothing outside the region, and the pixel of the window's centre (M, 2) as x, y."""
    n, h, w = labels.shape
    pad = int(1.5 * max(world.sizes.values()) * w) + 3
    key = (labels + torch.arange(n).view(n, 1, 1) * (h * w + 1)).view(-1)
    keys, index, counts = key.unique(return_inverse=True, return_counts=True)
    ys, xs = (torch.arange(v, dtype=torch.float32) for v in (h, w))
    total = torch.zeros(2, len(keys))
    total[0].index_add_(0, index, xs.repeat(n * h))
    total[1].index_add_(0, index, ys.repeat_interleave(w).repeat(n))
    keep = (keys % (h * w + 1) > 0) & (counts >= _SPECK * h * w)
    center = (total / counts)[:, keep].round().long().T  # (M, 2)
    picture, label = keys[keep] // (h * w + 1), keys[keep] % (h * w + 1)
    near = F.max_pool2d(labels[:, None].float(), 3, 1, 1)[
        :, 0
    ].long()  # the soft edge belongs to it
    near = torch.where(labels > 0, labels, near)
    span = torch.arange(-pad, pad + 1)
    rows = center[:, 1, None, None] + span[:, None] + pad
    cols = center[:, 0, None, None] + span[None, :] + pad
    where = picture[:, None, None]
    mine = F.pad(near, (pad,) * 4)[where, rows, cols] == label[:, None, None]  # (M, S, S)
    crop = F.pad(offset, (pad,) * 4).permute(0, 2, 3, 1)[where, rows, cols].permute(0, 3, 1, 2)
    return picture, crop * mine[:, None], center


def _objects(
    crop: torch.Tensor, center: torch.Tensor, ground: torch.Tensor, world: World
) -> list[Object]:
    """Name what is in each window. crop (M, 3, S, S), center (M, 2), ground (M, 3)."""
    templates, shape_of, unit_area, shift = _templates(world.name)
    paint, alpha = _soft(crop)
    mixed = _residual(crop, paint, alpha)
    color, off_color = _nearest(ground + paint, world.colors)
    masks, area, middle = _canonical(alpha)
    error = 1 + (templates.square().sum(1) - 2 * masks @ templates.T) / masks.square().sum(1, True)
    misfit, best = error.min(1)
    radius = (area / unit_area[best]).sqrt() / world.image_size
    place = (center + 0.5 + middle) / world.image_size - shift[best] * radius[:, None]
    sizes = torch.tensor(list(world.sizes.values()))
    size = (radius[:, None] / sizes).log().abs().argmin(1)
    bad = (misfit > _MISFIT) | (off_color > _OFF_COLOR) | (mixed > _MIXED)
    bad |= (radius > sizes.max() * _OFF_SIZE) | (radius < sizes.min() / _OFF_SIZE)
    colors, names = tuple(world.colors), tuple(world.sizes)
    return [
        Object(UNKNOWN if b else world.shapes[shape_of[t]], colors[c], names[s], x, y)
        for b, t, c, s, (x, y) in zip(
            bad.tolist(), best.tolist(), color.tolist(), size.tolist(), place.tolist(), strict=True
        )
    ]


def _soft(crop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The colour of each region's core less the background (M, 3), and its soft mask (M, S, S)."""
    distance = crop.norm(dim=1)  # (M, S, S)
    flat = distance.flatten(1)
    count = (flat > _EDGE).sum(1, True)
    rank = (flat.shape[1] - (0.15 * count).long() - 1).clamp(0, flat.shape[1] - 1)
    peak = flat.sort(1).values.gather(1, rank)[:, :, None]  # the 85th percentile: well inside
    core = ((distance > 0.85 * peak) & (distance < 1.15 * peak)).float()
    paint = (crop * core[:, None]).sum((2, 3)) / core.sum((1, 2)).clamp(min=1)[:, None]
    along = (crop * paint[:, :, None, None]).sum(1) / paint.square().sum(1).clamp(min=1)[
        :, None, None
    ]
    return paint, along.clamp(0, 1)


def _residual(crop: torch.Tensor, paint: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """How much of each region (M, 3, S, S) is not `alpha` times its one colour: 0..1 (M,)."""
    rest = crop - alpha[:, None] * paint[:, :, None, None]
    return rest.square().sum((1, 2, 3)) / crop.square().sum((1, 2, 3)).clamp(min=1)


def _canonical(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft masks (M, S, S) moved to their centre of mass and scaled to the same area: (M, GRID^2),
    the area (M,) and the centre of mass from the window's centre (M, 2), in pixels."""
    half = alpha.shape[-1] // 2
    span = torch.arange(-half, half + 1, dtype=torch.float32)
    area = alpha.sum((1, 2)).clamp(min=1e-3)
    middle = (
        torch.stack([(alpha.sum(1) * span).sum(1), (alpha.sum(2) * span).sum(1)], 1) / area[:, None]
    )
    theta = torch.zeros(len(alpha), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = _REACH * area.sqrt() / (half + 0.5)
    theta[:, :, 2] = middle / (half + 0.5)
    grid = F.affine_grid(theta, [len(alpha), 1, _GRID, _GRID], align_corners=False)
    masks = F.grid_sample(alpha[:, None], grid, align_corners=False)
    return masks.flatten(1), area, middle


def _nearest(rgb: torch.Tensor, named) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of the nearest name for each colour (M, 3), and the distance."""
    distance, index = torch.cdist(rgb, torch.tensor(list(named.values()), dtype=torch.float32)).min(
        1
    )
    return index, distance


@cache
def _templates(name: str) -> tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]:
    """Canonical masks (K, GRID^2) of every shape, size, some angles and places, sharp and blurred;
    their shapes, areas at radius 1, and centres of mass from the centre in radii (K, 2)."""
    world = get_world(name)
    rng = np.random.default_rng(0)
    pictures, shape_of, radius, center = [], [], [], []
    for i, shape in enumerate(world.shapes):
        for size, r in world.sizes.items():
            for angle in (-8, -4, 0, 4, 8):
                for _ in range(3):
                    x, y = 0.5 + (rng.random(2) - 0.5) / world.image_size
                    o = Object(shape, "black", size, x, y, 1.0, angle)
                    pictures.append(render(Scene((o,), "white"), world))
                    shape_of.append(i)
                    radius.append(r * world.image_size)
                    center.append((x * world.image_size, y * world.image_size))
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    kernel = torch.tensor([1.0, 4.0, 1.0])
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, 3, 3)
    levels = [x]
    for _ in range(_BLURS):
        levels.append(F.conv2d(F.pad(levels[-1], (1,) * 4, value=255.0), kernel, groups=3))
    x = torch.cat(levels)
    _, crop, window = _crops(x - 255, (x[:, 0] < 215).long(), world)
    masks, area, middle = _canonical(_soft(crop)[1])
    radii = torch.tensor(radius * len(levels))
    shift = (
        window + 0.5 + middle - torch.tensor(center * len(levels), dtype=torch.float32)
    ) / radii[:, None]
    return masks, shape_of * len(levels), area / radii.square(), shift
