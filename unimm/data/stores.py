"""Rendered scenes on disk: pictures, what they show, the edits between them, and their codes."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unimm.checkpoints.native import BUNDLED, load_model
from unimm.data.codes import encoder
from unimm.data.scenes import (
    WORLDS,
    Scene,
    edits,
    from_array,
    located,
    main_relation,
    render,
    sample_placed,
    sample_scene,
    to_array,
)

Change = Callable[[str, np.random.Generator], tuple[Scene, str, Scene]]
VALIDATION = 10**9  # sources give pictures that training never sees from this index on
ONLY = ("single", "pairs", "related", "alike", "equal", "mixed")  # some of the pictures
EQUAL = 0.5  # of the codes of a store, at least: bfloat16 changes some, another tokenizer all


class PictureStore:
    """Rendered scenes of the train split in a folder: pictures, scenes, edits and codes.

    pictures.npy uint8 (N, H, W, 3); scenes.npy float32 (N, …), see `scenes.to_array`;
    codes.npy uint16 (N, codes), once `add_codes` has made it, here or at the path `codes`. Pictures
    2 k and 2 k + 1 of a store with `instructions.json` are before and after edit k.
    """

    def __init__(self, folder: str | Path, codes: str | Path | None = None):
        folder = Path(folder)
        self.codes_path = Path(codes or folder / "codes.npy")
        if not (folder / "done").exists():
            raise ValueError(f"{folder} is not a finished picture store")
        self.folder = folder
        self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self.scenes = np.load(folder / "scenes.npy", mmap_mode="r")
        words = folder / "instructions.json"
        self.instructions: list[str] = json.loads(words.read_text()) if words.exists() else []
        self._codes: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        folder: str | Path,
        world: str,
        count: int,
        seed: int = 0,
        edited: bool = False,
        change: "Change | None" = None,
    ) -> "PictureStore":
        """Render `count` scenes, or open what is there.

        `edited`: in pairs of before and after, as `change` makes them (None: `sample_edit`).
        """
        folder = Path(folder)
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            size, words = WORLDS[world].image_size, []
            shape = (count, size, size, 3)
            pictures = np.lib.format.open_memmap(
                folder / "pictures.npy", "w+", dtype=np.uint8, shape=shape
            )
            scenes = []
            for k in tqdm(range(0, count, 2 if edited else 1), desc=f"rendering {folder.name}"):
                rng = np.random.default_rng((seed, k, edited))
                made = [sample_scene(WORLDS[world], rng)]
                if edited:
                    before, instruction, after = (change or sample_edit)(world, rng)
                    words.append(instruction)
                    made = [before, after]
                for offset, scene in enumerate(made):
                    pictures[k + offset] = render(scene, world)
                    scenes.append(to_array(scene))
            np.save(folder / "scenes.npy", np.stack(scenes))
            if edited:
                (folder / "instructions.json").write_text(json.dumps(words))
            pictures.flush()
            (folder / "done").write_text("")
        return cls(folder)

    def add_codes(self, encode: Callable[[np.ndarray], np.ndarray], batch: int = 256) -> None:
        """codes.npy from `encode`, uint8 (n, H, W, 3) -> codes (n, k), if it is not there yet or
        those in it are others."""
        if self.codes_path.exists() and self.equal_codes(encode) >= EQUAL:
            return
        parts = [
            encode(np.asarray(self.pictures[k : k + batch])).astype(np.uint16)
            for k in tqdm(range(0, len(self), batch), desc=f"encoding {self.folder.name}")
        ]
        scratch = self.codes_path.with_name("codes.part.npy")
        np.save(scratch, np.concatenate(parts))
        os.replace(scratch, self.codes_path)
        self._codes = None

    def equal_codes(self, encode: Callable[[np.ndarray], np.ndarray], count: int = 16) -> float:
        """The share of the first pictures' codes that are those that `encode` gives."""
        given, here = encode(np.asarray(self.pictures[:count])), self.codes[:count]
        return float((given == here).mean()) if given.shape == here.shape else 0.0

    @property
    def codes(self) -> np.ndarray:
        if self._codes is None:
            self._codes = np.load(self.codes_path)
        return self._codes

    def __len__(self) -> int:
        return len(self.scenes)

    def pick(self, rng: np.random.Generator, i: int) -> int:
        """A picture for index i; those for i >= VALIDATION are kept from all smaller indices."""
        kept = max(1, len(self) // 50)
        if i >= VALIDATION:
            return len(self) - kept + int(rng.integers(kept))
        return int(rng.integers(len(self) - kept))

    def scene(self, k: int) -> Scene:
        return from_array(self.scenes[k])

    def chosen(self, only: str = "") -> np.ndarray:
        """Indices of all pictures, or of some, int64 (n,).

        "single": one object; "pairs": two objects of different looks; "related": these, where
        they are in a plain relation; "alike": these, where shape or colour is the same; "equal":
        two or more objects of one look; "mixed": three or more, not of one look. Raises
        ValueError for other words, and where there are none.
        """
        if not only:
            return np.arange(len(self))
        if only not in ONLY:
            raise ValueError(f"no pictures {only!r}: choose one of {', '.join(ONLY)}")
        found = []
        for k in range(len(self)):
            objects = self.scene(k).objects
            looks = len({(o.shape, o.color) for o in objects})
            if only in ("single", "equal"):
                fits = looks == 1 and (len(objects) > 1) == (only == "equal")
            elif only == "mixed":
                fits = looks > 1 and len(objects) > 2
            else:
                fits = looks == len(objects) == 2
                if only == "related":
                    fits = fits and main_relation(*objects) is not None
                if only == "alike":
                    shapes, colors = ({o.shape for o in objects}, {o.color for o in objects})
                    fits = fits and 1 in (len(shapes), len(colors))
            if fits:
                found.append(k)
        if not found:
            raise ValueError(f"none of the pictures of {self.folder} are {only!r}")
        return np.asarray(found, dtype=np.int64)

    def image(self, k: int, codes: bool = True) -> dict[str, Any]:
        """Picture k as the content part of a message."""
        part: dict[str, Any] = {"image": np.asarray(self.pictures[k])}
        return {**part, "codes": self.codes[k]} if codes else part


def coded_store(run: Any, store: str, codes: str = "") -> PictureStore:
    """A store whose codes are drawn. Raises ValueError where they are another image tokenizer's
    than that of the model folder that the run begins with."""
    pictures, init = PictureStore(store, codes or None), getattr(run, "init", "")
    if init and isinstance(init, str | Path):
        folder = BUNDLED if init == "scenes" else Path(init)
        if equal_codes(pictures.folder, pictures.codes_path, folder) < EQUAL:
            raise ValueError(
                f"the codes in {pictures.codes_path} are of another image tokenizer than that in "
                f"{folder}: train/stores.py makes them"
            )
    return pictures


@lru_cache
def equal_codes(store: Path, codes: Path, model: Path) -> float:
    """`PictureStore.equal_codes` by the image tokenizer in a model folder; 1 if it has none."""
    if not all((model / name).is_file() for name in ("config.json", "image_tokenizer.json")):
        return 1.0
    return PictureStore(store, codes).equal_codes(encoder(load_model(model)[1]))


def sample_edit(
    world: str, rng: np.random.Generator, split: str = "train"
) -> tuple[Scene, str, Scene]:
    """A scene, an instruction and the scene after it, all of one split."""
    while True:
        before = sample_scene(WORLDS[world], rng, split=split)
        try:
            return before, *edits(WORLDS[world], before, rng, split=split)
        except ValueError:  # there are scenes in which nothing can be changed in this split
            continue


def sample_addition(world: str, rng: np.random.Generator) -> tuple[Scene, str, Scene]:
    """Some objects of a scene (`sample_placed`), the words that add one more at its place, and the
    scene with it: after it there are one, two, ... as often."""
    count = 1 + int(rng.integers(WORLDS[world].max_objects))
    scene = sample_placed(world, rng, count=count)
    objects = tuple(scene.objects[k] for k in rng.permutation(count))
    before, after = replace(scene, objects=objects[:-1]), replace(scene, objects=objects)
    return before, located(before, after), after
