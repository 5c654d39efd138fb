"""Losses that stand apart from a model: direct preference optimisation."""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """DPO (arXiv 2305.18290, eq. 7) of N pairs; returns losses (N,) and reward margins (N,).

    policy, reference: (2, N) log-probabilities of the chosen and of the rejected answers.
    label_smoothing: the share of pairs thought to be the wrong way round (conservative DPO).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is 0 or more and below 0.5, not {label_smoothing}")
    if beta < 0:
        raise ValueError(f"beta is 0 or more, not {beta}")
    chosen, rejected = beta * (policy - reference)  # the implicit rewards
    margin = chosen - rejected
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong, margin.detach()
