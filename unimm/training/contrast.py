"""Next-token training in which some pictures also tell their prompt from a false one.

What a prompt says of places and of which colour goes with which shape is a few bits of a picture,
beside the hundred of where things happen to be; its gradient drowns in theirs. Of the same codes
under two prompts the common part cancels. The added term, with one rival, is that of maximum mutual
information training (Bahl et al., ICASSP 1986): -log sigmoid(log p(x | true) - log p(x | false)).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unimm.config import Run
from unimm.data.packing import collate_packed
from unimm.data.processor import Processor, Sample
from unimm.model.unified import CODE, KINDS, Batch
from unimm.training.next_token import drop_prompt, open_init, unified_parts
from unimm.training.trainer import Parts


@dataclass
class Contrast:
    """A sample, and the same answer to a prompt that is false of it, if there is one."""

    sample: Sample
    rival: Sample | None = None

    def __len__(self) -> int:
        return len(self.sample) + (len(self.rival) if self.rival is not None else 0)


@dataclass
class ContrastBatch:
    """Packed rows of samples, each followed by its rival, if it has one.

    true (N,): whether a sample is no rival, bool. rivals (M,): which samples are; of (M,): which
    sample each is the rival of, int64.
    """

    rows: Batch
    true: torch.Tensor
    rivals: torch.Tensor
    of: torch.Tensor

    def to(self, device: torch.device | str) -> "ContrastBatch":
        return ContrastBatch(*(part.to(device) for part in vars(self).values()))

    def scored(self, kind: str) -> float:
        """The scored slots of a kind, rivals left out."""
        rows, (sample, _) = self.rows, self.rows.samples()
        return float(rows.score[self.true[sample] & (rows.kind == KINDS[kind])].sum())


def contrast_step(model: Any, batch: ContrastBatch, total: float, run: Run) -> Iterator[tuple]:
    """The next-token loss of the samples, plus `options.contrast` times the term of their rivals.

    Logs with the nats the share of rivals that are told apart ("told_apart").
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
    yield "main", loss / max(total, 1e-8), metrics


def contrast_weight(batch: ContrastBatch, run: Run) -> float:
    """What the loss of `contrast_step` is divided by: that of `next_token`, rivals left out."""
    return sum(w * batch.scored(kind) for kind, w in run.kind_weights.items())


def setup_contrast(run: Run) -> Parts:
    """A unified model from `run.init`; an item may have "false_messages" beside its "messages".

    options: those of `setup_unified`; `contrast`, the weight of the term; `changes` (1 if nothing
    is said), see `stress_changes`; `sampling`, defaults that are saved with the model.
    """
    model, processor, sampling = open_init(run)

    def prepare(item: dict[str, Any], rng: np.random.Generator) -> Contrast:
        whole = processor.encode(item["messages"])
        sample = drop_prompt(whole, processor, run.drop_prompt, rng)
        false = item.get("false_messages") if sample is whole else None
        both = [sample, processor.encode(false)] if false else [sample]
        return Contrast(*(stress_changes(s, run.options.get("changes", 1.0)) for s in both))

    return replace(
        unified_parts(run, model, processor, sampling),
        prepare=prepare,
        collate=lambda items: collate_contrasts(processor, [[item] for item in items]),
        pack=lambda rows: collate_contrasts(processor, rows),
    )


def stress_changes(sample: Sample, weight: float) -> Sample:
    """The sample, with `weight` for each drawn code that is not the shown picture's at its place.

    The shown picture is the last codes before that are not scored, as in an edit; of a few codes
    that change and many that stay the few would else be learned last. A picture drawn in part
    ("redrawn") has its kept codes behind the first drawn one, and is left as it is.
    """
    codes, drawn = sample.kind == CODE, sample.score > 0
    shown, made = np.flatnonzero(codes & ~drawn), np.flatnonzero(codes & drawn)
    if weight == 1 or not len(made) or len(shown) < len(made) or shown[-1] > made[0]:
        return sample
    changed = made[sample.ids[made] != sample.ids[shown[-len(made) :]]]
    score = sample.score.copy()
    score[changed] *= weight
    return replace(sample, score=score)


def collate_contrasts(processor: Processor, rows: Sequence[Sequence[Contrast]]) -> ContrastBatch:
    """One batch of packed rows."""
    packed, true, rivals, of = [], [], [], []
    for row in rows:
        packed.append([s for item in row for s in (item.sample, item.rival) if s is not None])
        for item in row:
            true.append(True)
            if item.rival is not None:
                of.append(len(true) - 1)
                rivals.append(len(true))
                true.append(False)
    return ContrastBatch(
        collate_packed(packed, processor),
        torch.tensor(true),
        torch.tensor(rivals, dtype=torch.int64),
        torch.tensor(of, dtype=torch.int64),
    )
