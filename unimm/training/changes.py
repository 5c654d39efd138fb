"""What an edit changes: more weight for it, and heads that teach inner layers where it will be.

Which object an instruction means is a few bits, and of all codes of an answer the first that
changes alone has to know them: the others see that it did. At each code of the shown picture,
whether it will change can be asked at once, and of inner layers, so that what follows could read
it; what came of that: train/README.md. Losses on inner layers: Lee et al., Deeply-supervised nets,
arXiv 1409.5185.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.data.processor import Sample
from unimm.model.decoder import Decoder
from unimm.model.unified import CODE


def edited(sample: Sample) -> tuple[np.ndarray, np.ndarray] | None:
    """The slots of a shown picture's codes and of the drawn one's, (n,) each; None if no edit.

    The shown picture is the last codes before the drawn ones, and those are all that is scored.
    """
    codes, scored = sample.kind == CODE, sample.score > 0
    shown, drawn = np.flatnonzero(codes & ~scored), np.flatnonzero(codes & scored)
    if not len(drawn) or len(shown) < len(drawn) or shown[-1] > drawn[0]:
        return None
    return shown[-len(drawn) :], drawn


def stress_changes(sample: Sample, weight: float) -> Sample:
    """The sample, with `weight` for each drawn code that is not the shown picture's at its place.

    Of a few codes that change and many that stay the few would else be learned last.
    """
    both = edited(sample)
    if weight == 1 or both is None:
        return sample
    shown, drawn = both
    score = sample.score.copy()
    score[drawn[sample.ids[drawn] != sample.ids[shown]]] *= weight
    return replace(sample, score=score)


class ChangeHeads(nn.Module):
    """At codes of shown pictures: will the answer's code there be another?

    One linear head for each of two layers in the middle of the decoder (never the last, whose
    output nothing reads any more), on what leaves the layer, scaled to unit mean square. For
    training alone: no part of the model.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        count = len(decoder.layers)
        self.kept: dict[int, Tensor] = {}  # what left each of the layers last, (B, T, D)
        self.heads = nn.ModuleList()
        for index in range(count)[min(count // 2, count - 2) : count - 1][:2]:
            head = nn.Linear(decoder.config.dim, 1)
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, -1.0)  # most codes stay
            self.heads.append(head)
            decoder.layers[index].register_forward_hook(self._keep(len(self.heads) - 1))

    def forward(self, slots: Tensor, changed: Tensor) -> Tensor:
        """Summed binary cross-entropy, the mean of both layers, of the model's last forward.

        slots (N, 2): row and slot of each code asked about, int64; changed (N,): bool.
        """
        losses = []
        for k, head in enumerate(self.heads):
            x = self.kept.pop(k)[slots[:, 0], slots[:, 1]].float()  # (N, D)
            logits = head(x * x.square().mean(-1, keepdim=True).rsqrt())[:, 0]
            losses.append(
                F.binary_cross_entropy_with_logits(logits, changed.float(), reduction="sum")
            )
        return torch.stack(losses).mean()

    def _keep(self, k: int) -> Any:
        def hook(layer: nn.Module, args: Any, x: Tensor) -> None:
            self.kept[k] = x

        return hook
