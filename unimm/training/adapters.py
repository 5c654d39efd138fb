"""LoRA (arXiv 2106.09685) through peft: adapters put into a model, switched off, merged away.

peft is an optional extra: `pip install unimm[lora]`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

TARGETS = (
    r"decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|connector\..*|code_adapter\..*|image_head\.(proj|out)|text_head"
)


def add_adapters(model: nn.Module, rank: int, targets: str = TARGETS) -> None:
    """Put adapters on the linear layers whose whole name matches `targets`; they start at zero.

    Raises ValueError where nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(targets, name)
    ]
    if not names:
        raise ValueError(f"no linear layer of the model matches {targets!r}")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters that are not an adapter's."""
    return [(name, p) for name, p in model.named_parameters() if "lora_" not in name]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_adapters`, inside the block."""
    adapters = _adapters(model)
    for layer in adapters:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapters:
            layer.enable_adapters(True)


def merge_adapters(model: nn.Module) -> None:
    """Add what the adapters learned to the weights, and take the adapters out."""
    wrapped = [(n, m) for n, m in model.named_modules() if m in _adapters(model)]
    for name, layer in wrapped:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _adapters(model: nn.Module) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
