"""Pictures of your own cut-outs, one or two of them, with captions, prompts and questions.

unimm train train/sprite_pictures.py index=emoji/index.jsonl out=runs/sprites

index: a .jsonl with "file" (a picture with a transparent background), "name", "style" and, where
there are any, "group" and "keywords". groups: only these. OUT/train is for training; OUT/pairs and
OUT/names have what is held out: a name in one style, or in every style (`scenes/sprites.py`). Each
has index.jsonl, one.jsonl (large sprites), few.jsonl (small ones, and two) and questions.jsonl.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from unimm.data.processor import assistant, user
from unimm.data.scenes import WORLDS
from unimm.data.scenes.sprites import SPLITS, Sprites, caption, compose, questions


def main(
    index: str = "",
    out: str = "runs/sprites",
    groups: tuple[str, ...] = (),
    few: int = 9_000,
    size: int = 64,
    background: str = "white",
    seed: int = 0,
) -> str:
    """Make all three splits; `few`: as many small ones, and as many of two."""
    if not index:
        raise ValueError("say where the cut-outs are: index=INDEX.jsonl")
    grounds = WORLDS["scenes"].backgrounds
    if background not in grounds:
        raise ValueError(f"background is one of {', '.join(grounds)}, not {background!r}")
    sprites, lines = Sprites(index, groups), []
    for number, split in enumerate(SPLITS):
        folder, rng = Path(out) / split, np.random.default_rng((seed, number, 31))
        folder.mkdir(parents=True, exist_ok=True)
        made = compose(sprites, split, few if split == "train" else few // 20, rng)
        files: dict[str, list[dict]] = {n: [] for n in ("index", "one", "few", "questions")}
        for k, objects in enumerate(tqdm(made, desc=f"composing {split}")):
            name = f"{k:06d}.png"
            Image.fromarray(sprites.render(objects, grounds[background], size)).save(folder / name)
            words = caption(objects)
            prompts = [words, words, words, f"draw {words}", f"a picture of {words}"]
            places = [[o.shape, o.color, o.size, o.x, o.y] for o in objects]
            row = {"file": name, "caption": words, "prompt": prompts, "objects": places}
            files["index"].append(row)
            files["one" if objects[0].size == "large" else "few"].append(row)
            turns = questions(sprites, objects, rng)
            messages = [part for q, a in turns for part in (user(q), assistant(a))]
            messages[0] = user({"image": name}, turns[0][0])
            files["questions"].append({"messages": messages})
        for name, rows in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        lines.append(f"{len(sprites.split[split])} sprites, {len(made)} pictures in {folder}")
    return "\n".join(lines)
