"""Products of prompts on a CPU: by oneDNN where torch itself would take MKL.

torch gives float32 products of a linear layer to MKL, which on some processors (AMD's among them)
is a quarter slower than oneDNN, and several times slower for few rows where there is AMX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROWS = 32  # of fewer, what oneDNN sets up before a product is not worth it


class OneDNN(TorchFunctionMode):
    """While it is entered, `F.linear` of many float32 rows without a gradient is oneDNN's."""

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and suits(*args):
            x, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN takes this product."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    plain = plain and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    plain = plain and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    plain = plain and not torch.is_autocast_enabled("cpu")
    return plain and not torch.is_grad_enabled() and x.numel() >= ROWS * x.shape[-1]
