"""What a run costs, before it is begun: parameters, memory, FLOPs, and the time they take."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from unimm.config import Run
from unimm.training.parallel import settled
from unimm.training.trainer import (
    Parts,
    Piece,
    cut,
    make_mixture,
    make_optimizers,
    set_rate,
    setup,
    train,
)

STEPS = 3  # that are measured; the first, which warms up, is not counted
COUNTED = 8  # batches whose FLOPs are counted, where steps follow from them


def dry_run(run: Run) -> str:
    """The cost of `run` in lines of text; `STEPS` steps are taken on this machine, none is kept."""
    run = settled(run)
    parts = setup(run)
    optimizers = make_optimizers(parts.model, run)
    pieces = one_step(parts, run)
    slots, room = sum(p.slots for p in pieces), sum(p.room for p in pieces)
    trained = [p for p in parts.model.parameters() if p.requires_grad]
    learned = sum(p.numel() for p in trained)
    weights = weights_of(parts.model)
    total = sum(p.numel() for p in weights.values())
    state = sum(
        p.numel() * (1 if name.endswith("_matrices") else 2)  # Muon has one moment, AdamW two
        for name, optimizer in optimizers.items()
        for group in optimizer.param_groups
        for p in group["params"]
    )
    sizes = {
        "weights": sum(p.nbytes for p in weights.values()),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": 4 * state,
        "activations": activations(parts, run, pieces[-1]),
    }
    flops = step_flops(parts, run, optimizers)
    seconds, peak = measured(run)
    speed = f", {slots / seconds:,.0f} tokens a second" if slots else ""
    lines = [f"parameters: {total:,}, of which {learned:,} trained and {total - learned:,} frozen"]
    lines += [f"  {line}" for line in by_part(parts, optimizers)]
    lines.append(f"a step: {run.batch_size:,} samples in {len(pieces)} pieces")
    if slots:
        lines[-1] += f", {slots:,} tokens that fill {slots / room:.0%} of their rows"
    lines += [
        f"memory: {_bytes(sum(sizes.values()))} ("
        + ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items())
        + f"); at most {_bytes(peak)} in the steps that were measured",
        f"compute: {flops:.3g} FLOPs a step, {flops * run.steps:.3g} in {run.steps:,} steps",
        f"time: {seconds:.3g} s a step{speed}, {flops / seconds / 1e9:,.3g} GFLOP/s "
        f"in {run.precision}: "
        f"{tqdm.format_interval(seconds * run.steps)} in all, without previews",
    ]
    if run.shard:
        lines.append("with shard=True each rank holds a part of the first three; not measured")
    return "\n".join(lines)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """By name: the parameters, and weights in int8, which are none for torch."""
    small = {name: b for name, b in model.named_buffers() if b.dtype == torch.int8}
    return {**dict(model.named_parameters()), **small}


def by_part(parts: Parts, optimizers: dict[str, Any]) -> list[str]:
    """A line for each part of the model: its name, size and learning rates."""
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    rates = {id(p): group["rate"] for group in groups for p in group["params"]}
    found: dict[str, tuple[int, set[float | None]]] = {}
    for name, parameter in weights_of(parts.model).items():
        size, known = found.get(name.split(".")[0], (0, set()))
        found[name.split(".")[0]] = size + parameter.numel(), known | {rates.get(id(parameter))}
    return [
        f"{part} {size:,}: "
        + ", ".join(sorted("frozen" if r is None else f"rate {r:g}" for r in known))
        for part, (size, known) in found.items()
    ]


def one_step(parts: Parts, run: Run) -> list[Piece]:
    """The first batch of a run, in pieces; the last is the largest."""
    return sorted(next(first_steps(parts, run)), key=lambda piece: piece.room)


def first_steps(parts: Parts, run: Run) -> Iterator[list[Piece]]:
    """The batches of a run from its first on, in pieces."""
    mixture = make_mixture(run, parts, None)
    while True:
        yield cut(mixture.draw(run.batch_size), parts, run)


def losses(parts: Parts, run: Run, piece: Piece) -> Iterator[Tensor]:
    """Each goes backward before the next is asked for."""
    for _, loss, _ in (parts.step or run.step)(parts.model, piece.batch, 1.0, run):
        yield loss


def activations(parts: Parts, run: Run, piece: Piece) -> int:
    """Bytes that one forward holds for its backward, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in weights_of(parts.model).values()}
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    parts.model.train()
    half = torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bf16")
    with half, saved_tensors_hooks(hold, lambda tensor: tensor):
        first = next(losses(parts, run, piece))
        del first
    return sum(held.values())


def measured(run: Run) -> tuple[float, int]:
    """Seconds a step, and the most memory in bytes (of the GPU; on a CPU, of the process)."""

    def unsaved(_: Run) -> Parts:
        return dataclasses.replace(setup(run), save=None, preview=None)

    with tempfile.TemporaryDirectory() as folder:
        few = dataclasses.replace(
            run, out=folder, steps=STEPS, log_every=1, save_every=0, setup=unsaved, shard=False
        )
        lines = (train(few) / "log.jsonl").read_text().splitlines()
    taken = [json.loads(line)["seconds_a_step"] for line in lines[1:]]
    if torch.cuda.is_available():
        return sum(taken) / len(taken), torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return sum(taken) / len(taken), peak * (1 if sys.platform == "darwin" else 1024)


def sample_flops(run: Run) -> float:
    """Training FLOPs a sample, the mean of `COUNTED` batches of `run` on the CPU.

    Samples differ in length, batches of 32 by 9 % in their FLOPs: one is not enough.
    """
    torch.manual_seed(run.seed)
    parts = setup(run)
    optimizers = make_optimizers(parts.model, run)
    return step_flops(parts, run, optimizers, COUNTED) / run.batch_size


def step_flops(parts: Parts, run: Run, optimizers: dict[str, Any], batches: int = 1) -> float:
    """FLOPs of products and convolutions in a training step, a mean: forward, backward, and the
    optimizers' (Muon's products are a fifth of a small step, and more than half of a smaller one).

    Real batches are counted, because which slots are scored shapes the heads' products, padding
    included; in float32 and by the math path of attention, as the counter reads 0 for the fused one
    on a CPU. The weights stay as they are.
    """
    run = dataclasses.replace(run, precision="float32")
    steps = list(islice(first_steps(parts, run), batches))
    parts.model.train()

    def work() -> None:
        for piece in chain(*steps):
            for loss in losses(parts, run, piece):
                loss.backward()

    def update() -> None:
        for optimizer in optimizers.values():
            set_rate(optimizer, 0.0)
            optimizer.step()

    flops = count_flops(work) / batches + count_flops(update)
    parts.model.zero_grad(set_to_none=True)
    return flops


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs (two a multiply-add) of products and convolutions in `call()`, on any device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
