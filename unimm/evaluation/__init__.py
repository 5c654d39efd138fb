"""Benchmarks by name; each entry imports its scorer on first use."""

from collections.abc import Callable
from typing import Any


def _scenes() -> Callable[..., dict[str, Any]]:
    from unimm.evaluation.scenes import evaluate

    return evaluate


def _sprites() -> Callable[..., dict[str, Any]]:
    from unimm.evaluation.sprites import evaluate

    return evaluate


BENCHMARKS: dict[str, Callable[[], Callable[..., dict[str, Any]]]] = {
    "scenes": _scenes,
    "sprites": _sprites,
}
