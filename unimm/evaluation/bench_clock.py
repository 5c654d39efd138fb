"""The clocks of the bench: models by turns, their peak memory, and how fast this machine is."""

import ctypes
import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch


def alternate(
    turns: dict[str, Callable[[], list[float]]], rounds: int, whole: bool = False
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Each turn once a round, after a round that is not timed and tells the memory.

    Returns medians of the runs (or the runs, `whole`), and the peak memory of each turn beyond
    what was held before it, in bytes (0 where the system does not tell).
    """
    timed: dict[str, list[Any]] = {name: [] for name in turns}
    memory = {}
    for name, turn in turns.items():
        give_back()
        before = start_peak()
        turn()
        memory[name] = peak() - before if before else 0
    for _ in range(rounds):
        for name, turn in turns.items():
            run = turn()
            timed[name].append(run if whole else statistics.median(run))
    return timed, memory


def result(timed: dict[str, list[float]], memory: dict[str, int]) -> dict[str, Any]:
    """Medians in milliseconds, and the ratio to the best of transformers' variants (and to
    DeepSeek's loop where it was timed)."""
    medians = {name: statistics.median(runs) * 1e3 for name, runs in timed.items()}
    ours, other = medians.pop("unimm"), medians.pop("deepseek", None)
    best = min(medians, key=medians.__getitem__)
    return {
        "unimm": ours,
        "transformers": medians,
        "best": best,
        "ratio": medians[best] / ours,
        "spread": [min(timed["unimm"]) * 1e3, max(timed["unimm"]) * 1e3],
        "memory": {"unimm": memory["unimm"], "transformers": memory[best]},
        **({} if other is None else {"deepseek": other, "deepseek_ratio": other / ours}),
    }


def bandwidth(size: int) -> float:
    """Bytes a second at which so many bytes are read again and again (in cache, if they fit)."""
    data = torch.ones(size // 4)
    return size / best_of(data.sum)


def flops(dtype: torch.dtype) -> float:
    """Operations a second of a large product: in `dtype`, or in float32 where that is faster."""
    factors = [torch.ones(1024, 1024, dtype=kind) for kind in {dtype, torch.float32}]
    return 2 * 1024**3 / min(best_of(partial(torch.matmul, a, a)) for a in factors)


def best_of(work: Callable[[], Any], times: int = 7, least: float = 0.3) -> float:
    """Least seconds of several runs, and of as many as fill `least` seconds: others may disturb."""
    found: list[float] = []
    while len(found) < times or sum(found) < least:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def give_back() -> None:
    """Return freed memory to the system: what a turn leaves would hide what the next one needs."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def start_peak() -> int:
    """Bytes held now, with the peak set back to them; 0 where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def machine() -> dict[str, Any]:
    import transformers

    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
