"""The Scenes world as training data: pictures on disk once, conversations made from them.

`PictureStore` holds rendered scenes (and, later, their codes) as plain .npy files. Each source
below is a function `make(run, store=..., ...)` whose result's `[i]` is a pure function of i.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unimm.data.processor import Message, assistant, user
from unimm.data.scenes import (
    WORLDS,
    Scene,
    World,
    describe,
    edits,
    express,
    from_array,
    is_held_out,
    main_relation,
    open_questions,
    prompt,
    render,
    sample_scene,
    text_dialogue,
    to_array,
    yes_no_pairs,
)

ASK_CAPTION = (
    "describe the picture",
    "what is in the picture?",
    "what do you see?",
    "caption this",
)
VALIDATION = 10**9  # sources give pictures that training never sees from this index on
BOTH = ["patches", "codes"]  # how a picture that is to be edited is shown


class PictureStore:
    """Rendered scenes of the train split in a folder: pictures, scenes, edits and codes.

    pictures.npy uint8 (N, H, W, 3); scenes.npy float32 (N, …), see `scenes.to_array`;
    codes.npy uint16 (N, codes), once `add_codes` has made it. Pictures 2 k and 2 k + 1 of a store
    with `instructions.json` are before and after edit k.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
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
        cls, folder: str | Path, world: str, count: int, seed: int = 0, edited: bool = False
    ) -> "PictureStore":
        """Render `count` scenes (`edited`: in pairs of before and after), or open what is there."""
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
                    before, instruction, after = sample_edit(world, rng)
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
        """codes.npy from `encode`, uint8 (n, H, W, 3) -> codes (n, k); done once."""
        target = self.folder / "codes.npy"
        if target.exists():
            return
        parts = [
            encode(np.asarray(self.pictures[k : k + batch])).astype(np.uint16)
            for k in tqdm(range(0, len(self), batch), desc=f"encoding {self.folder.name}")
        ]
        scratch = self.folder / "codes.part.npy"
        np.save(scratch, np.concatenate(parts))
        os.replace(scratch, target)

    @property
    def codes(self) -> np.ndarray:
        if self._codes is None:
            self._codes = np.load(self.folder / "codes.npy")
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

    def image(self, k: int, codes: bool = True) -> dict[str, Any]:
        """Picture k as the content part of a message."""
        part: dict[str, Any] = {"image": np.asarray(self.pictures[k])}
        return {**part, "codes": self.codes[k]} if codes else part


@dataclass
class Made:
    """A source made of a function (rng, i) -> item, with a generator that depends on i alone."""

    make: Callable[[np.random.Generator, int], Any]
    key: tuple[int, ...]

    def __getitem__(self, i: int) -> Any:
        return self.make(np.random.default_rng((*self.key, i)), i)


def _talk(*messages: Message) -> dict[str, Any]:
    return {"messages": list(messages)}


def scenes_pictures(run: Any, store: str) -> Made:
    """Text -> picture."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(rng.integers(len(pictures)))
        return _talk(user(prompt(pictures.scene(k), rng)), assistant(pictures.image(k)))

    return Made(make, (run.seed, 1))


def scenes_captions(run: Any, store: str) -> Made:
    """Picture -> the complete caption."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(rng.integers(len(pictures)))
        ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
        image = pictures.image(k, codes=False)
        return _talk(user(image, ask), assistant(describe(pictures.scene(k))))

    return Made(make, (run.seed, 2))


def scenes_questions(run: Any, store: str, most: int = 4) -> Made:
    """Picture and question -> answer; up to `most` turns about one picture."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(rng.integers(len(pictures)))
        scene, image = pictures.scene(k), pictures.image(k, codes=False)
        turns = some_questions(scene, rng, most)
        messages = []
        for n, (question, answer) in enumerate(turns):
            content = (image, question) if n == 0 else (question,)
            messages += [user(*content), assistant(answer)]
        return _talk(*messages)

    return Made(make, (run.seed, 3))


def scenes_text(run: Any, world: str = "scenes") -> Made:
    """Text alone: questions about described scenes, and descriptions said again."""

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        scene = sample_scene(WORLDS[world], rng)
        if rng.random() < 0.3:
            return _talk(user("say it again: " + retold(scene, rng)), assistant(describe(scene)))
        turns = text_dialogue(scene, rng)[:4]
        return _talk(*(m for q, a in turns for m in (user(q), assistant(a))))

    return Made(make, (run.seed, 4))


def retold(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in other words that hold all of `describe`; where none can, in its own."""
    objects = scene.objects
    plain = len(objects) == 2 and main_relation(*objects) is not None and objects[0] != objects[1]
    if len(objects) == 1 or (plain and describe(scene).count(" and ") == 0):
        one = len(objects) == 1
        return express(
            scene, rng, size=one, color=True, background=True, relation=True, opening=False
        )
    return describe(scene)


def scenes_edits(run: Any, store: str) -> Made:
    """Picture and instruction -> the changed picture."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(rng.integers(len(pictures.instructions)))
        before = {**pictures.image(2 * k), "view": BOTH}
        return _talk(user(before, pictures.instructions[k]), assistant(pictures.image(2 * k + 1)))

    return Made(make, (run.seed, 5))


def scenes_chats(run: Any, store: str) -> Made:
    """Draw it, answer about it, change it, in one conversation."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(rng.integers(len(pictures.instructions)))
        scene = pictures.scene(2 * k)
        messages = [user(prompt(scene, rng)), assistant(pictures.image(2 * k))]
        if rng.random() < 0.3:
            ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
            messages += [user(ask), assistant(describe(scene))]
        else:
            for question, answer in some_questions(scene, rng, 2):
                messages += [user(question), assistant(answer)]
        messages += [user(pictures.instructions[k]), assistant(pictures.image(2 * k + 1))]
        return _talk(*messages)

    return Made(make, (run.seed, 6))


def scenes_pairs(run: Any, store: str, variants: int = 1, world: str = "scenes") -> Made:
    """For contrastive training: {"pixels": uint8 (H, W, 3), "text": the complete caption}.

    Of `variants` items in a row the first is a picture of the store, and each other one the same
    but for the shape of one object: negatives that only somebody who sees shapes can tell apart.
    """
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        first, variant = divmod(i % VALIDATION, variants)
        base = np.random.default_rng((run.seed, 71, first))
        k = pictures.pick(base, i)
        scene, pixels = pictures.scene(k), np.asarray(pictures.pictures[k])
        if variant:
            scene = reshaped(scene, WORLDS[world], rng)
            pixels = render(scene, world)
        return {"pixels": pixels, "text": describe(scene)}

    return Made(make, (run.seed, 7))


def reshaped(scene: Scene, world: World, rng: np.random.Generator) -> Scene:
    """The scene with another shape in the place of one object; still of the train split."""
    while True:
        k = int(rng.integers(len(scene.objects)))
        shape = world.shapes[rng.integers(len(world.shapes))]
        objects = list(scene.objects)
        objects[k] = replace(objects[k], shape=shape)
        changed = replace(scene, objects=tuple(objects))
        if changed != scene and is_held_out(changed) is None:
            return changed


def scenes_pictures_only(run: Any, store: str) -> Made:
    """For the image tokenizer: uint8 (H, W, 3)."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> np.ndarray:
        return np.asarray(pictures.pictures[pictures.pick(rng, i)])

    return Made(make, (run.seed, 8))


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


def some_questions(scene: Scene, rng: np.random.Generator, most: int) -> list[tuple[str, str]]:
    """One to `most` questions and answers about a scene, of yes/no and open form."""
    pool = [(q.text, q.answer) for q in yes_no_pairs(scene, rng)]
    pool = [pool[k] for k in rng.permutation(len(pool))[: len(pool) // 2]]
    pool += [(q.text, q.answer) for q in open_questions(scene, rng)]
    order = rng.permutation(len(pool))[: int(rng.integers(1, most + 1))]
    return [pool[k] for k in order]
