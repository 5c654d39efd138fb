"""A unified model put together from trained pieces: what stage 0 or stage 1 begins with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unimm.checkpoints.native import load_weights, save_model
from unimm.data.processor import Processor, Template, load_tokenizer
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import UnifiedConfig, UnifiedModel


def assemble(
    out: str | Path,
    config: UnifiedConfig,
    text_tokenizer: str | Path,
    image_tokenizer: str | Path,
    vision: str | Path | None,
    image_size: int,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a model folder with a random decoder around trained pieces.

    text_tokenizer: a tokenizer.json. image_tokenizer: a folder that `ImageTokenizer.save` wrote.
    vision: a vision.safetensors of the shape `config.vision`. The vocabulary of `config` is set to
    the tokenizer's and the special tokens; the code embedding begins as the codebook where its
    width fits.
    """
    out = Path(out)
    words = load_tokenizer(text_tokenizer)
    codes = ImageTokenizer.load(image_tokenizer)
    template = Template.after(words.get_vocab_size())
    vocabulary = template.end_image + 1
    decoder = replace(config.decoder, vocab_size=vocabulary)
    config = replace(config, decoder=decoder, codebook_size=codes.codebook_size)
    torch.manual_seed(seed)
    model = UnifiedModel(config)
    if vision is not None and model.vision is not None:
        load_weights(model.vision, Path(vision))
    if config.pathway == "decoupled" and codes.code_vectors().shape[1] == config.code_dim:
        with torch.no_grad():
            rows = codes.code_vectors().float()
            model.code_embed.weight.copy_(rows * config.code_dim**0.5)  # entries of size one
    seen = model.vision.tokens(image_size, image_size) if model.vision is not None else 0
    processor = Processor(
        words, codes, template, image_size, seen, image_size, config.decoder.max_positions
    )
    save_model(out, model, processor, sampling)
    return out
