"""One door for every model: a folder or a Hub id, the format recognised from config.json."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unimm.checkpoints import adapters, emu3, janus, native
from unimm.checkpoints.shards import Places, fill, read_json, weight_files
from unimm.data.processor import Processor
from unimm.model.image_tokenizer import (
    Emu3Tokenizer,
    Emu3VQConfig,
    ImageTokenizer,
    VQConfig,
    VQTokenizer,
)
from unimm.model.int8 import quantize_decoder
from unimm.model.unified import UnifiedConfig, UnifiedModel

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
FORMATS = {
    "janus": "Hugging Face Janus",
    "multi_modality": "DeepSeek Janus",
    "emu3": "Hugging Face Emu3",
    "Emu3": "BAAI Emu3",
}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
Loaded = tuple[UnifiedModel, Processor, dict[str, Any]]


@dataclass
class Description:
    """What a configuration says: both networks are on "meta", without any weight."""

    folder: Path
    format: str
    model: UnifiedModel
    image_tokenizer: ImageTokenizer | None
    seen_size: int
    seen_tokens: int
    drawn_size: int
    license: str


def load_model(
    source: str | Path, dtype: str = "float32", device: torch.device | str = "cpu"
) -> Loaded:
    """Model, processor and sampling defaults of a folder or a Hub id (`name/model[@revision]`).

    A folder of adapters gives the model that they belong to with these merged into it.

    dtype: of the model's weights; "auto" is what is stored, "int8" that with the decoder's linear
    layers in int8 (unimm.model.int8). The image tokenizer stays float32.
    Raises ValueError or OSError, in one line that names the file, for what cannot be loaded.
    """
    kind = None if dtype == "auto" else check_dtype(dtype)
    folder = locate(source)
    if base := adapters.base_of(folder):
        float_dtype = "auto" if dtype == "int8" else dtype
        model, processor, sampling = load_model(locate_base(base), float_dtype, device)
        adapters.merge_stored(folder, model)
        if dtype == "int8":
            quantize_decoder(model)
        return model, processor, sampling
    found = recognise(folder)
    load = native.load_model if found == native.FORMAT else load_janus
    load = load_emu3 if found in ("emu3", "Emu3") else load
    return load(folder, kind, device)


def load_janus(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> Loaded:
    """A Janus folder in either layout."""
    config, codes, data = janus_configs(folder)
    files = weight_files(folder)
    model, image_tokenizer = on_meta(config, codes, folder)
    deepseek, own = data["model_type"] == "multi_modality", data.get("unimm")
    if own:
        processor, sampling = janus.own_processor(folder, own, image_tokenizer), own["sampling"]
    else:
        processor = janus.make_processor(folder, config, image_tokenizer, deepseek)
        sampling = {"guidance": janus.guidance(folder)}
    place = janus.from_deepseek if deepseek else janus.from_hugging_face

    def placed(name: str, tensor: torch.Tensor) -> Places:
        """Without a tied model's copy of its head, and rows that were added for a placeholder."""
        found = place(name, tensor)
        if config.decoder.tied_embeddings:
            found.pop("text_head.weight", None)
        if own:
            rows = config.decoder.vocab_size
            found |= {n: t[:rows] for n, t in found.items() if n in janus.TABLES}
        return found

    parts: dict[str, nn.Module] = {"": model, "image_tokenizer": image_tokenizer}
    fill(parts, files, placed, {"": dtype, "image_tokenizer": torch.float32}, device)
    image_tokenizer.eval()
    return model.eval(), processor, sampling


def load_emu3(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> Loaded:
    """An Emu3 folder in either layout."""
    config, codes, original = emu3_configs(folder)
    files = weight_files(folder)
    files += weight_files(emu3.vision_folder(folder)) if original else []
    model, image_tokenizer = on_meta(config, codes, folder)
    processor = emu3.make_processor(folder, config, image_tokenizer, original)
    place = emu3.from_original if original else emu3.from_hugging_face

    def placed(name: str, tensor: torch.Tensor) -> Places:
        found = place(name, tensor)
        if config.decoder.tied_embeddings:
            found.pop("text_head.weight", None)
        return found

    parts: dict[str, nn.Module] = {"": model, "image_tokenizer": image_tokenizer}
    fill(parts, files, placed, {"": dtype, "image_tokenizer": torch.float32}, device)
    image_tokenizer.eval()
    return model.eval(), processor, emu3.sampling(folder)


def emu3_configs(folder: Path) -> tuple[UnifiedConfig, Emu3VQConfig, bool]:
    """Ours of an Emu3 folder, and whether it is in BAAI's layout."""
    path = folder / "config.json"
    data = read_json(path)
    original = data["model_type"] == "Emu3"
    try:
        head = not janus.is_tied(folder, {"tie_word_embeddings": False, **data})
        if original:
            vision = emu3.vision_folder(folder)
            return *emu3.original_configs(data, str(path), head, vision), True
        return *emu3.configs(data, str(path), head, emu3.picture_settings(folder)), False
    except (AttributeError, KeyError, TypeError) as error:  # values of a strange kind
        raise ValueError(f"{path} describes no Emu3 model: {error!r}") from None


def janus_configs(folder: Path) -> tuple[UnifiedConfig, VQConfig, dict[str, Any]]:
    """Ours of a Janus folder, and its own."""
    path = folder / "config.json"
    data = read_json(path)
    try:
        if data["model_type"] == "multi_modality":
            return *janus.deepseek_configs(data, str(path)), data
        head = not janus.is_tied(folder, data)
        config, codes = janus.hugging_face_configs(data, str(path), head)
        if "unimm" in data:
            decoder = replace(config.decoder, vocab_size=data["unimm"]["vocab_size"])
            config = replace(config, decoder=decoder)
        return config, codes, data
    except (AttributeError, KeyError, TypeError) as error:  # values of a strange kind
        raise ValueError(f"{path} describes no Janus model: {error!r}") from None


def on_meta(
    config: UnifiedConfig, codes: VQConfig | Emu3VQConfig, folder: Path
) -> tuple[UnifiedModel, Any]:
    """Model and image tokenizer without memory for their weights."""
    try:
        with torch.device("meta"):
            made = VQTokenizer(codes) if isinstance(codes, VQConfig) else Emu3Tokenizer(codes)
            return UnifiedModel(config), made
    except Exception as error:  # whatever a strange configuration can lead to
        raise ValueError(f"{folder / 'config.json'} describes no model: {error!r}") from None


def describe_model(source: str | Path) -> Description:
    """Read the configuration of a folder or a Hub id, and no weights."""
    folder = locate(source, weights=False)
    if base := adapters.base_of(folder):
        return describe_model(locate_base(base))
    kind = recognise(folder)
    if kind == native.FORMAT:
        data = native.read_config(folder)
        model, codes = native.empty_model(data, folder), native.empty_image_tokenizer(folder)
        p = data["processor"]
        sizes = (p["seen_size"], p["seen_tokens"], p["drawn_size"])
        return Description(folder, "native", model, codes, *sizes, license_of(folder))
    if kind in ("emu3", "Emu3"):
        config, network, _ = emu3_configs(folder)
        model, codes = on_meta(config, network, folder)
        size = network.image_size
        return Description(folder, FORMATS[kind], model, codes, size, 0, size, license_of(folder))
    config, made, _ = janus_configs(folder)
    model, codes = on_meta(config, made, folder)
    assert config.vision is not None
    seen = config.vision.image_size
    sizes = (seen, (seen // config.vision.patch_size) ** 2, made.image_size)
    return Description(folder, FORMATS[kind], model, codes, *sizes, license_of(folder))


def license_of(folder: Path) -> str:
    """What the front matter of README.md says, or that nothing does."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    front = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = dict(re.findall(r"^(license|license_name):[ \t]*(\S+)", front, re.MULTILINE))
    return found.get("license_name") or found.get("license") or "not stated in the folder"


def recognise(folder: Path) -> str:
    """The format of a model folder: a model_type in FORMATS, or the native one."""
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json, so it is not a model folder")
    data = read_json(path)
    kind = data.get("model_type")
    if kind is None:
        return native.FORMAT
    if not isinstance(kind, str) or kind not in FORMATS:
        known = ", ".join(f"{name!r} ({text})" for name, text in FORMATS.items())
        raise ValueError(f"{path}: the model_type {kind!r} is unknown: unimm loads {known}")
    return kind


def locate(source: str | Path, weights: bool = True) -> Path:
    """The folder of a path, or of a Hub id, which is downloaded once (HF_HUB_OFFLINE, HF_TOKEN).

    weights: False asks for the configuration alone.
    """
    path = Path(source)
    if path.exists() or not HUB_ID.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download

    name, _, revision = str(source).partition("@")
    wanted = ["*.json", "*.jinja", "*.tiktoken", "*.txt", "README.md"]
    wanted += ["*.safetensors", "*.bin"] if weights else []
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # offline, absent, gated, no network: each has its own class
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no such model folder: {source}, and the Hub does not give it: {reason}"
        ) from None


def locate_base(base: str) -> Path | str:
    """What adapters name as their model; "scenes" is the bundled one."""
    return native.BUNDLED if base == "scenes" and not Path(base).exists() else base


def check_dtype(name: str) -> torch.dtype:
    """The dtype of that name; ValueError for another."""
    if name not in DTYPES[1:]:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {name!r}")
    return getattr(torch, name)
