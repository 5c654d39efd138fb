"""The one training loop, on accelerate. What is trained, on what and how is in the `Run`.

A step is a generator function, `step(model, batch, total, run)`, that yields
(optimizer name, loss, metrics); each loss goes backward before the generator is resumed, so a
discriminator is a second loss. `total` is the sum of `run.count` over the global batch: a loss
divided by it has the same gradient however the batch is cut.
"""

import json
import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from unimm.config import Rates, Run
from unimm.data.mixture import Mixture, pieces, prefetch
from unimm.training.state import load_checkpoint, save_checkpoint


@dataclass
class Parts:
    """What `run.setup(run)` returns.

    collate(items) makes a batch; prepare(item, rng) turns a source's item into what collate takes.
    preview(folder, step) writes sample pictures and returns metrics; save(folder) the result.
    """

    model: nn.Module
    collate: Callable[[list[Any]], Any]
    preview: Callable[[Path, int], dict[str, float] | None] | None = None
    save: Callable[[Path], None] | None = None
    prepare: Callable[[Any, Any], Any] | None = None
    size: Callable[[Any], int] | None = None  # items of like size go into one piece of a batch
    step: Callable[..., Any] | None = None  # in place of run.step, where it needs what setup made


def train(run: Run) -> Path:
    """Train as `run` says and return its folder, going on from its last checkpoint if any.

    The folder then holds run.json, log.jsonl, previews, and what the setup saves.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import send_to_device, set_seed

    if not run.out:
        raise ValueError("a run needs a folder for its result: out=DIR")
    if run.precision not in ("bf16", "float32"):
        raise ValueError(f"precision is 'bf16' or 'float32', not {run.precision!r}")
    if min(run.steps, run.batch_size, run.accumulate) < 1:
        raise ValueError("steps, batch_size and accumulate must be 1 or more")
    out = Path(run.out)
    check_same_run(out, run)
    if (out / "done").exists():
        return out

    set_seed(run.seed)
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision = "bf16" if run.precision == "bf16" else "no"
    AcceleratorState._reset_state()  # of an earlier run, which may have had another precision
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)  # several CPUs: by torchrun
    parts = setup(run)
    optimizers = make_optimizers(parts.model, run)
    model = accelerator.prepare(parts.model)
    start = load_checkpoint(out, parts.model, optimizers)
    rank, ranks = accelerator.process_index, accelerator.num_processes

    mixture = Mixture(
        {name: source.make(run, **source.options) for name, source in run.data.items()},
        {name: source.weight for name, source in run.data.items()},
        run.seed,
        parts.prepare,
        lambda name, reason: note_left_out(out, name, reason),
        run.most_broken,
    )
    mixture.skip(start * run.batch_size)
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(run.record(), indent=1))

    def make_batches() -> list[Any]:
        items = mixture.take(run.batch_size, rank, ranks)
        if parts.size:
            items.sort(key=parts.size)
        return [parts.collate(list(part)) for part in pieces(items, run.accumulate, parts.size)]

    count, make_losses = run.count or one, parts.step or run.step
    log = Log(out, run, start, shown=accelerator.is_main_process)
    ahead = prefetch(make_batches, run.steps - start)
    for step in range(start, run.steps):
        for optimizer in optimizers.values():
            set_rate(optimizer, rate_factor(run, step))
        model.train()
        batches = log.timed("waiting", lambda: next(ahead))
        total = sum(count(batch, run) for batch in batches)
        total = float(accelerator.reduce(torch.tensor(total, device=accelerator.device)))
        for piece, batch in enumerate(batches):
            batch = send_to_device(batch, accelerator.device)
            last = piece == len(batches) - 1  # ranks exchange gradients once a step
            with nullcontext() if last else accelerator.no_sync(model):
                for name, loss, metrics in make_losses(model, batch, total, run):
                    accelerator.backward(loss * ranks)  # DDP averages; ours is a share of a sum
                    log.add(name, float(loss.detach()) * ranks, metrics)
        for name, optimizer in optimizers.items():
            log.add(name, None, {f"{name}_gradient": clip(optimizer, run.clip)})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.step_done(step + 1)
        if accelerator.is_main_process and parts.preview and due(run.preview_every, step, run):
            log.write(step + 1, preview(parts, out, step + 1))
        if accelerator.is_main_process and due(run.save_every, step, run):
            save_checkpoint(out, parts.model, optimizers, step + 1)
    if accelerator.is_main_process:
        parts.model.eval()
        if parts.save:
            parts.save(out)
        (out / "done").write_text("")
        save_checkpoint(out, None, {}, 0)
    accelerator.wait_for_everyone()
    return out


def check_same_run(out: Path, run: Run) -> None:
    """Refuse to go on with, or to take for finished, what another run has begun in `out`."""
    if not (out / "run.json").exists():
        return
    there, here = json.loads((out / "run.json").read_text()), json.loads(json.dumps(run.record()))
    free = {"out", "log_every", "preview_every", "save_every"}
    free |= set() if (out / "done").exists() else {"steps"}
    for key in sorted(set(here) - free):
        if there.get(key) != here[key]:
            raise ValueError(
                f"{out} holds a run with {key}={there.get(key)!r}, and this one has "
                f"{key}={here[key]!r}: choose another out, or remove that folder"
            )


def note_left_out(out: Path, source: str, reason: str) -> None:
    """A line in left_out.txt for a row of data that could not be read."""
    with (out / "left_out.txt").open("a", encoding="utf-8") as file:
        file.write(f"{source}: {reason}\n")


def setup(run: Run) -> Parts:
    """The parts of `run`; a unified model from `run.init` where it names no setup."""
    if run.setup is not None:
        return run.setup(run)
    from unimm.training.next_token import setup_unified

    return setup_unified(run)


def make_optimizers(model: nn.Module, run: Run) -> dict[str, Optimizer]:
    """One AdamW for each named list of rates. Parameters that no list trains are frozen.

    With `run.optimizer` "muon", the matrices inside transformer layers go to a Muon "NAME_matrices"
    instead (Moonlight, arXiv 2502.16982: its updates have AdamW's size, so one rate suits both).
    """
    if run.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer is 'adamw' or 'muon', not {run.optimizer!r}")
    plans = run.train if isinstance(run.train, dict) else {"main": run.train}
    # (plan, in a Muon) -> (rate, weight decay) -> parameters
    chosen: dict[tuple[str, bool], dict[tuple[float, float], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        rates = {plan: rate_of(name, plans[plan]) for plan in plans}
        plan = next((plan for plan, rate in rates.items() if rate is not None), None)
        parameter.requires_grad_(plan is not None)
        if plan is not None:
            matrix = parameter.ndim == 2 and ".layers." in name
            decay = run.weight_decay if parameter.ndim > 1 else 0.0
            groups = chosen.setdefault((plan, matrix and run.optimizer == "muon"), {})
            groups.setdefault((rates[plan] or 0.0, decay), []).append(parameter)
    if next(iter(plans)) not in {plan for plan, _ in chosen}:
        raise ValueError(f"no parameter matches the patterns of this run: {plans}")
    optimizers: dict[str, Optimizer] = {}
    for (plan, muon), by_rate in chosen.items():  # a discriminator's plan is empty without one
        members: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate, "rate": rate, "weight_decay": decay}
            for (rate, decay), parameters in by_rate.items()
        ]
        if muon:
            how: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw"}
            optimizers[f"{plan}_matrices"] = torch.optim.Muon(members, **how)
        else:
            optimizers[plan] = AdamW(members, betas=run.betas, fused=True)
    return optimizers


def rate_of(name: str, rates: Rates) -> float | None:
    """The learning rate of a parameter: that of the first pattern matching its whole name."""
    return next((rate for pattern, rate in rates if re.fullmatch(pattern, name)), None)


def rate_factor(run: Run, step: int) -> float:
    """What the learning rates are multiplied by at `step` (from 0)."""
    if step < run.warmup:
        return (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    if run.schedule == "constant":
        return 1.0
    if run.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if run.schedule == "linear":
        return 1 - progress
    raise ValueError(f"schedule is 'constant', 'cosine' or 'linear', not {run.schedule!r}")


def set_rate(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor


def clip(optimizer: Optimizer, limit: float) -> float:
    """Clip the norm over all of an optimizer's gradients (0: never); returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


def due(every: int, step: int, run: Run) -> bool:
    return bool(every) and ((step + 1) % every == 0 or step + 1 == run.steps)


def one(batch: Any, run: Run) -> float:
    """The count of a step whose loss is a mean: `total` is then the number of pieces."""
    return 1.0


def preview(parts: Parts, out: Path, step: int) -> dict[str, float]:
    parts.model.eval()
    with torch.no_grad():
        metrics = parts.preview(out, step) if parts.preview else None
    parts.model.train()
    return metrics or {}


class Log:
    """Means over `log_every` steps to log.jsonl, and to a progress bar or plain lines.

    A metric is a number (mean over losses) or a pair (sum, count), pooled.
    """

    def __init__(self, out: Path, run: Run, start: int, shown: bool):
        self.path, self.every, self.shown = out / "log.jsonl", run.log_every, shown
        self.sums: dict[str, list[float]] = {}
        self.last_step, self.clock = start, time.perf_counter()
        self.bar = tqdm(
            total=run.steps, initial=start, desc=out.name, disable=None if shown else True
        )

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """`call()`, and its share of the time under `name`."""
        begin = time.perf_counter()
        result = call()
        self._pool(name, time.perf_counter() - begin, 0.0)
        return result

    def add(self, name: str, loss: float | None, metrics: dict[str, Any]) -> None:
        if loss is not None:
            self._pool(f"{name}_loss", loss, 0.0)
        for key, value in metrics.items():
            total, count = value if isinstance(value, tuple) else (float(value), 1.0)
            self._pool(key, float(total), float(count))

    def step_done(self, step: int) -> None:
        self.bar.update(1)
        if step % self.every and step != self.bar.total:
            return
        steps, seconds = step - self.last_step, time.perf_counter() - self.clock
        waiting = self.sums.pop("waiting", [0.0])[0]
        means = {key: total / (count or steps) for key, (total, count) in self.sums.items()}
        means |= {"seconds_a_step": seconds / steps, "waiting": waiting / seconds}
        self.write(step, means)
        self.sums, self.last_step, self.clock = {}, step, time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not metrics or not self.shown:
            return
        rounded = {key: float(f"{value:.5g}") for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        line = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        if self.bar.disable:
            print(f"{self.path.parent.name} {step}/{self.bar.total}  {line}", flush=True)
        else:
            self.bar.set_postfix_str(line[:120])

    def _pool(self, key: str, total: float, count: float) -> None:
        pair = self.sums.setdefault(key, [0.0, 0.0])
        pair[0] += total
        pair[1] += count
