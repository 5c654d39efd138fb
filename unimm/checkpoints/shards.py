"""Weight files, read a few tensors at a time: safetensors or PyTorch archives, one file or many.

A file is mapped, and mapped anew after every 32 MB, so that what was read does not stay in memory.
PyTorch archives are read with `weights_only=True`: one that holds more than tensors is refused.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unimm.model.int8 import quantize, quantize_decoder

MAPPED = 32 << 20  # bytes of a file that are mapped at once
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
Places = dict[str, Tensor]  # by the name of a parameter here


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder; ValueError where one is missing."""
    for index, single in zip(INDICES, SINGLES, strict=True):
        if (folder / index).exists():
            names = read_json(folder / index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise ValueError(f"{folder / index} names no weight files")
            files = [folder / name for name in sorted(set(map(str, names.values())))]
            for path in files:
                if not path.is_file():
                    raise ValueError(f"{path} is missing, and {index} names it")
            return files
        if (folder / single).exists():
            return [folder / single]
    raise ValueError(f"{folder} holds no weights: neither {SINGLES[0]} nor {SINGLES[1]}")


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file. Copy what you keep: the tensors lie in the mapped file."""
    opened = _safetensors if path.suffix == ".safetensors" else _archive
    try:
        names, done = list(opened(path)[0]), 0
        while done < len(names):
            get, mapped = opened(path)[1], 0
            while done < len(names) and mapped < MAPPED:
                tensor = get(names[done])
                mapped += tensor.nbytes
                yield names[done], tensor
                done += 1
                del tensor
            del get
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None


def names(path: Path) -> list[str]:
    """The names of the tensors of one file."""
    opened = _safetensors if path.suffix == ".safetensors" else _archive
    return list(opened(path)[0])


def fill(
    models: dict[str, nn.Module],
    files: Iterable[Path],
    place: Callable[[str, Tensor], Places],
    dtypes: dict[str, torch.dtype | None],
    device: torch.device | str = "cpu",
) -> None:
    """Give models built on "meta" their weights, each tensor straight in its final dtype.

    models and dtypes: by the first part of a name ("" is the rest); `place` turns one stored tensor
    into named ones. dtype None is that of the files; int8 is that of the decoder's linear layers
    (unimm.model.int8), and the rest is as in the files. Whole numbers and scales stay as they are.
    Raises ValueError, naming the file, for what is missing, strange or misshapen.
    """
    files = list(files)
    kept = {prefix: dtype for prefix, dtype in dtypes.items() if dtype not in (None, torch.int8)}
    if len(kept) < len(dtypes):
        kept = {**dict.fromkeys(dtypes, stored_dtype(files)), **kept}
    for prefix, dtype in dtypes.items():
        if dtype is torch.int8:
            quantize_decoder(models[prefix])
    expected = {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    whole = {name for name in expected if f"{name[:-6]}scale" in expected}  # int8 weights
    states: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in models}
    path = None
    for path in files:
        for stored, tensor in read(path):
            placed = _placed(path, stored, tensor, place)
            for name in whole & placed.keys():
                placed[name], placed[f"{name[:-6]}scale"] = quantize(placed[name])
            for name, value in placed.items():
                if name not in expected:
                    raise ValueError(f"{path}: the model has no place for the tensor {stored}")
                if value.shape != expected[name].shape:
                    found, wanted = tuple(value.shape), tuple(expected[name].shape)
                    raise ValueError(f"{path}: {stored} has shape {found}, not {wanted} ({name})")
                if value.is_floating_point() != expected[name].is_floating_point():
                    raise ValueError(f"{path}: {stored} holds {value.dtype}, which is no weight")
                prefix = name.split(".")[0]
                prefix, inner = (
                    (prefix, name[len(prefix) + 1 :]) if prefix in models else ("", name)
                )
                cast = value.is_floating_point() and not inner.endswith(".scale")
                dtype = kept[prefix] if cast else value.dtype
                states[prefix][inner] = value.detach().to(device, dtype, copy=True).contiguous()
            del tensor
    for prefix, model in models.items():
        _assign(model, states[prefix], prefix, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError in one line for anything else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is not a JSON object")
    return data


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    return read_json(path) if path.exists() else {}


def optional_number(path: Path, name: str, default: float) -> float:
    """A number that a JSON object gives; `default` where it is silent or there is no such file."""
    value = optional_json(path).get(name) or default
    if not isinstance(value, int | float):
        raise ValueError(f"{path}: {name} is {value!r}, not a number")
    return value


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The floating dtype of the first matrix."""
    for path in files:
        for _, tensor in read(path):
            if tensor.is_floating_point() and tensor.ndim > 1:
                return tensor.dtype
    return torch.float32


def _placed(
    path: Path, stored: str, tensor: Tensor, place: Callable[[str, Tensor], Places]
) -> Places:
    try:
        return place(stored, tensor)
    except KeyError:
        raise ValueError(f"{path}: the tensor {stored} is unknown in this format") from None


def _assign(model: nn.Module, state: dict[str, Tensor], prefix: str, path: Path | None) -> None:
    """Put the tensors in place; a tied head is the table."""
    names = dict(model.named_parameters(remove_duplicate=False))
    firsts = {id(parameter): name for name, parameter in reversed(list(names.items()))}
    ties = {name: firsts[id(p)] for name, p in names.items() if firsts[id(p)] != name}
    for name in model.state_dict():
        source = ties.get(name, name)
        if source not in state and name not in state:
            shown = f"{prefix}.{name}" if prefix else name
            raise ValueError(f"{path.parent if path else 'the folder'} lacks the tensor {shown}")
    model.load_state_dict({**state, **{n: state[s] for n, s in ties.items()}}, assign=True)
    for name, source in ties.items():
        owner, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    for parameter in model.parameters():
        parameter.requires_grad_(True)


Opened = tuple[Iterable[str], Callable[[str], Tensor]]  # names, and a tensor by name


def _safetensors(path: Path) -> Opened:
    try:
        file = safe_open(path, framework="pt")
        return file.keys(), file.get_tensor
    except FileNotFoundError:
        raise
    except Exception as error:  # SafetensorError and OSError, by what is wrong
        raise ValueError(f"{path} is damaged or truncated: {error}") from None


def _archive(path: Path) -> Opened:
    try:
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # written before PyTorch 1.6: cannot be mapped
            if "mmap" not in str(error):
                raise
            with warnings.catch_warnings():  # about the protocol of a bare pickle
                warnings.simplefilter("ignore")
                data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever unpickling a damaged or a hostile file leads to
        said = str(error)
        if isinstance(error, UnpicklingError):  # whose first line advises to run the file's code
            said = said.partition("\n")[2].rpartition("WeightsUnpickler error:")[2]
        reason = said.strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than plain tensors: {reason}") from None
    if isinstance(data, dict) and set(data) & {"model", "state_dict"}:  # LlamaGen's
        data = data.get("model", data.get("state_dict"))
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise ValueError(f"{path} does not hold plain tensors by name")
    return data, data.__getitem__
