"""Comparisons that are fair: variants of one recipe, one budget, several seeds, one protocol.

A study is a Python file with a function `study(shared)` that returns a `Study`; `shared` is a
folder for what all variants begin with. `compare` trains what is not trained yet, evaluates what
is not evaluated yet, and writes table.md, table.csv, curves.png, grids and one JSON a run.
"""

import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from unimm.config import Run, load_recipe
from unimm.data.processor import user
from unimm.data.scenes import (
    SPLITS,
    TASKS,
    WORLDS,
    check,
    describe,
    prompt,
    render,
    sample_scene,
    task_prompt,
)
from unimm.evaluation.scenes import Protocol, score_understanding
from unimm.inference.engine import Request
from unimm.inference.sampling import Settings
from unimm.model.diffusion import DiffusionDecoder
from unimm.pipeline import UniMM
from unimm.training.cost import COUNTED, sample_flops
from unimm.training.image_tokenizer import psnr
from unimm.training.previews import save_grid
from unimm.training.trainer import train

BUDGETS = ("steps", "samples", "flops")
COSTS = ("parameters", "steps", "flops_a_sample", "wall_ratio")  # columns before the metrics


@dataclass(frozen=True)
class Study:
    """What is compared.

    variants: by name, the phases of a training one after the other (each begins with the result
    of the one before); a phase is a dict of changes to fields of `base`, and "share" in it is its
    part of the budget. "{seed}" in the `init` of a first phase becomes the seed of the run.
    budget: one of {"steps": n}, {"samples": n}, {"flops": n}, training FLOPs, for each variant.
    protocol: what scores depend on, JSON-able. evaluate(folder, protocol) -> scores by name.
    draw(folder, protocol) -> pictures (N, 3, H, W) in [-1, 1] for the grid; optional.
    """

    base: Run
    variants: dict[str, Sequence[dict[str, Any]]]
    budget: dict[str, float]
    seeds: int
    protocol: dict[str, Any]
    evaluate: Callable[[Path, dict[str, Any]], dict[str, float]]
    draw: Callable[[Path, dict[str, Any]], Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.budget) != 1 or not self.budget.keys() <= set(BUDGETS):
            raise ValueError(f"a budget is one of {', '.join(BUDGETS)}, not {self.budget}")
        if self.seeds < 1 or not self.variants:
            raise ValueError("a study needs at least one variant and one seed")
        for name, phases in self.variants.items():
            if not np.isclose(sum(phase.get("share", 1.0) for phase in phases), 1.0):
                raise ValueError(f"the shares of the phases of {name!r} must add up to 1")

    def terms(self) -> dict[str, Any]:
        """What runs must have in common to stand in one table."""
        name = f"{self.evaluate.__module__}:{self.evaluate.__qualname__}"
        terms = {"protocol": self.protocol, "evaluate": name, "budget": self.budget}
        return json.loads(json.dumps({**terms, "batches_counted": COUNTED}))

    def plan(self, variant: str, out: Path) -> list[dict[str, Any]]:
        """The phases of a variant in full, as JSON-able data, with paths relative to `out`."""
        phases = []
        for phase in self.variants[variant]:
            begins = {"init": phase.get("init", self.base.init)}
            record = dataclasses.replace(self.base, **changes_of(phase), **begins).record()
            record["share"] = phase.get("share", 1.0)
            phases.append({k: v for k, v in record.items() if k not in ("out", "seed", "steps")})
        return json.loads(json.dumps(phases).replace(json.dumps(f"{out}/")[1:-1], ""))


def compare(study_path: str | Path, out: str | Path) -> Path:
    """Do what is left to do of the study and write its tables to `out`; returns `out`.

    Several processes may share the work, one a core: each takes a run that no other one is at, and
    at the end waits for those of the others. ValueError where runs in `out` were evaluated in
    another way than this study says.
    """
    out = Path(out)
    recipe = load_recipe(study_path)
    if not hasattr(recipe, "study"):
        raise ValueError(f"{study_path} is not a study: it has no function `study`")
    for name in ("shared", "runs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with FileLock(out / "shared.lock"):
        study: Study = recipe.study(out / "shared")
    check_terms([*read_runs(out), {"name": "this study", "terms": study.terms()}])
    check_recipes(study, out)
    # A seed of all variants before the next, so that half a study is comparable.
    runs = [(name, seed) for seed in range(study.seeds) for name in study.variants]
    for wait in (False, True):
        for name, seed in runs:
            record = out / "runs" / f"{name}-{seed}.json"
            lock = FileLock(record.with_suffix(".lock"), timeout=-1 if wait else 0)
            with suppress(Timeout), lock:
                if not record.exists():
                    finish_run(study, name, seed, record)
    with FileLock(out / "tables.lock"):
        tabulate(out)
    return out


def finish_run(study: Study, name: str, seed: int, record: Path) -> None:
    """Train and evaluate one run, and write its record whole."""
    result = run_variant(study, name, seed, record.with_suffix(""))
    result["plan"] = study.plan(name, record.parents[1])
    result["place"] = list(study.variants).index(name)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    os.replace(part, record)


def run_variant(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train all phases of one variant, evaluate the result and draw its grid."""
    begin = str(study.variants[name][0].get("init", study.base.init)).replace("{seed}", str(seed))
    init, costs, records, seconds = begin, [], [], 0.0
    for index, phase in enumerate(study.variants[name]):
        placed = dataclasses.replace(study.base, out=str(folder / f"phase{index}"), seed=seed)
        run = dataclasses.replace(placed, **changes_of(phase), init=init)
        known = folder / f"phase{index}.json"
        if not known.exists():  # counted once: the steps that follow from it must never change
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(json.dumps(sample_flops(run)))
        flops = json.loads(known.read_text())
        steps = steps_of(study.budget, phase.get("share", 1.0), run.batch_size, flops)
        run = dataclasses.replace(run, steps=steps)
        init = str(train(run))
        costs.append((steps, steps * run.batch_size, flops))
        records.append(run.record())
        seconds += wall_seconds(Path(run.out))
    if study.draw is not None and seed == 0:
        save_grid(study.draw(Path(init), study.protocol), folder / "samples.png", columns=8)
    return {
        "name": f"{name}-{seed}",
        "variant": name,
        "seed": seed,
        "terms": study.terms(),
        "phases": [f"{name}-{seed}/phase{k}" for k in range(len(costs))],
        "costs": {
            "parameters": moved_parameters(Path(begin) if begin else None, Path(init)),
            "steps": sum(steps for steps, _, _ in costs),
            "flops_a_sample": sum(n * f for _, n, f in costs) / sum(n for _, n, _ in costs),
            "seconds": seconds,
        },
        "scores": study.evaluate(Path(init), study.protocol),
        "runs": records,
    }


def steps_of(budget: dict[str, float], share: float, batch_size: int, flops: float) -> int:
    """How many steps a share of the budget is."""
    ((kind, amount),) = budget.items()
    per_step = {"steps": 1.0, "samples": batch_size, "flops": batch_size * flops}[kind]
    return max(1, round(amount * share / per_step))


def moved_parameters(before: Path | None, after: Path) -> int:
    """Numbers in the .safetensors of `after` whose tensors are not as they were in `before`."""
    count = 0
    for path in sorted(after.glob("*.safetensors")):
        old = before / path.name if before is not None else path
        known = load_file(old) if before is not None and old.exists() else {}
        for name, tensor in load_file(path).items():
            same = name in known and torch.equal(known[name].to(tensor.dtype), tensor)
            count += 0 if same else tensor.numel()
    return count


def wall_seconds(folder: Path) -> float:
    """Seconds of training by the log; steps done twice, after a stop, count once."""
    entries = {e["step"]: e for e in read_log(folder) if "seconds_a_step" in e}
    steps = sorted(entries)
    widths = np.diff([0, *steps])
    return float(sum(w * entries[s]["seconds_a_step"] for s, w in zip(steps, widths, strict=True)))


def read_log(folder: Path) -> list[dict[str, float]]:
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_runs(out: Path) -> list[dict[str, Any]]:
    """The runs of a study that are evaluated, by seed and then as the study lists its variants."""
    found = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*-*.json"))]
    return sorted(found, key=lambda run: (run["seed"], run.get("place", 0)))


def check_terms(runs: Sequence[dict[str, Any]]) -> None:
    """ValueError unless all runs were trained and evaluated on the same terms."""
    for run in runs[1:]:
        for key, value in run["terms"].items():
            if runs[0]["terms"].get(key) != value:
                raise ValueError(
                    f"{runs[0]['name']} and {run['name']} cannot stand in one table: "
                    f"{key} is {runs[0]['terms'].get(key)} in one and {value} in the other"
                )


def check_recipes(study: Study, out: Path) -> None:
    """ValueError where a variant of the study has changed since a run of it in `out` was made."""
    for run in read_runs(out):
        was, now = run["plan"], []
        if run["variant"] in study.variants:
            now = study.plan(run["variant"], out)
        changed = [
            f"{key} was {a[key]} and is {b.get(key)}"
            for a, b in zip(was, now, strict=False)
            for key in a
            if a[key] != b.get(key) and not (key == "precision" and b.get(key) == "auto")
        ]
        if now and len(was) != len(now):
            changed = [f"it had {len(was)} phases and has {len(now)}"]
        if changed:
            raise ValueError(
                f"the study has changed since {run['name']} was trained: {'; '.join(changed)}. "
                "Give the new study another --out, or remove the runs that it changes"
            )


def changes_of(phase: dict[str, Any]) -> dict[str, Any]:
    """What a phase changes in the fields of the base recipe."""
    return {key: value for key, value in phase.items() if key not in ("share", "init")}


def tabulate(out: Path) -> None:
    """table.md, table.csv, curves.png and samples.png, from the runs in `out`."""
    runs = read_runs(out)
    check_terms(runs)
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    first = {run["seed"]: run["costs"]["seconds"] for run in runs if run["variant"] == variants[0]}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for run in runs:
        ratio = run["costs"]["seconds"] / first.get(run["seed"], float("nan"))
        values = {**run["costs"], "wall_ratio": ratio, **run["scores"]}
        rows[run["variant"]].append(values)
    scores = list(dict.fromkeys(key for run in runs for key in run["scores"]))
    columns = [*COSTS, *scores]
    cells = {
        name: [spread([run[c] for run in runs_of if c in run]) for c in columns]
        for name, runs_of in rows.items()
    }
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seeds", *(f"{c}{s}" for c in columns for s in ("", "_std"))])
        for name, row in cells.items():
            writer.writerow([name, len(rows[name]), *(f"{v:.6g}" for cell in row for v in cell)])
    lines = [" | ".join(["variant", "seeds", *columns]), "|".join(["---"] * (len(columns) + 2))]
    for name, row in cells.items():
        shown = (f"{m:.4g}" if not s else f"{m:.4g} ± {s:.2g}" for m, s in row)
        lines.append(" | ".join([name, str(len(rows[name])), *shown]))
    note = (
        f"Mean ± standard deviation over seeds; wall_ratio is to {variants[0]} of the same seed. "
    )
    note += f"Terms: `{json.dumps(runs[0]['terms'])}`\n"
    (out / "table.md").write_text("\n".join(f"| {line} |" for line in lines) + "\n\n" + note)
    draw_curves(out, runs)
    draw_samples(out, variants)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; NaN where there is nothing."""
    if not values:
        return float("nan"), 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw_curves(out: Path, runs: Sequence[dict[str, Any]]) -> None:
    """curves.png: a panel for each logged loss, against training FLOPs; a line for each run.

    A phase begins at the FLOPs of those before it. `main_loss`, a mixture of what the phase trains,
    stands for it only where nothing else is logged.
    """
    lines: dict[str, list[tuple[str, list[float], list[float]]]] = {}
    for run in runs:
        spent = 0.0
        for phase, recipe in zip(run["phases"], run["runs"], strict=True):
            folder = out / "runs" / phase
            a_step = json.loads(folder.with_suffix(".json").read_text()) * recipe["batch_size"]
            log = read_log(folder)
            keys = {k for e in log for k in e if k.endswith(("_nats", "_error", "_loss"))}
            for key in sorted(keys - {"main_loss"} or keys):
                points = {e["step"]: e[key] for e in log if key in e}  # a step done twice: the last
                if any(points.values()):  # all zero: the phase trains nothing of the kind
                    places = [spent + a_step * step for step in sorted(points)]
                    values = [points[step] for step in sorted(points)]
                    lines.setdefault(key, []).append((run["variant"], places, values))
            spent += a_step * recipe["steps"]
    names = list(dict.fromkeys(run["variant"] for run in runs))
    rows = (len(lines) + 1) // 2
    figure = Figure(figsize=(10, 0.6 + 2.6 * rows), dpi=100, layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for panel, key in zip(grid, sorted(lines), strict=False):
        for name, places, values in lines[key]:
            panel.plot(places, values, color=f"C{names.index(name)}", linewidth=0.8)
        panel.set(title=key, yscale="log", xlabel="training FLOPs", xlim=(0, None))
        panel.yaxis.set_major_formatter("{x:.2g}")
        panel.yaxis.set_minor_formatter("{x:.2g}")
    for panel in grid[len(lines) :]:
        panel.remove()
    marks = [Line2D([], [], color=f"C{k}", label=name) for k, name in enumerate(names)]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    figure.savefig(out / "curves.png")


def draw_samples(out: Path, variants: Sequence[str]) -> None:
    """samples.png: the grids of the first seed, one variant below the other."""
    grids = {name: out / "runs" / f"{name}-0" / "samples.png" for name in variants}
    pictures = {name: Image.open(path) for name, path in grids.items() if path.exists()}
    if pictures:
        heights = [picture.height / picture.width for picture in pictures.values()]
        figure = Figure(figsize=(8, 8 * sum(heights) + 0.4 * len(heights)), layout="constrained")
        panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, picture) in zip(panels, pictures.items(), strict=True):
            panel.imshow(picture, interpolation="nearest")
            panel.set_title(name, loc="left")
            panel.axis("off")
        figure.savefig(out / "samples.png")


Painter = Callable[[Sequence[str], int], Tensor]  # prompts, seed of the first -> (N, 3, H, W)


def scenes_scores(folder: Path, protocol: dict[str, Any]) -> dict[str, float]:
    """Scores of a model folder on held-out Scenes; a diffusion decoder in it does the drawing.

    protocol: "world", "n" (pictures of each of two held-out splits), "seed", "guidance",
    "temperature", "diffusion_guidance" and "diffusion_steps". units_an_image: codes and steps of a
    flow. generation_seen: of new scenes whose combinations are those of training;
    generation_seen_4x_steps: of these with four times as many steps; generation_seen_untrained: of
    these by a flow of random weights. latency_s: seconds for one picture alone, the least of three.
    understanding: accuracy of yes/no answers, of models that see. reconstruction_*: see
    `reconstruction`.
    """
    model, paint, units = painter(folder, protocol)
    scores = {
        "units_an_image": units,
        **generation_scores(paint, protocol),
        "generation_seen": generation_scores(paint, protocol, SPLITS[:1])["generation"],
        "latency_s": least_seconds(lambda: paint(["a red circle"], 0)),
    }
    by_flow = has_flow(folder, "text")
    if by_flow:
        longer = {**protocol, "diffusion_steps": 4 * protocol["diffusion_steps"]}
        again = generation_scores(painter(folder, longer)[1], protocol, SPLITS[:1])
        scores["generation_seen_4x_steps"] = again["generation"]
        random = generation_scores(painter(folder, protocol, False)[1], protocol, SPLITS[:1])
        scores["generation_seen_untrained"] = random["generation"]
    if model.model.vision is not None or model.model.config.pathway == "shared":
        asked = Protocol(n=protocol["n"], world=protocol["world"])
        tallies = [score_understanding(model, asked, s, protocol["seed"]) for s in SPLITS[1:]]
        scores["understanding"] = float(np.mean([tally.rate("yes_no") for tally in tallies]))
    return scores if by_flow else {**scores, **reconstruction(folder, model, protocol)}


def generation_scores(
    paint: Painter, protocol: dict[str, Any], splits: Sequence[str] = SPLITS[1:]
) -> dict[str, float]:
    """Share of pictures that the checker finds right, by task, and the mean of the tasks."""
    right: dict[str, list[bool]] = {}
    for split in splits:
        tasks = ("position",) if split == "triples" else TASKS  # as evaluation.scenes asks
        jobs = []
        for k in range(max(1, protocol["n"] // len(tasks)) * len(tasks)):
            task = tasks[k % len(tasks)]
            rng = np.random.default_rng((protocol["seed"], k, SPLITS.index(split)))
            scene = sample_scene(WORLDS[protocol["world"]], rng, split=split, task=task)
            jobs.append((task, task_prompt(scene, task, rng)))
        pixels = paint([words for _, words in jobs], protocol["seed"] * 100_003)
        for (task, words), picture in zip(jobs, to_levels(pixels), strict=True):
            right.setdefault(task, []).append(check(picture, words, protocol["world"]))
    by_task = {f"generation_{task}": float(np.mean(right[task])) for task in TASKS if task in right}
    return {"generation": float(np.mean(list(by_task.values()))), **by_task}


def reconstruction(folder: Path, model: UniMM, protocol: dict[str, Any]) -> dict[str, float]:
    """What becomes of `n` held-out pictures that are made codes and pictures again.

    psnr: mean, in decibels. checked: the share in which the checker finds all that the complete
    caption says. decode_s: seconds from codes to one picture, the least of three.
    """
    tokenizer, world = model.processor.image_tokenizer, WORLDS[protocol["world"]]
    assert tokenizer is not None
    decode = code_decoder(folder, model, protocol)
    made, captions = [], []
    for k in range(protocol["n"]):
        rng = np.random.default_rng((protocol["seed"], 992, k))
        scene = sample_scene(world, rng, split="pairs")
        made.append(model.processor.drawn_pixels(render(scene, world)))
        captions.append(describe(scene))
    pixels = torch.stack(made)
    codes = tokenizer.encode(pixels)
    drawn = decode(codes, 0)
    checked = [check(p, words, world) for p, words in zip(to_levels(drawn), captions, strict=True)]
    return {
        "reconstruction_psnr": float(psnr(drawn, pixels).mean()),
        "reconstruction_checked": float(np.mean(checked)),
        "decode_s": least_seconds(lambda: decode(codes[:1], 0)),
    }


def to_levels(pixels: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def least_seconds(call: Callable[[], Any]) -> float:
    """Of three calls."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def has_flow(folder: Path, condition: str) -> bool:
    """Whether the folder has a diffusion decoder of "text" or of "codes"."""
    return (folder / f"diffusion_{condition}.json").exists()


def scenes_samples(folder: Path, protocol: dict[str, Any]) -> Tensor:
    """Sixteen pictures of held-out prompts, the same for every model: (16, 3, H, W)."""
    prompts = []
    for k in range(16):
        rng = np.random.default_rng((protocol["seed"], 991, k))
        scene = sample_scene(WORLDS[protocol["world"]], rng, split="pairs")
        prompts.append(prompt(scene, rng))
    return painter(folder, protocol)[1](prompts, 0)


def painter(
    folder: Path, protocol: dict[str, Any], trained: bool = True
) -> tuple[UniMM, Painter, int]:
    """The model, its way of drawing, and how many codes and steps that takes; with a flow of random
    weights instead of the trained one where asked for."""
    model = UniMM.from_pretrained(folder)
    if not has_flow(folder, "text"):
        decode = code_decoder(folder, model, protocol)

        def by_codes(prompts: Sequence[str], seed: int) -> Tensor:
            requests = [
                Request(model.processor.encode([user(words)], "image"), "image", seed + k)
                for k, words in enumerate(prompts)
            ]
            settings = Settings(protocol["guidance"], protocol["temperature"])
            answers = model.engine.run(requests, settings)
            return decode(torch.tensor([answer.codes for answer in answers]), seed)

        steps = protocol["diffusion_steps"] if has_flow(folder, "codes") else 0
        return model, by_codes, model.processor.codes_per_image + steps
    from unimm.inference.diffusion import UniMMDiffusionPipeline

    pipeline = UniMMDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if not trained:
        torch.manual_seed(protocol["seed"])
        fresh = DiffusionDecoder(pipeline.decoder.config)
        pipeline.decoder.load_state_dict(fresh.state_dict())

    def by_diffusion(prompts: Sequence[str], seed: int) -> Tensor:
        guidance, steps = protocol["diffusion_guidance"], protocol["diffusion_steps"]
        return pipeline(list(prompts), guidance=guidance, steps=steps, seed=seed)

    return model, by_diffusion, protocol["diffusion_steps"]


def code_decoder(
    folder: Path, model: UniMM, protocol: dict[str, Any]
) -> Callable[[Tensor, int], Tensor]:
    """(codes (N, K), seed) -> pixels (N, 3, H, W), by the diffusion de-tokenizer where there is
    one in the folder, else by the image tokenizer's own decoder."""
    if not has_flow(folder, "codes"):
        return lambda codes, seed: model.processor.pixels(codes.tolist())
    from unimm.inference.diffusion import UniMMDiffusionPipeline

    pipeline = UniMMDiffusionPipeline.from_pretrained(folder, "codes")
    pipeline.set_progress_bar_config(disable=True)
    return lambda codes, seed: pipeline.decode(codes, steps=protocol["diffusion_steps"], seed=seed)
