"""The recipes as they are: what each stage trains and what it freezes, in which proportions."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model

from unimm.checkpoints.native import load_model, save_model
from unimm.config import load_recipe
from unimm.data.mixture import Mixture
from unimm.data.sources import PictureStore
from unimm.model.unified import CODE
from unimm.training.next_token import drop_prompt, setup_unified
from unimm.training.trainer import make_optimizers, train

ROOT = Path(__file__).parent.parent
STAGES = {
    "stage0_text.py": {"decoder", "text_head"},
    "stage1_align.py": {"connector", "code_embed", "code_adapter", "image_head"},
    "stage2_pretrain.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head",
    },
    "stage3_sft.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and small stores with random codes (16 a picture)."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model", *tiny_model(max_positions=1024))
    for name, edited in (("store", False), ("edits", True)):
        store = PictureStore.build(root / name, "scenes-mini", 24, edited=edited)
        rng = np.random.default_rng(0)
        store.add_codes(lambda pictures, rng=rng: rng.integers(0, 32, (len(pictures), 16)))
    return root


def placed(recipe, root, **changes):
    """The recipe's run on the small stores."""
    config = load_recipe(ROOT / "train" / recipe).config
    places = {
        "runs/store": str(root / "store"),
        "runs/edits": str(root / "edits"),
        "scenes": "scenes-mini",
    }
    data = {
        name: dataclasses.replace(
            source, options={k: places.get(v, v) for k, v in source.options.items()}
        )
        for name, source in config.data.items()
    }
    base = dict(init=str(root / "model"), data=data, steps=2, batch_size=12, accumulate=2)
    return dataclasses.replace(config, **{**base, "log_every": 1, "warmup": 0, **changes})


@pytest.mark.parametrize("recipe", STAGES)
def test_a_stage_moves_what_it_says(recipe, world, tmp_path):
    out = train(placed(recipe, world, out=str(tmp_path / "out")))
    before, after = load_model(world / "model")[0], load_model(out)[0]
    moved = {
        name.split(".")[0]
        for (name, a), (_, b) in zip(
            before.state_dict().items(), after.state_dict().items(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert moved == STAGES[recipe]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["main_loss"]) for entry in log if "main_loss" in entry)


@pytest.mark.parametrize(
    ("recipe", "shares"),
    [
        ("stage1_align.py", {"captions": 1, "pictures": 3}),
        ("stage2_pretrain.py", {"captions": 1, "questions": 1, "text": 3, "pictures": 5}),
    ],
)
def test_published_proportions(recipe, shares, world):
    run = placed(recipe, world)
    weights = {name: source.weight for name, source in run.data.items()}
    stream = Mixture({name: [name] * 1000 for name in weights}, weights).take(400)
    drawn = Counter(stream)
    total = sum(shares.values())
    assert drawn == {name: 400 * share / total for name, share in shares.items()}


def test_stage3_is_five_to_one_to_four(world):
    weights = {n: s.weight for n, s in placed("stage3_sft.py", world).data.items()}
    seen = weights["captions"] + weights["questions"]
    drawn = weights["pictures"] + weights["edits"] + weights["chats"]
    assert (seen, weights["text"], drawn) == (5, 1, 4)


def test_a_tenth_of_drawings_loses_its_prompt(world):
    run = placed("stage1_align.py", world)
    parts = setup_unified(run)
    _, processor, _ = load_model(world / "model")
    pad = processor.template.pad
    mixture = Mixture(
        {name: source.make(run, **source.options) for name, source in run.data.items()},
        {name: source.weight for name, source in run.data.items()},
        0,
        parts.prepare,
    )
    samples = mixture.take(1600)
    drawings = [s for s in samples if s.draws]
    assert len(drawings) == 1200
    dropped = sum(bool((s.ids[s.user_text] == pad).all()) for s in drawings)
    assert 0.07 < dropped / len(drawings) < 0.13  # 3.5 standard deviations around a tenth
    assert not any((s.ids[s.user_text] == pad).any() for s in samples if not s.draws)
    one = drawings[0]
    always = drop_prompt(one, processor, 1.0, np.random.default_rng(0))
    assert (always.ids[one.user_text] == pad).all() and (always.score == one.score).all()


def test_every_code_of_a_drawing_is_supervised(world):
    run = placed("stage1_align.py", world)
    source = run.data["pictures"].make(run, **run.data["pictures"].options)
    _, processor, _ = load_model(world / "model")
    sample = processor.encode(source[0]["messages"])
    codes = sample.kind == CODE
    assert codes.sum() == 16 and (sample.score[codes] == 1).all()
    first = int(np.flatnonzero(codes)[0])
    assert sample.ids[first - 1] == processor.template.begin_image


def test_sources_are_functions_of_the_index(world):
    run = placed("stage3_sft.py", world)
    for name, source in run.data.items():
        first, second = (source.make(run, **source.options) for _ in range(2))
        for i in (0, 5, 1_000_000):
            assert repr(first[i]) == repr(second[i]), name
        assert repr(first[0]) != repr(first[1])


def test_stores_hold_the_train_split_alone(world):
    from unimm.data.scenes import is_held_out

    for name in ("store", "edits"):
        store = PictureStore(world / name)
        assert all(is_held_out(store.scene(k)) is None for k in range(len(store)))
    with pytest.raises(ValueError, match="finished"):
        PictureStore(world / "model")


def test_every_recipe_loads_and_trains_something(world):
    for path in sorted((ROOT / "train").glob("*.py")) + sorted((ROOT / "tokenizers").glob("*.py")):
        recipe = load_recipe(path)
        assert hasattr(recipe, "config") or hasattr(recipe, "main"), path
        assert recipe.__doc__ and "unimm train" in recipe.__doc__, path
    model = load_model(world / "model")[0]
    for name in STAGES:
        run = load_recipe(ROOT / "train" / name).config
        trained = make_optimizers(model, run)["main"].param_groups
        assert sum(p.numel() for group in trained for p in group["params"]) > 0
