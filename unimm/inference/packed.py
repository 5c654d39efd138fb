"""Linear layers as oneDNN keeps them, and the decoder step of such layers in torch alone.

torch's own products of a few rows read a weight at a third to a half of the memory's speed: at each
call MKL and oneDNN must find their way through rows that lie one behind the other. A packed weight
lies as oneDNN's inner loop goes. It is there once, in place of the parameter.
"""

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.inference.products import intel
from unimm.model.decoder import MLP, Attention, Decoder, KVCache, rotate

LEAST = 4  # rows: of fewer, oneDNN takes a slower way
LEARNS = "packed layers do not learn: use what unimm.checkpoints.load.load_model gives"
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PIECE = 1 << 20  # numbers of keys that are made float32 at once, so that they stay in the cache

# Shapes: R rows of the cache, T new slots of each, M = R T, D dim, H heads, K kv heads, E head dim.


class PackedLinear(nn.Linear):
    """x (…, in) -> (…, out) as nn.Linear, on a CPU; neither it nor what is before it learns.

    `state_dict` has the weight in the usual order, but cannot be loaded into. Moved to another
    device or dtype, it is a plain linear layer again. Raises RuntimeError where it is to learn.
    packed: the weights of several layers, of which this one's rows begin at `first`; None: its own.
    """

    packed: Tensor | None

    def __init__(self, layer: nn.Linear, packed: Tensor | None = None, first: int = 0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.bias, self.first = layer.bias, first
        self.packed = reordered(layer.weight.detach()) if packed is None else packed

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.packed is None else by_rows((self,), x)

    def beside(self, others: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
        """What it and others give for x: by one product if they are all that was packed with it."""
        layers: tuple[Any, ...] = (self, *others)
        sizes = [layer.out_features for layer in layers]
        joint = all(getattr(layer, "packed", None) is self.packed for layer in layers)
        if self.packed is None or not joint or sum(sizes) != len(self.packed):
            return [layer(x) for layer in layers]
        return by_rows(layers, x).split(sizes, -1)

    def dense(self) -> Tensor:
        """The weight (out, in) in the usual order."""
        assert self.packed is not None
        return self.packed.to_dense()[self.first : self.first + self.out_features].clone()

    def train(self, mode: bool = True) -> "PackedLinear":
        if mode and self.packed is not None:
            raise RuntimeError(LEARNS)
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}weight"] = self.dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.packed is not None:
            probe = torch.empty(0, dtype=self.packed.dtype)
            if (moved := fn(probe)).device != probe.device or moved.dtype != probe.dtype:
                self.weight = nn.Parameter(self.dense(), requires_grad=False)
                self.packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # of copies: oneDNN's order is this process's own
        dense = None if self.packed is None else self.dense()
        return {**self.__dict__, "packed": dense, "first": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = None if self.packed is None else reordered(self.packed)


def by_rows(layers: Sequence[PackedLinear], x: Tensor) -> Tensor:
    """`product` of any number of rows, x (…, in)."""
    assert layers[0].packed is not None
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(LEARNS)
    x, shape = x.to(layers[0].packed.dtype), x.shape[:-1]
    if (count := shape.numel()) < LEAST:
        x = F.pad(x.reshape(count, layers[0].in_features), (0, 0, 0, LEAST - count))
        y = product(*layers, x=x)[:count]
        return y.view(*shape, y.shape[-1])
    return product(*layers, x=x)


def product(*layers: PackedLinear, x: Tensor) -> Tensor:
    """What layers give for at least LEAST rows, side by side; no gradient.

    By one product of layers that were packed together, if they are all of these.
    """
    packed, size = layers[0].packed, sum(layer.out_features for layer in layers)
    assert packed is not None
    if any(layer.packed is not packed for layer in layers):
        return torch.cat([product(layer, x=x) for layer in layers], -1)
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    if size == len(packed):
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    y = y[..., layers[0].first : layers[0].first + size]
    return y if bias is None else y + bias


def reordered(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, LEAST)


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a model where oneDNN has a packed form for them.

    One by one, but those of attention that read the same are packed together, and so are those of
    an MLP. A weight that is shared, as of tied embeddings, stays. Nothing learns afterwards.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for parent in [m for m in model.modules() if m._modules]:  # not the layers: they are to go
        found: dict[str, nn.Linear] = {
            name: layer
            for name, layer in parent._modules.items()
            if type(layer) is nn.Linear and owners[id(layer.weight)] == 1 and suits(layer.weight)
        }
        for names in TOGETHER:
            if isinstance(parent, Attention | MLP) and all(name in found for name in names):
                joint, first = reordered(torch.cat([found[n].weight.detach() for n in names])), 0
                for name in names:
                    size = found[name].out_features
                    setattr(parent, name, PackedLinear(found.pop(name), joint, first).eval())
                    first += size
        for name in list(found):  # of the model no more than that is there twice at a time
            setattr(parent, name, PackedLinear(found.pop(name)).eval())
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
    # SDPA of few queries is slow in bfloat16, but on Intel's processors four times faster.
    wide = x.dtype if intel() else torch.promote_types(x.dtype, torch.float32)
    attend = decoder.attention(x, wide, None, cache)
    cos, sin = (part.transpose(1, 2) for part in decoder.rope(slots, x.dtype))
    count = rows * new
    more = (0, 0, 0, max(0, LEAST - count))  # rows of zeros behind the M
    x = F.pad(x.reshape(count, dim), more)
    block: Any
    for index, block in enumerate(decoder.layers):
        attention, mlp = block.self_attn, block.mlp
        seen = F.rms_norm(x, (dim,), block.input_layernorm.weight, c.norm_eps)
        parts = product(attention.q_proj, attention.k_proj, attention.v_proj, x=seen)
        parts = parts[:count].view(rows, new, -1, c.head_dim)
        turned, v = parts.split((c.heads + c.kv_heads, c.kv_heads), 2)
        if attention.q_norm is not None:
            turned = F.rms_norm(turned, (c.head_dim,), None, c.norm_eps)
            turned[:, :, : c.heads].mul_(attention.q_norm.weight)
            turned[:, :, c.heads :].mul_(attention.k_norm.weight)
        q, k = rotate(turned, cos, sin).transpose(1, 2).split((c.heads, c.kv_heads), dim=1)
        k, v = cache.update(index, k, v.transpose(1, 2))
        heads = in_pieces(attend, q, k, v, wide).transpose(1, 2).reshape(count, -1)
        x = x + product(attention.o_proj, x=F.pad(heads.to(x.dtype), more))
        seen = F.rms_norm(x, (dim,), block.post_attention_layernorm.weight, c.norm_eps)
        gate, up = product(mlp.gate_proj, mlp.up_proj, x=seen).chunk(2, -1)
        x = x + product(mlp.down_proj, x=F.silu(gate).mul_(up))
    return F.rms_norm(x[:count], (dim,), decoder.norm.weight, c.norm_eps).view(rows, new, dim)


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
