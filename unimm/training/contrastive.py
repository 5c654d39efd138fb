"""Contrastive training of the encoder: SigLIP's sigmoid loss (arXiv 2303.15343).

A picture and a caption agree or not, pair by pair; pairs with *equal* captions agree, which matters
where captions repeat. The text tower is a small Decoder without the causal mask, thrown away after.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.config import Run
from unimm.model.decoder import Decoder, DecoderConfig
from unimm.model.vision import VisionConfig, VisionEncoder

Pairs = dict[str, Tensor]  # what `collate_pairs` makes


@dataclass(frozen=True)
class ContrastiveConfig:
    """An encoder, a text tower beside it, and the width in which they meet."""

    vision: VisionConfig
    vocab_size: int
    text_dim: int
    text_layers: int
    text_heads: int
    embed_dim: int

    @property
    def text(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab_size,
            dim=self.text_dim,
            layers=self.text_layers,
            heads=self.text_heads,
            kv_heads=self.text_heads,
            head_dim=self.text_dim // self.text_heads,
            hidden=self.text_dim * 3,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            max_positions=512,
        )


class ContrastiveModel(nn.Module):
    """Two towers with mean-pooled, projected and normalised outputs, and the loss's two scalars."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = Decoder(config.text)
        self.image_proj = nn.Linear(config.vision.dim, config.embed_dim)
        self.text_proj = nn.Linear(config.text_dim, config.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Picture embeddings (N, E), caption embeddings (N, E) and logits (N, N), all float32."""
        images, texts = self.embed_images(pixels), self.embed_texts(ids, mask)
        with torch.autocast(images.device.type, enabled=False):
            logits = images @ texts.T * self.log_scale.exp() + self.bias
        return images, texts, logits

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 (N, 3, H, W) -> (N, E), float32 of length one."""
        features = self.vision(pixels.float() / 127.5 - 1)  # (N, P, D)
        return F.normalize(self.image_proj(features.mean(1)).float(), dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (N, T) and where they are words, bool (N, T) -> (N, E), float32 of length one."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.text(self.text.embed_tokens(ids), positions, mask[:, None, None])  # (N, T, D)
        weight = mask / mask.sum(1, keepdim=True)  # (N, T)
        return F.normalize(self.text_proj((x * weight[..., None]).sum(1)).float(), dim=-1)


def sigmoid_loss(logits: Tensor, captions: Tensor) -> Tensor:
    """SigLIP's loss of logits (N, N), a sum over pairs divided by N.

    captions (N,): equal numbers for equal captions, all pairs of which count as positive.
    """
    agree = captions[:, None] == captions[None]  # (N, N)
    return -F.logsigmoid(torch.where(agree, logits, -logits)).sum() / len(logits)


def contrastive_step(
    model: nn.Module, batch: Pairs, total: float, run: Run
) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
    """Yield ("main", loss, metrics). Negatives are the other pairs of this piece on this rank."""
    device = batch["pixels"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=run.precision == "bf16"):
        images, texts, logits = model(batch["pixels"], batch["ids"], batch["mask"])
    loss = sigmoid_loss(logits.float(), batch["caption"])
    found = retrieval(images.detach(), texts.detach(), batch["caption"])
    yield "main", loss / total, found


@torch.no_grad()
def retrieval(images: Tensor, texts: Tensor, captions: Tensor) -> dict[str, float]:
    """Zero-shot retrieval among N pairs: embeddings (N, E) each, and caption numbers (N,).

    A hit is the nearest item having the *caption* of the query, so equal captions are no error.
    """
    scores = images.float() @ texts.float().T  # (N, N)
    return {
        "image_to_text@1": (captions[scores.argmax(1)] == captions).float().mean().item(),
        "text_to_image@1": (captions[scores.argmax(0)] == captions).float().mean().item(),
    }


def collate_pairs(items: Sequence[dict[str, Any]], tokenizer: Any) -> Pairs:
    """Items {"pixels": uint8 (H, W, 3), "text": str} -> one batch of N pairs.

    pixels uint8 (N, 3, H, W); ids int64 (N, T), right-padded with 0, and mask bool (N, T), True at
    words; caption int64 (N,), equal where captions are.
    """
    pixels = torch.from_numpy(np.stack([item["pixels"] for item in items])).permute(0, 3, 1, 2)
    words = [tokenizer.encode(item["text"]).ids or [0] for item in items]
    longest = -(-max(map(len, words)) // 8) * 8  # few different shapes
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in words])
    mask = torch.arange(longest)[None] < torch.tensor([len(row) for row in words])[:, None]
    numbers: dict[str, int] = {}
    caption = torch.tensor([numbers.setdefault(item["text"], len(numbers)) for item in items])
    return {"pixels": pixels, "ids": ids, "mask": mask, "caption": caption}


DEFAULTS: dict[str, Any] = {
    "text_dim": 192,
    "text_layers": 2,
    "text_heads": 3,
    "embed_dim": 192,
    "previews": 512,  # pairs among which retrieval is measured
    "preview_offset": 10**9,  # their first index: training does not reach it
}


def setup_contrastive(run: Run) -> Any:
    """Model, collate, preview and save for the trainer.

    `run.options`: "text_tokenizer", path of a tokenizer.json; "vision", the fields of
    `VisionConfig`; and what `DEFAULTS` names. Previews come from the source "validation" (give it
    weight 0), or from the first source beyond what training reads. The result is
    vision.safetensors with vision.json. ValueError for an unknown or a missing option.
    """
    from tokenizers import Tokenizer

    from unimm.training.next_token import has_compiler
    from unimm.training.trainer import Parts

    options = {**DEFAULTS, **run.options}
    unknown = sorted(options.keys() - DEFAULTS.keys() - {"text_tokenizer", "vision"})
    if unknown:
        raise ValueError(f"unknown options of contrastive training: {', '.join(unknown)}")
    words = Path(options.get("text_tokenizer", ""))
    if not words.is_file():
        raise ValueError(f"options.text_tokenizer must be a tokenizer.json; no such file: {words}")
    tokenizer = Tokenizer.from_file(str(words))
    sizes = {f.name for f in dataclasses.fields(ContrastiveConfig)} & DEFAULTS.keys()
    config = ContrastiveConfig(
        vision=VisionConfig(**options["vision"]),
        vocab_size=tokenizer.get_vocab_size(),
        **{name: options[name] for name in sizes},
    )
    model = ContrastiveModel(config)
    if run.compile and has_compiler():
        for layer in [*model.vision.model.encoder.layers, *model.text.layers]:
            layer.compile(dynamic=True)
    fixed: list[Pairs] = []  # the validation pairs, made once

    def collate(items: list[Any]) -> Pairs:
        return collate_pairs(items, tokenizer)

    @torch.compiler.set_stance("force_eager")
    def preview(folder: Path, step: int) -> dict[str, float]:
        if not fixed:
            source = run.data.get("validation") or next(iter(run.data.values()))
            items = source.make(run, **source.options)
            first = options["preview_offset"]
            fixed.append(collate([items[first + i] for i in range(options["previews"])]))
        found = evaluate(model, fixed[0])
        return {f"validation_{name}": value for name, value in found.items()}

    return Parts(model, collate, preview, lambda path: save_vision(model.vision, path))


@torch.no_grad()
def evaluate(model: ContrastiveModel, pairs: Pairs, batch: int = 128) -> dict[str, float]:
    """Retrieval among all pairs of one (large) batch."""
    device = model.bias.device
    images, texts = [], []
    for k in range(0, len(pairs["ids"]), batch):
        pixels, ids, mask = (pairs[n][k : k + batch].to(device) for n in ("pixels", "ids", "mask"))
        images.append(model.embed_images(pixels))
        texts.append(model.embed_texts(ids, mask))
    return retrieval(torch.cat(images), torch.cat(texts), pairs["caption"].to(device))


def save_vision(vision: VisionEncoder, folder: Path) -> None:
    """vision.safetensors and vision.json (the fields of `VisionConfig`), each written whole."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in vision.state_dict().items()
    }
    part = folder / "vision.part"
    save_file(state, part)
    os.replace(part, folder / "vision.safetensors")
    part.write_text(json.dumps(dataclasses.asdict(vision.config), indent=1))
    os.replace(part, folder / "vision.json")


def load_vision(folder: Path) -> VisionEncoder:
    """What `save_vision` wrote. ValueError where it is not there."""
    from safetensors.torch import load_file

    if not (folder / "vision.json").is_file():
        raise ValueError(
            f"{folder} holds no vision.json: train the encoder first (train/siglip.py)"
        )
    vision = VisionEncoder(VisionConfig(**json.loads((folder / "vision.json").read_text())))
    vision.load_state_dict(load_file(folder / "vision.safetensors"))
    return vision.eval()
