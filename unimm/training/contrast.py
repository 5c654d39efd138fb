"""Next-token training in which some pictures also tell their prompt from a false one.

What a prompt says of places and of which colour goes with which shape is a few bits of a picture,
beside the hundred of where things happen to be; its gradient drowns in theirs. Of the same codes
under two prompts the common part cancels. The added term, with one rival, is that of maximum mutual
information training (Bahl et al., ICASSP 1986): -log sigmoid(log p(x | true) - log p(x | false)).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unimm.config import Run
from unimm.data.packing import collate_packed
from unimm.data.processor import Processor, Sample
from unimm.model.unified import KINDS, Batch
from unimm.training.changes import ChangeHeads, edited, stress_changes
from unimm.training.next_token import drop_prompt, open_init, unified_parts
from unimm.training.trainer import Parts, rate_of


@dataclass
class Contrast:
    """A sample, and the same answer to a prompt that is false of it, if there is one.

    copied: whether the answer of an edit goes in as the shown picture, as if nothing had changed.
    """

    sample: Sample
    rival: Sample | None = None
    copied: bool = False

    def __len__(self) -> int:
        return len(self.sample) + (len(self.rival) if self.rival is not None else 0)


@dataclass
class ContrastBatch:
    """Packed rows of samples, each followed by its rival, if it has one.

    true (N,): whether a sample is no rival, bool. rivals (M,): which samples are; of (M,): which
    sample each is the rival of, int64. shown (E, 2): row and slot of each code of a picture that an
    edit shows, rivals left out; changed (E,): whether the answer's code at its place is another.
    """

    rows: Batch
    true: torch.Tensor
    rivals: torch.Tensor
    of: torch.Tensor
    shown: torch.Tensor
    changed: torch.Tensor

    def to(self, device: torch.device | str) -> "ContrastBatch":
        return ContrastBatch(*(part.to(device) for part in vars(self).values()))

    def scored(self, kind: str) -> float:
        """The scored slots of a kind, rivals left out."""
        rows, (sample, _) = self.rows, self.rows.samples()
        return float(rows.score[self.true[sample] & (rows.kind == KINDS[kind])].sum())


def contrast_step(
    model: Any, batch: ContrastBatch, total: float, run: Run, heads: ChangeHeads | None = None
) -> Iterator[tuple]:
    """The next-token loss of the samples, plus `options.contrast` times the term of their rivals,
    plus `options.where` times that of the heads, if there are any.

    Logs with the nats the share of rivals that are told apart ("told_apart"), and the heads' nats
    a code ("where_nats").
    """
    output = model(batch.rows, run.kind_weights, total)
    nats = {kind: each[batch.true].sum() for kind, each in output.row_nats.items()}
    loss = sum(w * nats[kind] for kind, w in run.kind_weights.items())
    metrics = {f"{kind}_nats": (float(nats[kind].detach()), batch.scored(kind)) for kind in KINDS}
    if len(batch.of):
        margin = output.log_probs[batch.of] - output.log_probs[batch.rivals]  # (M,)
        loss = loss + run.options["contrast"] * F.softplus(-margin).sum()
        metrics["told_apart"] = (float((margin > 0).sum()), float(len(margin)))
        metrics["rival_nats"] = (float(F.softplus(-margin).detach().sum()), float(len(margin)))
    if heads is not None:
        nats_where = heads(batch.shown, batch.changed)
        loss = loss + run.options["where"] * nats_where
        metrics["where_nats"] = (float(nats_where.detach()), len(batch.changed))
    yield "main", loss / max(total, 1e-8), metrics


def contrast_weight(batch: ContrastBatch, run: Run) -> float:
    """What the loss of `contrast_step` is divided by: that of `next_token`, rivals left out."""
    return sum(w * batch.scored(kind) for kind, w in run.kind_weights.items())


def setup_contrast(run: Run) -> Parts:
    """A unified model from `run.init`; an item may have "false_messages" beside its "messages".

    options: those of `setup_unified`; `contrast`, the weight of the term; `changes` (1 if nothing
    is said), see `stress_changes`; `where`, the weight of `ChangeHeads` (0: none), which learn at
    the rate of the name "change_heads" and are not saved; `copied`, the share of edits whose answer
    goes in as the shown picture, so that each code that changes has to know it by itself.
    """
    model, processor, sampling = open_init(run)
    heads = None
    if run.options.get("where"):
        if run.lora or isinstance(run.train, dict) or rate_of("change_heads", run.train) is None:
            raise ValueError("where needs a rate for change_heads in one list, and no lora")
        heads = model.change_heads = ChangeHeads(model.decoder)

    def prepare(item: dict[str, Any], rng: np.random.Generator) -> Contrast:
        whole = processor.encode(item["messages"])
        sample = drop_prompt(whole, processor, run.drop_prompt, rng)
        share, weight = run.options.get("copied", 0.0), run.options.get("changes", 1.0)
        if share and edited(sample) and rng.random() < share:
            return Contrast(stress_changes(sample, weight), copied=True)
        false = item.get("false_messages") if sample is whole else None
        rival = stress_changes(processor.encode(false), weight) if false else None
        return Contrast(stress_changes(sample, weight), rival)

    parts = unified_parts(run, model, processor, sampling)

    def save(folder: Path) -> None:
        if heads is not None:
            del model.change_heads
        assert parts.save is not None
        parts.save(folder)

    return replace(
        parts,
        save=save,
        step=partial(contrast_step, heads=heads) if heads is not None else parts.step,
        prepare=prepare,
        collate=lambda items: collate_contrasts(processor, [[item] for item in items]),
        pack=lambda rows: collate_contrasts(processor, rows),
    )


def collate_contrasts(processor: Processor, rows: Sequence[Sequence[Contrast]]) -> ContrastBatch:
    """One batch of packed rows."""
    packed, true, rivals, of, shown, changed, copied = [], [], [], [], [], [], []
    for r, row in enumerate(rows):
        packed.append([s for item in row for s in (item.sample, item.rival) if s is not None])
        start = 0
        for item in row:
            if both := edited(item.sample):
                old, new = both
                shown += [(r, start + slot) for slot in old.tolist()]
                changed += (item.sample.ids[old] != item.sample.ids[new]).tolist()
                copied += (
                    [(r, start + k, start + n) for k, n in zip(*both, strict=True)]
                    if item.copied
                    else []
                )
            start += len(item)
            true.append(True)
            if item.rival is not None:
                of.append(len(true) - 1)
                rivals.append(len(true))
                true.append(False)
    batch = collate_packed(packed, processor)
    if copied:
        row, to_copy, into = torch.tensor(copied).T
        batch.inputs = batch.ids.clone()
        batch.inputs[row, into] = batch.ids[row, to_copy]
    return ContrastBatch(
        batch,
        torch.tensor(true),
        torch.tensor(rivals, dtype=torch.int64),
        torch.tensor(of, dtype=torch.int64),
        torch.tensor(shown, dtype=torch.int64).view(-1, 2),
        torch.tensor(changed, dtype=torch.bool),
    )
