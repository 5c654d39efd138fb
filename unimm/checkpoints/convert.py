"""Models written for others: a unimm model as a folder that transformers opens as Janus.

What Janus has no word for is refused with the reason. A section "unimm" in config.json keeps what
transformers does not need (template, sizes, sampling), so that the way back is exact.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimm.checkpoints import janus, native
from unimm.checkpoints.load import load_model
from unimm.data.processor import Processor
from unimm.model.decoder import DecoderConfig
from unimm.model.image_tokenizer import VQTokenizer
from unimm.model.unified import UnifiedModel
from unimm.model.vision import VisionConfig

PLACEHOLDER = "<image_placeholder>"
NAMES = (  # of the native template's seven ids, in order
    janus.TOKENS["bos_token"], janus.TOKENS["pad_token"], "<|User|>", "<|Assistant|>",
    janus.TOKENS["eos_token"], janus.TOKENS["boi_token"], janus.TOKENS["eoi_token"],
)  # fmt: skip
CHAT = """\
{%- for message in messages -%}
{%- set mine = message.role == 'assistant' -%}
{%- set parts = message.content -%}
{%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}
{{ ASSISTANT if mine else USER }}
{%- if mine and parts and parts[0].type == 'text' -%}{{ ANSWER_START }}{%- endif -%}
{%- for part in parts -%}
{%- if part.type == 'image' -%}
{{ '' if loop.first else BESIDE_IMAGE }}{{ PLACEHOLDER }}{{ '' if loop.last else BESIDE_IMAGE }}
{%- else -%}
{{ JOIN if not loop.first and parts[loop.index0 - 1].type == 'text' }}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ ASSISTANT_END if mine else USER_END }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ASSISTANT }}{%- endif -%}"""


def convert(source: str | Path, target: str | Path, to: str, dtype: str = "auto") -> Path:
    """Write the model `source` as the folder `target`, to "unimm" or "janus-hf".

    Raises ValueError for a source that cannot be loaded, a target that is there, and a model that
    the format cannot express; the target then does not come into being.
    """
    if to not in WRITERS:
        raise ValueError(f"--to is one of {', '.join(WRITERS)}, not {to!r}")
    if dtype == "int8":
        raise ValueError("int8 is for running a model, not for saving it: convert in another dtype")
    target = Path(target)
    if target.exists():
        raise ValueError(f"{target} is there already: name a new folder")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {target.absolute().parent}")
    model, processor, sampling = load_model(source, dtype)
    scratch = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}-"))
    try:
        WRITERS[to](scratch, model, processor, sampling)
        scratch.chmod(0o755)  # mkdtemp makes folders that only their owner can enter
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def write_janus(
    folder: Path, model: UnifiedModel, processor: Processor, sampling: dict[str, Any]
) -> None:
    """config.json, weights, generation_config.json and processor for JanusForConditionalGeneration.

    transformers draws with Janus's unguided prompt: all but its first and last slot is pad.
    """
    if reasons := inexpressible(model, processor):
        raise ValueError(f"Janus cannot express this model: {'; '.join(reasons)}")
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    tokenizer, placeholder = janus_tokenizer(processor)
    state = janus_state(model, processor, rows=max(placeholder + 1, _rows(model)))
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    config = janus_config(model, processor, len(state[EMBEDDING]), placeholder)
    settings = {"vocab_size": _rows(model), "processor": processor.settings()}
    if not processor.template.worded:
        settings["words"] = json.loads(processor.tokenizer.to_str())["post_processor"]
    config["unimm"] = {**settings, "sampling": sampling}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    t = processor.template
    generation = GenerationConfig(
        bos_token_id=t.bos,
        eos_token_id=t.end_of_turn,
        pad_token_id=t.pad,
        guidance_scale=float(sampling.get("guidance", 5.0)),
        do_sample=True,
        temperature=1.0,
    )
    boi = {"boi_token_id": t.begin_image}  # read by Janus's generate
    setattr(generation, "generation_kwargs", boi)  # noqa: B010
    generation.save_pretrained(folder)
    write_processor(folder, tokenizer, processor)


WRITERS: dict[str, Callable[..., None]] = {"unimm": native.save_model, "janus-hf": write_janus}
EMBEDDING = "model.language_model.embed_tokens.weight"


def inexpressible(model: UnifiedModel, processor: Processor) -> list[str]:
    """What of this model transformers' Janus has no word for; empty if it has words for all."""
    c, codes = model.config, processor.image_tokenizer
    if c.pathway != "decoupled":
        return [f"its pathway is {c.pathway!r}, and Janus's is decoupled"]
    if c.vision is None:
        return ["it has no vision encoder"]
    if not isinstance(codes, VQTokenizer):
        return ["it has no image tokenizer with a VQ network"]
    d, q, grid = c.decoder, codes.config, c.vision.image_size // c.vision.patch_size
    output = d.attention_bias if d.output_bias is None else d.output_bias
    checks = {
        "its decoder has qk_norm": not d.qk_norm,
        "only some projections of its attention have a bias": output == d.attention_bias,
        f"its connector is {c.connector!r}, not a two-layer 'mlp'": c.connector == "mlp",
        f"its encoder's activation is {c.vision.activation!r}, not the 'gelu' that Janus shares "
        "with the connector": c.vision.activation == "gelu",
        f"its image head is {c.image_head_dim} wide inside, not {d.dim} as the decoder": (
            c.image_head_dim == d.dim
        ),
        f"its code embedding is {c.code_dim} wide, not {q.code_dim} as the codebook": (
            c.code_dim == q.code_dim
        ),
        f"its quantizer is {q.quantizer!r}, not 'vq'": q.quantizer == "vq",
        f"its VQ network has norm {q.norm!r}, not 'group'": q.norm == "group",
        "its VQ network has no attention": q.attention,
        f"its VQ network folds patches of {q.patch} pixels": q.patch == 1,
        "its VQ network is local": not q.local,
        "its look-up of codes weighs their share": not q.rate,
        f"it draws {processor.grid} codes and sees {grid} x {grid} patches, which are one number "
        "in Janus": processor.grid == (grid, grid),
        f"it sees {processor.seen_size} pixels with an encoder made for {c.vision.image_size}": (
            processor.seen_size == c.vision.image_size
        ),
        "its template has a system prompt other than Janus's": (
            processor.template.system in ("", janus.SYSTEM)
        ),
    }  # fmt: skip
    return [reason for reason, fine in checks.items() if not fine]


def janus_state(model: UnifiedModel, processor: Processor, rows: int) -> dict[str, Tensor]:
    """The weights under transformers' names; the table has `rows` rows.

    Rows beyond the model's own repeat that of pad: it is never written, so they are not either.
    """
    assert processor.image_tokenizer is not None
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "text_head.weight" and model.config.decoder.tied_embeddings:
            continue
        if name in ("decoder.embed_tokens.weight", "text_head.weight"):
            pad = tensor[processor.template.pad]
            tensor = torch.cat([tensor, pad.expand(rows - len(tensor), -1)])
        state[janus.their_name(name)] = tensor.detach().cpu().contiguous()
    for name, tensor in processor.image_tokenizer.state_dict().items():
        state[janus.their_name(f"image_tokenizer.{name}")] = tensor.detach().cpu().contiguous()
    return state


def janus_config(
    model: UnifiedModel, processor: Processor, rows: int, placeholder: int
) -> dict[str, Any]:
    """config.json of transformers' Janus."""
    c, codes, t = model.config, processor.image_tokenizer, processor.template
    assert c.vision is not None and isinstance(codes, VQTokenizer)
    q, dim = codes.config, c.decoder.dim
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": dtype,
        "image_token_id": placeholder,
        "tie_word_embeddings": c.decoder.tied_embeddings,
        "text_config": {
            **llama_dict(c.decoder, rows),
            "bos_token_id": t.bos,
            "eos_token_id": t.end_of_turn,
            "pad_token_id": t.pad,
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": c.vision.dim,
            "num_hidden_layers": c.vision.layers,
            "num_attention_heads": c.vision.heads,
            "image_size": c.vision.image_size,
            "patch_size": c.vision.patch_size,
            "hidden_act": c.vision.activation,
            "layer_norm_eps": c.vision.norm_eps,
            "mlp_ratio": mlp_ratio(c.vision),
            "projection_dim": dim,
            "num_image_tokens": processor.seen_tokens,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "embed_dim": q.code_dim,
            "num_embeddings": q.codebook_size,
            "latent_channels": q.z_channels,
            "base_channels": q.base_channels,
            "channel_multiplier": list(q.multipliers),
            "num_res_blocks": q.res_blocks,
            "num_patches": c.vision.image_size // c.vision.patch_size,
            "projection_dim": dim,
            "image_token_embed_dim": dim,
        },
    }


def llama_dict(d: DecoderConfig, rows: int) -> dict[str, Any]:
    """transformers' LlamaConfig of a decoder whose table has `rows` rows."""
    scaling = d.rope_scaling or {"rope_type": "default"}
    return {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": d.dim,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "intermediate_size": d.hidden,
        "rms_norm_eps": d.norm_eps,
        "max_position_embeddings": d.max_positions,
        "attention_bias": d.attention_bias,
        "mlp_bias": d.mlp_bias,
        "tie_word_embeddings": d.tied_embeddings,
        "rope_parameters": {"rope_theta": d.rope_theta, **scaling},
    }


def mlp_ratio(vision: VisionConfig) -> float:
    """The ratio r with int(width * r) == hidden, as transformers computes it."""
    ratio = vision.hidden / vision.dim
    return ratio if int(vision.dim * ratio) == vision.hidden else math.nextafter(ratio, math.inf)


def janus_tokenizer(processor: Processor) -> tuple[Any, int]:
    """A tokenizer whose special tokens have names, and the id of the image placeholder."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    t = processor.template
    if not t.worded:
        ids = [t.bos, t.pad, t.user, t.assistant, t.end_of_turn, t.begin_image, t.end_image]
        tokenizer.add_special_tokens(list(NAMES))
        if [tokenizer.token_to_id(name) for name in NAMES] != ids:
            raise ValueError(
                "the text tokenizer has words with the names of Janus's special tokens"
            )
    tokenizer.add_special_tokens([PLACEHOLDER])
    placeholder = tokenizer.token_to_id(PLACEHOLDER)
    start = tokenizer.id_to_token(t.bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, t.bos)]
    )
    assert placeholder is not None
    return tokenizer, placeholder


def chat_template(processor: Processor, tokenizer: Any) -> str:
    """The template as transformers' apply_chat_template reads it."""
    t = processor.template

    def spelled(pieces: Any) -> str:
        pieces = pieces if isinstance(pieces, tuple) else (pieces,)
        return "".join(tokenizer.id_to_token(p) if isinstance(p, int) else p for p in pieces)

    end = spelled(t.end_of_turn)
    words = {
        "USER": spelled(t.user),
        "USER_END": t.user_end if t.worded else end,
        "ASSISTANT": spelled(t.assistant),
        "ASSISTANT_END": end,
        "ANSWER_START": t.answer_start,
        "BESIDE_IMAGE": t.beside_image,
        "JOIN": " " if t.worded else "",
        "PLACEHOLDER": PLACEHOLDER,
    }
    named = (f"{name} = {json.dumps(w, ensure_ascii=False)}" for name, w in words.items())
    return "".join(f"{{%- set {setting} -%}}\n" for setting in named) + CHAT


def write_processor(folder: Path, tokenizer: Any, processor: Processor) -> None:
    """Tokenizer, chat template and image settings, as JanusProcessor reads them."""
    from transformers import PreTrainedTokenizerFast

    t, size = processor.template, processor.seen_size
    names = {"bos": t.bos, "eos": t.end_of_turn, "pad": t.pad, "boi": t.begin_image}
    special = {f"{name}_token": tokenizer.id_to_token(i) for name, i in names.items()}
    special |= {"eoi_token": tokenizer.id_to_token(t.end_image), "image_token": PLACEHOLDER}
    own = {name: special.pop(name) for name in ("boi_token", "eoi_token", "image_token")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=processor.max_length,
        extra_special_tokens=own,
        **special,
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template(processor, tokenizer))
    pictures = {
        "image_processor_type": "JanusImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
        "background_color": [127, 127, 127],
        "min_size": processor.min_side,
    }
    settings = {
        "processor_class": "JanusProcessor",
        "num_image_tokens": processor.seen_tokens,
        "use_default_system_prompt": bool(t.system),
        "image_processor": pictures,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2))
    old = {**pictures, "processor_class": "JanusProcessor"}  # where older releases look
    (folder / "preprocessor_config.json").write_text(json.dumps(old, indent=2))


def _rows(model: UnifiedModel) -> int:
    return model.config.decoder.vocab_size
