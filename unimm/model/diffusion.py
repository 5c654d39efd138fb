"""Pictures by flow matching: a transformer carries noise to a picture, led by a condition.

The blocks are PixArt's (arXiv 2310.00426) as diffusers has them; each attends to the condition,
which is the hidden states of a prompt or the vectors of a picture's codes. The flow is rectified
(arXiv 2209.03003): x_t = (1 - t) noise + t picture, whose velocity is picture - noise.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import Batch, UnifiedModel

CONDITIONS = ("text", "codes")
LEAST_TIME = 0.05  # to the end of the flow, in the velocity of a predicted picture
Velocity = Callable[[Tensor, Tensor], Tensor]  # x (N, C, S, S) at time t (N,) -> dx/dt


@dataclass(frozen=True)
class DiffusionConfig:
    """Shape of a `DiffusionDecoder`; `size` and `channels` are 64 and 3 for pictures of 64 px, or
    those of latents: of an autoencoder, or (`latents` is "codes") the image tokenizer's vectors."""

    condition: str  # "text": hidden states of a decoder; "codes": vectors of an image tokenizer
    condition_dim: int
    codes: tuple[int, int] | None  # rows and columns of the codes; None for text
    size: int
    channels: int
    patch: int  # side of the squares that become one token
    dim: int
    layers: int
    heads: int
    latents: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", tuple(self.codes) if self.codes else None)
        if self.condition not in CONDITIONS:
            raise ValueError(f"condition is 'text' or 'codes', not {self.condition!r}")
        if (self.condition == "codes") != (self.codes is not None):
            raise ValueError("condition 'codes' needs the grid of the codes, and 'text' has none")
        if self.size % self.patch or self.dim % self.heads or self.dim % 4:
            raise ValueError("size must be a multiple of patch, and dim of heads and of 4")


class DiffusionDecoder(nn.Module):
    """x, t and a condition in, velocity out. Without condition there is one learned vector.

    Inside, the transformer predicts the picture, from which the velocity follows (arXiv
    2511.13720): a token as narrow as its patch cannot also carry the noise of the patch.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        from diffusers import PixArtTransformer2DModel
        from diffusers.models.attention_processor import AttnProcessor
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        c = self.config = config
        self.project = nn.Linear(c.condition_dim, c.dim)
        self.null = nn.Parameter(torch.zeros(c.dim))
        self.positions = None
        if c.codes is not None:  # begins as the positions of the tokens in the transformer
            places = get_2d_sincos_pos_embed(
                c.dim, c.codes, base_size=c.size // c.patch, output_type="pt"
            )
            self.positions = nn.Parameter(places.float())  # (gh gw, D)
        made: Any = PixArtTransformer2DModel  # diffusers' types are not for mypy
        self.transformer = made(
            num_attention_heads=c.heads,
            attention_head_dim=c.dim // c.heads,
            in_channels=c.channels,
            out_channels=c.channels,
            num_layers=c.layers,
            cross_attention_dim=c.dim,
            sample_size=c.size,
            patch_size=c.patch,
            interpolation_scale=1,
            use_additional_conditions=False,
        )
        # Plain products: on a CPU the fused attention's backward is slow, and not counted in FLOPs.
        self.transformer.set_attn_processor(AttnProcessor())
        nn.init.zeros_(self.transformer.proj_out.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Velocity at x (N, C, S, S), t (N,) in 0..1.

        condition: (N, T, condition_dim), or None for no condition. mask: bool (N, T), True where
        there is something to attend to. dropped: bool (N,), rows whose condition is not shown.
        """
        if condition is None:
            seen, mask = self.null.expand(len(x), 1, -1), None  # (N, 1, D)
        else:
            seen = self.project(condition.to(self.null.dtype))  # (N, T, D)
            seen = seen if self.positions is None else seen + self.positions
        if dropped is not None:  # attending to many equal vectors is attending to one
            seen = torch.where(dropped[:, None, None], self.null.to(seen.dtype), seen)
        picture = self.transformer(x, seen, t * 1000, encoder_attention_mask=mask).sample.float()
        return (picture - x) / (1 - t).clamp(min=LEAST_TIME).view(-1, 1, 1, 1)

    def velocity(
        self, condition: Tensor | None, mask: Tensor | None = None, guidance: float = 1.0
    ) -> Velocity:
        """Under classifier-free guidance (arXiv 2207.12598): uncond + g (cond - uncond)."""

        def twice(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([x, x])

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if guidance == 1.0 or condition is None:
                return self(x, t, condition, mask)
            dropped = torch.arange(2 * len(x), device=x.device) >= len(x)
            both = self(twice(x), twice(t), twice(condition), twice(mask), dropped)
            led, free = both.chunk(2)
            return free + guidance * (led - free)

        return velocity

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | None,
        mask: Tensor | None,
        seeds: Sequence[int],
        steps: int,
        guidance: float,
    ) -> Tensor:
        """(N, C, S, S): picture k depends on seeds[k] and row k of the condition alone."""
        x = noise(seeds, (self.config.channels, self.config.size, self.config.size))
        x = x.to(self.null.device, self.null.dtype)
        return euler(self.velocity(condition, mask, guidance), x, steps)


def noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Normal noise (N, *shape), float32 on the CPU, each picture from a seed of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """x at t = 0 carried to t = 1 in equal steps."""
    if steps < 1:
        raise ValueError(f"a picture takes one step or more, not {steps}")
    for k in range(steps):
        x = x + velocity(x, x.new_full((len(x),), k / steps)) / steps
    return x


def flow_loss(velocity: Velocity, pictures: Tensor, start: Tensor, t: Tensor) -> Tensor:
    """Squared error of the velocity, mean over each picture: (N,).

    pictures and start (noise) are (N, C, S, S), t (N,).
    """
    mix = t.view(-1, 1, 1, 1)
    error = velocity((1 - mix) * start + mix * pictures, t).float() - (pictures - start)
    return error.square().mean((1, 2, 3))


def save_diffusion(
    folder: str | Path, decoder: DiffusionDecoder, autoencoder: Any | None = None
) -> None:
    """diffusion_CONDITION.safetensors and .json, and the autoencoder's folder if there is one (an
    image tokenizer is in `folder` anyway)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"diffusion_{decoder.config.condition}"
    if autoencoder is not None and not isinstance(autoencoder, ImageTokenizer):
        autoencoder.save_pretrained(folder / f"{name}_autoencoder")
    state = {key: value.detach().cpu().contiguous() for key, value in decoder.state_dict().items()}
    part = folder / f"{name}.part"
    save_file(state, part)
    part.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(part, folder / f"{name}.safetensors")
    part.write_text(json.dumps(dataclasses.asdict(decoder.config), indent=1))
    os.replace(part, folder / f"{name}.json")


def load_diffusion(folder: str | Path, condition: str) -> tuple[DiffusionDecoder, Any | None]:
    """The decoder that `save_diffusion` wrote, and its autoencoder or None.

    ValueError where they are missing or broken.
    """
    path = Path(folder) / f"diffusion_{condition}.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no {path.name}: train one (train/diffusion.py)")
    try:
        decoder = DiffusionDecoder(DiffusionConfig(**json.loads(path.read_text())))
        decoder.load_state_dict(load_file(path.with_suffix(".safetensors")))
    except Exception as error:  # every way in which the two files can be broken or mismatched
        raise ValueError(f"{path} or its .safetensors is broken: {error}") from error
    if decoder.config.latents == "codes":
        return decoder.eval(), ImageTokenizer.load(folder)
    latent = path.with_name(f"{path.stem}_autoencoder")
    return decoder.eval(), load_autoencoder(latent) if latent.is_dir() else None


def load_autoencoder(folder: str | Path) -> Any:
    """A frozen `AutoencoderKL` from a folder that diffusers wrote."""
    from diffusers import AutoencoderKL

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is not an autoencoder that diffusers wrote: no config.json")
    made = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return made.eval().requires_grad_(False)


def hidden_states(model: UnifiedModel, batch: Batch) -> Tensor:
    """The condition "text": what the decoder makes of conversations, (N, T, D)."""
    return model.decoder(model.embed(batch), batch.positions)


def rows_mask(lengths: Sequence[int]) -> Tensor:
    """Bool (N, T), True in the first lengths[n] slots of row n."""
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def code_vectors(tokenizer: ImageTokenizer, codes: Tensor) -> Tensor:
    """The condition "codes": codes (N, K) as vectors (N, K, d) with entries of about one."""
    rows = tokenizer.code_vectors().float()
    return (rows / rows.square().mean().sqrt())[codes]


def to_latents(autoencoder: Any | None, pictures: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] -> what the flow ends in: latents of about unit variance.

    autoencoder: an `AutoencoderKL`; or an image tokenizer, whose codes (N, K) may be given in place
    of pixels; or None for pixels.
    """
    if autoencoder is None:
        return pictures
    if isinstance(autoencoder, ImageTokenizer):
        codes = autoencoder.encode(pictures) if pictures.is_floating_point() else pictures
        side = math.isqrt(codes.shape[1])
        return code_vectors(autoencoder, codes).mT.unflatten(2, (side, side))
    config = autoencoder.config
    latents = autoencoder.encode(pictures).latent_dist.mode()
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def to_pixels(autoencoder: Any | None, x: Tensor) -> Tensor:
    """The inverse of `to_latents`: float32 pixels in [-1, 1]. Vectors become the nearest codes."""
    if isinstance(autoencoder, ImageTokenizer):
        every = code_vectors(autoencoder, torch.arange(autoencoder.codebook_size, device=x.device))
        codes = torch.cdist(x.float().flatten(2).mT, every).argmin(-1)  # (N, K)
        return autoencoder.decode(codes, (x.shape[2], x.shape[3]))
    if autoencoder is not None:
        config = autoencoder.config
        x = autoencoder.decode(x / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return x.float().clamp(-1, 1)
