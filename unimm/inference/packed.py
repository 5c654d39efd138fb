"""Linear layers as oneDNN keeps them, and the decoder step of such layers in torch alone.

torch's own products of a few rows read a weight at a third to a half of the memory's speed: at each
call MKL and oneDNN must find their way through rows that lie one behind the other. A packed weight
lies as oneDNN's inner loop goes. It is there once, in place of the parameter.
"""

import platform
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.model.decoder import Decoder, KVCache, rotate

LEAST = 4  # rows: of fewer, oneDNN takes a slower way
LEARNS = "packed layers do not learn: use what unimm.checkpoints.load.load_model gives"
PIECE = 1 << 20  # numbers of keys that are made float32 at once, so that they stay in the cache

# Shapes: R rows of the cache, T new slots of each, M = R T, D dim, H heads, K kv heads, E head dim.


class PackedLinear(nn.Linear):
    """x (…, in) -> (…, out) as nn.Linear, on a CPU; neither it nor what is before it learns.

    `state_dict` has the weight in the usual order, but cannot be loaded into. Moved to another
    device or dtype, it is a plain linear layer again. Raises RuntimeError where it is to learn.
    """

    packed: Tensor | None

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.bias = layer.bias
        self.packed = reordered(layer.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(LEARNS)
        x, shape = x.to(self.packed.dtype), x.shape[:-1]
        if (count := shape.numel()) < LEAST:
            x = F.pad(x.reshape(count, self.in_features), (0, 0, 0, LEAST - count))
            return product(self, x)[:count].view(*shape, self.out_features)
        return product(self, x)

    def train(self, mode: bool = True) -> "PackedLinear":
        if mode and self.packed is not None:
            raise RuntimeError(LEARNS)
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self.packed.to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.packed is not None:
            probe = torch.empty(0, dtype=self.packed.dtype)
            if (moved := fn(probe)).device != probe.device or moved.dtype != probe.dtype:
                self.weight = nn.Parameter(self.packed.to_dense(), requires_grad=False)
                self.packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # of copies: oneDNN's order is this process's own
        dense = None if self.packed is None else self.packed.to_dense()
        return {**self.__dict__, "packed": dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = None if self.packed is None else reordered(self.packed)


def product(layer: PackedLinear, x: Tensor) -> Tensor:
    """`layer(x)` of at least LEAST rows and no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, layer.packed, layer.bias, "none", [], "")


def reordered(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, LEAST)


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a model, one by one, where oneDNN has a packed form for them.

    A weight that is shared, as of tied embeddings, stays. Nothing of the model learns afterwards.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for parent in [m for m in model.modules() if m._modules]:  # not the layers: they are to go
        for name in list(parent._modules):
            layer = parent._modules[name]
            if type(layer) is nn.Linear and owners[id(layer.weight)] == 1 and suits(layer.weight):
                setattr(parent, name, PackedLinear(layer).eval())
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        model.requires_grad_(False)


def suits(weight: Tensor) -> bool:
    """Whether oneDNN packs such a weight, and has instructions for it."""
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native)


def is_packed(decoder: nn.Module) -> bool:
    """Whether `step` serves this decoder."""
    first: Any = decoder.get_submodule("layers.0.self_attn.q_proj")
    return isinstance(first, PackedLinear) and first.packed is not None


def step(decoder: Decoder, x: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
    """What `Decoder.forward` gives for x (R, T, D) at slots (R, T): normed hidden states."""
    c, (rows, new, dim) = decoder.config, x.shape
    wide = torch.promote_types(x.dtype, torch.float32)  # as SDPA of few queries is slow in bf16
    attend = decoder.attention(x, wide, None, cache)
    cos, sin = (part.transpose(1, 2) for part in decoder.rope(slots, x.dtype))
    count = rows * new
    more = (0, 0, 0, max(0, LEAST - count))  # rows of zeros behind the M
    x = F.pad(x.reshape(count, dim), more)
    block: Any
    for index, block in enumerate(decoder.layers):
        attention, mlp = block.self_attn, block.mlp
        seen = norm(x, block.input_layernorm.weight, c.norm_eps)
        parts = [product(p, seen) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        q, k, v = (part[:count].view(rows, new, -1, c.head_dim) for part in parts)
        turned = torch.cat((q, k), 2)
        if attention.q_norm is not None:
            turned = norm(turned, None, c.norm_eps)
            turned[:, :, : c.heads].mul_(attention.q_norm.weight)
            turned[:, :, c.heads :].mul_(attention.k_norm.weight)
        q, k = rotate(turned, cos, sin).transpose(1, 2).split((c.heads, c.kv_heads), dim=1)
        k, v = cache.update(index, k, v.transpose(1, 2))
        heads = in_pieces(attend, q, k, v, wide).transpose(1, 2).reshape(count, -1)
        x = x + product(attention.o_proj, F.pad(heads.to(x.dtype), more))
        seen = norm(x, block.post_attention_layernorm.weight, c.norm_eps)
        gate, up = product(mlp.gate_proj, seen), product(mlp.up_proj, seen)
        x = x + product(mlp.down_proj, F.silu(gate, inplace=True).mul_(up))
    return norm(x[:count], decoder.norm.weight, c.norm_eps).view(rows, new, dim)


def in_pieces(attend: Any, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """attend(q, k, v) (R, H, T, E) in `dtype`, some rows after others where that is not theirs."""
    if k.dtype == dtype:
        return attend(q, k, v)
    size = max(1, PIECE // k[0].numel())
    mask = attend.keywords["attn_mask"]
    masks = mask.split(size) if mask is not None and len(mask) > 1 else [mask] * len(k)
    pieces = zip(q.split(size), k.split(size), v.split(size), masks, strict=False)
    return torch.cat(
        [attend(*(p.to(dtype) for p in piece), attn_mask=seen) for *piece, seen in pieces]
    )


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension as LayerNorm of (x, -x), whose mean is 0.

    Of four rows on a CPU torch's own takes as long in float32, half as long again in bfloat16.
    """
    size = x.shape[-1]
    normed = F.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[..., :size]
    return normed if weight is None else normed * weight
