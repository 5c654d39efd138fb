"""Alignment by DPO: answers of words, codes or both, each slot scored by its own head.

A preference is {"prompt": [messages], "chosen": [messages], "rejected": [messages]}, a line of a
JSONL file; drawn pictures are their stored codes. With a "rejected_prompt" the rejected answer
follows that one: so may one picture be preferred behind the prompt that it shows to itself behind
the prompt that it was drawn for (as condition contrastive alignment does, arXiv 2410.09347). The
step's policy and reference see unguided prompts; of each conversation the answer alone is scored.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from unimm.checkpoints.adapters import (
    add_adapters,
    base_parameters,
    merge_adapters,
    without_adapters,
)
from unimm.config import Run
from unimm.data.processor import Message, Processor, Sample
from unimm.data.readers import Rows
from unimm.model.unified import Batch, UnifiedModel
from unimm.training.losses import dpo_loss
from unimm.training.next_token import open_init, unified_parts
from unimm.training.trainer import Parts, rate_of

REFERENCES = ("cached", "copy", "adapter")
Row = dict[str, Any]


@dataclass
class Pair:
    """A preference as two samples, with the reference's log-probabilities where they are known."""

    chosen: Sample
    rejected: Sample
    reference: tuple[float, float] | None = None


@dataclass
class PairBatch:
    """N pairs: 2 N rows (all chosen answers, then all rejected ones) and, cached, (2, N)."""

    rows: Batch
    reference: Tensor | None = None

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch(
            self.rows.to(device), None if self.reference is None else self.reference.to(device)
        )

    @property
    def slots(self) -> Tensor:
        """How many slots of each answer are scored, (2, N)."""
        return self.rows.score[:, 1:].sum(1).view(2, -1)


def dpo_step(
    model: Any,
    pairs: PairBatch,
    total: float,
    run: Run,
    reference: Callable[[Batch], Tensor] | None = None,
) -> Iterator[tuple]:
    """DPO plus `options.next_token` times the next-token loss of the chosen answers (as Emu3).

    `reference` gives log-probabilities (2 N,) where the batch has none. options: `beta`,
    `label_smoothing`, `next_token`, `per_slot` (log-probabilities are means over an answer's
    slots, so that a long answer does not weigh more). `total`: pairs of the global batch.
    """
    options, slots = run.options, pairs.slots
    policy = model(pairs.rows).log_probs.view(2, -1)
    before = pairs.reference
    if before is None:
        assert reference is not None, "neither cached log-probabilities nor a reference"
        before = reference(pairs.rows).view(2, -1)
    if options.get("per_slot"):
        policy, before = policy / slots, before / slots
    losses, margin = dpo_loss(policy, before, options["beta"], options["label_smoothing"])
    likelihood = -(policy[0] if options.get("per_slot") else policy[0] / slots[0])  # (N,) nats
    loss = (losses + options["next_token"] * likelihood).sum() / total
    n = float(len(margin))
    drift = (before - policy).detach()
    yield (
        "main",
        loss,
        {
            "dpo": (float(losses.detach().sum()), n),
            "margin": (float(margin.sum()), n),
            "accuracy": (float((margin > 0).sum()), n),
            # Drawn from the reference, answers give KL(reference || policy), but for the choice
            # of the best and the worst.
            "kl": (float(drift.sum()), 2 * n),
            "chosen": (float(policy[0].detach().sum()), n),
            "rejected": (float(policy[1].detach().sum()), n),
            "chosen_gain": (-float(drift[0].sum()), n),
            "rejected_gain": (-float(drift[1].sum()), n),
        },
    )


def pair_count(batch: PairBatch, run: Run) -> float:
    """What the loss of `dpo_step` is divided by."""
    return len(batch.rows.ids) / 2


def setup_dpo(run: Run) -> Parts:
    """A policy from `run.init`, with a reference that `options.reference` chooses.

    "cached": its log-probabilities are computed once and kept in reference.json of the run's
    folder. "copy": a frozen copy. "adapter": the policy is the reference plus LoRA adapters of rank
    `options.lora_rank`, which are switched off for the reference and merged at the end (peft).
    """
    how = run.options["reference"]
    if how not in REFERENCES:
        raise ValueError(f"reference is one of {', '.join(REFERENCES)}, not {how!r}")
    model, processor, sampling = open_init(run)
    for source in run.data.values():
        rows = source.make(run, **source.options).rows
        check_codes(rows, processor, model.config.codebook_size)
    frozen = copy.deepcopy(model).eval().requires_grad_(False) if how == "copy" else None
    if how == "adapter":
        add_adapters(model, run.options["lora_rank"])
        assert not isinstance(run.train, dict)
        if any(rate_of(name, run.train) for name, _ in base_parameters(model)):
            raise ValueError(
                "with reference='adapter' the adapters alone may learn: "
                "train=((r'.*lora_.*', 1e-3), (r'.*', None))"
            )
    known = cached_reference(model, processor, run) if how == "cached" else {}
    parts = unified_parts(run, model, processor, sampling)

    @torch.no_grad()
    def reference(batch: Batch) -> Tensor:
        device = batch.ids.device
        with torch.autocast(device.type, torch.bfloat16, run.precision == "bf16"):
            if frozen is not None:
                return frozen.to(device)(batch).log_probs
            with without_adapters(model):
                return model(batch).log_probs

    def step(policy: Any, pairs: PairBatch, total: float, run: Run) -> Iterator[tuple]:
        return dpo_step(policy, pairs, total, run, reference)

    def prepare(row: Row, rng: np.random.Generator) -> Pair:
        return replace(encode_pair(processor, row), reference=known.get(row_key(row)))

    def save(folder: Path) -> None:
        if how == "adapter":
            merge_adapters(model)
        assert parts.save is not None
        parts.save(folder)

    return replace(
        parts,
        collate=lambda pairs: collate_pairs(processor, pairs),
        prepare=prepare,
        size=lambda pair: max(len(pair.chosen), len(pair.rejected)),
        save=save,
        step=step,
        pack=None,
    )


def encode_pair(processor: Processor, row: Row) -> Pair:
    """A preference as two samples in which only the answer is scored."""

    def encode(prompt: list[Message], answer: list[Message]) -> Sample:
        sample = processor.encode([*prompt, *answer])
        scored = np.flatnonzero(sample.score)
        if any(message["role"] == "assistant" for message in prompt):  # earlier answers are not
            earlier = int((processor.encode(prompt).score > 0).sum())
            sample.score[scored[:earlier]] = 0
        if not sample.score.any():
            raise ValueError("there is nothing to score in an answer of a preference")
        return sample

    other = row["rejected_prompt"] if "rejected_prompt" in row else row["prompt"]
    return Pair(encode(row["prompt"], row["chosen"]), encode(other, row["rejected"]))


def collate_pairs(processor: Processor, pairs: list[Pair]) -> PairBatch:
    rows = processor.collate([p.chosen for p in pairs] + [p.rejected for p in pairs])
    known = [p.reference for p in pairs if p.reference is not None]
    if len(known) < len(pairs):
        return PairBatch(rows)
    return PairBatch(rows, torch.tensor(known, dtype=torch.float32).T.contiguous())


def cached_reference(
    model: UnifiedModel, processor: Processor, run: Run
) -> dict[str, tuple[float, float]]:
    """Log-probabilities of every pair of the run under `model`, by `row_key`.

    What reference.json of the run's folder has of this very model is not computed again. The
    processes of a run share the work.
    """
    path, of = Path(run.out) / "reference.json", fingerprint(model, run.precision)
    before = json.loads(path.read_text()) if path.exists() else {}
    known: dict[str, tuple[float, float]] = {}
    if before.get("of") == of:
        known = {key: (a, b) for key, (a, b) in before["pairs"].items()}
    rows = [row for source in run.data.values() for row in source.make(run, **source.options).rows]
    rows = [row for row in rows if row_key(row) not in known]
    rows.sort(key=lambda row: len(json.dumps(row)))  # of like length together
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for k in range(rank * run.batch_size, len(rows), ranks * run.batch_size):
        part = rows[k : k + run.batch_size]
        batch = collate_pairs(processor, [encode_pair(processor, row) for row in part])
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, run.precision == "bf16"):
            found = model(batch.rows.to(device)).log_probs.view(2, -1).T.tolist()
        known |= {row_key(row): (a, b) for row, (a, b) in zip(part, found, strict=True)}
    if ranks > 1:
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, known)
        known = {key: value for one in everyone for key, value in one.items()}
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")  # of this rank
        scratch.write_text(json.dumps({"of": of, "pairs": known}))
        os.replace(scratch, path)
    return known


def fingerprint(model: UnifiedModel, precision: str) -> str:
    """A name for these weights in this precision."""
    sums = [
        (name, float(p.double().sum()), float(p.double().abs().sum()))
        for name, p in model.state_dict().items()
    ]
    return hashlib.sha1(json.dumps([precision, sums]).encode()).hexdigest()


def check_codes(rows: list[Row], processor: Processor, codes: int) -> None:
    """ValueError for a drawn picture in an answer that is not one of the model's: of another number
    of codes, or with a code outside 0 to `codes` - 1."""
    for number, row in enumerate(rows, 1):
        for message in [*row["chosen"], *row["rejected"]]:
            content = message.get("content")
            for part in content if isinstance(content, list) else []:
                drawn = part.get("codes") if isinstance(part, dict) else None
                if drawn is None:
                    continue
                fits = isinstance(drawn, list) and len(drawn) == processor.codes_per_image
                if not fits or not all(isinstance(c, int) and 0 <= c < codes for c in drawn):
                    raise ValueError(
                        f"preference {number}: a picture of this model is "
                        f"{processor.codes_per_image} codes from 0 to {codes - 1}"
                    )


def preferences(run: Run, path: str) -> Rows:
    """Source: the preferences of a JSONL file."""
    return Rows(read_preferences(path), lambda row, rng: row, run.seed, [])


def read_preferences(path: str | Path) -> list[Row]:
    """The rows of a preference file, checked, each pair once.

    Raises ValueError, in one line with the line's number, for what is no preference.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file of preferences: {path} (`unimm preferences` makes one)")
    rows: dict[str, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        problem = what_is_wrong(row)
        if problem:
            raise ValueError(f"{path}, line {number}: {problem}")
        rows.setdefault(row_key(row), row)
    if not rows:
        raise ValueError(f"{path} holds no preference")
    return list(rows.values())


def what_is_wrong(row: Any) -> str:
    """Why `row` is no preference; empty where it is one."""
    names = ("prompt", "chosen", "rejected")
    if not isinstance(row, dict) or not all(isinstance(row.get(n), list) for n in names):
        return 'a preference is {"prompt": [messages], "chosen": [messages], "rejected": [...]}'
    prompt = row["prompt"]
    other = row["rejected_prompt"] if "rejected_prompt" in row else prompt
    lists = (prompt, other, row["chosen"], row["rejected"])
    if not all(isinstance(x, list) and x and all(isinstance(m, dict) for m in x) for x in lists):
        return "prompt, chosen and rejected each hold at least one message"
    if any(talk[-1].get("role") != "user" for talk in (prompt, other)):
        return "the prompt ends with a user message"
    if any(m.get("role") != "assistant" for n in names[1:] for m in row[n]):
        return "chosen and rejected are assistant messages"
    if row["chosen"] == row["rejected"] and prompt == other:
        return "chosen and rejected are equal, so nothing is preferred"
    return ""


def row_key(row: Row) -> str:
    """A name for a preference, from what is in it."""
    names = ("prompt", "chosen", "rejected", "rejected_prompt")
    kept = {name: row[name] for name in names if name in row}
    return hashlib.sha1(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:20]
