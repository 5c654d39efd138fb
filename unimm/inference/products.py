"""Products of prompts on a CPU, by the library that is fastest there.

torch gives float32 products of a linear layer to MKL, which has no AVX-512 for processors of others
than Intel, where oneDNN is a quarter faster, and several times faster for few rows where there is
AMX; elsewhere MKL is a tenth faster. It multiplies bfloat16 itself where the processor has no
instructions for it, at a tenth of float32's speed; widening both factors costs next to nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unimm.cpu import intel, multiplies_bfloat16

ROWS = 32  # of fewer, what is set up before a product is not worth it


class ManyRows(TorchFunctionMode):
    """While it is entered, `F.linear` and attention of many rows take their fastest way.

    Nothing is changed where there is a gradient or autocast, or beyond a CPU.
    """

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and args[0].numel() >= ROWS * args[0].shape[-1]:
            x, weight, bias = (*args, None)[:3]
            if by_onednn(x, weight):
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            if by_float32(x, weight):
                return func(*(part if part is None else part.float() for part in args)).to(x.dtype)
        if func is F.scaled_dot_product_attention and len(args) == 3 and by_float32(*args):
            mask = (kwargs or {}).get("attn_mask")
            own = {} if mask is None or mask.dtype == torch.bool else {"attn_mask": mask.float()}
            wide = func(*(part.float() for part in args), **{**(kwargs or {}), **own})
            return wide.to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply these."""
    cpu = torch.backends.cpu.get_cpu_capability()
    wide = cpu == "AVX512" and not intel() or torch.cpu._is_amx_tile_supported()
    there = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    there = there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return wide and there and plain(torch.float32, x, weight)


def by_float32(*factors: Tensor) -> bool:
    """Whether these are in bfloat16, and faster by way of float32."""
    return plain(torch.bfloat16, *factors) and not multiplies_bfloat16()


def plain(dtype: torch.dtype, *factors: Tensor) -> bool:
    """Whether all are of this dtype, on a CPU, with nothing that learns and no autocast."""
    alike = all(part.dtype == dtype and part.device.type == "cpu" for part in factors)
    return alike and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
