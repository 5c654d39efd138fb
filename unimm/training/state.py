"""The state of a run on disk, from which it goes on as if it had never been stopped.

out/checkpoint-STEP/
  model.safetensors, optimizers.safetensors     weights and moments (a sharded run: shards/)
  random.safetensors, random-RANK.safetensors   the random number generators of each rank
  state.json                                    step, place in the data, the log's sums, checksums

A folder appears under its name only when all of it is on the disk; one that does not agree with
its checksums is passed over. `plain_state` and the rest of this file know safetensors alone.
"""

import json
import os
import random
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from unimm.training.parallel import Team

KEPT = 2  # checkpoints: the last, and the one before in case the last is damaged
Progress = dict[str, Any]  # JSON-able: "step", and whatever else a run has to know to go on


def save_checkpoint(
    out: Path,
    model: nn.Module,
    optimizers: dict[str, Optimizer],
    progress: Progress,
    team: Team,
) -> None:
    """Write `out`/checkpoint-STEP, all ranks together, and remove all but the last `KEPT`.

    Raises OSError where it cannot be written (a full disk); the checkpoints there are untouched.
    """
    part, target = out / "checkpoint.part", out / f"checkpoint-{progress['step']}"
    if team.from_main(int(team.main and target.exists() and last_good(out) == target)):
        return  # it is what the run has just gone on from
    try:
        if team.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        team.wait()
        _write_random(part / random_name(team.rank))
        if team.sharded:
            _write_shards(part / "shards", model, optimizers)
        elif team.main:
            save_file(plain_state(model), part / "model.safetensors")
            save_file(moments(model, optimizers), part / "optimizers.safetensors")
        team.wait()
        if team.main:
            files = [path for path in sorted(part.rglob("*")) if path.is_file()]
            sums = {str(path.relative_to(part)): checksum(path) for path in files}
            (part / "state.json").write_text(json.dumps({**progress, "files": sums}))
            for path in [*files, part / "state.json", part]:
                to_disk(path)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one, which was passed over
            part.rename(target)
            to_disk(out)
            earlier = [c for c in checkpoints(out) if step_of(c) <= progress["step"]]
            for old in earlier[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        team.wait()
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        shutil.rmtree(part, ignore_errors=True)
        good = last_good(out)
        rest = f"the run can go on from {good.name}" if good else "there is none before it"
        raise OSError(
            f"the checkpoint of step {progress['step']} cannot be written: {error}; {rest}"
        ) from error


def load_checkpoint(
    out: Path, model: nn.Module, optimizers: dict[str, Optimizer], team: Team
) -> Progress:
    """Load the last good checkpoint in `out` into place; {"step": 0} where there is none.

    It may have been written by another number of processes, sharded or not.
    """
    found = last_good(out) if team.main else None
    step = team.from_main(step_of(found) if found else -1)
    if step < 0:
        return {"step": 0}
    folder = out / f"checkpoint-{step}"
    parameters = dict(model.named_parameters())
    if (folder / "shards").exists():
        stored = _read_shards(folder / "shards", model, parameters)
    else:
        _fill(model, load_file(folder / "model.safetensors"))
        stored = load_file(folder / "optimizers.safetensors")
    for title, optimizer in optimizers.items():
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            prefix = f"{title}/{name}/"
            state = {k[len(prefix) :]: v for k, v in stored.items() if k.startswith(prefix)}
            if state and id(parameter) in mine:
                optimizer.state[parameter] = {k: _like(v, parameter) for k, v in state.items()}
    own = folder / random_name(team.rank)
    if own.exists():  # not for a rank that is new
        _read_random(own)
    return json.loads((folder / "state.json").read_text())


def remove_checkpoints(out: Path) -> None:
    for path in [*checkpoints(out), out / "checkpoint.part"]:
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in `out`, the oldest first."""
    found = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def last_good(out: Path) -> Path | None:
    """The newest checkpoint that is whole; those passed over are named on standard error."""
    for folder in reversed(checkpoints(out)):
        problem = what_is_wrong(folder)
        if not problem:
            return folder
        print(f"{folder} is damaged and passed over: {problem}", file=sys.stderr)
    return None


def what_is_wrong(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty where it can."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if "files" not in state:  # of a version without checksums
            for name in ("model", "optimizers", "random"):
                with safe_open(folder / f"{name}.safetensors", "pt"):
                    pass
        for name, expected in state.get("files", {}).items():
            if checksum(folder / name) != expected:
                return f"{name} is not what was written"
        return "" if state["step"] == step_of(folder) else "state.json is of another step"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return " ".join(str(error).split()) or repr(error)


def checksum(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Under a temporary name, then renamed: never half a file."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, each shared tensor once."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.contiguous()
    return state


def moments(model: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    """What the optimizers keep of each parameter, by optimizer/parameter/name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{title}/{name}/{key}": value.contiguous()
        for title, optimizer in optimizers.items()
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def random_name(rank: int) -> str:
    return f"random-{rank}.safetensors" if rank else "random.safetensors"


def _write_random(path: Path) -> None:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)
    known = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    save_file(states, path, {key: json.dumps(value) for key, value in known.items()})


def _read_random(path: Path) -> None:
    with safe_open(path, "pt") as file:
        known = file.metadata() or {}
    states = load_file(path)
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "python" in known:
        version, keys, gauss = json.loads(known["python"])
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(json.loads(known["numpy"])))


def _fill(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """The stored weights into the model, whether it is sharded or not."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in stored:
                tensor.copy_(_like(stored[name], tensor))


def _like(value: Tensor, other: Tensor) -> Tensor:
    """`value` on the device of `other` and, where it has its shape, sharded as it is."""
    value = value.to(other.device)
    if isinstance(other, DTensor) and not isinstance(value, DTensor) and value.shape == other.shape:
        return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)
    return value


def _write_shards(folder: Path, model: nn.Module, optimizers: dict[str, Optimizer]) -> None:
    """Each rank writes its part; torch.distributed.checkpoint in safetensors files."""
    import torch.distributed.checkpoint as dcp

    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save({**state, **moments(model, optimizers)}, storage_writer=writer)


def _read_shards(
    folder: Path, model: nn.Module, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The weights into the model in place; returns the moments, sharded as their parameters."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    wanted: dict[str, Any] = {f"model/{k}": v for k, v in model.state_dict().items()}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        if key not in wanted and not key.startswith("model/"):
            like, size = parameters[key.split("/")[1]], about.size  # type: ignore[union-attr]
            if size == like.shape:
                wanted[key] = torch.zeros_like(like, requires_grad=False)
            else:
                wanted[key] = torch.zeros(size, device=like.device)
    dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    return {key: value for key, value in wanted.items() if not key.startswith("model/")}
