"""Pictures of cut-outs: what is held out, what is where, and that all that is said is true."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unimm.config import load_recipe
from unimm.data.readers import captions, messages
from unimm.data.scenes.sprites import Sprites, caption, questions, split_of, two
from unimm.data.scenes.world import Object, relation_holds
from unimm.evaluation.sprites import evaluate, same

RECIPES = Path(__file__).parent.parent / "train"
STYLES = ("flat style", "3d style", "noto style")
LOOK = re.compile(r"(thing \d+) in (\w+ style)")
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """120 cut-outs: 40 names in three styles, each a rectangle of two colours of its own."""
    root, rng = tmp_path_factory.mktemp("cut-outs"), np.random.default_rng(0)
    rows = []
    for k in range(40):
        for style in STYLES:
            pixels = np.zeros((16, 32, 4), np.uint8)
            pixels[4:12, 4:28] = (*rng.integers(0, 160, 3), 255)
            pixels[4:12, 14:28] = (*rng.integers(0, 160, 3), 255)
            file = f"{len(rows)}.png"
            Image.fromarray(pixels).save(root / file)
            group = "even" if k % 2 == 0 else "odd"
            keywords = [f"word{k}", "thing"]
            rows.append({"file": file, "name": f"thing {k}", "style": style, "group": group,
                         "keywords": keywords})  # fmt: skip
    path = root / "index.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_sprite_is_of_one_split_and_its_words_are_seen(index):
    split = Sprites(index).split
    assert sum(map(len, split.values())) == 120 and all(split.values())
    known = {name for name, _ in split["train"]}
    assert not known & {name for name, _ in split["names"]}
    assert {name for name, _ in split["pairs"]} <= known
    assert {style for look in split.values() for _, style in look} == set(STYLES)
    assert {name[6:] for name, _ in Sprites(index, ("odd",)).sprites} == {
        str(k) for k in range(1, 40, 2)
    }


def test_a_small_sprite_has_the_same_pixels_anywhere(index):
    sprites = Sprites(index)
    look = sprites.split["train"][0]
    whole = sprites.render([Object(*look, "large", 0.5, 0.5)], WHITE, 64)
    opened = Image.open(sprites.sprites[look].file)
    color = opened.getpixel((22, 8))[:3]
    assert whole.shape == (64, 64, 3) and (whole[32, 44] == color).all()
    assert (whole[:16] == 255).all() and (whole[:, 0] == 255).all()  # wide, and in the middle
    found = []
    for x, y in ((0.25, 0.25), (0.625, 0.375)):
        picture = sprites.render([Object(*look, "small", x, y)], WHITE, 64)
        left, top = int(x * 64) - 16, int(y * 64) - 16
        found.append(picture[top : top + 32, left : left + 32])
        outside = picture.copy()
        outside[top : top + 32, left : left + 32] = 255
        assert (outside == 255).all() and (found[-1] != 255).any()
    assert (found[0] == found[1]).all()


def test_what_is_said_of_two_is_true(index):
    sprites, rng = Sprites(index), np.random.default_rng(0)
    looks = sprites.split["train"]
    related = 0
    for _ in range(200):
        pair = looks[rng.integers(len(looks))], looks[rng.integers(len(looks))]
        if pair[0][0] == pair[1][0]:
            continue
        objects = two(pair, rng)
        a, b = objects
        assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 0.5  # they do not overlap
        by_name = {o.shape: o for o in objects}
        words = caption(objects)
        for relation in ("left of", "above"):
            if f" {relation} " in words:
                one, other = (by_name[name] for name, _ in LOOK.findall(words))
                assert relation_holds(one, relation, other)
                related += 1
        for question, answer in questions(sprites, objects, rng):
            if question.startswith("what is "):
                relation, name = question[8:-1].split(" the ")
                assert relation_holds(by_name[answer], relation, by_name[name])
            elif question.startswith("where is the "):
                relation, name = answer.split(" the ")
                assert relation_holds(by_name[question[13:-1]], relation, by_name[name])
            elif question.startswith("is there a "):
                assert answer == ("yes" if question[11:-1] in by_name else "no")
            else:
                assert by_name[question.split(" the ")[1][:-1]].color == answer
    assert related > 100


def test_composed_pictures_are_read_and_hold_their_split_alone(index, tmp_path):
    main = load_recipe(RECIPES / "sprite_pictures.py").main
    assert "sprites" in main(str(index), str(tmp_path), few=40)
    for split in ("train", "pairs", "names"):
        rows = [json.loads(s) for s in (tmp_path / split / "index.jsonl").read_text().splitlines()]
        assert len(rows) > 4
        for row in rows:
            splits = [split_of(look) for look in LOOK.findall(row["caption"])]
            assert splits and split in splits and set(splits) <= {split, "train"}, row
    run = SimpleNamespace(seed=0, init="")
    drawn = captions(run, str(tmp_path / "train" / "one.jsonl"), text="prompt", task="draw")
    assert len(drawn) == len(Sprites(index).split["train"])
    picture = drawn[0]["messages"][1]["content"][0]["image"]
    assert Image.open(picture).size == (64, 64)
    asked = messages(run, str(tmp_path / "train" / "questions.jsonl"))[0]["messages"]
    assert Path(asked[0]["content"][0]["image"]).exists()
    assert [m["role"] for m in asked[:2]] == ["user", "assistant"]


class Oracle:
    """Draws and says what is true of composed pictures; `wrong`: of the next one of its kind."""

    def __init__(self, data, wrong=False):
        self.pictures, self.words = {}, {}
        for split in ("train", "pairs", "names"):
            rows = [json.loads(s) for s in (data / split / "index.jsonl").read_text().splitlines()]
            asked = (data / split / "questions.jsonl").read_text().splitlines()
            shown = [Image.open(data / split / row["file"]).convert("RGB") for row in rows]
            said = [row["caption"] for row in rows]
            turned = np.roll(np.arange(len(rows)), wrong)
            for k, other in enumerate(turned):
                self.pictures[said[k]] = shown[other]
                self.words[shown[k].tobytes(), "describe the picture"] = said[other]
            for picture, talk in zip(shown, map(json.loads, asked), strict=True):
                question, answer = (m["content"][-1]["text"] for m in talk["messages"][:2])
                self.words[picture.tobytes(), question] = "who knows?" if wrong else answer

    def generate(self, prompts, **options):
        return [self.pictures.get(words, Image.new("RGB", (64, 64), "white")) for words in prompts]

    def ask_all(self, pairs):
        return [self.words.get((image.tobytes(), asked), "no idea") for image, asked in pairs]


def test_scores_of_who_knows_all_and_of_who_knows_nothing(index, tmp_path):
    load_recipe(RECIPES / "sprite_pictures.py").main(str(index), str(tmp_path), few=200)
    best = evaluate(Oracle(tmp_path), n=30, seeds=2, data=str(tmp_path))
    for split in ("train", "pairs", "names"):
        assert best[split].pop("spread") == dict.fromkeys(best[split], 0.0)
        assert min(best[split].values()) == 1.0 and len(best[split]) == 12, best[split]
    for model, blind in ((Oracle(tmp_path, wrong=True), False), (Oracle(tmp_path), True)):
        worst = evaluate(model, n=30, data=str(tmp_path), blind=blind)
        for split in ("train", "pairs", "names"):
            exact = [v for k, v in worst[split].items() if "name" not in k and "style" not in k]
            assert len(exact) == 8 and max(exact) < 0.25, worst[split]
    with pytest.raises(ValueError, match="--data"):
        evaluate(Oracle(tmp_path))


def test_two_in_another_relation_are_not_the_same():
    cat, dog = (Object(name, "flat style", "small", 0.25, 0.5) for name in ("cat", "dog"))
    other = replace(dog, x=0.75)
    assert same([cat, other], [cat, other]) and same([other, cat], [cat, other])
    assert not same([replace(cat, x=0.75), replace(dog, x=0.25)], [cat, other])
    assert not same([cat, replace(other, color="3d style")], [cat, other])


def test_a_broken_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such index"):
        Sprites(tmp_path / "none.jsonl")
    path = tmp_path / "index.jsonl"
    path.write_text('{"file": "a.png", "name": "cat"}\n')
    with pytest.raises(ValueError, match="line 1: no sprite"):
        Sprites(path)
    path.write_text('{"file": "a.png", "name": "cat", "style": "flat style"}\n')
    with pytest.raises(ValueError, match="no sprite of cats"):
        Sprites(path, ("cats",))
    (tmp_path / "a.png").write_text("no picture")
    sprites = Sprites(path)
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        sprites.render([Object("cat", "flat style", "large", 0.5, 0.5)], WHITE, 64)
