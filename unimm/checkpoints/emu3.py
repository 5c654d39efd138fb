"""Emu3 Chat and Gen (arXiv 2409.18869): their configurations, key maps and processing.

Hugging Face's layout has model_type "emu3" (BAAI/Emu3-Chat-hf, Emu3-Gen-hf); its weights have the
names of transformers' class, or those that its files keep (`text_model.model.`, `vqmodel.`). BAAI's
own layout lies in two folders: the decoder has model_type "Emu3" (BAAI/Emu3-Chat, Emu3-Gen,
Emu3-Stage1) and Llama's names, the VQ network "Emu3VisionVQ" (BAAI/Emu3-VisionTokenizer), with the
names of github.com/baaivision/Emu3, emu3/tokenizer/modeling_emu3visionvq.py. Both become one
UnifiedModel of the shared pathway, whose codes are the last rows of the table, and an
Emu3Tokenizer, whose names begin with "image_tokenizer" in the maps.

- A code is a token `<|visual token 000000|>`; the ids of all must follow the text's, in order.
- `tie_word_embeddings`: as with Janus, a stored `lm_head.weight` counts more than the word.
- A picture's pixels are scaled by the mean and deviation of preprocessor_config.json, which are 0.5
  in BAAI's; where it is silent transformers takes CLIP's, and so does this.
"""

import itertools
import re
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unimm.checkpoints.llama import decoder_config
from unimm.checkpoints.shards import Places, optional_json, optional_number, read_json
from unimm.data.emu3 import Emu3Processor
from unimm.data.processor import Template, load_tokenizer
from unimm.model.image_tokenizer import Emu3Tokenizer, Emu3VQConfig
from unimm.model.unified import UnifiedConfig

# Prefixes of the names of transformers' class, then of its files, and of ours.
HUGGING_FACE = (
    ("model.text_model.", "decoder."),
    ("model.vqmodel.", "image_tokenizer.network."),
    ("lm_head.", "text_head."),
    ("text_model.model.", "decoder."),
    ("text_model.lm_head.", "text_head."),
    ("vqmodel.", "image_tokenizer.network."),
)
# Of BAAI's VQ network, in this order; its attention is made of 1 x 1 convolutions.
ORIGINAL = (
    (r"^(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid.attn_norm."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"^(encoder|decoder)\.mid\.", r"\1.middle_block."),
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"\.(attn\.\d+|attn_1)\.([qkv])\.", r".\1.\2_proj."),
    (r"\.(attn\.\d+|attn_1)\.proj_out\.", r".\1.out_proj."),
)
NETWORK = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
AREA = 720 * 720  # pixels of a drawn picture, where a configuration does not say
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
LIMITS = {"min_pixels": 512 * 512, "max_pixels": 1024 * 1024}
VQ_DEFAULTS: dict[str, Any] = {
    "codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "double_latent": False,
    "in_channels": 3, "out_channels": 3, "temporal_downsample_factor": 4, "base_channels": 256,
    "channel_multiplier": (1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (3,),
    "hidden_size": 1024, "num_attention_heads": 1,
}  # fmt: skip
TOKENS = {  # that the format is made of
    "bos": "<|extra_203|>",
    "pad": "<|endoftext|>",
    "end_of_turn": "<|extra_204|>",
    "begin_image": "<|image start|>",
    "end_image": "<|image end|>",
    "image_token": "<|image token|>",
    "row_end": "<|extra_200|>",
    "picture_end": "<|extra_201|>",
}
SYSTEM = "You are a helpful assistant. "  # before a chat, in all published examples
VISION = "Emu3-VisionTokenizer"  # BAAI's folder of the VQ network
SPLIT = (  # Qwen's words, as BAAI's tokenizer has them
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEGATIVE = (  # the published prompt of the unguided branch
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)


# ---------------------------------------------------------------- key maps


def from_hugging_face(name: str, tensor: Tensor) -> Places:
    """A tensor of transformers' Emu3ForConditionalGeneration under its name here."""
    for theirs, ours in HUGGING_FACE:
        if name.startswith(theirs):
            return {ours + name[len(theirs) :]: tensor}
    raise KeyError(name)


def their_name(ours: str) -> str:
    """Our name of a parameter -> transformers'; KeyError for one that Emu3 does not have."""
    for theirs, prefix in HUGGING_FACE:
        if ours.startswith(prefix):
            return theirs + ours[len(prefix) :]
    raise KeyError(ours)


def from_original(name: str, tensor: Tensor) -> Places:
    """A tensor of BAAI's decoder or of BAAI's VQ network under its name here."""
    if name.startswith(NETWORK):
        for pattern, new in ORIGINAL:
            name = re.sub(pattern, new, name)
        flat = tensor.ndim == 4 and name.endswith("_proj.weight")
        return {f"image_tokenizer.network.{name}": tensor.flatten(1) if flat else tensor}
    if name.startswith("model."):
        return {name.replace("model.", "decoder.", 1): tensor}
    if name == "lm_head.weight":
        return {"text_head.weight": tensor}
    raise KeyError(name)


# ---------------------------------------------------------------- configurations


def configs(
    data: dict[str, Any], where: str, head_stored: bool, pictures: dict[str, Any]
) -> tuple[UnifiedConfig, Emu3VQConfig]:
    """config.json of transformers' Emu3 and its preprocessor_config.json -> ours.

    head_stored: there is an `lm_head.weight`.
    """
    decoder = decoder_config(
        {"model_type": "emu3_text_model", **data.get("text_config", {})}, where
    )
    codes = vq_config(data.get("vq_config", {}), where, pictures, data.get("image_area", AREA))
    words = decoder.vocab_size - codes.codebook_size
    first_code(data.get("vocabulary_map") or {}, words, codes.codebook_size, where)
    decoder = replace(decoder, vocab_size=words, tied_embeddings=not head_stored)
    size = (codes.codebook_size, codes.code_dim, decoder.dim)
    return UnifiedConfig(decoder, None, "mlp", *size, pathway="shared"), codes


def vq_config(
    data: dict[str, Any], where: str, pictures: dict[str, Any], area: int
) -> Emu3VQConfig:
    """A `vq_config` of transformers', and the settings of its pictures, as ours."""
    q, p = {**VQ_DEFAULTS, **data}, {**CLIP, **pictures}
    if q["double_latent"] or (q["in_channels"], q["out_channels"]) != (3, 3):
        raise ValueError(f"{where}: a VQ network with double_latent or without 3 channels")
    try:
        config = Emu3VQConfig(
            image_size=1,
            codebook_size=q["codebook_size"],
            code_dim=q["embed_dim"],
            z_channels=q["latent_channels"],
            base_channels=q["base_channels"],
            multipliers=q["channel_multiplier"],
            res_blocks=q["num_res_blocks"],
            attention_levels=q["attn_resolutions"],
            attention_dim=q["hidden_size"],
            attention_heads=q["num_attention_heads"],
            frames=q["temporal_downsample_factor"],
            mean=p["image_mean"],
            std=p["image_std"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    side = round(area**0.5 / config.stride)  # in codes, as transformers rounds it
    return replace(config, image_size=side * config.stride)


def first_code(vocabulary: dict[str, int], words: int, codes: int, where: str) -> None:
    """ValueError unless the ids of the codes' tokens are words, words + 1, ... in order."""
    for code in (0, codes // 2, codes - 1) if vocabulary else ():
        name = f"<|visual token {code:06d}|>"
        if vocabulary.get(name) != words + code:
            found = vocabulary.get(name)
            raise ValueError(f"{where}: the id of {name} is {found}, not {words} + {code}")


def original_configs(
    data: dict[str, Any], where: str, head_stored: bool, vision: Path
) -> tuple[UnifiedConfig, Emu3VQConfig]:
    """The two config.json of BAAI's layout -> ours. vision: the folder of the VQ network."""
    found = {
        "text_config": {**data, "model_type": "emu3_text_model"},
        "vq_config": original_vq(read_json(vision / "config.json")),
        "image_area": data.get("image_area", AREA),
    }
    return configs(found, where, head_stored, picture_settings(vision))


def original_vq(data: dict[str, Any]) -> dict[str, Any]:
    """config.json of BAAI's VQ network in transformers' words."""
    q = {new: data[name] for name, new in ORIGINAL_VQ.items() if name in data}
    full = {**VQ_DEFAULTS, **q}
    return {**q, "hidden_size": full["base_channels"] * full["channel_multiplier"][-1]}


def network_config(folder: Path) -> Emu3VQConfig:
    """The VQ network alone, of a folder in Hugging Face's layout or of Emu3-VisionTokenizer."""
    path = folder / "config.json"
    data = read_json(path)
    q = data.get("vq_config", {}) if data["model_type"] == "emu3" else original_vq(data)
    return vq_config(q, str(path), picture_settings(folder), data.get("image_area", AREA))


ORIGINAL_VQ = {
    "codebook_size": "codebook_size", "embed_dim": "embed_dim", "z_channels": "latent_channels",
    "double_z": "double_latent", "in_channels": "in_channels", "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor", "ch": "base_channels",
    "ch_mult": "channel_multiplier", "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
}  # fmt: skip


def vision_folder(folder: Path) -> Path:
    """Where the VQ network of a decoder in BAAI's layout lies: in its folder, or beside it."""
    for place in (folder, folder.absolute().parent):
        if (place / VISION).is_dir():
            return place / VISION
    raise ValueError(f"{folder} has no VQ network: put BAAI/{VISION} as a folder beside it")


# ---------------------------------------------------------------- processing


def make_processor(
    folder: Path, config: UnifiedConfig, image_tokenizer: Emu3Tokenizer, original: bool
) -> Emu3Processor:
    """Tokenizer, template and settings of pictures of a folder in either layout."""
    path = folder / ("emu3.tiktoken" if original else "tokenizer.json")
    tokenizer = ranked_tokenizer(folder) if original else load_tokenizer(path)
    pictures = picture_settings(vision_folder(folder) if original else folder)
    ids = {name: tokenizer.token_to_id(token) for name, token in TOKENS.items()}
    for name, found in ids.items():
        if found is None or found >= config.decoder.vocab_size:
            raise ValueError(f"{path} has no token {TOKENS[name]}, which Emu3 needs ({name})")
    own = {name: ids.pop(name) for name in ("image_token", "row_end", "picture_end")}
    template = Template(user=("USER: ",), assistant=("ASSISTANT:",), system=SYSTEM, **ids)
    limits = {name: pictures.get(name, default) for name, default in LIMITS.items()}
    size = image_tokenizer.config.image_size
    return Emu3Processor(
        tokenizer,
        image_tokenizer,
        template,
        seen_size=size,
        seen_tokens=0,
        drawn_size=size,
        max_length=config.decoder.max_positions,
        negative=NEGATIVE,
        **own,
        **limits,
    )


def picture_settings(folder: Path) -> dict[str, Any]:
    """What a folder says of its pictures: limits, mean and deviation."""
    inside = optional_json(folder / "processor_config.json").get("image_processor")
    found = inside or optional_json(folder / "preprocessor_config.json")
    names = (*CLIP, *LIMITS)
    return {name: found[name] for name in names if found.get(name) is not None}


def ranked_tokenizer(folder: Path) -> Any:
    """A `tokenizers.Tokenizer` from emu3.tiktoken (tokens by rank) and emu3_vision_tokens.txt."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path, names = folder / "emu3.tiktoken", folder / "emu3_vision_tokens.txt"
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {b64decode(word): int(rank) for word, rank in pairs}
        vision = [line.strip() for line in names.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} or {names.name} cannot be read as tokens: {error}") from None
    letters = bytes_to_unicode()

    def spelled(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    merges = [(spelled(a), spelled(b)) for a, b in (halves(w, ranks) for w in ranks if len(w) > 1)]
    vocabulary = {spelled(word): rank for word, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    extra = [f"<|extra_{i}|>" for i in range(205)]
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra, *vision])
    return tokenizer


def halves(word: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding joins last to make `word`."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def sampling(folder: Path) -> dict[str, Any]:
    """Guidance 3, as published; top_k of generation_config.json."""
    top_k = optional_number(folder / "generation_config.json", "top_k", 2048)
    return {"guidance": 3.0, "top_k": int(top_k)}
