"""The processes of a run: one, several that hold the whole model (DDP), or a part each (FSDP2).

All ranks call the methods of `Team` in the same order. A run that is sharded leaves `Parts.model`
to previews and saving, for which the main process is lent the whole weights.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unimm.config import Run
from unimm.cpu import multiplies_bfloat16


def settled(run: Run) -> Run:
    """The run with precision "auto" made what it was begun with, or what is faster here.

    A CPU without instructions for bfloat16 multiplies it several times slower than float32.
    """
    if run.precision != "auto":
        return run
    begun = Path(run.out) / "run.json"
    if run.out and begun.exists():
        there = json.loads(begun.read_text()).get("precision")
        return dataclasses.replace(run, precision=there)
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    slow = on_cpu and not multiplies_bfloat16()
    return dataclasses.replace(run, precision="float32" if slow else "bf16")


class Team:
    """This process and the others. Raises ValueError for what cannot be sharded."""

    def __init__(self, run: Run):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

        on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        precision = "bf16" if run.precision == "bf16" else "no"
        AcceleratorState._reset_state()  # of an earlier run, which may have had another precision
        # under adapters nothing else changes: an int8 base need not travel in every forward
        how = DistributedDataParallelKwargs(broadcast_buffers=not run.lora)
        self.accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=[how])
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.rank == 0, self.accelerator.device
        self.sharded = run.shard
        if run.shard and not dist.is_initialized():
            raise ValueError("shard=True needs several processes: torchrun, or accelerate launch")
        if run.batch_size < self.ranks:
            raise ValueError(f"a batch of {run.batch_size} leaves some of {self.ranks} ranks empty")

    def prepare(self, model: nn.Module, run: Run) -> nn.Module:
        """The module to train: `model` itself, in DDP, or a sharded copy of it.

        Which parameters learn must be settled before; optimizers of a sharded run come after.
        """
        if not self.sharded:
            return self.accelerator.prepare(model)
        return shard(model, self.device, run)

    def exchange(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Around the forward and backward of a piece: ranks add up gradients in the last alone."""
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(model)

    @contextmanager
    def whole(self, plain: nn.Module, trained: nn.Module) -> Iterator[None]:
        """Inside, `plain` has all weights in the main process."""
        if self.sharded:
            for mine, part in zip(plain.parameters(), trained.parameters(), strict=True):
                full = part.full_tensor()  # type: ignore[attr-defined]
                mine.data = full if self.main else mine.data
        yield
        if self.sharded:
            empty(plain)

    def gather(self, numbers: list[float]) -> Tensor:
        """The numbers of all ranks, (ranks, n) float64."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.ranks == 1:
            return mine[None]
        return self.accelerator.gather(mine.to(self.device)[None]).cpu()

    def gather_objects(self, mine: Any) -> list[Any]:
        """An object of each rank."""
        if self.ranks == 1:
            return [mine]
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        return everyone

    def from_main(self, number: int) -> int:
        """The main process's number, to everybody."""
        return int(self.gather([number])[0, 0])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def shard(model: nn.Module, device: torch.device, run: Run) -> nn.Module:
    """A copy of a unified model as FSDP2 has it: layer by layer, with the rest at the root.

    The weights of `model` are given up. Ranks reach the root's parts in any number of calls, as
    it is gathered once a forward; only layers, which all ranks pass alike, are gathered alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if run.setup is not None or run.options.get("code_rows_only"):
        raise ValueError("shard=True is for the plain training of a unified model")
    trained: Any = copy.deepcopy(model).to(device)
    empty(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if run.precision == "bf16":  # what travels is bfloat16, and sums of gradients are float32
        half = torch.bfloat16
        policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
        trained.forward = torch.autocast(device.type, half)(trained.forward)
    for layer in trained.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(trained, mesh=mesh)
    return trained


def empty(model: nn.Module) -> None:
    """Give up the memory of the weights."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
