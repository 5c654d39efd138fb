"""How well a model draws, names and composes cut-outs: those of its training, and held-out ones.

What is drawn is judged by the nearest of all cut-outs, those held out among them (16 x 16 pixels,
squared distance), what is said by the words.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.readers import read_jsonl
from unimm.data.scenes import Object, main_relation, normalize_answer
from unimm.data.scenes.sprites import SPLITS, STEP, WIDTH
from unimm.pipeline import UniMM

SIDE = 16  # pixels, of what is compared
ASK = "describe the picture"


def evaluate(
    model: UniMM,
    n: int = 100,
    seeds: int = 1,
    blind: bool = False,
    guidance: float | None = None,
    temperature: float | None = None,
    data: str = "",
    first_seed: int = 1000,
) -> dict[str, Any]:
    """Scores in 0..1 by split ("train", "pairs", "names"), means over `seeds` samples of `n` each.

    `data`: a folder that train/sprite_pictures.py has made. large, small, two: drawn so that the
    nearest cut-outs are those asked for (two: and their relation is); large_name, large_style: in
    this at least; own_eyes: large ones that the model itself describes as it was asked for them.
    described_large, …: captions of true pictures, exact; described_name, described_style: of large
    ones, this at least. questions: exact answers. `blind`: without the prompt's words, or with a
    grey picture.
    """
    if not data:
        raise ValueError("say where the pictures are: --data DIR, as sprite_pictures.py makes it")
    pictures = Gallery(Path(data))
    runs = [
        {s: score(model, pictures, s, n, seed, blind, guidance, temperature) for s in SPLITS}
        for seed in range(first_seed, first_seed + seeds)
    ]
    result: dict[str, Any] = {}
    for split in SPLITS:
        every = {name: [run[split][name] for run in runs] for name in runs[0][split]}
        result[split] = {name: float(np.mean(found)) for name, found in every.items()}
        if seeds > 1:
            spread = {name: float(np.std(found, ddof=1)) for name, found in every.items()}
            result[split]["spread"] = spread
    return {**result, "protocol": {"n": n, "seeds": seeds, "blind": blind}, "items": runs}


class Gallery:
    """All cut-outs as they look, large and small, and the rows of every split."""

    def __init__(self, data: Path):
        self.data = data
        self.rows = {split: read_jsonl(str(data / split / "index.jsonl")) for split in SPLITS}
        self.asked = {split: read_jsonl(str(data / split / "questions.jsonl")) for split in SPLITS}
        large = [(s, r) for s in SPLITS for r in self.rows[s] if kind(r) == "large"]
        self.looks = [(row["objects"][0][0], row["objects"][0][1]) for _, row in large]
        shown = [self.picture(split, row["file"]) for split, row in large]
        self.size = shown[0].width
        half = (round(self.size * WIDTH["small"]),) * 2
        self.large = vectors(shown)
        self.small = vectors(p.resize(half, Image.Resampling.LANCZOS) for p in shown)

    def picture(self, split: str, file: str) -> Image.Image:
        return Image.open(self.data / split / file).convert("RGB")

    def nearest(self, picture: Image.Image, wanted: list[Object]) -> list[Object]:
        """As many cut-outs as are `wanted`, of their size, that the picture is nearest to."""
        if wanted[0].size == "large":
            name, style = self.looks[int(distances(vectors([picture]), self.large).argmin())]
            return [Object(name, style, "large", 0.5, 0.5)]
        steps = np.arange(0, 1 - WIDTH["small"] + STEP / 2, STEP)
        corners = [(x, y) for x in steps for y in steps]
        width, pixels = round(WIDTH["small"] * self.size), np.array(picture)
        places = [(round(x * self.size), round(y * self.size)) for x, y in corners]
        parts = [Image.fromarray(pixels[y : y + width, x : x + width]) for x, y in places]
        ink = np.square(self.small - 255).sum(1) + 1  # else the emptiest would be near everything
        off = distances(vectors(parts), self.small) / ink  # (places, cut-outs)
        found = []
        for _ in wanted:
            place, best = np.unravel_index(int(off.argmin()), off.shape)
            x, y = corners[place]
            edge = WIDTH["small"] / 2
            found.append(Object(*self.looks[best], "small", float(x + edge), float(y + edge)))
            near = [max(abs(x - u), abs(y - v)) < WIDTH["small"] for u, v in corners]
            off[near] = np.inf
        return found


def score(
    model: UniMM, pictures: Gallery, split: str, n: int, seed: int, blind: bool,
    guidance: float | None, temperature: float | None,
) -> dict[str, float]:  # fmt: skip
    """The scores of one split by name."""
    rng, right = np.random.default_rng((seed, SPLITS.index(split))), {}

    def shown(file: str) -> Image.Image:
        picture = pictures.picture(split, file)
        return Image.new("RGB", picture.size, (128, 128, 128)) if blind else picture

    for name in ("large", "small", "two"):
        rows = some([row for row in pictures.rows[split] if kind(row) == name], n, rng)
        wanted = [[Object(*fields) for fields in row["objects"]] for row in rows]
        words = [row["caption"] for row in rows]
        prompts = ["a picture"] * len(rows) if blind else words
        drawn = model.generate(prompts, guidance=guidance, temperature=temperature, seed=seed)
        found = [pictures.nearest(*pair) for pair in zip(drawn, wanted, strict=True)]
        right[name] = mean(map(same, found, wanted))
        said = model.ask_all([(shown(row["file"]), ASK) for row in rows])
        right[f"described_{name}"] = mean(a == b for a, b in zip(said, words, strict=True))
        if name == "large":
            looks = [(f[0].shape == w[0].shape, f[0].color == w[0].color)
                     for f, w in zip(found, wanted, strict=True)]  # fmt: skip
            right["large_name"], right["large_style"] = map(mean, zip(*looks, strict=True))
            seen = model.ask_all([(picture, ASK) for picture in drawn])
            right["own_eyes"] = mean(a == b for a, b in zip(seen, words, strict=True))
            told = list(zip(said, (w[0] for w in wanted), strict=True))
            right["described_name"] = mean(f" {o.shape} in " in words for words, o in told)
            right["described_style"] = mean(words.endswith(f" in {o.color}") for words, o in told)
    talks = [row["messages"] for row in some(pictures.asked[split], n, rng)]
    asked = [(shown(t[0]["content"][0]["image"]), t[0]["content"][1]["text"]) for t in talks]
    true = [talk[1]["content"][0]["text"] for talk in talks]
    answers = map(normalize_answer, model.ask_all(asked))
    right["questions"] = mean(a == normalize_answer(b) for a, b in zip(answers, true, strict=True))
    return right


def same(found: list[Object], wanted: list[Object]) -> bool:
    """Whether they are the same cut-outs, and of two in the same plain relation."""
    if sorted(o.shape + o.color for o in found) != sorted(o.shape + o.color for o in wanted):
        return False
    if len(wanted) == 1 or main_relation(*wanted) is None:
        return True
    ordered = sorted(found, key=lambda o: (o.shape, o.color) != (wanted[0].shape, wanted[0].color))
    return main_relation(*ordered) == main_relation(*wanted)


def kind(row: dict[str, Any]) -> str:
    """ "large", "small" or "two"."""
    return "two" if len(row["objects"]) == 2 else row["objects"][0][2]


def some(rows: list[Any], n: int, rng: np.random.Generator) -> list[Any]:
    return [rows[k] for k in rng.permutation(len(rows))[:n]]


def mean(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


def vectors(pictures: Iterable[Image.Image]) -> np.ndarray:
    """float32 (N, 3 SIDE²)."""
    small = [p.resize((SIDE, SIDE), Image.Resampling.BOX) for p in pictures]
    return np.stack([np.asarray(p, np.float32).ravel() for p in small])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared, (len(a), len(b))."""
    return np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)
