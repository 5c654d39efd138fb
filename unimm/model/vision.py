"""The encoder of seen images: SigLIP (arXiv 2303.15343), as transformers implements it.

A thin wrap of SiglipVisionModel without its pooling head, which with GELU is Janus's encoder
exactly. An encoder answers one more question: how many features an (h, w) image gives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a SigLIP vision transformer. Janus uses activation="gelu"."""

    dim: int
    layers: int
    heads: int
    hidden: int
    image_size: int
    patch_size: int
    activation: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"a width of {self.dim} does not split into {self.heads} heads")


class VisionEncoder(nn.Module):
    """Pixels in, one feature a patch out."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.config = config
        self.model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.dim,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.hidden,
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_act=config.activation,
                layer_norm_eps=config.norm_eps,
                vision_use_head=False,
            )
        )
        # Not saved with the weights: real also where the model is built on "meta" to be loaded.
        place = torch.arange(self.tokens(config.image_size, config.image_size), device="cpu")
        self.model.embeddings.register_buffer("position_ids", place[None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, h, w) in [-1, 1] -> features (N, P, dim), after the last norm.

        Another size than the configured one works: the position embedding is interpolated.
        """
        size = self.config.image_size
        other = tuple(pixels.shape[-2:]) != (size, size)
        # In bfloat16 training on a CPU, SDPA's backward is 3 to 5 times slower for few patches.
        short = pixels.device.type == "cpu" and self.tokens(*pixels.shape[-2:]) <= 192
        eager = short and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        self.model.config._attn_implementation = "eager" if eager else "sdpa"
        out = self.model(pixel_values=pixels, interpolate_pos_encoding=other)
        return out.last_hidden_state  # (N, P, dim)

    def tokens(self, height: int, width: int) -> int:
        """How many features an image of this many pixels gives."""
        return (height // self.config.patch_size) * (width // self.config.patch_size)
