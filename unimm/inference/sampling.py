"""From logits to the next id: guidance, temperature, top-k, top-p, and noise one can reproduce.

The noise of an id is a function of (seed, position, id) alone, so a batch, a stream or a resumed
request gives what a single call gives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How answers are sampled.

    guidance: g in uncond + g * (cond - uncond), 1 for none. temperature: applied after guidance,
    0 for greedy. top_k: 0 for all. top_p: 1 for all. max_text: most text tokens of an answer.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    text_temperature: float = 0.0
    max_text: int = 96

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.text_temperature >= 0):
            raise ValueError("temperature must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError("top_k must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p must be above 0 and at most 1")
        if not self.guidance >= 0:
            raise ValueError("guidance must be 0 or more (1 for none)")


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of logits (arXiv 2207.12598)."""
    return unconditional + guidance * (conditional - unconditional)


def choose(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    stream: int = 0,
    noise: "Noise | None" = None,
) -> Tensor:
    """Logits (N, K), seeds (N,), positions (N,) -> ids (N,), by the Gumbel-max trick."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    kept = keep_likely(logits / temperature, top_k, top_p)
    return (kept + (noise or gumbel)(seeds, positions, logits.shape[-1], stream)).argmax(-1)


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """All but the `top_k` most likely, and what lies beyond the mass `top_p`, set to -inf."""
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        beyond = mass.cumsum(-1) - mass >= top_p  # the first one is always kept
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    return logits


def gumbel(seeds: Tensor, positions: Tensor, size: int, stream: int = 0) -> Tensor:
    """Gumbel noise (N, size), float32, of ids 0 … size - 1 at each (seed, position).

    Seeds and positions are (N,) int64. `stream` keeps the noise of words and codes apart.
    """
    key = _hash(_hash(seeds & _MASK) ^ ((seeds >> 32) & _MASK))
    key = _hash(key ^ ((positions * 0x9E3779B1 + stream * 0x85EBCA77) & _MASK))
    ids = torch.arange(size, device=seeds.device) * 0xC2B2AE3D & _MASK
    bits = _hash(key[:, None] ^ ids)  # (N, size), 32 bits each
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # never 0 or 1 in float32
    return -torch.log(-torch.log(uniform))


Noise = Callable[[Tensor, Tensor, int, int], Tensor]


class Ahead:
    """`gumbel`, of the positions to come as well while they are few: one pass over many ids costs
    little more than over some. What it gives is the same."""

    def __init__(self) -> None:
        # By seed, position, size and stream: (size,).
        self.rows: dict[tuple[int, int, int, int], Tensor] = {}

    def __call__(self, seeds: Tensor, positions: Tensor, size: int, stream: int = 0) -> Tensor:
        asked = zip(seeds.tolist(), positions.tolist(), strict=True)
        wanted = [(*pair, size, stream) for pair in asked]
        if missing := [key for key in wanted if key not in self.rows]:
            count = max(1, AHEAD // (size * len(missing)))
            ahead = ((seed, at + k) for seed, at, *_ in missing for k in range(count))
            pairs = list(dict.fromkeys(ahead))
            seeds, positions = torch.tensor(pairs, device=positions.device).T
            keys = [(*pair, size, stream) for pair in pairs]
            made = dict(zip(keys, gumbel(seeds, positions, size, stream), strict=True))
            self.rows = {key: self.rows[key] for key in wanted if key in self.rows} | made
        return torch.stack([self.rows[key] for key in wanted])


AHEAD = 16_384  # numbers of noise to make at once
_MASK = 0xFFFFFFFF


def _hash(x: Tensor) -> Tensor:
    """A 32-bit mixing function on int64 tensors (constants of C. Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
