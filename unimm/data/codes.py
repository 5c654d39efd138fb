"""Codes ahead of time: pictures become codes once, and training reads these in their place.

A code shard is a safetensors file with `codes` (n, k) int32 and, in its header, the names and
stamps of the n pictures and which image tokenizer made them. A stamp is the CRC-32 of a picture's
bytes: codes are given for a picture of that name *and* content, never those of an older or of
another picture. A shard's own name follows from all of this, so that any number of processes,
started again at will, make the same shards.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from unimm.checkpoints.native import BUNDLED
from unimm.data.images import open_image
from unimm.data.processor import Processor


class Picture(NamedTuple):
    """What a picture is called, and what reads its bytes (ValueError or OSError where none is)."""

    name: str
    read: Callable[[], bytes]

    def __repr__(self) -> str:
        return self.name

    def image(self) -> Any:
        return open_image(io.BytesIO(self.read()), name=self.name)

    def stamp(self) -> str:
        return f"{zlib.crc32(self.read()):08x}"


class CodeShards:
    """The codes in a folder, by name and stamp of the picture.

    maker: the image tokenizer (`made_by`) whose codes are wanted; None takes any.
    Raises ValueError for a folder without shards, a broken shard, and codes of another tokenizer.
    """

    def __init__(self, folder: str | Path, maker: str | None = None):
        self.folder = folder
        self.places: dict[str, dict[str, tuple[Path, int]]] = {}
        self.open: dict[Path, np.ndarray] = {}
        self.found: dict[str, tuple[Path, int]] = {}  # what was looked at, so that it is read once
        for path in sorted(Path(folder).glob("codes-*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    about = file.metadata()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as a code shard: {error}") from None
            if maker is not None and about["maker"] != maker:
                raise ValueError(f"the codes in {folder} are of another image tokenizer")
            if "stamps" not in about:
                raise ValueError(
                    f"{path} is of an earlier version: remove the folder and make the codes again"
                )
            both = zip(json.loads(about["names"]), json.loads(about["stamps"]), strict=True)
            for k, (name, stamp) in enumerate(both):
                self.places.setdefault(name, {})[stamp] = path, k
        if not self.places:
            raise ValueError(f"{folder} holds no codes: tokenizers/encode_images.py makes them")

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def of(self, picture: Picture) -> np.ndarray:
        """The codes of a picture, (k,) int32; ValueError where those of its name are of another
        content. The picture is read the first time that it is asked for, if it is still there."""
        if picture.name not in self.found:
            known = self.places[picture.name]
            try:
                stamp = picture.stamp()
            except (ValueError, OSError):
                if len(known) > 1:
                    raise
                (stamp,) = known
            if stamp not in known:
                raise ValueError(
                    f"{picture.name} is not the picture that it was when the codes in "
                    f"{self.folder} were made: make them again (tokenizers/encode_images.py)"
                )
            self.found[picture.name] = known[stamp]
        path, k = self.found[picture.name]
        if path not in self.open:
            with safe_open(path, "np") as file:
                self.open[path] = file.get_tensor("codes")
        return self.open[path][k]

    def check(self, names: Iterable[str]) -> None:
        """ValueError where the codes are of none of these pictures."""
        first = None
        for name in names:
            if name in self.places:
                return
            first = first or name
        if first is not None:
            raise ValueError(
                f"the codes in {self.folder} are of none of these pictures: the first one is "
                f"{first!r}, and in the codes {next(iter(self.places))!r}"
            )


def made_by(folder: str | Path) -> str:
    """A name for the image tokenizer of a model folder ("scenes": of the bundled model; a folder of
    adapters: of their base); "" where it is not in a file of its own.

    It follows from the names and values of the weights: the same ones in bfloat16 and in float32
    have one name.
    """
    folder = BUNDLED if str(folder) == "scenes" else Path(folder)
    adapters = folder / "adapter_config.json"
    if adapters.is_file():
        return made_by(json.loads(adapters.read_text())["base_model_name_or_path"])
    path = folder / "image_tokenizer.safetensors"
    if not path.is_file():
        return ""
    crc = 0
    for name, tensor in sorted(load_file(path).items()):
        crc = zlib.crc32(
            tensor.float().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), crc)
        )
    return f"{crc:08x}"


def encoder(processor: Processor) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 pictures (n, H, W, 3) -> their codes as drawn, int32 (n, k)."""

    def encode(pictures: np.ndarray) -> np.ndarray:
        return _encode(processor, torch.stack(list(map(processor.drawn_pixels, pictures)))).numpy()

    return encode


def encode_pictures(
    pictures: list[Picture],
    processor: Processor,
    out: Path,
    maker: str = "",
    shard: int = 1024,
    part: int = 0,
    parts: int = 1,
    batch: int = 32,
) -> tuple[int, list[str]]:
    """Write the code shards of `pictures` that are not there yet, each whole.

    Pictures are read to know which are there, and decoded where they are not.

    Of all shards, this process makes those whose number is `part` modulo `parts`. Returns how many
    pictures it has encoded, and a line for each that cannot be read (they are left out).
    """
    out.mkdir(parents=True, exist_ok=True)
    chunks = [pictures[k : k + shard] for k in range(0, len(pictures), shard)]
    encoded = 0
    wrong: list[str] = []
    for chunk in tqdm(chunks[part::parts], desc="encoding", unit="shard", disable=None):
        stamps = dict(_stamped(chunk, wrong))
        digest = hashlib.sha1(json.dumps([maker, *stamps.items()]).encode())
        target = out / f"codes-{digest.hexdigest()[:16]}.safetensors"
        if target.exists():
            continue
        names, codes = [], []
        there = [picture for picture in chunk if picture.name in stamps]
        for group in _opened(there, processor, batch, wrong):
            names += [name for name, _ in group]
            codes.append(_encode(processor, torch.stack([pixels for _, pixels in group])))
        if names:
            scratch = out / f".{target.name}.{os.getpid()}.part"
            about = {"names": names, "stamps": [stamps[name] for name in names]}
            header = {key: json.dumps(value) for key, value in about.items()}
            save_file({"codes": torch.cat(codes)}, scratch, {**header, "maker": maker})
            os.replace(scratch, target)
        encoded += len(names)
    return encoded, wrong


def _stamped(chunk: list[Picture], wrong: list[str]) -> Iterator[tuple[str, str]]:
    """Names and stamps; what cannot be read goes to `wrong`."""
    for picture in chunk:
        try:
            yield picture.name, picture.stamp()
        except (ValueError, OSError) as error:
            wrong.append(f"{picture.name}: {' '.join(str(error).split())}")


def _opened(
    pictures: list[Picture], processor: Processor, batch: int, wrong: list[str]
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Names and pixels (3, s, s) in groups of `batch`; what is no picture goes to `wrong`."""
    group: list[tuple[str, torch.Tensor]] = []
    for picture in pictures:
        try:
            group.append((picture.name, processor.drawn_pixels(picture.image())))
        except (ValueError, OSError) as error:
            wrong.append(f"{picture.name}: {' '.join(str(error).split())}")
        if len(group) == batch:
            yield group
            group = []
    if group:
        yield group


def _encode(processor: Processor, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (N, 3, s, s) -> (N, k) int32."""
    assert processor.image_tokenizer is not None
    weight = next(processor.image_tokenizer.parameters())
    with torch.inference_mode():
        codes = processor.image_tokenizer.encode(pixels.to(weight.device, weight.dtype))
    return codes.to("cpu", torch.int32)
