"""The recipes as they are: what each stage trains and what it freezes, in which proportions."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from unimm.checkpoints.native import load_model, save_model
from unimm.config import load_recipe
from unimm.data import sources
from unimm.data.codes import encoder
from unimm.data.mixture import Mixture
from unimm.data.processor import assistant, user
from unimm.data.scenes import describe
from unimm.data.sources import scenes_text
from unimm.data.stores import VALIDATION, PictureStore, equal_codes, sample_addition
from unimm.model.unified import CODE
from unimm.pipeline import UniMM
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
    "longer.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
    "edits.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
    "layouts.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
    "looking.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
    "locate.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
    "relations.py": {
        "decoder", "text_head", "connector", "code_embed", "code_adapter", "image_head", "vision",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and small stores with random codes (16 a picture)."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model", *tiny_model(max_positions=1024))
    for name, edited, change in (
        ("store", False, None),
        ("edits", True, None),
        ("additions", True, sample_addition),
    ):
        store = PictureStore.build(root / name, "scenes-mini", 24, 0, edited, change)
        store.add_codes(encoder(load_model(root / "model")[1]))
    drawn = {"messages": [user("a star"), assistant({"codes": [*range(16)]})]}
    (root / "own.jsonl").write_text(json.dumps(drawn) + "\n")
    return root


def placed(recipe, root, **changes):
    """The recipe's run on the small stores."""
    config = load_recipe(ROOT / "train" / recipe).config
    places = {
        "own.jsonl": str(root / "own.jsonl"),
        "runs/store": str(root / "store"),
        "runs/edits": str(root / "edits"),
        "runs/additions": str(root / "additions"),
        "scenes": "scenes-mini",
        "mixed": "pairs",  # there are no three objects in scenes-mini
    }
    data = {
        name: dataclasses.replace(
            source, options={k: places.get(str(v), v) for k, v in source.options.items()}
        )
        for name, source in config.data.items()
    }
    base = dict(init=str(root / "model"), data=data, steps=2, batch_size=12, accumulate=2)
    base |= dict(compile=False)
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
    assert all(np.isfinite(entry["main_loss"]) for entry in log_of(out) if "main_loss" in entry)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_only_the_push_of_edits_has_them_located(world, tmp_path):
    """locate.py has the words alone; what edits.py makes draws by them."""
    for recipe in ("locate.py", "edits.py"):
        config = load_recipe(ROOT / "train" / recipe).config
        assert config.data["located"].make is sources.scenes_located
        out = train(placed(recipe, world, out=str(tmp_path / recipe), steps=1))
        model = UniMM.from_pretrained(out)
        assert bool(model.sampling.get("edit_located")) == (recipe == "edits.py")


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


def test_the_shared_pathway_goes_through_the_stages(world, tmp_path):
    shared, processor = tiny_model("shared", max_positions=1024)
    processor.image_tokenizer = load_model(world / "model")[1].image_tokenizer
    save_model(tmp_path / "model", shared, processor)
    table = r"decoder\.embed_tokens\.weight|text_head\.weight"
    one = placed(
        "stage1_align.py", world, init=str(tmp_path / "model"), out=str(tmp_path / "one"),
        train=((table, 1e-2), (r".*", None)),
    )  # fmt: skip
    train(dataclasses.replace(one, options={**one.options, "code_rows_only": True}))
    before, after = (load_model(tmp_path / name)[0].state_dict() for name in ("model", "one"))
    for name, weight in before.items():
        moved = (after[name] != weight).reshape(len(weight), -1).any(1)
        if name.endswith(("embed_tokens.weight", "text_head.weight")):
            assert not moved[:263].any() and moved[263:].any(), name
        else:
            assert not moved.any(), name
    run = placed(
        "stage3_sft.py", world, init=str(tmp_path / "one"), out=str(tmp_path / "three"), steps=12
    )
    log = log_of(train(run))
    assert log[-1]["main_loss"] < log[0]["main_loss"]
    model = UniMM.from_pretrained(tmp_path / "three")
    picture = model.generate("a red circle")
    assert picture.size == (16, 16)
    assert isinstance(model.ask(picture, "what?"), str)
    assert model.edit(picture, "make it blue").size == (16, 16)


def test_tied_heads_stay_tied(world, tmp_path):
    save_model(tmp_path / "tied", *tiny_model(max_positions=1024, tied_embeddings=True))
    model, processor, _ = load_model(tmp_path / "tied")
    assert model.text_head.weight is model.decoder.embed_tokens.weight
    out = train(
        placed("stage2_pretrain.py", world, init=str(tmp_path / "tied"), out=str(tmp_path / "o"))
    )
    again = load_model(out)[0]
    assert again.text_head.weight is again.decoder.embed_tokens.weight
    assert not torch.equal(again.text_head.weight, model.text_head.weight)


def test_a_folder_is_not_taken_for_another_run(world, tmp_path):
    run = placed("stage2_pretrain.py", world, out=str(tmp_path / "o"))
    train(run)
    assert train(run) == tmp_path / "o"
    with pytest.raises(ValueError, match="holds a run with batch_size=12"):
        train(dataclasses.replace(run, batch_size=8))
    with pytest.raises(ValueError, match="holds a run with steps=2"):
        train(dataclasses.replace(run, steps=4))
    with pytest.raises(ValueError, match="no such model folder"):
        train(dataclasses.replace(run, init="nowhere", out=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_text_alone_holds_questions_of_every_type():
    from unimm.data.scenes import QUESTION_TYPES, WORLDS, sample_scene, text_dialogue

    samples = scenes_text(Seed, "scenes")
    answers = [m["content"][0]["text"] for i in range(300) for m in samples[i]["messages"][1::2]]
    shares = Counter(a for a in answers if a in ("yes", "no"))
    assert 0.8 < shares["yes"] / shares["no"] < 1.25
    assert any(a.startswith(("left of", "right of", "above", "below")) for a in answers)
    assert {"red", "small", "two", "white"} <= set(answers) and len(QUESTION_TYPES) == 6
    first = [
        text_dialogue(sample_scene(WORLDS["scenes"], rng), rng)[0][1]
        for rng in map(np.random.default_rng, range(200))
    ]
    assert 0.2 < sum(a in ("yes", "no") for a in first) / 200 < 0.8


class Seed:
    seed = 0


def test_validation_pictures_are_never_trained_on(world):
    store = PictureStore(world / "store")
    used = {store.pick(np.random.default_rng(i), i) for i in range(500)}
    kept = {store.pick(np.random.default_rng(i), VALIDATION + i) for i in range(50)}
    assert used and kept and not used & kept and used | kept == set(range(len(store)))


def test_the_whole_way(tmp_path, monkeypatch):
    """train/scenes.py, two steps a piece: stopped on the way, it goes on; nothing is made twice."""
    recipe = load_recipe(ROOT / "train/scenes.py")
    monkeypatch.setitem(
        recipe.SIZES, "quick", {**recipe.SIZES["quick"], "pictures": 60, "edits": 20}
    )
    real, ran = recipe.train, []

    def stopping(run):
        ran.append(Path(run.out).name)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(recipe, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(size="quick", out=str(tmp_path / "run"), steps=0.01)
    made = (tmp_path / "run/pictures/pictures.npy").stat().st_mtime_ns
    codes = (tmp_path / "run/pictures/codes.npy").stat().st_mtime_ns
    folder = Path(recipe.main(size="quick", out=str(tmp_path / "run"), steps=0.01))
    assert (tmp_path / "run/pictures/pictures.npy").stat().st_mtime_ns == made
    assert (tmp_path / "run/pictures/codes.npy").stat().st_mtime_ns == codes
    assert ran[:4] == ["image_tokenizer", "siglip", "stage0", "stage1"]
    assert ran[4:] == ["image_tokenizer", "siglip", "stage0", "stage1", "stage2", "stage3"]
    model = UniMM.from_pretrained(folder)
    assert model.generate("a red circle").size == (32, 32)
    store = PictureStore(tmp_path / "run/pictures")
    again = model.processor.codes(np.asarray(store.pictures[3]))  # saved in bf16: nearly all equal
    assert (again == store.codes[3]).mean() > 0.5
    with pytest.raises(ValueError, match="size is one of"):
        recipe.main(size="large")


def test_the_size_for_a_gpu_goes_its_way_on_a_cpu(tmp_path, monkeypatch):
    """128 px in 256 codes, by a step or two of every piece, with a smaller decoder."""
    recipe = load_recipe(ROOT / "train/scenes.py")
    base = recipe.SIZES["base"]
    small = {"pictures": 24, "edits": 8, "compile": False, "batch": dict.fromkeys(base["batch"], 4)}
    decoder = {**base["decoder"], "layers": 1}
    monkeypatch.setitem(recipe.SIZES, "base", {**base, **small, "decoder": decoder})
    folder = recipe.main(size="base", out=str(tmp_path / "run"), steps=1e-6)
    model = UniMM.from_pretrained(folder)
    picture = model.generate("a red circle")
    assert picture.size == (128, 128) and model.processor.codes_per_image == 256
    assert model.sampling["world"] == "scenes-128"
    talk = model.chat([user("a star"), assistant({"image": picture}), user("make it red")])
    assert len(talk) == 4


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
        assert len({repr(first[i]) for i in range(4)}) > 1, name


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
        command = "compare" if path.stem.startswith("study_") else "train"
        assert any(hasattr(recipe, name) for name in ("config", "main", "study")), path
        assert f"unimm {command} {path.relative_to(ROOT)}" in recipe.__doc__, path
    model = load_model(world / "model")[0]
    for name in STAGES:
        run = load_recipe(ROOT / "train" / name).config
        trained = make_optimizers(model, run)["main"].param_groups
        assert sum(p.numel() for group in trained for p in group["params"]) > 0


def test_several_pictures_are_spoken_of_one_by_one(world):
    """What is said of the first, the second and both is true of the store's scenes."""
    store = PictureStore(world / "store")
    told = {store.pictures[k].tobytes(): store.scene(k) for k in range(len(store))}
    made, asked = sources.scenes_several(SimpleNamespace(seed=3), str(world / "store")), Counter()
    for i in range(200):
        scenes = []
        messages = made[i]["messages"]
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            for part in question["content"]:
                if part["type"] == "image":
                    scenes.append(told[np.asarray(part["image"]).tobytes()])
            words, said = question["content"][-1]["text"], answer["content"][0]["text"]
            if words in sources.ASK_CAPTION:
                assert said == describe(scenes[-1])
            elif words.startswith("what is in the "):
                assert said == describe(scenes["second" in words])
                asked["caption"] += 1
            elif words.endswith("more objects?"):
                a, b = (len(scene.objects) for scene in scenes)
                names = "the first picture" if a > b else "the second picture"
                assert said == ("both have as many" if a == b else names)
                asked["more"] += 1
        assert len(scenes) == 2
    assert asked["caption"] > 50 and asked["more"] > 50


def test_near_negatives_differ_in_one_shape_and_stay_in_the_split(world):
    """Of eight pairs in a row seven have one other shape; each caption is true of its picture."""

    from unimm.data.scenes import complete, is_held_out, look, parse
    from unimm.data.sources import scenes_pairs

    pairs = scenes_pairs(SimpleNamespace(seed=3), str(world / "store"), 8, "scenes-mini")
    for first in range(0, 80, 8):
        group = [pairs[first + k] for k in range(8)]
        looks = [look(item["pixels"], "scenes-mini") for item in group]
        assert all(is_held_out(scene) is None for scene in looks)
        for item, scene in zip(group, looks, strict=True):
            assert complete(parse(item["text"]), scene)
        base = sorted((o.x, o.y, o.color, o.shape) for o in looks[0].objects)
        for scene in looks[1:]:
            kept = [o.shape for o in scene.objects]
            assert sorted(kept) != sorted(o.shape for o in looks[0].objects)
            assert len(kept) == len(base)
            assert sorted(o.color for o in scene.objects) == sorted(o[2] for o in base)
    plain = scenes_pairs(SimpleNamespace(seed=3), str(world / "store"))
    assert len({plain[i]["text"] for i in range(40)}) > 10


def test_codes_of_another_image_tokenizer_are_refused_and_made_again(world, tmp_path):
    """They would teach nothing but noise, without a word."""
    stores, longer = (load_recipe(ROOT / "train" / f"{name}.py") for name in ("stores", "longer"))
    save_model(tmp_path / "other", *tiny_model(max_positions=1024, seed=5))
    where = {name: str(tmp_path / name.split("/")[1]) for name in ("runs/store", "runs/edits")}

    def make(model):
        stores.main(str(model), str(tmp_path), "scenes-mini", pictures=20, edits=10)
        equal_codes.cache_clear()

    def begin(name, model):
        source = longer.config.data[name]
        options = {key: where.get(str(value), value) for key, value in source.options.items()}
        source.make(dataclasses.replace(longer.config, init=str(model)), **options)

    for mine, others in (
        (world / "model", tmp_path / "other"),
        (tmp_path / "other", world / "model"),
    ):
        make(mine)
        for name in ("pictures", "edits", "chats"):
            begin(name, mine)
            with pytest.raises(ValueError, match="another image tokenizer"):
                begin(name, others)
    made = PictureStore(tmp_path / "store"), PictureStore(tmp_path / "edits")
    assert [len(store) for store in made] == [20, 20] and len(made[1].instructions) == 10
