"""Weight-only int8: the decoder's linear layers keep whole numbers and one scale a row.

A row w becomes round(w / s) with s = max|w| / 127, so that no weight is off by more than s / 2,
1/254 of its row's largest; for normally distributed weights the error is about 0.9 % of their size
(root mean square). The logits of the bundled model then move by 0.7 % of their spread, and the
likeliest code or word stays the same 98 times in 100. Activations, embeddings, norms and heads stay
as they are. A layer multiplies by its whole numbers in the dtype of what comes in, and by the
scales afterwards. Its weight does not learn, but gradients go through it to what is before it, and
to adapters around it (unimm/training/adapters.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """x (…, in) -> (…, out), as nn.Linear; weight int8 (out, in), scale float32 (out,)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            out = _Product.apply(x, self.weight) * self.scale.to(x.dtype)
        else:
            out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias

    def dequantized(self) -> Tensor:
        """The weight (out, in) that the layer stands for, float32."""
        return self.weight * self.scale[:, None]

    def _apply(self, fn, recurse=True):  # .to(bfloat16) must not round the scales
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) -> int8 (out, in) and float32 scales (out,)."""
    rows = weight.float()
    scale = rows.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    return (rows / scale[:, None]).round().to(torch.int8), scale


class _Product(torch.autograd.Function):
    """x (…, in) times an int8 weight (out, in); the backward is left int8, not what it became."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def quantize_decoder(model: nn.Module) -> None:
    """Replace the linear layers of `model.decoder`; on "meta" they wait for their weights.

    Adapters on them stay, in floating point.
    """
    for path, parent in list(model.get_submodule("decoder").named_modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and "lora_" not in path:
                setattr(parent, name, _quantized(layer))


def plain(layer: Int8Linear) -> nn.Linear:
    """A linear layer with the weight that `layer` stands for."""
    with torch.device("meta"):  # nothing is drawn at random, which dropout would notice
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
    made.bias = layer.bias  # type: ignore[assignment]
    return made


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _quantized(layer: nn.Linear) -> Int8Linear:
    with torch.device(layer.weight.device):
        made = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None)
    if not layer.weight.is_meta:
        made.weight, made.scale = quantize(layer.weight.detach())
        made.bias = layer.bias
    return made
