"""Training of the VQ image tokenizer: reconstruction, commitment and a patch discriminator.

The quantizers come from vector-quantize-pytorch and stay in float32; what is saved is a plain
`VQTokenizer` with the rows of its codebook, which needs none of them.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from unimm.checkpoints.native import BUNDLED
from unimm.config import Run
from unimm.model.image_tokenizer import (
    Codebook,
    ImageTokenizer,
    VQConfig,
    VQTokenizer,
    with_rate,
)


@dataclass(frozen=True)
class VQTraining:
    """Weights of the losses and settings of the quantizer. LlamaGen: l2 1, perceptual (LPIPS) 1,
    adversarial 0.5 from step 20,000, commitment 0.25."""

    l1: float = 1.0
    l2: float = 0.0
    edges: float = 0.0  # L1 between the differences of neighbouring pixels
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None  # (drawn, pixels) -> scalar
    perceptual_weight: float = 1.0
    commitment: float = 0.25
    adversarial: float = 0.0  # 0: there is no discriminator
    adversarial_start: int = 0  # step from which pictures are judged
    adaptive: bool = False  # scale `adversarial` to the gradient of reconstruction (VQGAN)
    decay: float = 0.8  # of the moving averages of "vq" rows
    dead_code: float = 2.0  # "vq" rows used less often in a batch (moving average) are replaced
    previews: int = 64  # pictures that are measured
    preview_offset: int = 10**9  # their first index: training does not reach it
    counted: int = 1000  # pictures on which a look-up with a `rate` counts its codes


class TokenizerTraining(nn.Module):
    """A `VQTokenizer` with the quantizer and the discriminator that train it.

    `spread` gives each dimension of the latents mean 0 and variance 1, so that no quantizer depends
    on the scale that the encoder happens to have; `export` folds it into the last convolution.
    """

    pictures: Tensor

    def __init__(self, config: VQConfig, settings: VQTraining):
        super().__init__()
        self.settings = settings
        self.tokenizer = VQTokenizer(config)
        self.tokenizer.apply(initialise)
        self.tokenizer.quantize.requires_grad_(False)  # its rows are a copy, made by `export`
        self.spread = nn.BatchNorm1d(config.code_dim, affine=False)
        self.quantizer = make_quantizer(config, settings)
        self.discriminator = PatchDiscriminator() if settings.adversarial else None
        self.register_buffer("pictures", torch.zeros((), dtype=torch.int64))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (N, 3, H, W) -> reconstruction, codes (N, gh * gw), commitment loss."""
        latents = self.tokenizer.latents(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            z = latents.permute(0, 2, 3, 1).flatten(1, 2).float()  # (N, gh gw, d)
            z = self.spread(z.flatten(0, 1)).view(z.shape)
            quantized, codes, *loss = self.quantizer(z)
        commitment = loss[0].sum() if loss else z.new_zeros(())  # fsq commits by construction
        vectors = quantized.unflatten(1, latents.shape[2:]).permute(0, 3, 1, 2)
        return self.tokenizer.pixels(vectors).float(), codes, commitment

    @torch.no_grad()
    def begin_with(self, tokenizer: ImageTokenizer) -> None:
        """Go on from a tokenizer that `export` made. ValueError where that is not possible."""
        ours = self.tokenizer.config
        if not isinstance(tokenizer, VQTokenizer) or ours.quantizer == "simvq":
            raise ValueError("only image tokenizers of kind vq or fsq can be trained further")
        if dataclasses.replace(tokenizer.config, rate=ours.rate) != ours:
            raise ValueError(f"the image tokenizer to begin with is {tokenizer.config}, not {ours}")
        state = tokenizer.state_dict()  # `spread` is folded in: it is new
        state.pop("quantize.log_share", None)  # counted when training is over
        self.tokenizer.load_state_dict({**self.tokenizer.state_dict(), **state})
        if ours.quantizer == "vq":
            book: Any = self.quantizer._codebook  # its moving averages start anew from the rows
            for rows in (book.embed, book.embed_avg):
                rows.copy_(tokenizer.code_vectors())

    @torch.no_grad()
    def export(self) -> VQTokenizer:
        """A copy of the tokenizer as it is now, with the quantizer's rows, to be used and saved."""
        tokenizer, spread = copy.deepcopy(self.tokenizer).eval(), self.spread
        assert spread.running_mean is not None and spread.running_var is not None
        scale = (spread.running_var + 1e-5).rsqrt()  # BatchNorm's eps
        weight, bias = tokenizer.quant_conv.parameters()  # take over what `spread` does
        weight.mul_(scale.view(-1, 1, 1, 1))
        bias.sub_(spread.running_mean).mul_(scale)
        if isinstance(tokenizer.quantize, Codebook):
            rows: Any = self.quantizer.codebook
            tokenizer.quantize.set_rows(rows)
        return tokenizer


def initialise(module: nn.Module) -> None:
    """Convolutions that keep the variance and add nothing. With torch's own the first latents are
    almost equal for all pictures, and short trainings stalled there."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_quantizer(config: VQConfig, settings: VQTraining) -> nn.Module:
    """The quantizer of vector-quantize-pytorch that trains what `config` looks up."""
    from vector_quantize_pytorch import FSQ, SimVQ, VectorQuantize

    if config.quantizer == "fsq":
        return FSQ(list(config.levels))
    if config.quantizer == "simvq":
        return SimVQ(
            config.code_dim,
            config.codebook_size,
            input_to_quantize_commit_loss_weight=settings.commitment,
        )
    return VectorQuantize(
        config.code_dim,
        config.codebook_size,
        use_cosine_sim=True,
        decay=settings.decay,
        threshold_ema_dead_code=settings.dead_code,
        commitment_weight=settings.commitment,
    )


class PatchDiscriminator(nn.Module):
    """Judges patches of 22 pixels: (N, 3, H, W) -> logits (N, 1, h, w), high if real."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4, padding=1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def image_tokenizer_step(
    model: TokenizerTraining, batch: Tensor, total: float, run: Run
) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
    """Yield ("main", loss, metrics), then ("discriminator", loss, metrics) where it has started.

    `batch` is uint8 (N, 3, H, W). The caller runs backward on each loss before it resumes.
    """
    wrapped, model = model, getattr(model, "module", model)  # DistributedDataParallel
    settings, device = model.settings, next(model.parameters()).device
    pixels = to_signed(batch.to(device))
    if model.training:
        model.pictures += len(pixels)
    judged = model.discriminator is not None and (
        int(model.pictures) * world_size() > settings.adversarial_start * run.batch_size
    )
    half = torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16")
    with half:
        drawn, codes, commitment = wrapped(pixels)
        rebuilt = reconstruction_loss(drawn, pixels, settings)
        loss = rebuilt + commitment
        if judged:
            assert model.discriminator is not None
            # detached parameters: this part moves the tokenizer, never the discriminator
            frozen = {k: p.detach() for k, p in model.discriminator.named_parameters()}
            fooled = -functional_call(model.discriminator, frozen, (drawn,)).float().mean()
            weight = settings.adversarial
            if settings.adaptive:
                last = model.tokenizer.decoder.conv_out.weight
                weight *= adaptive_weight(rebuilt, fooled, last)
            loss = loss + weight * fooled
    metrics = {
        "reconstruction": rebuilt.item(),
        "commitment": commitment.item(),
        "psnr": psnr(drawn.detach().clamp(-1, 1), pixels).mean().item(),
        "codes": float(codes.unique().numel()),
    }
    yield "main", loss / total, metrics
    if judged:
        assert model.discriminator is not None
        with half:
            both = torch.cat([pixels, drawn.detach()])
            real, fake = model.discriminator(both).float().chunk(2)
            hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        yield "discriminator", hinge / total, {"hinge": hinge.item()}


def reconstruction_loss(drawn: Tensor, pixels: Tensor, settings: VQTraining) -> Tensor:
    error = drawn - pixels
    loss = settings.l1 * error.abs().mean() + settings.l2 * error.square().mean()
    if settings.edges:
        loss = loss + settings.edges * (error.diff(dim=2).abs().mean() + error.diff().abs().mean())
    if settings.perceptual is not None:
        loss = loss + settings.perceptual_weight * settings.perceptual(drawn, pixels)
    return loss


def adaptive_weight(rebuilt: Tensor, fooled: Tensor, last: Tensor) -> float:
    """VQGAN's (arXiv 2012.09841, eq. 7): the two gradients at the last layer get equal length."""
    ours, theirs = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rebuilt, fooled)
    )
    return (ours / (theirs + 1e-4)).clamp(max=1e4).item()


def world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def setup_image_tokenizer(run: Run) -> Any:
    """Model, collate, preview and save for the trainer; `run.options` holds the fields of
    `VQConfig` and `VQTraining`, `run.init` a folder whose image tokenizer is trained further
    ("scenes": the bundled one), whose `rate` stays if none is given. ValueError for an option that
    is neither, or another tokenizer."""
    from unimm.training.trainer import Parts

    fields = {made: {f.name for f in dataclasses.fields(made)} for made in (VQConfig, VQTraining)}
    unknown = sorted(run.options.keys() - fields[VQConfig] - fields[VQTraining])
    if unknown:
        raise ValueError(f"unknown options of an image tokenizer: {', '.join(unknown)}")
    chosen = {
        made: {k: v for k, v in run.options.items() if k in names} for made, names in fields.items()
    }
    settings = VQTraining(**chosen[VQTraining])
    begun = None
    if run.init:
        begun = ImageTokenizer.load(BUNDLED if run.init == "scenes" else str(run.init))
        chosen[VQConfig].setdefault("rate", getattr(begun.config, "rate", 0.0))
    model = TokenizerTraining(VQConfig(**chosen[VQConfig]), settings)
    if begun is not None:
        model.begin_with(begun)

    @lru_cache
    def some(first: int, count: int, what: str) -> Tensor:
        """Pictures of the source, uint8 (N, 3, H, W); what cannot be read is passed over."""
        source = next(iter(run.data.values()))
        items = source.make(run, **source.options)
        found: list[Any] = []
        for i in range(2 * count):
            if len(found) < count:
                with suppress(ValueError, OSError):
                    found.append(items[first + i])
        if not found:
            raise ValueError(f"none of the pictures {what} can be read")
        return collate(found)

    def finished() -> VQTokenizer:
        tokenizer = model.export()
        if not tokenizer.config.rate:
            return tokenizer
        parts = some(0, settings.counted, "of training").split(settings.previews)
        return with_rate(tokenizer, map(signed, parts), tokenizer.config.rate)

    def signed(pictures: Tensor) -> Tensor:
        return to_signed(pictures.to(next(model.parameters()).device))

    def preview(folder: Path, step: int) -> dict[str, float]:
        pixels = signed(some(settings.preview_offset, settings.previews, "held out"))
        tokenizer = finished()
        picture = reconstruction_grid(tokenizer, pixels[:16])
        picture.save(folder / f"preview-{step:06d}.png")
        return reconstruction_metrics(tokenizer, pixels)

    return Parts(model, collate, preview, lambda path: finished().save(path))


def collate(items: list[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(np.stack(items)).permute(0, 3, 1, 2)


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], channels-last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Floats (N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    rounded = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
    return rounded.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def reconstruction_metrics(
    tokenizer: ImageTokenizer, pixels: Tensor, batch: int = 32
) -> dict[str, float]:
    """How well pixels (N, 3, H, W) in [-1, 1] come back: PSNR in dB and SSIM (means over pictures),
    usage (share of the codebook that occurs) and perplexity of the codes."""
    grid = tokenizer.grid(*pixels.shape[-2:])
    codes = torch.cat([tokenizer.encode(part) for part in pixels.split(batch)])
    parts = zip(pixels.split(batch), codes.split(batch), strict=True)
    scores = [(psnr(d, p), ssim(d, p)) for p, c in parts for d in [tokenizer.decode(c, grid)]]
    share = torch.bincount(codes.flatten(), minlength=tokenizer.codebook_size) / codes.numel()
    return {
        "psnr": torch.cat([s[0] for s in scores]).mean().item(),
        "ssim": torch.cat([s[1] for s in scores]).mean().item(),
        "usage": (share > 0).float().mean().item(),
        "perplexity": math.exp(torch.special.entr(share).sum().item()),
    }


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Of pixels (N, 3, H, W) in [-1, 1]: decibels (N,), at most 100."""
    error = ((a.float() - b.float()) / 2).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pixels (N, 3, H, W) in [-1, 1]: (N,).

    Mean over channels and over the places where the whole Gaussian window lies in the picture.
    """
    if min(a.shape[-2:]) < window:
        raise ValueError(f"SSIM needs pictures of at least {window} x {window} pixels")
    a, b = (a.float() + 1) / 2, (b.float() + 1) / 2
    x = torch.arange(window, device=a.device) - window // 2
    gauss = torch.exp(-x.square() / (2 * sigma**2))
    gauss = (gauss / gauss.sum()).repeat(a.shape[1], 1, 1, 1)  # (3, 1, 1, window)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, gauss, groups=x.shape[1])
        return F.conv2d(x, gauss.mT, groups=x.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))


@torch.no_grad()
def reconstruction_grid(tokenizer: ImageTokenizer, pixels: Tensor) -> Image.Image:
    """One column a picture: the original above its reconstruction."""
    drawn = tokenizer.decode(tokenizer.encode(pixels), tokenizer.grid(*pixels.shape[-2:]))
    rows = [np.concatenate(list(to_bytes(x)), axis=1) for x in (pixels, drawn)]
    return Image.fromarray(np.concatenate(rows, axis=0))
