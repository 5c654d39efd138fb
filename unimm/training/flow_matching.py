"""Training of a diffusion decoder: the flow-matching step, the moving average, and two setups.

What is random in a sample (its noise, its time, whether its condition is dropped) follows from its
place in the stream alone, so a resumed or distributed run sees what a single one sees.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unimm.checkpoints.native import save_model
from unimm.config import Run
from unimm.data.processor import Processor, Sample, to_unit, user
from unimm.model.diffusion import (
    DiffusionConfig,
    DiffusionDecoder,
    code_vectors,
    flow_loss,
    hidden_states,
    load_autoencoder,
    rows_mask,
    save_diffusion,
    to_latents,
    to_pixels,
)
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import Batch, UnifiedModel
from unimm.training.next_token import open_init
from unimm.training.previews import save_grid
from unimm.training.trainer import Parts

DEFAULTS: dict[str, Any] = {
    "dim": 192,
    "layers": 6,
    "heads": 6,
    "patch": 8,
    "autoencoder": "",  # a diffusers folder: the flow then ends in its latents; or "codes" (text):
    # in the vectors of the model's image tokenizer, of which the nearest are drawn
    "decay": 0.99,  # of the moving average, a step (JanusFlow's)
    "prompts": [],  # drawn in previews (text)
    "previews": 16,  # pictures rebuilt and measured in previews (codes)
    "preview_offset": 10**9,  # their first index: training does not reach it
    "guidance": 2.0,
    "sampling_steps": 30,
}


class Drawn(NamedTuple):
    """One picture to learn, with what leads to it and what is random about it."""

    pixels: Tensor  # (3, H, W) in [-1, 1], or the codes (K,) of a picture
    sample: Sample | None  # the conversation up to the picture (text)
    start: np.ndarray  # noise (C, S, S)
    t: float
    dropped: bool


class FlowBatch(NamedTuple):
    """N pictures; `batch` holds their conversations (text) and `mask` (N, T) where these are."""

    pixels: Tensor
    start: Tensor
    t: Tensor  # (N,)
    dropped: Tensor  # bool (N,)
    batch: Batch | None
    mask: Tensor | None


class FlowMatching(nn.Module):
    """The decoder, its moving average, and what makes its condition: a model or a tokenizer."""

    updates: Tensor

    def __init__(
        self,
        decoder: DiffusionDecoder,
        conditioner: UnifiedModel | ImageTokenizer,
        autoencoder: Any | None = None,
    ):
        super().__init__()
        self.decoder, self.conditioner, self.autoencoder = decoder, conditioner, autoencoder
        self.average = copy.deepcopy(decoder).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: FlowBatch) -> Tensor:
        """The loss, a sum over pictures of the mean error of each."""
        condition = self.condition(batch)
        with torch.no_grad():
            pictures = to_latents(self.autoencoder, batch.pixels)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.decoder(x, t, condition, batch.mask, batch.dropped)

        return flow_loss(velocity, pictures.float(), batch.start, batch.t).sum()

    def condition(self, batch: FlowBatch) -> Tensor:
        """Hidden states (N, T, D), or vectors of codes (N, gh * gw, d)."""
        learns = any(p.requires_grad for p in self.conditioner.parameters())
        self.conditioner.train(self.training and learns)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            if isinstance(self.conditioner, UnifiedModel):
                assert batch.batch is not None
                return hidden_states(self.conditioner, batch.batch)
            return code_vectors(self.conditioner, self.conditioner.encode(batch.pixels))

    @torch.no_grad()
    def follow(self, decay: float, share: int) -> None:
        """Move the average by one `share`-th of a step; it is faster in the first steps."""
        step = int(self.updates) // share
        keep = min(decay, (1 + step) / (10 + step)) ** (1 / share)
        for mean, weight in zip(self.average.parameters(), self.decoder.parameters(), strict=True):
            mean.lerp_(weight, 1 - keep)
        self.updates += 1


def flow_matching(
    model: Any, batch: FlowBatch, total: float, run: Run
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Yield ("main", loss, metrics), then let the average follow (it is one step behind).

    Each of the `run.accumulate` pieces of a step moves the average by its share.
    """
    inner: FlowMatching = getattr(model, "module", model)  # DistributedDataParallel
    loss = model(batch)
    yield "main", loss / total, {"velocity_error": (float(loss.detach()), float(len(batch.t)))}
    inner.follow(run.options.get("decay", DEFAULTS["decay"]), run.accumulate)


def pictures(batch: FlowBatch, run: Run) -> float:
    """What the loss of `flow_matching` is divided by."""
    return float(len(batch.t))


def setup_diffusion(run: Run) -> Parts:
    """Text -> picture: the model of `run.init` gives the condition, and is saved with the decoder.

    Of what `run.init` may be, see `open_init`. Items are conversations that end in a drawn picture;
    all before it is the condition. What of the model learns is said by `run.train`
    ("conditioner." before its names).
    """
    options = checked_options(run)
    model, processor, sampling = open_init(run)
    dim, size = model.config.decoder.dim, processor.drawn_size
    by_codes = options["autoencoder"] == "codes"
    flow = make_flow(options, model, dim, None, size, processor.image_tokenizer)

    def prepare(item: dict[str, Any], rng: np.random.Generator) -> Drawn:
        messages = item["messages"]
        picture = messages[-1]["content"][-1]
        if messages[-1]["role"] != "assistant" or picture["type"] != "image":
            raise ValueError("diffusion learns from conversations that end in a drawn picture")
        if not by_codes:
            pixels = processor.drawn_pixels(picture["image"])
        elif picture.get("codes") is None:
            pixels = torch.as_tensor(processor.codes(picture["image"]))
        else:
            pixels = torch.as_tensor(processor.checked_codes(picture["codes"]))
        sample = processor.encode(messages[:-1], answer="image")
        return randomised(flow.decoder.config, pixels, sample, rng, run.drop_prompt)

    def collate(items: Sequence[Drawn]) -> FlowBatch:
        return collate_drawn(items, processor)

    def preview(folder: Path, step: int) -> None:
        prompts = options["prompts"]
        if prompts:
            device = flow.decoder.null.device
            samples = [processor.encode([user(prompt)], answer="image") for prompt in prompts]
            batch = processor.collate(samples).to(device)
            condition = hidden_states(model.eval(), batch)
            mask = rows_mask([len(sample) for sample in samples]).to(device)
            drawn = draw(flow, condition, mask, options)
            save_grid(drawn, folder / f"preview-{step:06d}.png", columns=8)

    def save(folder: Path) -> None:
        save_model(folder, model, processor, sampling)
        save_diffusion(folder, flow.average, flow.autoencoder)

    return Parts(flow, collate, preview, save, prepare, lambda item: len(item.sample or ()))


def setup_detokenizer(run: Run) -> Parts:
    """Codes -> picture, for the image tokenizer in `run.init`; items are uint8 (H, W, 3)."""
    options = checked_options(run)
    tokenizer = ImageTokenizer.load(run.init)
    size, dim = tokenizer.config.image_size, tokenizer.code_vectors().shape[1]
    flow = make_flow(options, tokenizer, dim, tokenizer.grid(size, size), size)
    fixed: list[Tensor] = []  # the validation pictures, made once

    def prepare(item: np.ndarray, rng: np.random.Generator) -> Drawn:
        return randomised(flow.decoder.config, to_unit(item), None, rng, run.drop_prompt)

    def preview(folder: Path, step: int) -> dict[str, float]:
        from unimm.training.image_tokenizer import psnr

        if not fixed:
            source = next(iter(run.data.values()))
            items, first = source.make(run, **source.options), options["preview_offset"]
            fixed.append(
                torch.stack([to_unit(items[first + i]) for i in range(options["previews"])])
            )
        pixels = fixed[0].to(flow.decoder.null.device)
        codes = tokenizer.encode(pixels)
        drawn = draw(flow, code_vectors(tokenizer, codes), None, options)
        convolved = tokenizer.decode(codes, tokenizer.grid(size, size))
        save_grid(
            torch.cat([pixels, convolved, drawn]), folder / f"preview-{step:06d}.png", len(pixels)
        )
        return {
            "psnr": psnr(drawn, pixels).mean().item(),
            "psnr_convolutional": psnr(convolved, pixels).mean().item(),
        }

    def save(folder: Path) -> None:
        tokenizer.save(folder)
        save_diffusion(folder, flow.average, flow.autoencoder)

    return Parts(flow, collate_drawn, preview, save, prepare)


def checked_options(run: Run) -> dict[str, Any]:
    """`run.options` over `DEFAULTS`; ValueError for an unknown one or a run without `init`."""
    unknown = sorted(run.options.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(f"unknown options of a diffusion decoder: {', '.join(unknown)}")
    if not run.init:
        raise ValueError("a diffusion decoder starts from a model folder: init=DIR")
    return {**DEFAULTS, **run.options}


def make_flow(
    options: dict[str, Any],
    conditioner: UnifiedModel | ImageTokenizer,
    condition_dim: int,
    codes: tuple[int, int] | None,
    image_size: int,
    tokenizer: ImageTokenizer | None = None,
) -> FlowMatching:
    """A new decoder for pictures of `image_size`: in pixels, in an autoencoder's latents, or in
    the vectors of the codes of `tokenizer`."""
    autoencoder: Any = None
    if options["autoencoder"] == "codes":
        if tokenizer is None:
            raise ValueError(
                "autoencoder=codes is for text, on a model that has an image tokenizer"
            )
        autoencoder = tokenizer.requires_grad_(False)
    elif options["autoencoder"]:
        autoencoder = load_autoencoder(options["autoencoder"])
    with torch.no_grad():
        shape = to_latents(autoencoder, torch.zeros(1, 3, image_size, image_size)).shape
    config = DiffusionConfig(
        condition="text" if codes is None else "codes",
        condition_dim=condition_dim,
        codes=codes,
        size=shape[-1],
        channels=shape[1],
        latents="codes" if isinstance(autoencoder, ImageTokenizer) else "",
        **{name: options[name] for name in ("patch", "dim", "layers", "heads")},
    )
    return FlowMatching(DiffusionDecoder(config), conditioner, autoencoder)


def randomised(
    config: DiffusionConfig,
    pixels: Tensor,
    sample: Sample | None,
    rng: np.random.Generator,
    share: float,
) -> Drawn:
    """A picture with its noise, a logit-normal time (arXiv 2403.03206) and, for a `share`, no
    condition."""
    shape = (config.channels, config.size, config.size)
    start = rng.standard_normal(shape, dtype=np.float32)
    t = 1 / (1 + float(np.exp(-rng.standard_normal())))
    return Drawn(pixels, sample, start, t, bool(rng.random() < share))


def collate_drawn(items: Sequence[Drawn], processor: Processor | None = None) -> FlowBatch:
    samples = [item.sample for item in items if item.sample is not None]
    return FlowBatch(
        torch.stack([item.pixels for item in items]),
        torch.from_numpy(np.stack([item.start for item in items])),
        torch.tensor([item.t for item in items], dtype=torch.float32),
        torch.tensor([item.dropped for item in items]),
        processor.collate(samples) if processor is not None else None,
        rows_mask([len(sample) for sample in samples]) if processor is not None else None,
    )


def draw(
    flow: FlowMatching, condition: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """One picture a condition, by the averaged weights: (N, 3, H, W) in [-1, 1]."""
    guidance = options["guidance"] if mask is not None else 1.0
    steps = options["sampling_steps"]
    x = flow.average.sample(condition, mask, range(len(condition)), steps, guidance)
    return to_pixels(flow.autoencoder, x)
