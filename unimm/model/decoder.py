"""The decoder: Llama and its family (Qwen2/3, SmolLM, DeepSeek-LLM), embeddings to hidden states.

Parameter names are those of transformers' LlamaModel, so its checkpoints, LoRA targets and key maps
apply as they are. The heads live outside, in UnifiedModel; `KVCache` keeps one length per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Shapes: B rows, T new slots, S slots seen so far (S >= T), D dim, H heads, K kv heads, E head dim.


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options, meant as in transformers' LlamaConfig and Qwen3Config."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width of the gated MLP
    rope_theta: float
    norm_eps: float
    max_positions: int
    qk_norm: bool = False  # Qwen3: RMS norm of every query and key head
    attention_bias: bool = False
    output_bias: bool | None = None  # bias of o_proj; None: as attention_bias (Qwen2 has False)
    mlp_bias: bool = False
    tied_embeddings: bool = False  # read by UnifiedModel: the text head is embed_tokens.weight
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "linear" | "llama3", "factor": ...}
    dropout: float = 0.0  # on the output of attention and MLP, in training

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly; "
                "choose kv_heads that divides heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        rope_frequencies(self)  # an unknown rope_scaling is an error here, not in the first step


class Decoder(nn.Module):
    """A stack of pre-norm blocks with rotary positions and grouped-query attention."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # A plain attribute: always float32 (a buffer would follow .to(bfloat16)) and never saved.
        self._frequencies = rope_frequencies(config)
        self.init_weights()

    def init_weights(self, std: float = 0.02) -> None:
        """Normal weights, zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        memory: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Embeddings (B, T, D) at positions (B, T) or (1, T) -> normed hidden states (B, T, D).

        mask: None is causal (right padding needs no mask, as nothing looks to the right), or bool,
        broadcastable to (B, 1, T, S), True = may attend. With a cache the T new keys are written
        behind each row's length; the caller then calls `cache.advance`. memory is reserved.
        last: only the hidden states of the last slots are wanted, (B, 1, D), so the last layer
        makes no others.
        """
        if memory is not None:
            raise NotImplementedError("memory is reserved for cross-attention and not built yet")
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        attend = self.attention(x, dtype, mask, cache)
        cos, sin = self.rope(positions, dtype)
        *layers, final = self.layers
        for layer in layers:
            x = layer(x, cos, sin, attend, cache)
        attend = self.attention(x, dtype, mask, cache, last) if last else attend
        return self.norm(final(x, cos, sin, attend, cache, last))

    def attention(
        self,
        x: Tensor,
        dtype: torch.dtype,
        mask: Tensor | None,
        cache: KVCache | None,
        last: bool = False,
    ) -> Attend:
        """What layers share: the function (q, k, v) -> heads, with its mask in it.

        last: q (B, H, 1, E) is of the last slots alone.
        """
        new, grouped = x.shape[1], self.config.heads != self.config.kv_heads
        causal = mask is None and new > 1
        if cache is not None and mask is None:
            causal = causal and cache.longest == 0
            if not causal and not (new == 1 and cache.equal):
                mask = cache.mask(new)
        # Training on a CPU: the fused backward is 2 to 4 times slower than plain products here.
        short = torch.is_grad_enabled() and x.device.type == "cpu" and new <= 320
        plain = short and dtype == torch.bfloat16 and cache is None and not grouped
        if plain and mask is None:
            mask = torch.ones(new, new, dtype=torch.bool).tril()  # (T, T)
        if mask is not None:  # to an additive mask once, where SDPA would do it in every layer
            zero = torch.zeros((), dtype=dtype, device=x.device)
            mask = torch.where(mask, zero, -math.inf)
            mask = mask[..., -1:, :] if last else mask
        causal = causal and not last
        if plain:
            assert mask is not None
            return partial(plain_attention, mask=mask)
        return partial(
            F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of positions (B, T), each (B, 1, T, E), shared by all layers."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angle = positions[:, None, :, None] * self._frequencies  # (B, 1, T, E)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache in this decoder's dtype and on its device."""
        c, like = self.config, self.embed_tokens.weight
        return KVCache(c.layers, rows, c.kv_heads, c.head_dim, capacity, like.dtype, like.device)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = config.dropout
        self.recompute = False  # hold the input alone for the backward, and compute the rest again

    def forward(self, x, cos, sin, attend, cache, last=False) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self.compute, x, cos, sin, attend, cache, last, use_reentrant=False)
        return self.compute(x, cos, sin, attend, cache, last)

    def compute(self, x, cos, sin, attend, cache, last=False) -> Tensor:
        dtype = cos.dtype  # under autocast: one cast here, where each projection would do its own
        seen = self.input_layernorm(x).to(dtype)
        heard = self.drop(self.self_attn(seen, cos, sin, attend, cache, last))
        x = x[:, -heard.shape[1] :] + heard
        return x + self.drop(self.mlp(self.post_attention_layernorm(x).to(dtype)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        dim, width = config.dim, config.head_dim
        bias = config.attention_bias
        output_bias = bias if config.output_bias is None else config.output_bias
        self.index, self.head_dim = index, width
        self.q_proj = nn.Linear(dim, config.heads * width, bias=bias)
        self.k_proj = nn.Linear(dim, config.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, config.kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.heads * width, dim, bias=output_bias)
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None

    def forward(self, x, cos, sin, attend, cache, last=False) -> Tensor:
        rows, new, _ = x.shape
        asked = 1 if last else new  # slots whose hidden states are wanted
        if last:
            q, k, v = self.q_proj(x[:, -1:]), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = side_by_side(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(rows, asked, -1, self.head_dim)  # (B, T, H, E)
        k = k.view(rows, new, -1, self.head_dim)  # (B, T, K, E)
        v = v.view(rows, new, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.transpose(1, 2), cos[:, :, -asked:], sin[:, :, -asked:])  # (B, H, T, E)
        k = rotate(k.transpose(1, 2), cos, sin)  # (B, K, T, E)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, K, S, E)
        x = attend(q, k, v).transpose(1, 2)  # (B, T, H, E)
        return self.o_proj(x.reshape(rows, asked, -1))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = side_by_side(x, self.gate_proj, self.up_proj)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))


def side_by_side(x: Tensor, first: nn.Module, *others: nn.Module) -> Sequence[Tensor]:
    """What linear layers give for x; layers that were packed together do it by one product."""
    beside: Any = getattr(first, "beside", None)
    return [layer(x) for layer in (first, *others)] if beside is None else beside(others, x)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # under autocast, query and key heads come in bfloat16
        return F.rms_norm(x, weight.shape, weight, self.eps)


class KVCache:
    """Keys and values of every layer, preallocated, with one length per row.

    A step is: forward (each layer calls `update`), then `advance`. Right-padded prefill advances
    each row by its true length; what padding left behind that is masked, and overwritten later.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would be NaN.
        shape = (rows, kv_heads, capacity, head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.capacity = capacity
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest, self.equal = 0, True  # kept on the host: the hot loop never asks the device
        self._slots: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.length.shape[0]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (rows, K, T, E) behind each row's length; returns views (rows, K, S, E)."""
        new = k.shape[2]
        end = self.longest + new
        if end > self.capacity:
            raise ValueError(
                f"{end} slots are longer than the context of {self.capacity}: "
                "shorten the prompt, or ask for fewer tokens or images"
            )
        keys, values = self.k[layer], self.v[layer]
        if self.equal:
            keys.narrow(2, self.longest, new).copy_(k)
            values.narrow(2, self.longest, new).copy_(v)
        else:
            row = torch.arange(self.rows, device=k.device)[:, None]
            where = (row, slice(None), self.slots(new))  # (rows, T, K, E); scatter_ copies it all
            keys[where] = k.transpose(1, 2).to(keys.dtype)
            values[where] = v.transpose(1, 2).to(values.dtype)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def slots(self, new: int) -> Tensor:
        """Where the next `new` entries of each row go, (rows, new); the same for all layers."""
        if self._slots is None or self._slots.shape[1] != new:
            self._slots = self.length[:, None] + torch.arange(new, device=self.length.device)
        return self._slots

    def mask(self, new: int) -> Tensor:
        """Causal mask of the next `new` queries over the filled slots, bool (rows, 1, new, S)."""
        seen = torch.arange(self.longest + new, device=self.length.device)  # (S,)
        return seen <= self.slots(new)[:, None, :, None]

    def advance(self, count: int | Tensor) -> None:
        """Keep `count` of the entries just written: one number, or one a row (a (rows,) tensor)."""
        self.length = self.length + count
        if isinstance(count, int):
            self.longest += count
        else:
            self._measure()
        self._slots = None

    def select(self, rows: Tensor | Sequence[int]) -> KVCache:
        """A new cache made of the given rows, in that order; a row may be repeated or left out."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.length.device)
        chosen = KVCache.__new__(KVCache)
        chosen.k = [k.index_select(0, index) for k in self.k]
        chosen.v = [v.index_select(0, index) for v in self.v]
        chosen.capacity, chosen.length = self.capacity, self.length[index]
        chosen._measure()
        chosen._slots = None
        return chosen

    def _measure(self) -> None:
        lengths = self.length.tolist()
        self.longest, self.equal = max(lengths, default=0), len(set(lengths)) <= 1


def block_mask(segment: Tensor) -> Tensor:
    """Mask of packed rows: segment (B, T) -> bool (B, 1, T, T), causal and within one segment.

    Segments count from 0; padding is -1 and sees only itself, so that no row is empty (a softmax
    over nothing is NaN).
    """
    size = segment.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    same = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, :, None]  # (B, T, T)
    itself = torch.eye(size, dtype=torch.bool, device=segment.device)
    return (same & causal | itself)[:, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in three steps, (B, H, T, E) each; mask (…, T, T) is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + mask  # (B, H, T, T)
    return scores.softmax(-1).to(v.dtype) @ v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864, halves as in Llama) of x (B, H, T, E); sin is signed."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """Angle per position (E,), float32 on the CPU; the first half is negative.

    The sign makes sin(-a), sin(a) the two factors of the rotated halves, and cos does not see it.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequency = 1.0 / config.rope_theta ** (steps / config.head_dim)  # (E/2,)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":  # slow waves are stretched, fast ones kept, and a ramp between them
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling["factor"])
    elif kind != "default":
        raise ValueError(f"rope_scaling type {kind!r} is not supported: use 'linear' or 'llama3'")
    return torch.cat((-frequency, frequency))
