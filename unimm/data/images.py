"""Anybody's picture as an upright RGB image: what is accepted, what is refused, and why.

One door for files and objects, so that the command line, the demo, the readers and the library
refuse the same things with the same words.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # refused above it: a header may claim any size


def open_image(source: Any, name: str = "") -> Image.Image:
    """`source` as an RGB image: a path, PIL image, uint8 array (H, W, 3), or the `BytesIO` of a
    file, which errors call `name`.

    Transparency is laid over white, EXIF rotation applied, the first frame of an animation taken,
    16-bit grey scaled down. Raises ValueError, in one line, for anything that is not a picture.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(
                f"an image array is uint8 (H, W, 3), not {source.dtype} {source.shape}"
            )
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    path: Any = name if isinstance(source, io.BytesIO) else Path(source)
    if isinstance(path, Path):
        if not path.exists():
            raise ValueError(f"no such image: {path}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(
                        f"{path} claims {picture.width} x {picture.height} pixels, "
                        f"and more than {MAX_PIXELS:,} are refused: make it smaller"
                    )
                return _upright_rgb(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large a picture: {error}") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        empty = isinstance(path, Path) and path.stat().st_size == 0
        reason = "empty file" if empty else str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image: {reason}") from None


def _upright_rgb(picture: Image.Image) -> Image.Image:
    if getattr(picture, "is_animated", False):
        picture.seek(0)
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: Pillow would clip it to white
        values = np.asarray(picture, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255
        picture = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
