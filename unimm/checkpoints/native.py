"""unimm's own format: a folder with config.json, model.safetensors and the two tokenizers.

config.json                 what the model is, the processor's settings, sampling defaults
model.safetensors           the weights of the unified model
image_tokenizer.*           the image tokenizer's configuration and weights
tokenizer.json              the text tokenizer, as Hugging Face tokenizers writes it
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unimm.checkpoints.shards import fill, read_json
from unimm.data.emu3 import Emu3Processor
from unimm.data.processor import Processor, Template, load_tokenizer
from unimm.model.image_tokenizer import IMAGE_TOKENIZERS, ImageTokenizer
from unimm.model.int8 import is_quantized
from unimm.model.unified import UnifiedConfig, UnifiedModel

FORMAT = "unimm-1"
PROCESSORS: dict[str, type[Processor]] = {"native": Processor, "emu3": Emu3Processor}
BUNDLED = Path(__file__).parents[1] / "assets" / "scenes"


def save_model(
    folder: str | Path,
    model: UnifiedModel,
    processor: Processor,
    sampling: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder; each file appears whole. `dtype`: of the stored weights.

    Raises ValueError for a model in int8: what is saved can be loaded in int8.
    """
    if is_quantized(model):
        raise ValueError("weights in int8 are not saved: load the model in another dtype to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:  # a tied head
            continue
        seen.add(tensor.data_ptr())
        state[name] = tensor.detach().to("cpu", dtype).contiguous()
    _write(folder / "model.safetensors", lambda path: save_file(state, path))
    if processor.image_tokenizer is not None:
        processor.image_tokenizer.save(folder, dtype)  # type: ignore[operator]
    _write(folder / "tokenizer.json", lambda path: processor.tokenizer.save(str(path)))
    config = {
        "format": FORMAT,
        "model": model.config.to_dict(),
        "processor": processor.settings(),
        "sampling": sampling or {},
    }
    _write(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1)))


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[UnifiedModel, Processor, dict[str, Any]]:
    """Model, processor and sampling defaults of a native folder.

    dtype: of the weights, None as stored, int8 as in `fill`; the image tokenizer is float32.
    Raises ValueError, in one line, for a folder that is missing, incomplete or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = empty_model(config, folder)
    load_weights(model, folder / "model.safetensors", dtype, device)
    image_tokenizer = None
    if (folder / "image_tokenizer.json").exists():
        image_tokenizer = ImageTokenizer.load(folder).eval().to(device)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    try:
        settings = dict(config["processor"])
        template = Template(**settings.pop("template"))
        made = PROCESSORS[settings.pop("kind", "native")]
        processor = made(tokenizer, image_tokenizer, template, **settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no processor: {error!r}") from None
    return model.eval(), processor, config.get("sampling", {})


def empty_model(config: dict[str, Any], folder: Path) -> UnifiedModel:
    """The model that a configuration describes, without memory for its weights."""
    try:
        with torch.device("meta"):
            return UnifiedModel(UnifiedConfig.from_dict(config["model"]))
    except Exception as error:  # whatever a damaged configuration can lead to
        raise ValueError(f"{folder / 'config.json'} describes no model: {error!r}") from None


def empty_image_tokenizer(folder: Path) -> ImageTokenizer | None:
    """The image tokenizer that a folder describes, without memory; None where there is none."""
    path = folder / "image_tokenizer.json"
    if not path.exists():
        return None
    described = read_json(path)
    try:
        with torch.device("meta"):
            return IMAGE_TOKENIZERS[described.pop("kind")](described)
    except Exception as error:  # whatever a damaged configuration can lead to
        raise ValueError(f"{path} describes no image tokenizer: {error!r}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a native folder, checked to be one."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json, so it is not a model folder")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} is not in the format {FORMAT}")
    return config


def load_weights(
    model: torch.nn.Module,
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Put the tensors of a safetensors file in place of `model`'s own, as `dtype`.

    dtype: as `fill` has it. Raises ValueError, naming the file, for what is missing or misshapen.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: the model folder is incomplete")
    fill({"": model}, [path], lambda name, tensor: {name: tensor}, {"": dtype}, device)


def _write(path: Path, write: Any) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    part.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(part, path)
