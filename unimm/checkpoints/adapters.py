"""LoRA (arXiv 2106.09685) through peft: adapters put into a model, switched off, merged away.

The layers under them may be in int8, as QLoRA's (arXiv 2305.14314) are in 4 bits:
unimm.model.int8.quantize_decoder after `add_adapters`.

peft is an optional extra: `pip install unimm[lora]`.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unimm.model.int8 import Int8Linear, plain

Model = TypeVar("Model", bound=nn.Module)
TARGETS = (
    r"decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|connector\..*|code_embed|code_adapter\..*|image_head\.(proj|out)|text_head"
)
FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's


def add_adapters(
    model: nn.Module, rank: int, targets: str = TARGETS, learns: Callable[[str], bool] | None = None
) -> None:
    """Put adapters on the linear layers and tables whose whole name matches `targets`, and whose
    weight `learns`, by its name. They start at zero. A weight that two layers share gets none.

    Raises ValueError where nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    owners = Counter(id(module.weight) for module in found.values())
    names = [
        name
        for name, module in found.items()
        if re.fullmatch(targets, name)
        and owners[id(module.weight)] == 1
        and (learns is None or learns(f"{name}.weight"))
    ]
    if not names:
        raise ValueError(f"no layer that learns matches {targets!r}: there is nothing to adapt")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def adapted_name(name: str) -> str | None:
    """The weight that a parameter of an adapter changes; None for all other parameters."""
    found = re.fullmatch(r"(.*)\.lora_(embedding_)?[AB]\.default(\.weight)?", name)
    return f"{found[1]}.weight" if found else None


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
    """Add what the adapters learned to the weights, and take the adapters out.

    An int8 layer under an adapter becomes a float one: whole numbers would lose the sum.
    """
    wrapped = [(n, m) for n, m in model.named_modules() if m in _adapters(model)]
    for name, layer in wrapped:
        if isinstance(layer.get_base_layer(), Int8Linear):
            layer.base_layer = plain(layer.get_base_layer())
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def merged_copy(model: Model) -> Model:
    """The model as generation wants it: itself, or where it has adapters a copy without any."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return model
    model = copy.deepcopy(model)
    merge_adapters(model)
    return model


def save_adapters(folder: Path, model: nn.Module, base: str) -> None:
    """What the adapters have learned, in peft's two files; `base`: the model they belong to."""
    from peft import LoraConfig

    layers = [(n, m) for n, m in model.named_modules() if m in _adapters(model)]
    rank = layers[0][1].r["default"]
    names = [name for name, _ in layers]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, base_model_name_or_path=base
    )
    config.save_pretrained(str(folder))
    state = {
        _stored_name(name): parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if adapted_name(name)
    }
    part = folder / "adapter.part"
    save_file(state, part, {"format": "pt"})
    part.rename(folder / FILES[1])


def base_of(folder: Path) -> str:
    """The model that the adapters in a folder belong to; "" where it is no folder of adapters."""
    about = folder / FILES[0]
    if not about.is_file() or (folder / "config.json").exists():
        return ""
    try:
        base = json.loads(about.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about} does not say whose adapters these are: {error!r}") from None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{about} does not say whose adapters these are")
    return base


def merge_stored(folder: Path, model: nn.Module) -> None:
    """Put the adapters of `save_adapters` onto their base and merge them.

    Raises ValueError where they do not fit it.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(f"{folder} holds adapters: pip install unimm[lora]") from None

    inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), model)
    stored = load_file(folder / FILES[1])
    mine = {n: p for n, p in model.named_parameters() if adapted_name(n)}
    if {_stored_name(name) for name in mine} != stored.keys():
        raise ValueError(f"the adapters in {folder} are of another model")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(stored[_stored_name(name)])
    merge_adapters(model)


def _stored_name(name: str) -> str:
    return "base_model.model." + name.replace(".default", "")


def _adapters(model: nn.Module) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
