"""unimm: one small autoregressive decoder that sees pictures and draws them.

The public names load on first use, so that `import unimm` costs nothing but this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "UniMM": "unimm.pipeline",
    "Run": "unimm.config",
    "Source": "unimm.config",
    "UnifiedModel": "unimm.model.unified",
    "UnifiedConfig": "unimm.model.unified",
    "Processor": "unimm.data.processor",
}
__all__ = ["Processor", "Run", "Source", "UniMM", "UnifiedConfig", "UnifiedModel"]

if TYPE_CHECKING:
    from unimm.config import Run, Source
    from unimm.data.processor import Processor
    from unimm.model.unified import UnifiedConfig, UnifiedModel
    from unimm.pipeline import UniMM


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'unimm' has no attribute {name!r}")
