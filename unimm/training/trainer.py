"""The one training loop, on accelerate. What is trained, on what and how is in the `Run`.

A step is a generator function, `step(model, batch, total, run)`, that yields
(optimizer name, loss, metrics); each loss goes backward before the generator is resumed, so a
discriminator is a second loss. `total` is the sum of `run.count` over the global batch: a loss
divided by it has the same gradient however the batch is cut.
"""

import dataclasses
import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from unimm.checkpoints.adapters import adapted_name
from unimm.config import Rates, Run
from unimm.data.mixture import Mixture, Origin, pieces, prefetch
from unimm.data.packing import pack
from unimm.memory import keep_freed
from unimm.training.log import Log
from unimm.training.parallel import Team, settled
from unimm.training.state import (
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    write_text,
)

# Of layers of ours, transformers' and diffusers'; PixArt's tables of shifts are no matrices.
IN_LAYERS = r"\.(layers|transformer_blocks)\.(?!.*scale_shift_table)"


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
    pack: Callable[[list[list[Any]]], Any] | None = None  # as collate, of rows of several items


@dataclass
class Piece:
    """A part of a step's batch: one forward and backward."""

    batch: Any
    origins: list[Origin]  # of its samples, in order
    slots: int  # that samples fill
    room: int  # that the rows have
    again: bool = False  # passed once more, for nothing, to go in step with other ranks


def train(run: Run) -> Path:
    """Train as `run` says and return its folder, going on from its last good checkpoint if any.

    The folder then holds run.json, log.jsonl, previews, and what the setup saves. SIGTERM saves a
    checkpoint and ends the process with status 0. Raises ValueError where a loss or a gradient is
    no number any more, and OSError where a checkpoint cannot be written.
    """
    from accelerate.utils import set_seed

    out = checked_folder(run)
    if (out / "done").exists():
        return out
    run = settled(run)
    set_seed(run.seed)
    team = Team(run)
    with alone_in(out, team):
        if not (out / "done").exists():
            train_in(out, run, team)
        team.wait()
    return out


def train_in(out: Path, run: Run, team: Team) -> None:
    """The run itself, in a folder that is its own."""
    from accelerate.utils import send_to_device, set_seed

    keep_freed(whole=True)
    parts = setup(run)
    if run.packing and parts.pack is None:
        raise ValueError("this setup cannot pack samples: packing=0")
    optimizers = make_optimizers(parts.model, run)  # and freezes what is frozen
    model = team.prepare(parts.model, run)
    if team.rank:
        set_seed(run.seed + team.rank)  # the weights are made: masks of dropout are each rank's own
    if team.sharded:
        optimizers = make_optimizers(model, run)
    trained = model if team.sharded else parts.model
    progress = load_checkpoint(out, trained, optimizers, team)
    start = progress["step"]
    mixture = make_mixture(run, parts, progress, team.rank, team.ranks)
    if team.main:
        write_text(out / "run.json", json.dumps(run.record(), indent=1))

    def make_step() -> tuple[list[Piece], dict[str, Any]]:
        drawn = mixture.draw(run.batch_size, team.rank, team.ranks)
        return cut(drawn, parts, run), mixture.state()

    def save(step: int) -> None:
        streams = team.gather_objects(cursor["streams"])  # each rank is at its own place in them
        there = {**cursor, "streams": streams}
        progress = {"step": step, "mixture": there, "log": log.state(), "ranks": team.ranks}
        save_checkpoint(out, trained, optimizers, progress, team)

    count, make_losses = run.count or one, parts.step or run.step
    log = Log(out, run, start, team, progress.get("log"))
    cursor = mixture.state()
    ahead_of_use = closing(prefetch(make_step, run.steps - start))
    with ahead_of_use as ahead, Signal() as asked_to_stop:
        for step in range(start, run.steps):
            try:
                todo, next_cursor = log.timed(lambda: next(ahead))
            except ValueError:  # too much of a source is broken
                if team.ranks == 1:
                    save(step)
                raise
            mine = sum(count(piece.batch, run) for piece in todo)
            weights, most, stops = team.gather([mine, len(todo), asked_to_stop()]).T
            if stops.any():
                save(step)
                raise SystemExit(0)
            if team.sharded:  # ranks must pass the layers equally often
                again = dataclasses.replace(todo[-1], again=True, slots=0, room=0)
                todo += [again] * (int(most.max()) - len(todo))
            for optimizer in optimizers.values():
                set_rate(optimizer, rate_factor(run, step))
            model.train()
            wrong: list[Origin] = []
            told: list[tuple] = []  # to the log, once it is known that the step is sound
            for k, piece in enumerate(todo):
                batch = send_to_device(piece.batch, team.device)
                with team.exchange(model, last=k == len(todo) - 1):
                    for name, loss, metrics in make_losses(model, batch, float(weights.sum()), run):
                        # gradients are averaged over ranks, and a loss is a share of a sum
                        team.accelerator.backward(loss * (0 if piece.again else team.ranks))
                        value = float(loss.detach())
                        wrong += [] if math.isfinite(value) else piece.origins
                        if not piece.again:
                            told.append((name, value, metrics, piece.origins))
                if piece.room:
                    told.append(("", None, {"fill": (piece.slots, piece.room)}))
            norms = {name: clip(optimizer, run.clip) for name, optimizer in optimizers.items()}
            sound = all(map(math.isfinite, norms.values()))  # the same on all ranks
            if wrong or not sound:
                if not sound and team.gather([is_finite(model)]).all():
                    save(step)
                raise ValueError(not_finite(step, wrong, out))
            told += [(name, None, {f"{name}_gradient": norm}) for name, norm in norms.items()]
            for name, broken in next_cursor["broken"].items():  # rows left out, a step
                if new := broken - cursor["broken"][name]:
                    told.append(("", None, {f"{name}_broken": (new, 0)}))
            for entry in told:
                log.add(*entry)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            cursor = next_cursor
            log.step_done(step + 1, sum(piece.slots for piece in todo))
            if parts.preview and due(run.preview_every, step, run):
                with team.whole(parts.model, trained):
                    if team.main:
                        log.write(step + 1, preview(parts, out, step + 1))
            if due(run.save_every, step, run):
                save(step + 1)
    with team.whole(parts.model, trained):
        if team.main:
            parts.model.eval()
            if parts.save:
                parts.save(out)
            (out / "done").write_text("")
            remove_checkpoints(out)
    log.close()


def checked_folder(run: Run) -> Path:
    """The folder of a run, once all that can be known to be wrong before it begins is known."""
    if not run.out:
        raise ValueError("a run needs a folder for its result: out=DIR")
    if run.precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision is 'auto', 'bf16' or 'float32', not {run.precision!r}")
    for name in ("steps", "batch_size", "accumulate", "log_every", "workers"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} is 1 or more, not {getattr(run, name)}")
    for name in ("warmup", "packing", "preview_every", "save_every", "lora"):
        if getattr(run, name) < 0:
            raise ValueError(f"{name} is 0 or more, not {getattr(run, name)}")
    check_same_run(Path(run.out), run)
    return Path(run.out)


def make_mixture(
    run: Run, parts: Parts, progress: dict[str, Any] | None, rank: int = 0, ranks: int = 1
) -> Mixture:
    """The sources of a run as one stream, from where `progress` is (None: a trial, from 0).

    Rows that cannot be read are named in left_out.txt, each once.
    """
    path = Path(run.out) / "left_out.txt"
    told = set(path.read_text(encoding="utf-8").splitlines() if path.exists() else ())

    def note(name: str, reason: str) -> None:
        line = f"{name}: {reason}"
        if line not in told:
            told.add(line)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

    sources = {name: source.make(run, **source.options) for name, source in run.data.items()}
    mixture = Mixture(
        sources,
        mixing_weights(run, sources),
        run.seed,
        parts.prepare,
        None if progress is None else note,
        run.most_broken,
        run.workers,
    )
    if progress and "mixture" in progress:
        cursor = progress["mixture"]
        mixture.restore({**cursor, "streams": streams_of(cursor, rank, ranks)})
    elif progress:
        mixture.skip(progress["step"] * run.batch_size)
    return mixture


def streams_of(cursor: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Where each stream goes on: with other ranks than before, from the furthest of these."""
    every: list[dict[str, Any]] = cursor.get("streams") or [{}]
    if len(every) == ranks:
        return every[rank]
    return {name: max((e[name] for e in every), key=lambda s: s["begin"]) for name in every[0]}


def mixing_weights(run: Run, sources: dict[str, Any]) -> dict[str, float]:
    """The weights of the recipe, or these times the square roots of the sources' sizes
    (InstructBLIP, arXiv 2305.06500, section 2.3). ValueError where a size is unknown."""
    if run.mixing not in ("weights", "sqrt"):
        raise ValueError(f"mixing is 'weights' or 'sqrt', not {run.mixing!r}")
    weights = {name: source.weight for name, source in run.data.items()}
    if run.mixing == "weights":
        return weights
    for name in (name for name, source in sources.items() if not hasattr(source, "__len__")):
        raise ValueError(f"mixing=sqrt: the source {name!r} has no size")
    return {name: weight * len(sources[name]) ** 0.5 for name, weight in weights.items()}


def cut(drawn: list[tuple[Origin, Any]], parts: Parts, run: Run) -> list[Piece]:
    """A rank's samples of a step as at most `run.accumulate` pieces, of rows of like length.

    With `run.packing` a row holds several samples. Nothing is carried over to the next step, so
    the samples of a step, and its loss, are those of a run without packing.
    """
    size = parts.size
    sizes = [size(item) if size else 0 for _, item in drawn]
    rows = pack(sizes, run.packing) if run.packing else [[k] for k in range(len(drawn))]
    lengths = [sum(sizes[k] for k in row) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    found = []
    for part in pieces(order, run.accumulate, lengths.__getitem__ if size else None):
        items = [[drawn[k][1] for k in rows[r]] for r in part]
        if run.packing:
            assert parts.pack is not None
            batch = parts.pack(items)
        else:
            batch = parts.collate([row[0] for row in items])
        filled = sum(lengths[r] for r in part)
        room = len(part) * max(lengths[r] for r in part)
        found.append(Piece(batch, [drawn[k][0] for r in part for k in rows[r]], filled, room))
    return found


def is_finite(model: nn.Module) -> bool:
    """Whether all that this rank holds is: running statistics take in a forward before its loss is
    known, and weights a step whose gradient was finite and too large."""
    every = chain(model.parameters(), model.buffers())
    held = (t.to_local() if isinstance(t, DTensor) else t for t in every)
    return all(bool(t.isfinite().all()) for t in held if t.is_floating_point())


def not_finite(step: int, wrong: list[Origin], out: Path) -> str:
    """What to tell of step `step` (from 0), in which the loss of the samples `wrong` is NaN."""
    places: dict[str, list[Any]] = {}
    for name, row in wrong:
        places.setdefault(name, []).append(row)
    which = "; ".join(f"{name} {', '.join(map(str, sorted(r)))}" for name, r in places.items())
    what = f"the loss of these samples: {which}" if wrong else "the gradient"
    return (
        f"in step {step + 1} a number is not finite in {what}. The last checkpoint in {out} is of "
        "the weights before it; the run can go on from there with lower rates (train=...), another "
        "clip, or precision=float32"
    )


@contextmanager
def alone_in(out: Path, team: Team) -> Iterator[None]:
    """Inside, no other run trains in this folder; ValueError, on all ranks, where one does."""
    lock = FileLock(out / ".lock", timeout=0)
    if team.main:
        out.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire()
    if not team.gather_objects(lock.is_locked)[0]:
        raise ValueError(f"another run is training in {out}: choose another out")
    try:
        yield
    finally:
        lock.release()
        if team.main and [path.name for path in out.iterdir()] == [".lock"]:
            (out / ".lock").unlink()  # a run that could not begin leaves nothing
            out.rmdir()


class Signal:
    """Inside, SIGTERM is noted instead of ending the process."""

    def __enter__(self) -> Callable[[], bool]:
        self.seen = False
        self.mine = threading.current_thread() is threading.main_thread()
        if self.mine:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return lambda: self.seen

    def __exit__(self, *error: Any) -> None:
        if self.mine:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: Any) -> None:
        self.seen = True


def check_same_run(out: Path, run: Run) -> None:
    """Refuse to go on with, or to take for finished, what another run has begun in `out`."""
    if not (out / "run.json").exists():
        if (out / "model.safetensors").exists():
            raise ValueError(f"{out} holds a model that no run has left there: choose another out")
        return
    unset = dataclasses.replace(run, **defaults_of(Run)).record()  # of fields newer than run.json
    there = {**unset, **json.loads((out / "run.json").read_text())}
    there, here = (json.loads(json.dumps(record)) for record in (there, run.record()))
    free = {"out", "log_every", "preview_every", "save_every", "tensorboard", "shard", "recompute"}
    free |= {"workers", "most_broken"}  # so that a run that stopped by the latter can go on
    free |= set() if (out / "done").exists() else {"steps", "train", "clip", "precision"}
    if here["precision"] == "auto":  # whatever that was when it began
        free.add("precision")
    for key in sorted(set(here) - free):
        if there.get(key) != here[key]:
            raise ValueError(
                f"{out} holds a run with {key}={there.get(key)!r}, and this one has "
                f"{key}={here[key]!r}: choose another out, or remove that folder"
            )


def defaults_of(kind: type) -> dict[str, Any]:
    """The fields of a dataclass that have a default, with it."""
    found = {}
    for f in dataclasses.fields(kind):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def setup(run: Run) -> Parts:
    """The parts of `run`; a unified model from `run.init` where it names no setup."""
    if run.setup is not None:
        return run.setup(run)
    from unimm.training.next_token import setup_unified

    return setup_unified(run)


def make_optimizers(model: nn.Module, run: Run) -> dict[str, Optimizer]:
    """One AdamW for each named list of rates. Parameters that no list trains are frozen.

    With `run.lora` an adapter has the rate of the weight that it changes, and all else is frozen.

    With `run.optimizer` "muon", the matrices inside transformer layers go to a Muon "NAME_matrices"
    instead (Moonlight, arXiv 2502.16982: its updates have AdamW's size, so one rate suits both).
    """
    if run.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer is 'adamw' or 'muon', not {run.optimizer!r}")
    if run.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError("optimizer=muon is of torch 2.9 and later: choose adamw")
    plans = run.train if isinstance(run.train, dict) else {"main": run.train}
    # (plan, in a Muon) -> (rate, weight decay) -> parameters
    chosen: dict[tuple[str, bool], dict[tuple[float, float], list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        learns = adapted_name(name) if run.lora else name
        rates = {plan: rate_of(learns, plans[plan]) if learns else None for plan in plans}
        plan = next((plan for plan, rate in rates.items() if rate is not None), None)
        parameter.requires_grad_(plan is not None)
        if plan is not None:
            matrix = parameter.ndim == 2 and re.search(IN_LAYERS, name) is not None
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
    norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


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
