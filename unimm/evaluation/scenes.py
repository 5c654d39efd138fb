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
    edit_kind,
    look,
    normalize_answer,
    open_questions,
    parse,
    render,
    sample_scene,
    task_prompt,
    yes_no_pairs,
)
from unimm.data.stores import sample_edit
from unimm.inference.engine import Request
from unimm.inference.judging import agreement
from unimm.inference.sampling import Settings
from unimm.pipeline import UniMM, edit_messages

HEADS = {"generation": TASKS, "understanding": ("yes_no",), "edits": ("edit",)}
SPLITS = {"held_out": ("pairs", "triples"), "seen": ("train",)}
BATCH = 32
AGAIN = 1_000_000_007  # between the seeds of several pictures of one prompt


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
    edit_temperature: float = 1.0
    blind: bool = False
    best_of: int = 1
    tries: int = 1


@dataclass
class Tally:
    """How right each item was, by name, as (scene, 0 or 1) in the order asked.

    Of two runs compared, an item is their difference.
    """

    items: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, scene: int, right: float) -> None:
        self.items[name].append((scene, float(right)))

    @property
    def asked(self) -> dict[str, int]:
        return {name: len(found) for name, found in self.items.items()}

    def rate(self, name: str) -> float:
        return float(np.mean([right for _, right in self.items[name]]))

    def variance(self, name: str) -> float:
        """Of `rate`, where the items of one scene may hang together (cluster-robust)."""
        rate = self.rate(name)
        off: dict[int, float] = defaultdict(float)
        for scene, right in self.items[name]:
            off[scene] += right - rate
        return sum(value**2 for value in off.values()) / len(self.items[name]) ** 2


Tallies = dict[str, dict[str, Tally]]  # by split and kind


def evaluate(
    model: UniMM,
    n: int = 300,
    seeds: int = 1,
    blind: bool = False,
    guidance: float | None = None,
    temperature: float | None = None,
    world: str | None = None,
    before: list[Any] | None = None,
    best_of: int = 1,
    tries: int | None = None,
    first_seed: int = Protocol.first_seed,
) -> dict[str, Any]:
    """All scores of a model on Scenes, in 0..1, means over `seeds` runs on different scenes, of
    seeds `first_seed` and on.

    `blind`: the control, which draws without the prompt's words and answers about a grey picture.
    `before`: the "items" of another model's result; what changed is then in "paired".
    `best_of`: of so many pictures of a prompt, the first of them those of best_of=1, the one counts
    that the model itself chooses (`generate(…, best_of=…)`); edits are drawn once.
    `tries`: at what the model, looking at the picture, finds wrong (None: its own number).
    Returns {"held_out": {"generation": …, "understanding": …, "edits": …}, "seen": {…},
    "protocol": {…}, "items": [what was right, one entry a seed]}.
    """
    usual = model.sampling.get
    drawn = usual("temperature", 1.0) if temperature is None else temperature
    protocol = Protocol(
        n=n,
        seeds=seeds,
        first_seed=first_seed,
        world=world or usual("world", "scenes"),
        guidance=usual("guidance", 1.0) if guidance is None else guidance,
        edit_guidance=usual("edit_guidance", 1.0),
        temperature=drawn,
        edit_temperature=usual("edit_temperature", drawn) if temperature is None else temperature,
        blind=blind,
        best_of=best_of,
        tries=usual("tries", 1) if tries is None else tries,
    )
    runs = [one_seed(model, protocol, protocol.first_seed + k) for k in range(seeds)]
    scored = [scores(run) for run in runs]
    splits = [
        {split: {k: summary(k, [t]) for k, t in kinds.items()} for split, kinds in run.items()}
        for run in runs
    ]
    counts = {split: {k: t.asked for k, t in kinds.items()} for split, kinds in runs[0].items()}
    result = {
        **average(scored),
        "protocol": {
            **vars(protocol),
            "splits": average(splits),
            "counts": counts,
            "interval95": interval(runs),
            "spread": spread(scored),
        },
        "items": [
            {split: {k: dict(t.items) for k, t in kinds.items()} for split, kinds in run.items()}
            for run in runs
        ],
    }
    return result if before is None else {**result, "paired": paired(before, result["items"])}


def one_seed(model: UniMM, protocol: Protocol, seed: int) -> Tallies:
    """What is right, by split and kind."""
    return {
        split: {
            "generation": score_generation(model, protocol, split, seed),
            "understanding": score_understanding(model, protocol, split, seed),
            "edits": score_edits(model, protocol, split, seed),
        }
        for group in SPLITS.values()
        for split in group
    }


def scores(run: Tallies) -> dict[str, Any]:
    """Scores by group of splits and kind."""
    return {
        name: {kind: summary(kind, [run[split][kind] for split in group]) for kind in HEADS}
        for name, group in SPLITS.items()
    }


def paired(before: list[Any], after: list[Any]) -> dict[str, Any]:
    """What changed on the same items: headline figures after less before, and 95 % half-widths.

    Raises ValueError where the two are not the same items.
    """
    if len(before) != len(after):
        raise ValueError("to compare item by item takes the same seeds")
    runs: list[Tallies] = []
    for old, new in zip(before, after, strict=True):
        changed: Tallies = {}
        for split, kinds in new.items():
            for kind, names in kinds.items():
                tally = changed.setdefault(split, {}).setdefault(kind, Tally())
                for name, items in names.items():
                    if name not in HEADS[kind]:
                        continue
                    others = old.get(split, {}).get(kind, {}).get(name, [])
                    if [scene for scene, _ in items] != [scene for scene, _ in others]:
                        raise ValueError(f"{split}, {name}: these are not the same items")
                    for (scene, a), (_, b) in zip(items, others, strict=True):
                        tally.add(name, scene, a - b)
        runs.append(changed)
    means = average([scores(run) for run in runs])
    heads = {f"{g}.{kind}": means[g][kind]["overall"] for g in SPLITS for kind in HEADS}
    return {"change": heads, "interval95": interval(runs)}


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
    tries = [
        list(draw(model, talks, settings, seed * 100_003 + again * AGAIN, protocol))
        for again in range(protocol.best_of)
    ]
    pixels = best(model, tries, [words for _, words in jobs])
    for k, ((task, words), picture) in enumerate(zip(jobs, pixels, strict=True)):
        tally.add(task, k, check(picture, words, protocol.world))
    return tally


def score_understanding(model: UniMM, protocol: Protocol, split: str, seed: int) -> Tally:
    """Captions, open answers, and yes/no pairs (MME: accuracy; accuracy+ when both are right)."""
    world, tally = WORLDS[protocol.world], Tally()
    asked: list[tuple[Any, str]] = []
    marks: list[tuple[str, int, Any]] = []
    for k in range(max(1, protocol.n // (2 if split != "train" else 1))):
        rng = np.random.default_rng((seed, 77, k, _split_key(split)))
        scene = sample_scene(world, rng, split=split)
        picture = render(scene, world)
        if protocol.blind:
            picture = np.full_like(picture, 127)
        asked.append((picture, "describe the picture"))
        marks.append(("caption", k, scene))
        for question in _chosen(scene, protocol.world, rng):
            asked.append((picture, question.text))
            marks.append((question.type, k, question))
    answers = model.ask_all(asked, protocol.tries)
    pairs: dict[Any, list[bool]] = defaultdict(list)
    for (kind, k, truth), answer in zip(marks, answers, strict=True):
        if kind == "caption":
            spec = parse(answer)
            tally.add("caption_exact", k, spec is not None and complete(spec, truth))
            continue
        right = normalize_answer(answer) == normalize_answer(truth.answer)
        if truth.yes_no:
            tally.add("yes_no", k, right)
            tally.add(f"yes_no_{kind}", k, right)
            pairs[(k, truth.pair)].append(right)
        else:
            tally.add("open", k, right)
            tally.add(f"open_{kind}", k, right)
    for (k, _), both in pairs.items():
        tally.add("accuracy_plus", k, all(both))
    return tally


def score_edits(model: UniMM, protocol: Protocol, split: str, seed: int) -> Tally:
    """Edits, all and by kind (`EDITS`): the change made and all else kept."""
    world, tally, jobs = WORLDS[protocol.world], Tally(), []
    for k in range(max(1, protocol.n // 6)):
        rng = np.random.default_rng((seed, 55, k, _split_key(split)))
        jobs.append(sample_edit(protocol.world, rng, split))
    asked = [(render(before, world), words) for before, words, _ in jobs]
    # Blind, the words must not say where either.
    talks = [edit_messages(*pair) for pair in asked] if protocol.blind else model.edits(asked)
    settings = Settings(protocol.edit_guidance, protocol.edit_temperature)
    pixels = draw(model, talks, settings, seed * 100_003 + 50_000, protocol)
    for k, ((before, _, after), picture) in enumerate(zip(jobs, pixels, strict=True)):
        right = edit_holds(before, _seen(picture, protocol), after)
        tally.add("edit", k, right)
        tally.add(edit_kind(before, after), k, right)
    return tally


def draw(
    model: UniMM, talks: list[list[Any]], settings: Settings, seed: int, protocol: Protocol
) -> Iterator[np.ndarray]:
    """One picture a conversation, uint8 (H, W, 3); blind, the words of the prompt are hidden."""
    processor = model.processor
    for start in range(0, len(talks), BATCH):
        part = talks[start : start + BATCH]
        if protocol.blind:
            samples = [processor.unguided(processor.encode(talk, "image")) for talk in part]
            requests = [Request(s, "image", seed + start + k) for k, s in enumerate(samples)]
            codes = [answer.codes for answer in model.engine.run(requests, settings)]
        else:
            codes = model.draw_codes(part, settings, seed + start, protocol.tries)
        pixels = processor.pixels(codes, model.model.decoder.norm.weight.dtype)
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        yield from levels.permute(0, 2, 3, 1).numpy()


def best(model: UniMM, tries: list[list[Any]], prompts: list[str]) -> list[Any]:
    """Of several pictures a prompt, the one that the model thinks fits best, see `agreement`."""
    if len(tries) == 1:
        return tries[0]
    scores = [agreement(model.model, model.processor, pictures, prompts) for pictures in tries]
    chosen = np.argmax(scores, axis=0)
    return [tries[again][k] for k, again in enumerate(chosen)]


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
    return {"overall": rates.pop("edit"), **rates}


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


def interval(runs: list[Tallies]) -> dict[str, float]:
    """Half-widths of 95 % intervals of the headline figures, over all seeds together."""
    widths = {}
    for group, splits in SPLITS.items():
        for kind, heads in HEADS.items():
            total = 0.0
            for run in runs:
                asked = {n: [t for s in splits if n in (t := run[s][kind]).items] for n in heads}
                asked = {name: tallies for name, tallies in asked.items() if tallies}
                for name, tallies in asked.items():  # `summary` weighs tasks, and splits, equally
                    weight = 1 / (len(asked) * len(tallies) * len(runs))
                    total += sum(weight**2 * tally.variance(name) for tally in tallies)
            widths[f"{group}.{kind}"] = round(1.96 * math.sqrt(total), 4)
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
