"""The state of a run on disk: weights and optimizer moments as safetensors, written whole.

A checkpoint is a folder `checkpoint-STEP` that appears under its name only when it is complete.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer


def save_checkpoint(
    out: Path, model: nn.Module | None, optimizers: dict[str, Optimizer], step: int
) -> None:
    """Write `out`/checkpoint-`step` and remove older ones; model None only removes."""
    old = list(out.glob("checkpoint-*"))
    if model is not None:
        part = out / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_file(plain_state(model), part / "model.safetensors")
        save_file(_moments(model, optimizers), part / "optimizers.safetensors")
        save_file({"torch": torch.get_rng_state()}, part / "random.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step}))
        target = out / f"checkpoint-{step}"
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        old = [path for path in old if path != target]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(out: Path, model: nn.Module, optimizers: dict[str, Optimizer]) -> int:
    """Load the last checkpoint in `out` into place; returns its step, 0 where there is none."""
    found = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not found:
        return 0
    last = found[-1]
    model.load_state_dict(load_file(last / "model.safetensors"), strict=False)
    moments = load_file(last / "optimizers.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for title, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{title}/{names[parameter]}/"
                state = {k[len(prefix) :]: v for k, v in moments.items() if k.startswith(prefix)}
                if state:  # fused AdamW wants its step count where the parameter is
                    device = parameter.device
                    optimizer.state[parameter] = {k: v.to(device) for k, v in state.items()}
    torch.set_rng_state(load_file(last / "random.safetensors")["torch"])
    return int(json.loads((last / "state.json").read_text())["step"])


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


def _moments(model: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{title}/{name}/{key}": value.contiguous()
        for title, optimizer in optimizers.items()
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
