"""Decoders of the Llama family: what transformers' config.json of one says, as a DecoderConfig."""

from typing import Any

from unimm.model.decoder import DecoderConfig

# What transformers' LlamaConfig assumes where a config.json is silent: Janus-Pro-7B's is.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
EMU3 = {  # as LLAMA, of transformers' Emu3TextConfig
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
DEFAULTS: dict[str, dict[str, Any]] = {"llama": LLAMA, "emu3_text_model": EMU3}
SIZES = {*LLAMA} - {"rms_norm_eps"}
OPTIONS: dict[str, dict[str, Any]] = {  # what a model_type adds to Llama
    "llama": {},
    "qwen2": {"attention_bias": True, "output_bias": False},
    "qwen3": {"qk_norm": True},
    "emu3_text_model": {},
}


def decoder_config(data: dict[str, Any], where: str) -> DecoderConfig:
    """A transformers configuration -> DecoderConfig.

    `where` names the file in errors. Raises ValueError for what the decoder cannot compute.
    """
    kind = data.get("model_type", "llama")
    if kind not in OPTIONS:
        known = ", ".join(OPTIONS)
        raise ValueError(f"{where}: a decoder of model_type {kind!r} is unknown here: {known} are")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: the activation {data['hidden_act']!r} is not silu")
    if data.get("use_sliding_window"):
        raise ValueError(f"{where}: attention in a sliding window is not supported")
    c = {**DEFAULTS.get(kind, {}), **data}
    for name in SIZES & c.keys():
        if not isinstance(c[name], int) or c[name] < 1:
            raise ValueError(f"{where}: {name} is {c[name]!r}, not a whole number above 0")
    try:
        heads, dim = c["num_attention_heads"], c["hidden_size"]
        theta, scaling = rope(c)
        options = {"attention_bias": bool(c.get("attention_bias", False)), **OPTIONS[kind]}
        return DecoderConfig(
            vocab_size=c["vocab_size"],
            dim=dim,
            layers=c["num_hidden_layers"],
            heads=heads,
            kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or dim // heads,
            hidden=c["intermediate_size"],
            rope_theta=theta,
            norm_eps=c["rms_norm_eps"],
            max_positions=c["max_position_embeddings"],
            mlp_bias=bool(c.get("mlp_bias", False)),
            tied_embeddings=bool(c.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            **options,
        )
    except KeyError as error:
        raise ValueError(f"{where} does not give {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def rope(data: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary positions, in the words of transformers 4 or 5."""
    given = {**(data.get("rope_scaling") or {}), **(data.get("rope_parameters") or {})}
    theta = given.pop("rope_theta", None) or data.get("rope_theta", 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    return float(theta), None if kind == "default" else given
