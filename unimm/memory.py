"""Freed memory stays with the process: a step asks for what the step before it gave back.

glibc returns large blocks to the system as they are freed, and each page of the next block is a
fault: on a virtual machine a third of a training step, and a quarter of reading a long prompt.
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
USERS = ("MALLOC_", "GLIBC_TUNABLES")
_kept = -1  # what has been asked for so far, as below


def keep_freed(whole: bool = False) -> bool:
    """Have malloc keep what is freed, for as long as the process lives; whether it does.

    Blocks of up to 32 MB, and 256 MB of them, or `whole`: all there is, as a training run wants
    it, whose steps are alike. Nothing is done where the C library is not glibc, or where its
    variables (MALLOC_TRIM_THRESHOLD_ and the like, mallopt(3); GLIBC_TUNABLES) are set.
    """
    global _kept
    if sys.platform != "linux" or any(name.startswith(USERS) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    if whole > _kept:
        some = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 256 << 20}
        asked = {MMAP_MAX: 0, TRIM_THRESHOLD: -1} if whole else some
        if not all([mallopt(name, value) for name, value in asked.items()]):
            return False
        _kept = int(whole)
    return True
