"""The text tokenizer: byte-level BPE, so that no word and no script is ever unknown.

unimm train tokenizers/train_text.py out=runs/text                         # the language of Scenes
unimm train tokenizers/train_text.py out=runs/text corpus=lines.txt vocab_size=32000

Cost: a minute for Scenes (60,000 sentences). Writes tokenizer.json.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from unimm.data.scenes import WORLDS, describe, prompt, sample_scene, text_dialogue


def main(
    out: str = "runs/text",
    corpus: str = "",
    vocab_size: int = 768,
    lines: int = 20_000,
    world: str = "scenes",
    seed: int = 0,
) -> str:
    """Train on `corpus` (a text file, a sentence a line), or on sentences about Scenes."""
    target = Path(out) / "tokenizer.json"
    if target.exists():
        return str(target)
    source = read_lines(corpus) if corpus else scenes_lines(world, lines, seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source, trainer)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    tokenizer.save(str(part))
    os.replace(part, target)
    return str(target)


def read_lines(path: str) -> Iterator[str]:
    if not Path(path).is_file():
        raise ValueError(f"no such corpus: {path}")
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield line.strip()


def scenes_lines(world: str, count: int, seed: int) -> Iterator[str]:
    """Captions, prompts, questions and answers of the train split."""
    for k in range(count):
        rng = np.random.default_rng((seed, k, 11))
        scene = sample_scene(WORLDS[world], rng)
        yield describe(scene)
        yield prompt(scene, rng)
        for question, answer in text_dialogue(scene, rng)[:2]:
            yield f"{question} {answer}"
