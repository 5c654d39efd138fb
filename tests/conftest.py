"""Tiny real models for the tests: every part exists, nothing is mocked."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from unimm.data.processor import Processor, Template
from unimm.model.decoder import DecoderConfig
from unimm.model.image_tokenizer import VQConfig, VQTokenizer
from unimm.model.unified import UnifiedConfig, UnifiedModel
from unimm.model.vision import VisionConfig

WORDS = 256  # a byte a token


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tiny_config(pathway: str = "decoupled", **decoder) -> UnifiedConfig:
    sizes = dict(
        vocab_size=WORDS + 7, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48,
        rope_theta=10000.0, norm_eps=1e-6, max_positions=256,
    )  # fmt: skip
    vision = VisionConfig(dim=16, layers=1, heads=2, hidden=32, image_size=16, patch_size=4)
    return UnifiedConfig(
        decoder=DecoderConfig(**{**sizes, **decoder}),
        vision=vision if pathway == "decoupled" else None,
        connector="mlp",
        codebook_size=32,
        code_dim=4,
        image_head_dim=32,
        pathway=pathway,
    )


def tiny_image_tokenizer() -> VQTokenizer:
    return VQTokenizer(
        VQConfig(
            image_size=16, codebook_size=32, code_dim=4, z_channels=8, base_channels=8,
            multipliers=(1, 1, 1), res_blocks=1, norm="rms", attention=False,
        )
    ).eval()  # fmt: skip


def tiny_model(pathway: str = "decoupled", seed: int = 0, **decoder):
    """(UnifiedModel, Processor): 16 px pictures, 16 codes, 16 patches, a byte tokenizer."""
    torch.manual_seed(seed)
    config = tiny_config(pathway, **decoder)
    model = UnifiedModel(config)
    for parameter in model.decoder.parameters():  # larger than training starts with: a random
        if parameter.ndim > 1:  # model whose outputs depend visibly on its inputs
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.text_head.weight, std=0.3)
    processor = Processor(
        byte_tokenizer(),
        tiny_image_tokenizer(),
        Template.after(WORDS),
        seen_size=16,
        seen_tokens=16 if config.vision else 0,
        drawn_size=16,
        max_length=config.decoder.max_positions,
    )
    return model.eval(), processor


@pytest.fixture(params=["decoupled", "shared"])
def tiny(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def picture():
    """A 16 x 16 picture, uint8 (H, W, 3)."""
    torch.manual_seed(3)
    return torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
