"""The decoder step in torch alone, with fewer and larger operations; what is done without a kernel.

A layer's query, key and value matrices become one, as do its gate and up matrices. None is kept
twice: the parameters of the model become views of these.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.model.decoder import Decoder, KVCache, rotate

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")

# Shapes: R rows of the cache, T new slots of each, M = R T, D dim, H heads, K kv heads, E head dim.


@dataclass
class Layer:
    qkv: Any  # ((H + 2 K) E, D)
    qkv_bias: Tensor | None
    heads: Tensor | None  # (H + K, E), the norms of query and key heads
    gate_up: Any  # (2 hidden, D)
    gate_up_bias: Tensor | None
    block: Any


class Fused:
    """A decoder of plain linear layers on a CPU; `make_fused` says whether it is one."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        c = decoder.config
        self.layers = []
        block: Any
        for block in decoder.layers:
            attention, mlp = block.self_attn, block.mlp
            norms = None
            if attention.q_norm is not None:
                rows = (attention.q_norm.weight.expand(c.heads, -1),
                        attention.k_norm.weight.expand(c.kv_heads, -1))  # fmt: skip
                norms = torch.cat(rows)
            qkv, gate_up = joined(attention, QKV), joined(mlp, GATE_UP)
            self.layers.append(Layer(*qkv, norms, *gate_up, block))

    def step(self, x: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
        """What `Decoder.forward` gives for x (R, T, D) at slots (R, T): normed hidden states."""
        c, (rows, new, dim) = self.decoder.config, x.shape
        attend = self.decoder.attention(x, x.dtype, None, cache)
        cos, sin = (part.transpose(1, 2) for part in self.decoder.rope(slots, x.dtype))
        x = x.reshape(-1, dim)  # (M, D)
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.block.self_attn, layer.block.mlp
            seen = norm(x, layer.block.input_layernorm.weight, c.norm_eps)
            every = F.linear(seen, layer.qkv, layer.qkv_bias).view(rows, new, -1, c.head_dim)
            turned, v = every.split((c.heads + c.kv_heads, c.kv_heads), dim=2)
            if layer.heads is not None:
                turned = norm(turned, layer.heads, c.norm_eps)
            q, k = rotate(turned, cos, sin).transpose(1, 2).split((c.heads, c.kv_heads), dim=1)
            k, v = cache.update(index, k, v.transpose(1, 2))
            heads = attend(q, k, v).transpose(1, 2).reshape(rows * new, -1)
            x = added(x, heads, attention.o_proj)
            seen = norm(x, layer.block.post_attention_layernorm.weight, c.norm_eps)
            gate, up = F.linear(seen, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = added(x, F.silu(gate).mul_(up), mlp.down_proj)
        return norm(x, self.decoder.norm.weight, c.norm_eps).view(rows, new, dim)


def make_fused(decoder: Decoder) -> Fused | None:
    """None where the layers are not plain or not on a CPU."""
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        parts = [getattr(attention, name) for name in (*QKV, "o_proj")]
        parts += [getattr(mlp, name) for name in (*GATE_UP, "down_proj")]
        for layer in parts:
            if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
                return None
            if type(layer.weight) is not nn.Parameter or layer.weight.is_inference():
                return None
    with torch.inference_mode(False), torch.no_grad():
        return Fused(decoder)


def joined(parent: nn.Module, names: tuple[str, ...]) -> tuple[Any, Tensor | None]:
    """Weights and biases of linear layers in one; the layers' own become views of it."""
    parts = [getattr(parent, name) for name in names]
    return as_one([part.weight for part in parts]), as_one([part.bias for part in parts])


def as_one(parts: list[Any]) -> Tensor | None:
    """Parameters in one tensor, end to end, of which they become views (None of none).

    Those that lie so already, as another engine of the model has put them, stay where they are.
    """
    first = parts[0]
    if first is None:
        return None
    places = {part.untyped_storage().data_ptr() for part in parts}
    follow = all(
        a.data_ptr() + a.numel() * a.element_size() == b.data_ptr() and a.is_contiguous()
        for a, b in pairwise(parts)
    )
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    if len(places) == 1 and follow and parts[-1].is_contiguous():
        return first.detach().as_strided(shape, first.stride(), first.storage_offset())
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole


def added(x: Tensor, y: Tensor, layer: nn.Linear) -> Tensor:
    """x + layer(y), for rows (M, ·)."""
    sum_ = torch.addmm(x, y, layer.weight.t())
    return sum_ if layer.bias is None else sum_ + layer.bias


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, which torch does slowly for a few rows on a CPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
    scale = square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight)
