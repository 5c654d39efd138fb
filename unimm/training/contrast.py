"""Next-token training in which some pictures also tell their prompt from a false one.

What a prompt says of places and of which colour goes with which shape is a few bits of a picture,
beside the hundred of where things happen to be; its gradient drowns in theirs. Of the same codes
under two prompts the common part cancels. The added term, with one rival, is that of maximum mutual
information training (Bahl et al., ICASSP 1986): -log sigmoid(log p(x | true) - log p(x | false)).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unimm.config import Run
from unimm.data.processor import Processor, Sample
from unimm.model.unified import KINDS, Batch
from unimm.training.next_token import drop_prompt, open_init, unified_parts
from unimm.training.trainer import Parts


@dataclass
class Contrast:
    """A sample, and the same answer to a prompt that is false of it, if there is one."""

    sample: Sample
    rival: Sample | None = None

    def __len__(self) -> int:
        return max(len(self.sample), len(self.rival) if self.rival is not None else 0)


@dataclass
class ContrastBatch:
    """Rows of N samples, then those of their M rivals; `of` (M,): whose rival each is, int64."""

    rows: Batch
    of: torch.Tensor

    def to(self, device: torch.device | str) -> "ContrastBatch":
        return ContrastBatch(self.rows.to(device), self.of.to(device))

    @property
    def count(self) -> int:
        return len(self.rows.ids) - len(self.of)

    def scored(self, kind: str) -> float:
        """The scored slots of a kind, rivals left out."""
        rows, n = self.rows, self.count
        return float(rows.score[:n][rows.kind[:n] == KINDS[kind]].sum())


def contrast_step(model: Any, batch: ContrastBatch, total: float, run: Run) -> Iterator[tuple]:
    """The next-token loss of the samples, plus `options.contrast` times the term of their rivals.

    Logs with the nats the share of rivals that are told apart ("told_apart").
    """
    output, n = model(batch.rows, run.kind_weights, total), batch.count
    loss = sum(w * output.row_nats[kind][:n].sum() for kind, w in run.kind_weights.items())
    metrics = {
        f"{kind}_nats": (float(output.row_nats[kind][:n].detach().sum()), batch.scored(kind))
        for kind in KINDS
    }
    if len(batch.of):
        margin = output.log_probs[batch.of] - output.log_probs[n:]  # (M,)
        loss = loss + run.options["contrast"] * F.softplus(-margin).sum()
        metrics["told_apart"] = (float((margin > 0).sum()), float(len(margin)))
        metrics["rival_nats"] = (float(F.softplus(-margin).detach().sum()), float(len(margin)))
    yield "main", loss / max(total, 1e-8), metrics


def contrast_weight(batch: ContrastBatch, run: Run) -> float:
    """What the loss of `contrast_step` is divided by: that of `next_token`, rivals left out."""
    return sum(w * batch.scored(kind) for kind, w in run.kind_weights.items())


def setup_contrast(run: Run) -> Parts:
    """A unified model from `run.init`; an item may have "false_messages" beside its "messages"."""
    model, processor, sampling = open_init(run)

    def prepare(item: dict[str, Any], rng: np.random.Generator) -> Contrast:
        whole = processor.encode(item["messages"])
        sample = drop_prompt(whole, processor, run.drop_prompt, rng)
        rival = item.get("false_messages") if sample is whole else None
        return Contrast(sample, processor.encode(rival) if rival else None)

    return replace(
        unified_parts(run, model, processor, sampling),
        prepare=prepare,
        collate=lambda items: collate_contrasts(processor, items),
        pack=None,  # rows with rivals are not rows of samples
    )


def collate_contrasts(processor: Processor, items: list[Contrast]) -> ContrastBatch:
    rivals = [(k, item.rival) for k, item in enumerate(items) if item.rival is not None]
    rows = processor.collate([item.sample for item in items] + [rival for _, rival in rivals])
    return ContrastBatch(rows, torch.tensor([k for k, _ in rivals], dtype=torch.int64))
