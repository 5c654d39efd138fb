"""Freed memory that stays: steps that are alike cause no faults but the first."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from unimm import memory

STEPS = """
import resource, sys
import torch
from unimm.memory import keep_freed
size, whole = int(sys.argv[1]) << 18, {"whole": True, "part": False, "none": None}[sys.argv[2]]
done = whole is not None and keep_freed(whole)
def step():
    blocks = [torch.empty(size).fill_(1) for _ in range(4)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for k in range(20):
    before = before if k > 12 else faults()
    step()
print(done, faults() - before)
"""


def steps(megabytes: int, how: str, **variables: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", STEPS, str(megabytes), how],
        capture_output=True, text=True, timeout=120, env=clean | variables,
    )  # fmt: skip
    done, faults = run.stdout.split()
    return done, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
@pytest.mark.parametrize(("megabytes", "how"), [(30, "part"), (30, "whole"), (48, "whole")])
def test_a_step_reuses_what_the_one_before_it_freed(megabytes, how):
    done, faults = steps(megabytes, how)
    assert done == "True" and faults < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_what_is_large_goes_back_unless_all_is_kept_and_variables_go_first():
    assert steps(48, "none")[1] > 1000 and steps(48, "part")[1] > 1000
    done, faults = steps(48, "whole", MALLOC_TRIM_THRESHOLD_="131072")
    assert done == "False" and faults > 1000


def test_a_later_call_takes_nothing_back(monkeypatch):
    """The engine of a preview, within a training run."""
    asked = []
    library = SimpleNamespace(mallopt=lambda name, value: asked.append((name, value)) or 1)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory, "_kept", -1)
    for name in [name for name in os.environ if name.startswith(memory.USERS)]:
        monkeypatch.delenv(name)
    assert memory.keep_freed(whole=True) and (memory.MMAP_MAX, 0) in asked
    before = list(asked)
    assert memory.keep_freed() and asked == before
