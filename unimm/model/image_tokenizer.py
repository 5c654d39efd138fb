"""Image tokenizers: a picture becomes a grid of codes and comes back as pixels.

`ImageTokenizer` is what the rest of unimm relies on. `VQTokenizer` is the convolutional VQ network
of LlamaGen (arXiv 2406.06525) and Janus; its module names are those of transformers' JanusVQVAE.
`Emu3Tokenizer` is Emu3's (arXiv 2409.18869), a thin wrap of transformers' network.
"""

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

QUANTIZERS = ("vq", "simvq", "fsq")
NORMS = ("group", "rms")


@dataclass(frozen=True)
class VQConfig:
    """Architecture of a `VQTokenizer`. Janus: (384, 16384, 8, 256, 128, (1, 1, 2, 2, 4), 2).

    quantizer: "vq" looks up the row of nearest direction (rows have unit length), "simvq" the row
    of least distance (arXiv 2411.02038), "fsq" rounds each dimension to `levels` (2309.15505).
    norm: "group" is GroupNorm(32) as in Janus, whose statistics cover the whole picture; "rms" is
    RMS norm over the channels of one position, so that a code depends on its neighbourhood alone.
    patch: side of the pixel squares folded into channels around the network (1 in Janus).
    local: the encoder's kernels at the lowest resolution are 1 x 1, so that a code sees little more
    than its own square of the picture (False in Janus).
    rate: what a code's information, -log of its share of all codes, weighs in its look-up beside
    half the squared distance (entropy-constrained quantization: Chou, Lookabaugh and Gray, IEEE
    Trans. ASSP 37(1), 1989). 0 in Janus; see `with_rate`. Not for "fsq".
    """

    image_size: int  # side of the pictures it is made for; it takes every multiple of `stride`
    codebook_size: int
    code_dim: int
    z_channels: int
    base_channels: int
    multipliers: tuple[int, ...]  # of base_channels, from full resolution down
    res_blocks: int
    quantizer: str = "vq"
    norm: str = "group"
    attention: bool = True
    patch: int = 1
    local: bool = False
    levels: tuple[int, ...] = ()  # "fsq" only
    rate: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer {self.quantizer!r} is not one of {', '.join(QUANTIZERS)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not one of {', '.join(NORMS)}")
        if self.norm == "group" and self.base_channels % 32:
            raise ValueError(f"norm 'group' needs base_channels {self.base_channels} % 32 == 0")
        if self.image_size % self.stride:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.stride}")
        if not 0 <= self.rate < math.inf or (self.rate and self.quantizer == "fsq"):
            raise ValueError(f"rate is 0 or more, and 0 for fsq, not {self.rate}")
        if self.quantizer == "fsq":
            if len(self.levels) != self.code_dim or prod(self.levels) != self.codebook_size:
                raise ValueError(
                    f"fsq needs code_dim {self.code_dim} levels whose product is codebook_size"
                    f" {self.codebook_size}, not {self.levels}"
                )
            if min(self.levels) < 3:
                raise ValueError(f"fsq needs 3 levels or more a dimension, not {self.levels}")

    @property
    def stride(self) -> int:
        """Pixels of one side of a code."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


class ImageTokenizer(nn.Module):
    """The interface: pixels (N, 3, H, W) in [-1, 1] <-> codes (N, gh * gw) in raster order."""

    kind: str  # its name in image_tokenizer.json
    config: Any
    codebook_size: int
    row_token: bool = False  # whether drawn rows end with a token of their own (Emu3)

    def encode(self, pixels: Tensor) -> Tensor:
        """Float pixels (N, 3, H, W) in [-1, 1] -> int64 codes (N, gh * gw)."""
        raise NotImplementedError

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes (N, gh * gw) -> float32 pixels (N, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def grid(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of codes of a picture of h x w pixels; ValueError if it does not fit."""
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        """The vector of every code, (codebook_size, d)."""
        raise NotImplementedError

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write image_tokenizer.json and .safetensors; `dtype` converts all but the codebook."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, tensor in self.state_dict().items():
            kept = "quantize." in name or not tensor.is_floating_point()
            cast = dtype is not None and not kept
            tensors[name] = tensor.detach().cpu().to(dtype if cast else tensor.dtype).contiguous()
        described = {"kind": self.kind, **asdict(self.config)}
        with tempfile.TemporaryDirectory(dir=directory, prefix=".image_tokenizer-") as scratch:
            written = Path(scratch)
            save_file(tensors, written / "image_tokenizer.safetensors", {"format": "pt"})
            text = json.dumps(described, indent=2) + "\n"
            (written / "image_tokenizer.json").write_text(text, encoding="utf-8")
            for name in ("image_tokenizer.safetensors", "image_tokenizer.json"):
                os.replace(written / name, directory / name)

    @staticmethod
    def load(directory: str | Path, dtype: torch.dtype = torch.float32) -> "ImageTokenizer":
        """The tokenizer that `save` wrote, in evaluation mode, its weights converted to `dtype`."""
        path = Path(directory) / "image_tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{directory} holds no image_tokenizer.json")
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            made = IMAGE_TOKENIZERS[described.pop("kind")]
            tokenizer = made(described)
            tensors = load_file(path.with_suffix(".safetensors"))
            tokenizer.load_state_dict(tensors)
        except Exception as error:  # every way in which the two files can be broken or mismatched
            raise ValueError(f"{path} or its .safetensors is broken: {error}") from error
        return tokenizer.to(dtype).eval()


class VQTokenizer(ImageTokenizer):
    """Encoder, look-up and decoder; activations are channels-last, the fastest layout."""

    kind = "vq"

    def __init__(self, config: VQConfig | dict):
        super().__init__()
        self.config = config = VQConfig(**config) if isinstance(config, dict) else config
        self.codebook_size = config.codebook_size
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        quantizer = FiniteScalars if config.quantizer == "fsq" else Codebook
        self.quantize: FiniteScalars | Codebook = quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be (N, 3, H, W), not {tuple(pixels.shape)}")
        latents = self.latents(pixels)  # (N, d, gh, gw)
        return self.quantize.look_up(latents.permute(0, 2, 3, 1)).flatten(1)  # (N, gh * gw)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        if codes.ndim != 2 or codes.shape[1] != prod(grid):
            raise ValueError(f"codes of shape {tuple(codes.shape)} do not fill a {grid} grid")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"a code is not in 0..{self.codebook_size - 1}")
        vectors = self.code_vectors()[codes.reshape(-1, *grid)]  # (N, gh, gw, d)
        return self.pixels(vectors.permute(0, 3, 1, 2)).float().clamp(-1, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) -> vectors before quantization (N, d, gh, gw); differentiable."""
        self.grid(*pixels.shape[-2:])
        x = pixels.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)
        x = F.pixel_unshuffle(x, self.config.patch) if self.config.patch > 1 else x
        return self.quant_conv(self.encoder(x))

    def pixels(self, vectors: Tensor) -> Tensor:
        """Quantized vectors (N, d, gh, gw) -> pixels (N, 3, H, W), not clamped; differentiable."""
        x = vectors.to(self.post_quant_conv.weight.dtype, memory_format=torch.channels_last)
        x = self.decoder(self.post_quant_conv(x))
        return F.pixel_shuffle(x, self.config.patch) if self.config.patch > 1 else x

    def grid(self, h: int, w: int) -> tuple[int, int]:
        return _grid(h, w, self.config.stride)

    def code_vectors(self) -> Tensor:
        return self.quantize.vectors()


@torch.no_grad()
def with_rate(
    tokenizer: VQTokenizer, batches: Iterable[Tensor], rate: float, rounds: int = 5
) -> VQTokenizer:
    """A copy of the tokenizer whose look-up prefers, among codes about as near, the usual ones.

    batches: pixels (N, 3, H, W) in [-1, 1], on which the shares of the codes are counted; as the
    shares depend on the look-up and it on them, `rounds` times. Where a code is a choice among near
    equals, such as in plain ground, a model of the codes need not guess it then.
    """
    made = copy.deepcopy(tokenizer).eval()
    made.config = replace(tokenizer.config, rate=rate)
    book = made.quantize
    if isinstance(book, Codebook):
        book.rate = rate
        book.register_buffer("log_share", torch.zeros_like(book.log_share), persistent=rate > 0)
    latents = torch.cat([made.latents(pixels) for pixels in batches]).permute(0, 2, 3, 1)
    for _ in range(rounds if rate else 0):
        codes = book.look_up(latents).flatten()
        counts = torch.bincount(codes, minlength=tokenizer.codebook_size) + 1  # none is impossible
        book.log_share = (counts / counts.sum()).log()
    return made


@dataclass(frozen=True)
class Emu3VQConfig:
    """Sizes of Emu3's network. Emu3: (720, 32768, 4, 4, 256, (1, 2, 2, 4), 2, (3,), 1024, 1, 4).

    mean, std: of the channels of pixels in [0, 1], as its checkpoint's preprocessor_config says.
    """

    image_size: int  # side of a drawn picture; it takes every multiple of `stride`
    codebook_size: int
    code_dim: int
    z_channels: int
    base_channels: int
    multipliers: tuple[int, ...]
    res_blocks: int
    attention_levels: tuple[int, ...]  # indices into multipliers
    attention_dim: int  # channels where there is attention
    attention_heads: int
    frames: int  # of a video that one code spans; a picture is so many equal frames
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention_levels", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def stride(self) -> int:
        """Pixels of one side of a code."""
        return 2 ** (len(self.multipliers) - 1)


class Emu3Tokenizer(ImageTokenizer):
    """transformers' Emu3VQVAE on single pictures. It is loaded and not trained.

    A picture goes in as `frames` equal frames and comes out as the first of as many, as there.
    """

    kind = "emu3"
    row_token = True

    def __init__(self, config: Emu3VQConfig | dict):
        super().__init__()
        from transformers import Emu3VQVAE, Emu3VQVAEConfig

        self.config = c = Emu3VQConfig(**config) if isinstance(config, dict) else config
        self.codebook_size = c.codebook_size
        self.network = Emu3VQVAE(
            Emu3VQVAEConfig(
                codebook_size=c.codebook_size,
                embed_dim=c.code_dim,
                latent_channels=c.z_channels,
                base_channels=c.base_channels,
                channel_multiplier=list(c.multipliers),
                num_res_blocks=c.res_blocks,
                attn_resolutions=list(c.attention_levels),
                hidden_size=c.attention_dim,
                num_attention_heads=c.attention_heads,
                temporal_downsample_factor=c.frames,
            )
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        self.grid(*pixels.shape[-2:])
        mean, std = self._scale(pixels)
        found = self.network.encode(((pixels + 1) / 2 - mean) / std, sizes, return_dict=True)
        return torch.stack(found.image_tokens).flatten(1)  # (N, gh * gw)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        if codes.ndim != 2 or codes.shape[1] != prod(grid):
            raise ValueError(f"codes of shape {tuple(codes.shape)} do not fill a {grid} grid")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"a code is not in 0..{self.codebook_size - 1}")
        drawn = self.network.decode(codes.reshape(-1, *grid)).float()  # (N, 3, H, W)
        mean, std = self._scale(drawn)
        return ((drawn * std + mean) * 2 - 1).clamp(-1, 1)

    def grid(self, h: int, w: int) -> tuple[int, int]:
        return _grid(h, w, self.config.stride)

    def code_vectors(self) -> Tensor:
        return self.network.quantize.embedding.weight

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels, (3, 1, 1) each."""
        of = (self.config.mean, self.config.std)
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in of)
        return mean[:, None, None], std[:, None, None]


class Codebook(nn.Module):
    """The rows of "vq" (stored with unit length) and "simvq" (as they are), and their look-up."""

    log_share: Tensor

    def __init__(self, config: VQConfig):
        super().__init__()
        self.cosine, self.rate = config.quantizer == "vq", config.rate
        share = torch.zeros(config.codebook_size)  # log of each code's share, if `rate` asks for it
        self.register_buffer("log_share", share, persistent=config.rate > 0)
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.set_rows(self.embedding.weight)

    @torch.no_grad()
    def set_rows(self, rows: Tensor) -> None:
        """Store rows (K, d), normalised if this codebook is of directions."""
        self.embedding.weight.copy_(F.normalize(rows.float(), dim=-1) if self.cosine else rows)

    def vectors(self) -> Tensor:
        return self.embedding.weight

    def look_up(self, latents: Tensor, products: int = 1 << 23) -> Tensor:
        """Vectors (..., d) -> int64 codes (...): exact, at most `products` products at once."""
        rows = self.embedding.weight.float()
        x = latents.reshape(-1, rows.shape[1]).float()
        # argmin |x - row|^2 = argmax x.row - |row|^2 / 2; for rows of unit length, x.row alone
        bias = None if self.cosine else rows.square().sum(-1) / -2  # (K,)
        if self.rate:
            x = F.normalize(x, dim=-1) if self.cosine else x
            weighed = self.rate * self.log_share.float()
            bias = weighed if bias is None else bias + weighed
        with torch.autocast(x.device.type, enabled=False):
            chunks = x.split(max(1, products // len(rows)))
            codes = [F.linear(chunk, rows, bias).argmax(-1) for chunk in chunks]
        return torch.cat(codes).view(latents.shape[:-1])


class FiniteScalars(nn.Module):
    """The grid of "fsq", without weights: dimension i takes levels[i] values in [-1, 1]."""

    levels: Tensor
    strides: Tensor

    def __init__(self, config: VQConfig):
        super().__init__()
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", levels.cumprod(0) // levels, persistent=False)

    def vectors(self) -> Tensor:
        codes = torch.arange(int(self.levels.prod()), device=self.levels.device)
        half = self.levels // 2
        return (codes[:, None] // self.strides % self.levels - half) / half  # (K, d)

    def look_up(self, latents: Tensor) -> Tensor:
        """Vectors (..., d) -> int64 codes (...): tanh, then rounding, as the paper has it."""
        scale = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)  # an even number of levels has no zero
        squashed = torch.tanh(latents.float() + torch.atanh(offset / scale)) * scale - offset
        digits = squashed.round().long() + self.levels // 2
        return (digits * self.strides).sum(-1)


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.base_channels
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            kernel = 1 if last and config.local else 3
            stage = Stage(channels, width, config.res_blocks, config, attention=last, kernel=kernel)
            if not last:
                stage.downsample = Downsample(width)
            self.down.append(stage)
            channels = width
        self.mid = Middle(channels, config, kernel)
        self.norm_out = make_norm(channels, config)
        self.conv_out = nn.Conv2d(channels, config.z_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3 p², H / p, W / p) -> (N, z, gh, gw)
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config)
        self.up = nn.ModuleList()  # from the lowest resolution up, as LlamaGen counts
        for level, width in reversed(list(enumerate(widths))):
            last = level == len(widths) - 1
            stage = Stage(channels, width, config.res_blocks + 1, config, attention=last)
            if level:
                stage.upsample = Upsample(width)
            self.up.append(stage)
            channels = width
        self.norm_out = make_norm(channels, config)
        self.conv_out = nn.Conv2d(channels, 3 * config.patch**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, z, gh, gw) -> (N, 3 p², H / p, W / p)
        x = self.mid(self.conv_in(x))
        for stage in self.up:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Stage(nn.Module):
    """The residual blocks of one resolution, then the change of resolution where there is one."""

    def __init__(
        self,
        channels: int,
        width: int,
        blocks: int,
        config: VQConfig,
        attention: bool,
        kernel: int = 3,
    ):
        super().__init__()
        sizes = [channels] + [width] * blocks
        self.block = nn.ModuleList(ResBlock(sizes[i], width, config, kernel) for i in range(blocks))
        attends = attention and config.attention
        self.attn = nn.ModuleList(Attention(width, config) for _ in range(blocks if attends else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        resample = self.downsample or self.upsample
        return resample(x) if resample is not None else x


class Middle(nn.Module):
    def __init__(self, channels: int, config: VQConfig, kernel: int = 3):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config, kernel)
        self.attn_1 = Attention(channels, config) if config.attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, config, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nn.Module):
    def __init__(self, channels: int, width: int, config: VQConfig, kernel: int = 3):
        super().__init__()
        self.norm1 = make_norm(channels, config)
        self.conv1 = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        self.norm2 = make_norm(width, config)
        self.conv2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        if channels != width:
            self.nin_shortcut = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        reuse = not torch.is_grad_enabled()
        y = self.conv1(F.silu(self.norm1(x), inplace=reuse))
        y = self.conv2(F.silu(self.norm2(y), inplace=reuse))
        x = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return y.add_(x) if reuse else y + x


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int, config: VQConfig):
        super().__init__()
        self.norm = make_norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).mT for conv in (self.q, self.k, self.v))  # (N, h w, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only, as LlamaGen pads


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ChannelRMSNorm(nn.Module):
    """RMS norm over the channels of each position: local, unlike GroupNorm."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)  # (N, h, w, C): contiguous, as x is channels-last
        return _RMSNorm.apply(y, self.weight.to(y.dtype), self.eps).permute(0, 3, 1, 2)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm over the last dimension; in training 6 times faster on a CPU in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = norm.to(torch.promote_types(x.dtype, torch.float32))
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, weight, scale) = grads, ctx.saved_tensors
        products = (grad * x).flatten(0, -2)  # (M, C)
        d_weight = scale.to(x.dtype).view(1, -1) @ products
        along = (products @ weight).view(scale.shape) * scale.pow(3) / -x.shape[-1]
        d_x = (grad * weight).mul_(scale.to(x.dtype)).addcmul_(x, along.to(x.dtype))
        return d_x, d_weight.view(-1), None


def make_norm(channels: int, config: VQConfig) -> nn.Module:
    return nn.GroupNorm(32, channels, 1e-6) if config.norm == "group" else ChannelRMSNorm(channels)


def _grid(h: int, w: int, stride: int) -> tuple[int, int]:
    if h <= 0 or w <= 0 or h % stride or w % stride:
        raise ValueError(f"{h} x {w} pixels: both sides must be multiples of {stride}")
    return h // stride, w // stride


IMAGE_TOKENIZERS: dict[str, Callable[[Any], ImageTokenizer]] = {
    "vq": VQTokenizer,
    "emu3": Emu3Tokenizer,
}
