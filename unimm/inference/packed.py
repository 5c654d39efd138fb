"""Linear layers as oneDNN or FBGEMM keeps them, and the decoder step of such layers in torch alone.

torch's own products of a few rows read a weight at a third to a half of the memory's speed: at each
call MKL and oneDNN must find their way through rows that lie one behind the other. A packed weight
lies as the library's inner loop goes. It is there once, in place of the parameter.

oneDNN packs float32, and bfloat16 where the processor multiplies that. Where it does not, weights
of 16 bits are packed for FBGEMM, in float16, and the model computes in float32.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.cpu import halves, intel, multiplies_bfloat16, x86
from unimm.model.decoder import MLP, Attention, Decoder, KVCache, rotate

# Rows: of fewer, oneDNN takes a slower way where it has AVX-512.
FEW = 4  # rows, for which oneDNN chooses its order
LEAST = FEW if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1
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

    packed: "Reordered | Halves | None"

    def __init__(
        self, layer: nn.Linear, packed: "Reordered | Halves | None" = None, first: int = 0
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.bias, self.first = layer.bias, first
        self.packed = form(layer.weight.detach()) if packed is None else packed

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
        return self.packed.dense()[self.first : self.first + self.out_features].clone()

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
        return {**self.__dict__, "packed": dense, "first": 0, "how": type(self.packed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        how = state.pop("how")
        super().__setstate__(state)
        if isinstance(dense := self.packed, Tensor):
            self.packed = how(dense)


class Reordered:
    """A weight (out, in) in oneDNN's order, of float32 or bfloat16."""

    least = LEAST

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.made = torch.ops.mkldnn._reorder_linear_weight(weight, FEW)
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __len__(self) -> int:
        return len(self.made)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.multiply(x, self.made, bias, "none", [], "")

    def dense(self) -> Tensor:
        return self.made.to_dense()


class Halves:
    """A weight (out, in) of 16 bits as FBGEMM keeps it: in float16, times a power of two.

    That moves its numbers into float16's range: all of at least 2^-28 of the largest are kept as
    they are, in bfloat16 and float16 alike.
    """

    least = 1
    dtype = torch.float32  # of what goes in and comes out

    def __init__(self, weight: Tensor):
        most = float(weight.abs().max()) if weight.numel() else 0.0
        scale = 2.0 ** min(14 - math.frexp(most)[1], 100)  # the largest is in 2^13 ... 2^14
        self.rows, self.back = len(weight), torch.tensor(1 / scale)
        self.made = torch.ops.quantized.linear_prepack_fp16(weight.float() * scale, None)
        by_fbgemm = torch.ops.quantized.linear_dynamic_fp16.default
        self.multiply = getattr(by_fbgemm, "_op", by_fbgemm)  # without looks at what it is given

    def __len__(self) -> int:
        return self.rows

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.multiply(x, self.made).mul_(self.back)
        return y if bias is None else y.add_(bias)

    def dense(self) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self.made)[0].float() * self.back


def by_rows(layers: Sequence[PackedLinear], x: Tensor) -> Tensor:
    """`product` of any number of rows, x (…, in)."""
    assert (weight := layers[0].packed) is not None
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(LEARNS)
    x, shape = x.to(weight.dtype), x.shape[:-1]
    if (count := shape.numel()) < weight.least:
        x = F.pad(x.reshape(count, layers[0].in_features), (0, 0, 0, weight.least - count))
        y = product(*layers, x=x)[:count]
        return y.view(*shape, y.shape[-1])
    return product(*layers, x=x)


def product(*layers: PackedLinear, x: Tensor) -> Tensor:
    """What layers give for at least as many rows as is `least`, side by side; no gradient."""
    return multiplier(*layers)(x)


def multiplier(*layers: PackedLinear) -> Callable[[Tensor], Tensor]:
    """`product` as a function of x, for as long as the layers stay as they are.

    It is one product of layers that were packed together, if they are all of these.
    """
    packed, size = layers[0].packed, sum(layer.out_features for layer in layers)
    assert packed is not None
    if any(layer.packed is not packed for layer in layers):
        each = [multiplier(layer) for layer in layers]
        return lambda x: torch.cat([multiply(x) for multiply in each], -1)
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    if size == len(packed):
        return partial(packed, bias=bias)
    own = slice(layers[0].first, layers[0].first + size)
    if bias is None:
        return lambda x: packed(x)[..., own]
    return lambda x: packed(x)[..., own] + bias


def pack(model: nn.Module) -> None:
    """Replace the linear layers of a model where there is a packed form for them.

    One by one, but those of attention that read the same are packed together, and so are those of
    an MLP. A weight that is shared, as of tied embeddings, stays. Nothing learns afterwards. Around
    `Halves` the rest of the model becomes float32, by which 16 bits lose nothing.
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
                joint = form(torch.cat([found[n].weight.detach() for n in names]))
                first = 0
                for name in names:
                    size = found[name].out_features
                    setattr(parent, name, PackedLinear(found.pop(name), joint, first).eval())
                    first += size
        for name in list(found):  # of the model no more than that is there twice at a time
            setattr(parent, name, PackedLinear(found.pop(name)).eval())
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if layers:
        model.requires_grad_(False)
    if any(isinstance(layer.packed, Halves) for layer in layers):
        model.float()


def form(weight: Tensor) -> Reordered | Halves:
    """A weight (out, in) in the form that suits it."""
    return Halves(weight) if by_halves(weight.dtype) else Reordered(weight)


def suits(weight: Tensor) -> bool:
    """Whether a library packs such a weight for this processor."""
    if weight.device.type != "cpu" or not x86():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    native = weight.dtype == torch.bfloat16 and multiplies_bfloat16()
    return weight.dtype == torch.float32 or native or by_halves(weight.dtype)


def by_halves(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are FBGEMM's."""
    slow = dtype == torch.bfloat16 and not multiplies_bfloat16()
    return (slow or dtype == torch.float16) and halves()


def is_packed(decoder: nn.Module) -> bool:
    """Whether there are `Steps` of this decoder."""
    first: Any = decoder.get_submodule("layers.0.self_attn.q_proj")
    return isinstance(first, PackedLinear) and first.packed is not None


class Steps:
    """What `Decoder.forward` gives, for few slots: for as long as its weights stay as they are."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.layers: list[Any] = []
        block: Any
        for block in decoder.layers:
            attention, mlp = block.self_attn, block.mlp
            together = [
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj],
            ]
            norms = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
            self.layers.append((*norms, *(multiplier(*layers) for layers in together)))
        first: Any = decoder.get_submodule("layers.0.self_attn.q_proj")
        self.least = first.packed.least

    def __call__(self, x: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
        """x (R, T, D) at slots (R, T) -> normed hidden states (R, T, D)."""
        decoder, c, (rows, new, dim) = self.decoder, self.decoder.config, x.shape
        # SDPA of few queries is slow in bfloat16, but on Intel's processors four times faster.
        wide = x.dtype if intel() else torch.promote_types(x.dtype, torch.float32)
        attend = decoder.attention(x, wide, None, cache)
        cos, sin = (part.transpose(1, 2) for part in decoder.rope(slots, x.dtype))
        count = rows * new
        none = x.new_zeros(max(0, self.least - count), c.heads * c.head_dim)
        x = F.pad(x.reshape(count, dim), (0, 0, 0, len(none)))  # rows of zeros behind the M
        for index, (norm1, norm2, qkv, out, gate_up, down) in enumerate(self.layers):
            parts = qkv(norm(x, norm1, c.norm_eps))[:count].view(rows, new, -1, c.head_dim)
            turned, v = parts.split((c.heads + c.kv_heads, c.kv_heads), 2)
            if c.qk_norm:
                attention: Any = decoder.layers[index].self_attn
                turned = F.rms_norm(turned, (c.head_dim,), None, c.norm_eps)
                turned[:, :, : c.heads].mul_(attention.q_norm.weight)
                turned[:, :, c.heads :].mul_(attention.k_norm.weight)
            q, k = rotate(turned, cos, sin).transpose(1, 2).split((c.heads, c.kv_heads), dim=1)
            k, v = cache.update(index, k, v.transpose(1, 2))
            heads = in_pieces(attend, q, k, v, wide).transpose(1, 2).reshape(count, -1).to(x.dtype)
            x = x + out(torch.cat((heads, none)) if len(none) else heads)
            gate, up = gate_up(norm(x, norm2, c.norm_eps)).chunk(2, -1)
            x = x + down(F.silu(gate).mul_(up))
        return norm(x[:count], decoder.norm.weight, c.norm_eps).view(rows, new, dim)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of few rows (M, D); in float32 by a product, faster than torch's own."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    least, shares = of_mean(x.shape[1], eps)
    return (x * weight).mul_(torch.addmv(least, x * x, shares).rsqrt_()[:, None])


@lru_cache(16)
def of_mean(size: int, eps: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(eps), torch.full((size,), 1 / size)


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
