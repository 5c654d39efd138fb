"""Products of prompts on a CPU: by oneDNN where torch itself would take MKL.

torch gives float32 products of a linear layer to MKL, which on processors of others than Intel is
a quarter slower than oneDNN, and several times slower for few rows where there is AMX. Elsewhere it
is a tenth faster.
"""

import platform
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
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
    plain = plain and (not intel() or torch.cpu._is_amx_tile_supported())
    return plain and not torch.is_grad_enabled() and x.numel() >= ROWS * x.shape[-1]


@lru_cache(1)
def intel() -> bool:
    """Whether this is a processor of Intel's, for which torch's own kernels were tuned."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    return any("GenuineIntel" in line for line in lines)
