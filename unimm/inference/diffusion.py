"""Drawing with a diffusion decoder, as a diffusers pipeline: prompts or codes in, pixels out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from unimm.checkpoints.native import load_model, save_model
from unimm.data.processor import Message, Processor, Sample, user
from unimm.model.diffusion import (
    DiffusionDecoder,
    code_vectors,
    hidden_states,
    load_diffusion,
    rows_mask,
    save_diffusion,
    to_pixels,
)
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import UnifiedModel

BATCH = 16  # pictures drawn side by side


class UniMMDiffusionPipeline(DiffusionPipeline):
    """A diffusion decoder behind a unified model, or behind an image tokenizer alone.

    decoder: condition "text" draws prompts (`__call__`), "codes" draws codes (`decode`).
    autoencoder: the `AutoencoderKL` or image tokenizer whose latents it draws, None for pixels.
    tokenizer: the image tokenizer of the codes, where there is no model and no processor.
    """

    decoder: DiffusionDecoder
    model: UnifiedModel
    processor: Processor
    autoencoder: Any
    tokenizer: ImageTokenizer
    _optional_components = ["model", "processor", "autoencoder", "tokenizer"]

    def __init__(
        self,
        decoder: DiffusionDecoder,
        model: UnifiedModel | None = None,
        processor: Processor | None = None,
        autoencoder: Any | None = None,
        tokenizer: ImageTokenizer | None = None,
    ):
        super().__init__()
        self.register_modules(
            decoder=decoder,
            model=model,
            processor=processor,
            autoencoder=autoencoder,
            tokenizer=tokenizer or (processor.image_tokenizer if processor else None),
        )
        self.sampling: dict[str, Any] = {}  # the unified model's own defaults, kept with it

    @property
    def device(self) -> torch.device:
        return self.decoder.null.device

    def to(self, *args: Any, **kwargs: Any) -> "UniMMDiffusionPipeline":
        """Move and convert all parts, as `nn.Module.to` does."""
        for part in (self.decoder, self.model, self.autoencoder):
            if part is not None:
                part.to(*args, **kwargs)
        if self.model is None:
            self.tokenizer.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        """The native folder of the model (`UniMM.from_pretrained` loads it) and the decoder."""
        if self.model is None:
            self.tokenizer.save(folder)
        else:
            save_model(folder, self.model, self.processor, self.sampling)
        save_diffusion(folder, self.decoder, self.autoencoder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, condition: str = "text"
    ) -> "UniMMDiffusionPipeline":
        """What `save_pretrained` or training wrote, float32 on the CPU; ValueError if damaged."""
        decoder, autoencoder = load_diffusion(folder, condition)
        if condition == "codes" and not (Path(folder) / "config.json").exists():
            return cls(decoder, autoencoder=autoencoder, tokenizer=ImageTokenizer.load(folder))
        model, processor, sampling = load_model(folder)
        pipeline = cls(decoder, model, processor, autoencoder)
        pipeline.sampling = sampling
        return pipeline

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str | Sequence[Message]],
        *,
        guidance: float = 2.0,
        steps: int = 30,
        seed: int = 0,
    ) -> Tensor:
        """One picture a prompt (words, or a conversation), picture k from seed + k.

        Pixels (N, 3, H, W), float32 in [-1, 1], on the CPU. ValueError where there is no prompt.
        """
        self._check("text")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        talks = [[user(p)] if isinstance(p, str) else p for p in listed]
        samples = [self.processor.encode(talk, answer="image") for talk in talks]

        def condition(part: list[Sample]) -> tuple[Tensor, Tensor]:
            batch = self.processor.collate(part).to(self.device)
            mask = rows_mask([len(sample) for sample in part])
            return hidden_states(self.model, batch), mask.to(self.device)

        return self._draw(samples, condition, guidance, steps, seed)

    @torch.inference_mode()
    def decode(
        self, codes: Tensor, *, guidance: float = 1.0, steps: int = 30, seed: int = 0
    ) -> Tensor:
        """Codes (N, K) -> pixels (N, 3, H, W), as `__call__` gives them."""
        self._check("codes")

        def condition(part: Tensor) -> tuple[Tensor, None]:
            rows = self.tokenizer.code_vectors()
            return code_vectors(self.tokenizer, part.to(rows.device)).to(self.device), None

        return self._draw(codes, condition, guidance, steps, seed)

    def _check(self, condition: str) -> None:
        if self.decoder.config.condition != condition:
            other = self.decoder.config.condition
            raise ValueError(f"this diffusion decoder draws {other}, not {condition}")

    def _draw(
        self, items: Any, condition: Callable, guidance: float, steps: int, seed: int
    ) -> Tensor:
        if not len(items):
            raise ValueError("there is nothing to draw: give at least one prompt")
        parts = []
        for start in self.progress_bar(range(0, len(items), BATCH)):
            part = items[start : start + BATCH]
            seeds = range(seed + start, seed + start + len(part))
            vectors, mask = condition(part)
            x = self.decoder.sample(vectors, mask, seeds, steps, guidance)
            parts.append(to_pixels(self.autoencoder, x).cpu())
        return torch.cat(parts)
