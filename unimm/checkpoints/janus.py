"""Janus and Janus-Pro: their configurations, key maps and processing, in both public layouts.

Hugging Face's layout has model_type "janus" (deepseek-community/Janus-Pro-1B), DeepSeek's own has
"multi_modality" (deepseek-ai/Janus-1.3B, Janus-Pro-1B and -7B). Both become one UnifiedModel with a
VQTokenizer; the names of the latter begin with "image_tokenizer" in the maps.

- DeepSeek's network normalises the rows of its codebook at every look-up; transformers' `encode`
  does not. Here rows are normalised once, on loading, so that both give DeepSeek's codes.
- `tie_word_embeddings` is True by default in transformers' JanusConfig; a stored `lm_head.weight`
  says otherwise, and counts.
- transformers' own conversion loses `rope_theta` and `rms_norm_eps`; they are read here.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from unimm.checkpoints.llama import decoder_config
from unimm.checkpoints.shards import (
    Places,
    names,
    optional_json,
    optional_number,
    read_json,
    weight_files,
)
from unimm.data.processor import Processor, Template, load_tokenizer
from unimm.model.image_tokenizer import VQConfig, VQTokenizer
from unimm.model.unified import UnifiedConfig
from unimm.model.vision import VisionConfig

# Prefixes of transformers' names and of ours; read backwards to write.
HUGGING_FACE = (
    ("model.vision_model.", "vision.model."),
    ("model.aligner.fc1.", "connector.fc1."),
    ("model.aligner.hidden_layers.0.", "connector.fc2."),
    ("model.vqmodel.", "image_tokenizer."),
    ("model.generation_embeddings.", "code_embed."),
    ("model.generation_aligner.fc1.", "code_adapter.fc1."),
    ("model.generation_aligner.hidden_layers.0.", "code_adapter.fc2."),
    ("model.generation_head.proj_out.", "image_head.proj."),
    ("model.generation_head.vision_head.", "image_head.out."),
    ("model.language_model.", "decoder."),
    ("lm_head.", "text_head."),
)
THEIR_OUTPUT, OUR_OUTPUT = ".self_attn.projection_layer.", ".self_attn.out_proj."  # of the encoder

TOWER = r"^vision_model\.vision_tower\."
LAYER = r"vision.model.encoder.layers.\1."
CODES = r"^gen_vision_model\."
DEEPSEEK = (
    (TOWER + r"attn_pool\..*", None),  # not used for features
    (CODES + r"quantize\.codebook_used$", None),  # statistics of training
    (TOWER + r"pos_embed$", "vision.model.embeddings.position_embedding.weight"),  # (1, P, D)
    (TOWER + r"patch_embed\.proj\.", "vision.model.embeddings.patch_embedding."),
    (TOWER + r"norm\.", "vision.model.post_layernorm."),
    (TOWER + r"blocks\.(\d+)\.norm([12])\.", LAYER + r"layer_norm\2."),
    (TOWER + r"blocks\.(\d+)\.attn\.qkv\.", LAYER + "self_attn.qkv."),  # three matrices in one
    (TOWER + r"blocks\.(\d+)\.attn\.proj\.", LAYER + "self_attn.out_proj."),
    (TOWER + r"blocks\.(\d+)\.mlp\.", LAYER + "mlp."),
    (CODES + r"(encoder|decoder)\.mid\.0\.", r"image_tokenizer.\1.mid.block_1."),
    (CODES + r"(encoder|decoder)\.mid\.1\.", r"image_tokenizer.\1.mid.attn_1."),
    (CODES + r"(encoder|decoder)\.mid\.2\.", r"image_tokenizer.\1.mid.block_2."),
    (CODES + r"encoder\.conv_blocks\.(\d+)\.res\.", r"image_tokenizer.encoder.down.\1.block."),
    (CODES + r"encoder\.conv_blocks\.", "image_tokenizer.encoder.down."),
    (CODES + r"decoder\.conv_blocks\.(\d+)\.res\.", r"image_tokenizer.decoder.up.\1.block."),
    (CODES + r"decoder\.conv_blocks\.", "image_tokenizer.decoder.up."),
    (CODES, "image_tokenizer."),
    (r"^aligner\.layers\.0\.", "connector.fc1."),
    (r"^aligner\.layers\.2\.", "connector.fc2."),
    (r"^gen_aligner\.layers\.0\.", "code_adapter.fc1."),
    (r"^gen_aligner\.layers\.2\.", "code_adapter.fc2."),
    (r"^gen_head\.output_mlp_projector\.", "image_head.proj."),
    (r"^gen_head\.vision_head\.", "image_head.out."),
    (r"^gen_embed\.", "code_embed."),
    (r"^language_model\.model\.", "decoder."),
    (r"^language_model\.lm_head\.", "text_head."),
)
CODEBOOK = "image_tokenizer.quantize.embedding.weight"
TABLES = ("decoder.embed_tokens.weight", "text_head.weight")
POSITIONS = "vision.model.embeddings.position_embedding.weight"

# (width, layers, heads, mlp ratio, patch) of the encoders that DeepSeek's configurations name.
TOWERS = {
    "siglip_large_patch16_384": (1024, 24, 16, 4.0, 16),
    "siglip_so400m_patch14_384": (1152, 27, 16, 3.7362, 14),
}
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n"
)
TOKENS = {  # Janus's special tokens, where a folder does not name others
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}


# ---------------------------------------------------------------- key maps


def from_hugging_face(name: str, tensor: Tensor) -> Places:
    """A tensor of transformers' JanusForConditionalGeneration under its name here."""
    return _finished(our_name(name), tensor)


def from_deepseek(name: str, tensor: Tensor) -> Places:
    """A tensor of DeepSeek's layout under its names here: none, one, or three (a fused qkv)."""
    for pattern, ours in DEEPSEEK:
        if re.match(pattern, name):
            if ours is None:
                return {}
            return _finished(re.sub(pattern, ours, name), tensor)
    raise KeyError(name)


def our_name(theirs: str) -> str:
    """transformers' name of a parameter -> ours; KeyError for no Janus name."""
    return _renamed(theirs, HUGGING_FACE).replace(THEIR_OUTPUT, OUR_OUTPUT)


def their_name(ours: str) -> str:
    """Our name of a parameter -> transformers'; KeyError for one that Janus does not have."""
    theirs = _renamed(ours, tuple((b, a) for a, b in HUGGING_FACE))
    return theirs.replace(OUR_OUTPUT, THEIR_OUTPUT)


def _renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    raise KeyError(name)


def _finished(name: str, tensor: Tensor) -> Places:
    """What needs arithmetic: the fused qkv, the leading 1 of positions, the codebook's lengths."""
    if ".qkv." in name:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("qkv", f"{letter}_proj"): part for letter, part in parts}
    if name == POSITIONS and tensor.ndim == 3:
        return {name: tensor.squeeze(0)}
    if name == CODEBOOK:
        return {name: unit_rows(tensor)}
    return {name: tensor}


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (K, d) of length one in float32; rows that have it already stay bit for bit."""
    rows = rows.float()
    if (rows.norm(dim=-1) - 1).abs().max() < 1e-5:
        return rows
    return F.normalize(rows, dim=-1)


# ---------------------------------------------------------------- configurations


def hugging_face_configs(
    data: dict[str, Any], where: str, head_stored: bool
) -> tuple[UnifiedConfig, VQConfig]:
    """config.json of transformers' Janus -> ours. head_stored: there is an `lm_head.weight`."""
    text, vision, vq = (_part(data, f"{name}_config", where) for name in ("text", "vision", "vq"))
    decoder = decoder_config(text, where)
    decoder = replace(decoder, tied_embeddings=not head_stored)
    v = {**VISION_DEFAULTS, **vision}
    q = {**VQ_DEFAULTS, **vq}
    _demand(where, v["depth"] == 2 and q["num_hidden_layers"] == 2, "an adaptor has not two layers")
    _demand(where, not v["use_qk_norm"], "use_qk_norm of the encoder is not supported")
    _demand(where, v["attention_bias"], "an encoder without attention biases is not supported")
    _demand(where, v["hidden_act"] == q["hidden_act"] == "gelu", "an activation is not gelu")
    channels = (v["num_channels"], q["in_channels"], q["out_channels"])
    _demand(where, channels == (3, 3, 3), "pictures do not have 3 channels")
    _demand(where, not q["double_latent"], "double_latent is not supported")
    dim = decoder.dim
    widths = (v["projection_dim"], q["projection_dim"], q["image_token_embed_dim"])
    _demand(where, widths == (dim,) * 3, f"the projection widths {widths} are not {dim}")
    grid = v["image_size"] // v["patch_size"]
    return _configs(
        where,
        decoder=decoder,
        vision=VisionConfig(
            dim=v["hidden_size"],
            layers=v["num_hidden_layers"],
            heads=v["num_attention_heads"],
            hidden=int(v["hidden_size"] * v["mlp_ratio"]),
            image_size=v["image_size"],
            patch_size=v["patch_size"],
            activation=v["hidden_act"],
            norm_eps=v["layer_norm_eps"],
        ),
        image_head_dim=q["projection_dim"],
        image_size=grid * 2 ** (len(q["channel_multiplier"]) - 1),
        codebook_size=q["num_embeddings"],
        code_dim=q["embed_dim"],
        z_channels=q["latent_channels"],
        base_channels=q["base_channels"],
        multipliers=tuple(q["channel_multiplier"]),
        res_blocks=q["num_res_blocks"],
    )


VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": 3,
    "image_size": 384, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "mlp_ratio": 4.0, "attention_bias": True, "projection_dim": 2048, "use_qk_norm": False,
    "depth": 2,
}  # fmt: skip
VQ_DEFAULTS: dict[str, Any] = {
    "embed_dim": 8, "num_embeddings": 16384, "double_latent": False, "latent_channels": 256,
    "in_channels": 3, "out_channels": 3, "base_channels": 128, "num_res_blocks": 2,
    "channel_multiplier": (1, 1, 2, 2, 4), "projection_dim": 2048, "num_hidden_layers": 2,
    "hidden_act": "gelu", "image_token_embed_dim": 2048,
}  # fmt: skip


def deepseek_configs(data: dict[str, Any], where: str) -> tuple[UnifiedConfig, VQConfig]:
    """config.json of DeepSeek's layout -> ours.

    It names its encoder and its VQ network and does not give their sizes. Where `params` has them
    (width, layers, heads, mlp_ratio, patch_size; ch, ch_mult, z_channels, num_res_blocks) they win.
    """
    vision, codes, head, aligner, gen_aligner = (
        _part(_part(data, f"{name}_config", where), "params", where)
        for name in ("vision", "gen_vision", "gen_head", "aligner", "gen_aligner")
    )
    language = {"tie_word_embeddings": False, **_part(data, "language_config", where)}
    decoder = decoder_config(language, where)
    name = vision.get("model_name", "siglip_large_patch16_384")
    fields = ("width", "layers", "heads", "mlp_ratio", "patch_size")
    tower: dict[str, Any] = {**dict(zip(fields, TOWERS.get(name, ()), strict=False)), **vision}
    _demand(where, all(field in tower for field in fields), f"the encoder {name} is unknown")
    width, layers, heads, ratio, patch = (tower[field] for field in fields)
    layer = vision.get("select_layer", -1)
    layers = min(layers, layers + layer + 1) if layer <= 0 else layer
    network = data["gen_vision_config"].get("cls", "VQ-16")
    _demand(where, network == "VQ-16", f"the image tokenizer {network!r} is not VQ-16")
    for part in (aligner, gen_aligner):
        kind, depth = part.get("projector_type", "mlp_gelu"), part.get("depth", 2)
        fits = (kind, depth) == ("mlp_gelu", 2)
        _demand(where, fits, f"an adaptor of type {kind} and depth {depth} is not supported")
    dim = decoder.dim
    widths = tuple(part.get("n_embed", dim) for part in (aligner, gen_aligner, head))
    _demand(where, widths == (dim,) * 3, f"the widths of adaptors and head {widths} are not {dim}")
    size = vision.get("image_size", 384)
    multipliers = tuple(codes.get("ch_mult", (1, 1, 2, 2, 4)))
    return _configs(
        where,
        decoder=decoder,
        vision=VisionConfig(
            dim=width,
            layers=layers,
            heads=heads,
            hidden=int(width * ratio),
            image_size=size,
            patch_size=patch,
            activation="gelu",
        ),
        image_head_dim=head.get("image_token_embed", dim),
        image_size=size // patch * 2 ** (len(multipliers) - 1),
        codebook_size=codes.get("image_token_size", 16384),
        code_dim=codes.get("n_embed", 8),
        z_channels=codes.get("z_channels", 256),
        base_channels=codes.get("ch", 128),
        multipliers=multipliers,
        res_blocks=codes.get("num_res_blocks", 2),
    )


def _configs(
    where: str, decoder: Any, vision: VisionConfig, image_head_dim: int, **vq: Any
) -> tuple[UnifiedConfig, VQConfig]:
    try:
        codes = VQConfig(**vq)
        size, dim = codes.codebook_size, codes.code_dim
        return UnifiedConfig(decoder, vision, "mlp", size, dim, image_head_dim), codes
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def is_tied(folder: Path, data: dict[str, Any]) -> bool:
    """Whether the text head is the embedding table, as no head is stored (or the config says)."""
    try:
        files = weight_files(folder)
    except ValueError:
        return bool(data.get("tie_word_embeddings", True))
    return not any(name.endswith("lm_head.weight") for path in files for name in names(path))


def _part(data: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    part = data.get(name, {})
    if not isinstance(part, dict):
        raise ValueError(f"{where}: {name} is not an object")
    return part


def _demand(where: str, holds: Any, fault: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {fault}")


# ---------------------------------------------------------------- processing


def make_processor(
    folder: Path, config: UnifiedConfig, image_tokenizer: VQTokenizer | None, deepseek: bool
) -> Processor:
    """Tokenizer, template and image settings of a Janus folder.

    The template is "<|User|>: ... <|Assistant|>: ...", after the system prompt where the answer is
    text. Roles that are no tokens are spelled; in DeepSeek's layout (Janus-1.3B) without brackets.
    """
    assert config.vision is not None
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    named = optional_json(folder / "tokenizer_config.json")
    settings = optional_json(folder / "processor_config.json")
    if deepseek:  # its code names the pad token, whatever the tokenizer calls so
        settings = {"pad_tag": TOKENS["pad_token"], **settings}
    ids = {name: _special(tokenizer, name, named, settings, path) for name in TOKENS}
    use_system = deepseek or settings.get("use_default_system_prompt", False)
    template = Template(
        bos=ids["bos_token"],
        pad=ids["pad_token"],
        user=_role(tokenizer, "User", ": ", deepseek),
        assistant=_role(tokenizer, "Assistant", ":", deepseek),
        end_of_turn=ids["eos_token"],
        begin_image=ids["boi_token"],
        end_image=ids["eoi_token"],
        system=SYSTEM if use_system else "",
        user_end="\n\n",
        answer_start=" ",
        beside_image="\n",
    )
    pictures = settings.get("image_processor") or optional_json(folder / "preprocessor_config.json")
    seen, patch = config.vision.image_size, config.vision.patch_size
    return Processor(
        tokenizer,
        image_tokenizer,
        template,
        seen_size=seen,
        seen_tokens=(seen // patch) ** 2,
        drawn_size=image_tokenizer.config.image_size if image_tokenizer else seen,
        max_length=config.decoder.max_positions,
        min_side=pictures.get("min_size", 14),
    )


def own_processor(
    folder: Path, section: dict[str, Any], image_tokenizer: VQTokenizer | None
) -> Processor:
    """The processor of a model that unimm wrote, as it was before its tokens got Janus's names."""
    from tokenizers import Tokenizer

    data = read_json(folder / "tokenizer.json")
    try:
        settings = dict(section["processor"])
        template = Template(**settings.pop("template"))
        if not template.worded:
            data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < template.bos]
            data["post_processor"] = section["words"]
        tokenizer = Tokenizer.from_str(json.dumps(data))
        return Processor(tokenizer, image_tokenizer, template, **settings)
    except Exception as error:  # whatever a damaged section or tokenizer leads to
        raise ValueError(f"{folder / 'config.json'} describes no processor: {error!r}") from None


def guidance(folder: Path) -> float:
    """The guidance that generation_config.json asks for; 5 where it is silent."""
    return float(optional_number(folder / "generation_config.json", "guidance_scale", 5.0))


def _special(
    tokenizer: Any, name: str, named: dict[str, Any], settings: dict[str, Any], path: Path
) -> int:
    """The id of a special token, by the name that the folder gives it, or by Janus's own."""
    tags = {"boi_token": "image_start_tag", "eoi_token": "image_end_tag", "pad_token": "pad_tag"}
    extra = named.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    for given in (settings.get(tags.get(name, "")), named.get(name), extra.get(name), TOKENS[name]):
        text = given.get("content") if isinstance(given, dict) else given
        found = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if found is not None:
            return found
    raise ValueError(f"{path} has no token {TOKENS[name]}, which Janus needs as its {name}")


def _role(tokenizer: Any, role: str, end: str, deepseek: bool) -> tuple[int | str, ...]:
    found = tokenizer.token_to_id(f"<|{role}|>")
    if found is not None:
        return (found, end)
    return (f"{role}{end}" if deepseek else f"<|{role}|>{end}",)
