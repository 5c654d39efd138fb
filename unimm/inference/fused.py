"""The decoder step in torch alone, with fewer and larger operations; what is done without a kernel.

A layer's query, key and value matrices become one, as do its gate and up matrices. None is kept
twice: the parameters of the model become views of these.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.model.decoder import Decoder, KVCache, rotate

SMALL, MANY, PIECE = 1 << 20, 4, 1 << 18  # numbers, rows, numbers: of what is widened, and how
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")

# Shapes: R rows of the cache, T new slots of each, M = R T, D dim, H heads, K kv heads, E head dim.


@dataclass
class Layer:  # weights are views, transposed: (in, out)
    qkv: Any  # (D, (H + 2 K) E)
    qkv_bias: Tensor | None
    out: Any  # (H E, D)
    gate_up: Any  # (D, 2 hidden)
    gate_up_bias: Tensor | None
    down: Any  # (hidden, D)
    block: Any


class Fused:
    """A decoder of plain linear layers on a CPU; `make_fused` says whether it is one."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.layers = []
        block: Any
        for block in decoder.layers:
            attention, mlp = block.self_attn, block.mlp
            out, down = (m.weight.detach().t() for m in (attention.o_proj, mlp.down_proj))
            qkv, gate_up = joined(attention, QKV), joined(mlp, GATE_UP)
            self.layers.append(Layer(*qkv, out, *gate_up, down, block))

    def step(self, x: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
        """What `Decoder.forward` gives for x (R, T, D) at slots (R, T): normed hidden states."""
        c, (rows, new, dim) = self.decoder.config, x.shape
        wide = torch.promote_types(x.dtype, torch.float32)  # as SDPA of few queries is slow in bf16
        attend = self.decoder.attention(x, wide, None, cache)
        cos, sin = (part.transpose(1, 2) for part in self.decoder.rope(slots, x.dtype))
        x = x.reshape(-1, dim)  # (M, D)
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.block.self_attn, layer.block.mlp
            seen = norm(x, layer.block.input_layernorm.weight, c.norm_eps)
            every = product(seen, layer.qkv, layer.qkv_bias).view(rows, new, -1, c.head_dim)
            turned, v = every.split((c.heads + c.kv_heads, c.kv_heads), dim=2)
            if attention.q_norm is not None:
                turned = norm(turned, None, c.norm_eps)
                turned[:, :, : c.heads].mul_(attention.q_norm.weight)
                turned[:, :, c.heads :].mul_(attention.k_norm.weight)
            q, k = rotate(turned, cos, sin).transpose(1, 2).split((c.heads, c.kv_heads), dim=1)
            k, v = cache.update(index, k, v.transpose(1, 2))
            heads = attend(*(part.to(wide) for part in (q, k, v))).to(x.dtype)
            heads = heads.transpose(1, 2).reshape(rows * new, -1)
            x = added(x, heads, layer.out, attention.o_proj.bias)
            seen = norm(x, layer.block.post_attention_layernorm.weight, c.norm_eps)
            gate, up = product(seen, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = added(x, F.silu(gate).mul_(up), layer.down, mlp.down_proj.bias)
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
    """Weights (in, out) and biases of linear layers in one; the layers' own become views of it."""
    parts = [getattr(parent, name) for name in names]
    weight, bias = (as_one([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    assert weight is not None
    return weight.t(), bias


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


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias for rows (M, ·); of so few rows `F.linear` is in part its own overhead."""
    if x.dtype == torch.bfloat16 and widened(len(x), weight.numel()):
        y = wide_product(x, weight).to(x.dtype)
        return y if bias is None else y.add_(bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def added(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + y @ weight + bias."""
    if x.dtype == torch.bfloat16 and widened(len(x), weight.numel()):
        sum_ = wide_product(y, weight).add_(x).to(x.dtype)
    else:
        sum_ = torch.addmm(x, y, weight)
    return sum_ if bias is None else sum_ + bias


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight in float32, of a large weight (in, out) in pieces that stay in the CPU's cache."""
    x = x.float()
    if weight.numel() <= SMALL:
        return torch.mm(x, weight.float())
    parts = weight.split(max(1, PIECE // weight.shape[0]), dim=1)
    return torch.cat([torch.mm(x, part.float()) for part in parts], 1)


def widened(rows: int, size: int) -> bool:
    """Whether a bfloat16 product is faster in float32, its weight (of `size` numbers) and all."""
    return emulated_bfloat16() and (size <= SMALL or rows >= MANY)


@cache
def emulated_bfloat16() -> bool:
    """Whether the CPU has AVX-512 without instructions for bfloat16 products (AMX included)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_avx512_supported() and not native


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension as LayerNorm of (x, -x), whose mean is 0.

    Of a few rows on a CPU torch's own RMSNorm takes several times as long.
    """
    size = x.shape[-1]
    normed = F.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[..., :size]
    return normed if weight is None else normed * weight
