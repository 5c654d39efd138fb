"""Codes ahead of time: pictures become codes once, and training reads these in their place.

A code shard is a safetensors file with `codes` (n, k) int32 and, in its header, the names of the n
pictures and which image tokenizer made them. Its own name follows from those of its pictures, so
that any number of processes, started again at will, make the same shards.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from unimm.checkpoints.native import BUNDLED
from unimm.data.processor import Processor

Picture = tuple[str, Callable[[], Any]]  # a name, and what opens it


class CodeShards:
    """The codes in a folder, by the name of the picture.

    maker: the image tokenizer (`made_by`) whose codes are wanted; None takes any.
    Raises ValueError for a folder without shards, a broken shard, and codes of another tokenizer.
    """

    def __init__(self, folder: str | Path, maker: str | None = None):
        self.places: dict[str, tuple[Path, int]] = {}
        self.open: dict[Path, np.ndarray] = {}
        for path in sorted(Path(folder).glob("codes-*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    about = file.metadata()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as a code shard: {error}") from None
            if maker is not None and about["maker"] != maker:
                raise ValueError(f"the codes in {folder} are of another image tokenizer")
            for k, name in enumerate(json.loads(about["names"])):
                self.places[name] = path, k
        if not self.places:
            raise ValueError(f"{folder} holds no codes: tokenizers/encode_images.py makes them")

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> np.ndarray:
        """The codes of one picture, (k,) int32."""
        path, k = self.places[name]
        if path not in self.open:
            with safe_open(path, "np") as file:
                self.open[path] = file.get_tensor("codes")
        return self.open[path][k]


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

    Of all shards, this process makes those whose number is `part` modulo `parts`. Returns how many
    pictures it has encoded, and a line for each that cannot be read (they are left out).
    """
    out.mkdir(parents=True, exist_ok=True)
    chunks = [pictures[k : k + shard] for k in range(0, len(pictures), shard)]
    encoded = 0
    wrong: list[str] = []
    for chunk in tqdm(chunks[part::parts], desc="encoding", unit="shard", disable=None):
        digest = hashlib.sha1(json.dumps([maker, *(name for name, _ in chunk)]).encode())
        target = out / f"codes-{digest.hexdigest()[:16]}.safetensors"
        if target.exists():
            continue
        names, codes = [], []
        for group in _read(chunk, processor, batch, wrong):
            names += [name for name, _ in group]
            codes.append(_encode(processor, torch.stack([pixels for _, pixels in group])))
        if names:
            scratch = out / f".{target.name}.{os.getpid()}.part"
            about = {"names": json.dumps(names), "maker": maker}
            save_file({"codes": torch.cat(codes)}, scratch, about)
            os.replace(scratch, target)
        encoded += len(names)
    return encoded, wrong


def _read(
    chunk: list[Picture], processor: Processor, batch: int, wrong: list[str]
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Names and pixels (3, s, s) in groups of `batch`; what cannot be read goes to `wrong`."""
    group: list[tuple[str, torch.Tensor]] = []
    for name, opened in chunk:
        try:
            group.append((name, processor.drawn_pixels(opened())))
        except (ValueError, OSError) as error:
            wrong.append(f"{name}: {' '.join(str(error).split())}")
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
