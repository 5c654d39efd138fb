"""The Scenes benchmark: GenEval's six tasks by a checker, and understanding as MME scores it.

Held-out figures are about combinations that no training picture or text held: "pairs" (a shape in
a colour) and "triples" (an object, a relation, another object). Blind controls see no prompt or
no picture.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unimm.data.processor import user
from unimm.data.scenes import (
    TASKS,
    WORLDS,
    Scene,
    check,
    complete,
    edit_holds,
    look,
    normalize_answer,
    open_questions,
    parse,
    render,
    sample_scene,
    task_prompt,
    yes_no_pairs,
)
from unimm.data.sources import sample_edit
from unimm.inference.engine import Request
from unimm.inference.sampling import Settings
from unimm.pipeline import UniMM, edit_messages

HEADS = {"generation": TASKS, "understanding": ("yes_no",), "edits": ("edit",)}
SPLITS = {"held_out": ("pairs", "triples"), "seen": ("train",)}
BATCH = 32


@dataclass
class Protocol:
    """What a score depends on. n: pictures of a split to draw, and about as many to ask about."""

    n: int = 300
    seeds: int = 1
    first_seed: int = 1000
    world: str = "scenes"
    guidance: float = 1.0
    edit_guidance: float = 1.0
    temperature: float = 1.0
    blind: bool = False


@dataclass
class Tally:
    """Right and asked, by name."""

    right: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, right: bool) -> None:
        self.right[name] += right
        self.asked[name] += 1

    def rate(self, name: str) -> float:
        return self.right[name] / self.asked[name] if self.asked[name] else math.nan


def evaluate(
    model: UniMM,
    n: int = 300,
    seeds: int = 1,
    blind: bool = False,
    guidance: float | None = None,
    temperature: float = 1.0,
    world: str | None = None,
) -> dict[str, Any]:
    """All scores of a model on Scenes, in 0..1, means over `seeds` runs on different scenes.

    `blind`: the control, which draws without the prompt's words and answers about a grey picture.
    Returns {"held_out": {"generation": …, "understanding": …, "edits": …}, "seen": {…},
    "protocol": {…}}.
    """
    default = model.sampling.get("guidance", 1.0)
    protocol = Protocol(
        n=n,
        seeds=seeds,
        world=world or model.sampling.get("world", "scenes"),
        guidance=default if guidance is None else guidance,
        edit_guidance=model.sampling.get("edit_guidance", 1.0),
        temperature=temperature,
        blind=blind,
    )
    runs = [one_seed(model, protocol, protocol.first_seed + k) for k in range(seeds)]
    result = average([run["scores"] for run in runs])
    return {
        **result,
        "protocol": {
            **vars(protocol),
            "splits": average([run["splits"] for run in runs]),
            "counts": runs[0]["counts"],
            "interval95": interval(runs),
            "spread": spread([run["scores"] for run in runs]),
        },
    }


def one_seed(model: UniMM, protocol: Protocol, seed: int) -> dict[str, Any]:
    """Scores of one seed, the same by split, and how many of each were asked."""
    tallies = {
        split: {
            "generation": score_generation(model, protocol, split, seed),
            "understanding": score_understanding(model, protocol, split, seed),
            "edits": score_edits(model, protocol, split, seed),
        }
        for group in SPLITS.values()
        for split in group
    }
    splits = {
        split: {k: summary(k, [t]) for k, t in tally.items()} for split, tally in tallies.items()
    }
    scores = {
        name: {kind: summary(kind, [tallies[split][kind] for split in group]) for kind in HEADS}
        for name, group in SPLITS.items()
    }
    counts = {
        split: {kind: dict(t.asked) for kind, t in tally.items()}
        for split, tally in tallies.items()
    }
    return {"scores": scores, "splits": splits, "counts": counts}


def score_generation(model: UniMM, protocol: Protocol, split: str, seed: int) -> Tally:
    """Pictures by task; of "triples" there is the task of positions alone."""
    tasks = ("position",) if split == "triples" else TASKS
    each = max(1, protocol.n // len(TASKS))
    world, tally = WORLDS[protocol.world], Tally()
    jobs = []
    for task in tasks:
        for k in range(each):
            rng = np.random.default_rng((seed, TASKS.index(task), k, _split_key(split)))
            scene = sample_scene(world, rng, split=split, task=task)
            jobs.append((task, task_prompt(scene, task, rng)))
    settings = Settings(protocol.guidance, protocol.temperature)
    talks = [[user(words)] for _, words in jobs]
    pixels = draw(model, talks, settings, seed * 100_003, protocol.blind)
    for (task, words), picture in zip(jobs, pixels, strict=True):
        tally.add(task, check(picture, words, protocol.world))
    return tally


def score_understanding(model: UniMM, protocol: Protocol, split: str, seed: int) -> Tally:
    """Captions, open answers, and yes/no pairs (MME: accuracy; accuracy+ when both are right)."""
    world, tally = WORLDS[protocol.world], Tally()
    asked: list[tuple[Any, str]] = []
    marks: list[tuple[str, Any]] = []
    for k in range(max(1, protocol.n // (2 if split != "train" else 1))):
        rng = np.random.default_rng((seed, 77, k, _split_key(split)))
        scene = sample_scene(world, rng, split=split)
        picture = render(scene, world)
        if protocol.blind:
            picture = np.full_like(picture, 127)
        asked.append((picture, "describe the picture"))
        marks.append(("caption", scene))
        for question in _chosen(scene, protocol.world, rng):
            asked.append((picture, question.text))
            marks.append((question.type, question))
    answers = model.ask_all(asked)
    pairs: dict[Any, list[bool]] = defaultdict(list)
    for index, ((kind, truth), answer) in enumerate(zip(marks, answers, strict=True)):
        if kind == "caption":
            spec = parse(answer)
            tally.add("caption_exact", spec is not None and complete(spec, truth))
            number = index
            continue
        right = normalize_answer(answer) == normalize_answer(truth.answer)
        if truth.yes_no:
            tally.add("yes_no", right)
            tally.add(f"yes_no_{kind}", right)
            pairs[(number, truth.pair)].append(right)
        else:
            tally.add("open", right)
            tally.add(f"open_{kind}", right)
    for both in pairs.values():
        tally.add("accuracy_plus", all(both))
    return tally


def score_edits(model: UniMM, protocol: Protocol, split: str, seed: int) -> Tally:
    """Edits: the change made and all else kept."""
    world, tally, jobs = WORLDS[protocol.world], Tally(), []
    for k in range(max(1, protocol.n // 6)):
        rng = np.random.default_rng((seed, 55, k, _split_key(split)))
        jobs.append(sample_edit(protocol.world, rng, split))
    talks = [edit_messages(render(before, world), words) for before, words, _ in jobs]
    settings = Settings(protocol.edit_guidance, protocol.temperature)
    pixels = draw(model, talks, settings, seed * 100_003 + 50_000, protocol.blind)
    for (before, _, after), picture in zip(jobs, pixels, strict=True):
        tally.add("edit", edit_holds(before, _seen(picture, protocol), after))
    return tally


def draw(
    model: UniMM, talks: list[list[Any]], settings: Settings, seed: int, blind: bool = False
) -> Iterator[np.ndarray]:
    """One picture a conversation, uint8 (H, W, 3); `blind` hides the words of the prompt."""
    processor = model.processor
    for start in range(0, len(talks), BATCH):
        requests = []
        for k, talk in enumerate(talks[start : start + BATCH]):
            sample = processor.encode(talk, "image")
            sample = processor.unguided(sample) if blind else sample
            requests.append(Request(sample, "image", seed + start + k))
        answers = model.engine.run(requests, settings)
        pixels = processor.pixels([answer.codes for answer in answers])
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        yield from levels.permute(0, 2, 3, 1).numpy()


def summary(kind: str, tallies: list[Tally]) -> dict[str, float]:
    """Scores of several splits together: the mean over the splits that asked."""
    names = sorted({name for tally in tallies for name in tally.asked})
    rates = {
        name: float(np.mean([t.rate(name) for t in tallies if t.asked.get(name)])) for name in names
    }
    if kind == "generation":
        tasks = [rates[task] for task in TASKS if task in rates]
        return {"overall": float(np.mean(tasks)), **rates}
    if kind == "understanding":
        return {"overall": rates.pop("yes_no"), **rates}
    return {"overall": rates["edit"]}


def average(runs: list[Any]) -> Any:
    """Mean over runs of the same nested shape."""
    if isinstance(runs[0], dict):
        keys = {key for run in runs for key in run}
        return {key: average([run[key] for run in runs if key in run]) for key in sorted(keys)}
    return round(float(np.mean(runs)), 4)


def spread(runs: list[Any]) -> dict[str, Any]:
    """Standard deviation over seeds of the headline figures; 0 for one seed."""
    heads = {
        f"{group}.{kind}": [run[group][kind]["overall"] for run in runs]
        for group in runs[0]
        for kind in runs[0][group]
    }
    ddof = 1 if len(runs) > 1 else 0
    return {name: round(float(np.std(values, ddof=ddof)), 4) for name, values in heads.items()}


def interval(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Half-widths of 95 % intervals of the headline figures, from the number asked (binomial)."""
    widths = {}
    for group, splits in SPLITS.items():
        for kind, names in HEADS.items():
            p = float(np.mean([run["scores"][group][kind]["overall"] for run in runs]))
            asked = sum(
                run["counts"][split][kind].get(name, 0)
                for run in runs
                for split in splits
                for name in names
            )
            widths[f"{group}.{kind}"] = round(1.96 * math.sqrt(p * (1 - p) / max(1, asked)), 4)
    return widths


def _chosen(scene: Scene, world: str, rng: np.random.Generator) -> list[Any]:
    """Two yes/no pairs and two open questions about a scene."""
    questions = yes_no_pairs(scene, rng, world)
    ids = list(dict.fromkeys(q.pair for q in questions))
    kept = {ids[k] for k in rng.permutation(len(ids))[:2]}
    open_ones = open_questions(scene, rng)
    picked = [open_ones[k] for k in rng.permutation(len(open_ones))[:2]]
    return [q for q in questions if q.pair in kept] + picked


def _seen(picture: np.ndarray, protocol: Protocol) -> Scene:
    found = look(picture, protocol.world)
    assert isinstance(found, Scene)
    return found


def _split_key(split: str) -> int:
    return ("train", "pairs", "triples").index(split)
