"""The contrastive loss counted by hand, retrieval with repeated captions, and a run that learns."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from unimm.config import Run, Source, load_recipe
from unimm.model.vision import VisionConfig
from unimm.training.contrastive import (
    ContrastiveConfig,
    ContrastiveModel,
    collate_pairs,
    contrastive_step,
    load_vision,
    retrieval,
    setup_contrastive,
    sigmoid_loss,
)

VISION = {"dim": 32, "layers": 1, "heads": 2, "hidden": 64, "image_size": 16, "patch_size": 8}
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (99,) * 3}
PLACES = {"left": (slice(None), slice(0, 8)), "right": (slice(None), slice(8, 16))}


class Halves:
    """A coloured half of a white picture, and its name: 8 captions, so batches repeat them."""

    def __getitem__(self, i: int):
        rng = np.random.default_rng(i)
        color, place = rng.choice(list(COLORS)), rng.choice(list(PLACES))
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[PLACES[place]] = COLORS[color]
        return {"pixels": pixels, "text": f"{place} {color}"}


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> str:
    words = {word: k for k, word in enumerate([*COLORS, *PLACES])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="red"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def run(tokenizer_file: str) -> Run:
    return Run(
        step=contrastive_step,
        setup=setup_contrastive,
        train=((r".*", 3e-3),),
        data={"pairs": Source(lambda run: Halves())},
        steps=200,
        batch_size=32,
        options={
            "text_tokenizer": tokenizer_file,
            "vision": VISION,
            "text_dim": 32,
            "text_layers": 1,
            "text_heads": 2,
            "embed_dim": 16,
            "previews": 40,
        },
    )


def test_loss_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0], [4.0, 0.2, 0.1]])
    captions = torch.tensor([0, 1, 0])  # the first and the last caption are equal
    total = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if captions[i] == captions[j] else -1
            total += math.log1p(math.exp(-sign * float(logits[i, j])))
    assert sigmoid_loss(logits, captions).item() == pytest.approx(total / 3, rel=1e-5)


def test_first_loss_is_that_of_the_paper():
    """With bias -10 nearly only the positives count, about 10 each at the start."""
    torch.manual_seed(0)
    config = ContrastiveConfig(VisionConfig(**VISION), 8, 32, 1, 2, 16)
    model = ContrastiveModel(config)
    assert model.log_scale.exp().item() == pytest.approx(10) and model.bias.item() == -10
    assert sigmoid_loss(torch.full((8, 8), -10.0), torch.arange(8)).item() == pytest.approx(
        10, abs=0.01
    )


def test_equal_captions_are_hits():
    images = torch.eye(3)
    texts = torch.eye(3)[[2, 1, 0]]  # pictures 0 and 2 find each other's caption
    assert retrieval(images, texts, torch.tensor([5, 1, 5])) == {
        "image_to_text@1": 1.0,
        "text_to_image@1": 1.0,
    }
    assert retrieval(images, texts, torch.tensor([5, 1, 6]))["image_to_text@1"] == pytest.approx(
        1 / 3
    )


@torch.no_grad()
def test_padding_does_not_matter(tokenizer_file):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    model = ContrastiveModel(ContrastiveConfig(VisionConfig(**VISION), 8, 32, 2, 2, 16)).eval()
    pixels = np.zeros((16, 16, 3), np.uint8)
    items = [{"pixels": pixels, "text": "left red"}, {"pixels": pixels, "text": "red " * 9}]
    both, alone = collate_pairs(items, tokenizer), collate_pairs(items[:1], tokenizer)
    assert both["ids"].shape == (2, 16) and alone["ids"].shape == (1, 8)
    assert both["mask"].sum(1).tolist() == [2, 9]
    together = model.embed_texts(both["ids"], both["mask"])[0]
    torch.testing.assert_close(together, model.embed_texts(alone["ids"], alone["mask"])[0])
    # and the tower looks both ways: the last word changes what the first position says
    turned = collate_pairs([{"pixels": pixels, "text": "left blue"}], tokenizer)
    assert (model.embed_texts(turned["ids"], turned["mask"])[0] - together).abs().max() > 1e-4


def test_it_learns_and_is_saved(run, tmp_path):
    torch.manual_seed(0)
    parts = setup_contrastive(run)
    optimizer = torch.optim.AdamW(parts.model.parameters(), 3e-3)
    before = parts.preview(tmp_path, 0)
    source = Halves()
    for step in range(run.steps):
        batch = parts.collate([source[step * 32 + k] for k in range(32)])
        for name, loss, metrics in contrastive_step(parts.model, batch, 1.0, run):
            assert name == "main" and set(metrics) == {"image_to_text@1", "text_to_image@1"}
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = parts.preview(tmp_path, run.steps)
    assert before["validation_image_to_text@1"] < 0.6
    assert after["validation_image_to_text@1"] > 0.95
    assert after["validation_text_to_image@1"] > 0.95

    parts.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/vision.json").read_text())["dim"] == 32
    vision = load_vision(tmp_path / "out")
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vision(pixels), parts.model.vision(pixels))
    with pytest.raises(ValueError, match=r"vision\.json"):
        load_vision(tmp_path)


def test_wrong_options_are_said(run):
    with pytest.raises(ValueError, match="tokenizer"):
        setup_contrastive(dataclasses.replace(run, options={"vision": VISION}))
    with pytest.raises(ValueError, match="tekst_dim"):
        setup_contrastive(dataclasses.replace(run, options={**run.options, "tekst_dim": 3}))


def test_the_recipe_builds(tokenizer_file):
    """Every weight is trained, at a rate of its own for the loss's two scalars."""
    from unimm.training.trainer import rate_of

    recipe = load_recipe(Path(__file__).parent.parent / "train/siglip.py").config
    options = {**recipe.options, "text_tokenizer": tokenizer_file}
    model = setup_contrastive(dataclasses.replace(recipe, options=options)).model
    rates = {name: rate_of(name, recipe.train) for name, _ in model.named_parameters()}
    assert None not in rates.values() and rates["bias"] > rates["vision.model.post_layernorm.bias"]
