"""The two models of the bench: transformers' Janus, and ours with the same weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimm.checkpoints import janus
from unimm.checkpoints.load import load_model
from unimm.data.processor import Processor, Template
from unimm.inference.engine import Engine
from unimm.model.image_tokenizer import VQTokenizer
from unimm.model.unified import UnifiedModel

PROMPT = 32  # slots of a prompt
ATTENTION = ("sdpa", "eager")  # transformers' ways


@dataclass(frozen=True)
class Size:
    """A Janus of random weights. side: pixels of a picture, 16 a code and a patch."""

    dim: int
    layers: int
    heads: int
    hidden: int
    words: int
    codes: int
    side: int
    vq_channels: int
    vision: tuple[int, int, int]  # width, layers, heads


SIZES = {
    "tiny": Size(256, 6, 4, 1024, 8192, 1024, 128, 32, (256, 4, 4)),
    "mid": Size(768, 12, 12, 3072, 32000, 16384, 384, 128, (384, 12, 6)),
}


@dataclass
class Pair:
    """transformers' model, and ours with the same weights.

    dtype: of what they compute, and of their weights (but for training: float32 and autocast).
    """

    theirs: Any
    engine: Engine
    dtype: torch.dtype

    @property
    def template(self) -> Template:
        return self.engine.processor.template


def random_pair(size: Size, dtype: torch.dtype) -> Pair:
    """Both models with one set of random weights."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        LlamaConfig,
    )
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig

    torch.manual_seed(0)
    template = Template.after(size.words - 8)  # the word after them stands for patches
    width, layers, heads = size.vision
    config = JanusConfig(
        text_config=LlamaConfig(
            hidden_size=size.dim, num_hidden_layers=size.layers, num_attention_heads=size.heads,
            num_key_value_heads=size.heads, intermediate_size=size.hidden, vocab_size=size.words,
            max_position_embeddings=2048, bos_token_id=template.bos, pad_token_id=template.pad,
            eos_token_id=template.end_of_turn,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=size.side, patch_size=16, projection_dim=size.dim, depth=2,
            num_image_tokens=(size.side // 16) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=size.codes, base_channels=size.vq_channels,
            projection_dim=size.dim, image_token_embed_dim=size.dim, num_hidden_layers=2,
            latent_channels=256,
        ),
        image_token_id=size.words - 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = JanusForConditionalGeneration(config).eval()
    rows = theirs.model.vqmodel.quantize.embedding.weight
    rows.data.copy_(torch.nn.functional.normalize(rows.data, dim=-1))
    return paired(theirs, config.to_dict(), template, size.side, dtype)


def loaded_pair(folder: str, dtype: torch.dtype) -> Pair:
    """Both models from a Hugging Face Janus folder."""
    from transformers import JanusForConditionalGeneration

    theirs = JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    model, processor, _ = load_model(folder, str(dtype).split(".")[1])
    use_ids(theirs, processor.template)
    return Pair(theirs, Engine(model, processor), dtype)


def paired(
    theirs: Any, data: dict[str, Any], template: Template, side: int, dtype: torch.dtype
) -> Pair:
    config, codes = janus.hugging_face_configs(data, "the bench", head_stored=True)
    with torch.device("meta"):
        model, image_tokenizer = UnifiedModel(config), VQTokenizer(codes)
    theirs = theirs.to(dtype)
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        ours |= janus.from_hugging_face(name, tensor.clone())
    prefix = "image_tokenizer."
    drawn = {k.removeprefix(prefix): v.float() for k, v in ours.items() if k.startswith(prefix)}
    image_tokenizer.load_state_dict(drawn, assign=True)
    model.load_state_dict({k: v for k, v in ours.items() if prefix not in k}, assign=True)
    processor = Processor(
        None, image_tokenizer.eval(), template, side, (side // 16) ** 2, side,
        config.decoder.max_positions,
    )  # fmt: skip
    use_ids(theirs, template)
    return Pair(theirs, Engine(model, processor), dtype)


def use_ids(theirs: Any, template: Template) -> None:
    """Tell transformers' loop the special tokens of ours."""
    config = theirs.generation_config
    config.bos_token_id, config.pad_token_id = template.bos, template.pad
    config.eos_token_id = template.end_of_turn
    config.generation_kwargs = {"boi_token_id": template.begin_image}
    config.top_k = None
