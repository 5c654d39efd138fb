"""What this machine's processor is good at: those who choose a dtype or a library ask here."""

import platform
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(1)
def intel() -> bool:
    """Whether this is a processor of Intel's, for which torch's own kernels were tuned."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    return any("GenuineIntel" in line for line in lines)


def x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def multiplies_bfloat16() -> bool:
    """Whether it has instructions for products of bfloat16.

    One without them takes up to ten times as long for these as for float32's.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch can say it of x86 alone
        known_of_x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return known_of_x86 or not x86()
    known = torch.cpu.get_capabilities()
    return any(bool(known.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def halves() -> bool:
    """Whether torch has FBGEMM's products of float32 by float16 for it."""
    return x86() and "fbgemm" in torch.backends.quantized.supported_engines
