"""A study of linear models: it takes seconds, and has all that a real one has."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model

from unimm.checkpoints.native import save_model
from unimm.config import load_recipe
from unimm.evaluation.compare import (
    Study,
    check_terms,
    compare,
    painter,
    scenes_samples,
    scenes_scores,
    steps_of,
    wall_seconds,
)
from unimm.model.decoder import Decoder
from unimm.model.diffusion import DiffusionConfig, DiffusionDecoder, save_diffusion
from unimm.training.cost import COUNTED, count_flops

ROOT = Path(__file__).parent.parent
STUDY = textwrap.dedent('''
    """Two widths of a linear model, with the steps counted in FLOPs."""

    import numpy as np
    import torch
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    from torch import nn

    from unimm.config import Run, Source
    from unimm.evaluation.compare import Study
    from unimm.training.trainer import Parts

    STOP = Path(__file__).with_name("stop")  # holds how many more steps may be taken


    def numbers(run):
        class Numbers:
            def __getitem__(self, i):
                rng = np.random.default_rng((run.seed, i))
                return rng.normal(size=4).astype(np.float32)
        return Numbers()


    def setup(run):
        wide = run.options["wide"]
        model = nn.Sequential(nn.Linear(4, wide, bias=False), nn.Linear(wide, 1, bias=False))
        if run.init:
            model.load_state_dict(load_file(run.init + "/model.safetensors"))
        save = lambda out: save_file(model.state_dict(), out / "model.safetensors")
        return Parts(model, lambda items: torch.tensor(np.stack(items)), None, save)


    def step(model, batch, total, run):
        if STOP.exists():
            left = int(STOP.read_text()) - 1
            STOP.write_text(str(left))
            if left < 0:
                raise KeyboardInterrupt
        yield "main", (model(batch) - batch.sum(1, keepdim=True)).square().mean() / total, {}


    def evaluate(folder, protocol):
        a, b = load_file(folder / "model.safetensors").values()
        x = torch.randn(protocol["n"], 4, generator=torch.Generator().manual_seed(0))
        return {"error": float((x @ a.T @ b.T - x.sum(1, keepdim=True)).square().mean())}


    def draw(folder, protocol):
        return torch.zeros(3, 3, 8, 8)


    def study(shared):
        base = Run(
            step=step, train=((r".*", 1e-2),), data={"a": Source(numbers)}, steps=1, batch_size=4,
            setup=setup, precision="float32", log_every=1, save_every=2, options={"wide": 8},
        )
        frozen = ((r"0.*", None), (r".*", 1e-2))
        return Study(
            base=base,
            variants={
                "narrow": [{}],
                "wide": [{"options": {"wide": 32}}],
                "phases": [{"share": 0.25}, {"share": 0.75, "train": frozen}],
            },
            budget={"flops": BUDGET}, seeds=2, protocol={"n": N}, evaluate=evaluate, draw=draw,
        )
''')  # fmt: skip

# A product (4, 4) @ (4, 8) has 2·4·4·8 FLOPs; the first layer needs no gradient of its input.
NARROW = 2 * 4 * 4 * 8 * 2 + 2 * 4 * 8 * 3


def written(folder, n=64, budget=16 * NARROW):
    path = folder / "study.py"
    path.write_text(STUDY.replace("N}", f"{n}}}").replace("BUDGET", str(budget)))
    return path


def rows_of(out):
    with (out / "table.csv").open() as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return compare(written(folder), folder / "out")


def test_the_table_has_every_variant_on_one_budget(finished):
    rows = rows_of(finished)
    assert list(rows) == ["narrow", "wide", "phases"]
    assert {row["seeds"] for row in rows.values()} == {"2"}
    assert float(rows["narrow"]["flops_a_sample"]) == NARROW / 4
    assert [float(rows[name]["steps"]) for name in ("narrow", "wide")] == [16, 4]
    assert float(rows["narrow"]["parameters"]) == 4 * 8 + 8
    assert float(rows["wide"]["parameters"]) == 4 * 32 + 32
    assert float(rows["phases"]["steps"]) == 4 + 22  # a frozen layer costs less: more steps
    assert float(rows["narrow"]["wall_ratio"]) == 1
    assert float(rows["narrow"]["error_std"]) > 0
    errors = [
        json.loads((finished / f"runs/narrow-{k}.json").read_text())["scores"]["error"]
        for k in (0, 1)
    ]
    assert float(rows["narrow"]["error"]) == pytest.approx(np.mean(errors), rel=1e-4)
    assert float(rows["narrow"]["error_std"]) == pytest.approx(np.std(errors, ddof=1), rel=1e-4)
    text = (finished / "table.md").read_text()
    assert "±" in text and text.count("\n| ") == 4
    for name in ("curves.png", "samples.png"):
        assert (finished / name).stat().st_size > 100, name


def test_a_study_that_is_killed_goes_on_to_the_same_table(finished, tmp_path):
    path, kills = written(tmp_path), 0
    for steps in (5, 9, 1000):
        (tmp_path / "stop").write_text(str(steps + 2 * COUNTED))  # counting FLOPs takes steps too
        try:
            compare(path, tmp_path / "out")
        except KeyboardInterrupt:
            kills += 1
            assert not (tmp_path / "out/table.md").exists()
    assert kills == 2
    whole, cut = rows_of(finished), rows_of(tmp_path / "out")
    for name, row in whole.items():
        for key, value in row.items():
            if "wall" not in key:
                assert cut[name][key] == value, (name, key)
    left = int((tmp_path / "stop").read_text())
    written_at = (tmp_path / "out/runs/wide-1.json").stat().st_mtime_ns
    compare(path, tmp_path / "out")
    assert int((tmp_path / "stop").read_text()) == left  # nothing is trained again,
    assert (tmp_path / "out/runs/wide-1.json").stat().st_mtime_ns == written_at  # nor evaluated


def test_two_processes_share_a_study(finished, tmp_path):
    path = written(tmp_path)
    path.write_text(
        path.read_text().replace(
            "def evaluate(folder, protocol):",
            "def evaluate(folder, protocol):\n"
            "    import os, time; (folder / 'by').open('a').write(f'{os.getpid()} ')\n"
            "    for _ in range(300):  # until both are at work\n"
            "        if len(list(folder.parent.parent.glob('*/*/by'))) > 1: break\n"
            "        time.sleep(0.1)",
        )
    )
    command = [sys.executable, "-m", "unimm.cli", "compare", str(path), "-o", str(tmp_path / "out")]
    workers = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    by = [file.read_text().split() for file in (tmp_path / "out/runs").glob("*/*/by")]
    assert len(by) == 6 and all(len(one) == 1 for one in by)  # no run twice
    assert {int(one) for (one,) in by} == {worker.pid for worker in workers}
    whole, shared = rows_of(finished), rows_of(tmp_path / "out")
    for name, row in whole.items():
        assert {k: v for k, v in shared[name].items() if "wall" not in k} == {
            k: v for k, v in row.items() if "wall" not in k
        }


def test_runs_of_different_protocols_are_not_tabulated(finished, tmp_path):
    other = written(tmp_path, n=32)
    with pytest.raises(ValueError, match="protocol"):
        compare(other, finished)
    with pytest.raises(ValueError, match="budget"):
        compare(written(tmp_path, budget=99), finished)
    old = tmp_path / "old/runs/narrow-0.json"  # of a version that counted otherwise
    old.parent.mkdir(parents=True)
    record = json.loads((finished / "runs/narrow-0.json").read_text())
    del record["place"], record["plan"], record["terms"]["batches_counted"]
    old.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="batches_counted"):
        compare(written(tmp_path), tmp_path / "old")
    runs = [{"name": n, "terms": {"protocol": p}} for n, p in (("a", {"n": 1}), ("b", {"n": 1}))]
    check_terms(runs)
    runs[1]["terms"]["protocol"] = {"n": 2}
    with pytest.raises(ValueError, match="a and b"):
        check_terms(runs)


def test_a_changed_recipe_does_not_go_into_the_old_table(finished, tmp_path):
    path = written(tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    compare(path, moved)  # in another place it is the same study
    same = path.read_text()
    for old, new, told in (
        ('"wide": 32', '"wide": 16', "wide-0 was trained: options was .*32.* and is .*16"),
        ('"train": frozen', '"clip": 0.5', "phases-0 was trained: train was"),
        ('"wide": [{}', '"wide": [{"share": 0.5}, {"share": 0.5}', "1 phases and has 2"),
    ):
        path.write_text(
            same.replace('[{"options": {"wide": 32}}]', "[{}]") if "[{" in old else same
        )
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(ValueError, match=told):
            compare(path, moved)


def test_budgets():
    assert steps_of({"steps": 10}, 0.5, 8, 1.0) == 5
    assert steps_of({"samples": 800}, 1.0, 8, 1.0) == 100
    assert steps_of({"flops": 1e6}, 0.5, 10, 100.0) == 500
    common = dict(base=None, seeds=1, protocol={}, evaluate=steps_of)
    with pytest.raises(ValueError, match="budget"):
        Study(variants={"a": [{}]}, budget={"minutes": 3}, **common)
    with pytest.raises(ValueError, match="add up"):
        Study(variants={"a": [{"share": 0.5}]}, budget={"steps": 3}, **common)
    with pytest.raises(ValueError, match="at least one"):
        Study(variants={}, budget={"steps": 3}, **common)


def test_flops_of_a_decoder_are_those_of_the_formula():
    config = tiny_config(heads=4, kv_heads=4).decoder
    decoder = Decoder(config)
    x, positions = torch.randn(2, 10, config.dim), torch.arange(10)[None]
    c, width = config, config.heads * config.head_dim
    matrices = c.layers * (4 * c.dim * width + 3 * c.dim * c.hidden)
    attention = c.layers * 2 * 2 * 10 * 10 * width  # scores and values, two rows
    with torch.no_grad():
        assert count_flops(lambda: decoder(x, positions)) == 2 * (20 * matrices + attention)


def test_wall_time_counts_a_step_once(tmp_path):
    entries = [(2, 1.0), (4, 2.0), (4, 3.0), (6, 1.0)]  # the second 4 came after a stop
    lines = [json.dumps({"step": s, "seconds_a_step": t}) for s, t in entries]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, json.dumps({"step": 6, "psnr": 3.0})]))
    assert wall_seconds(tmp_path) == 2 * 1.0 + 2 * 3.0 + 2 * 1.0


def test_one_protocol_scores_both_ways_of_drawing(tmp_path, monkeypatch):
    from unimm.evaluation import compare as module

    save_model(tmp_path / "model", *tiny_model())
    protocol = {
        "world": "scenes-mini", "n": 12, "seed": 3, "guidance": 1.0, "temperature": 1.0,
        "diffusion_guidance": 1.0, "diffusion_steps": 2,
    }  # fmt: skip
    asked, steps, real = [], [], module.painter
    monkeypatch.setattr(module, "check", lambda p, words, world: asked.append(words) or True)
    monkeypatch.setattr(
        module,
        "painter",
        lambda f, p, *a: steps.append((p["diffusion_steps"], *a)) or real(f, p, *a),
    )
    for way, unit in (("codes", 16), ("diffusion", 2)):
        asked.append(way)
        if way == "diffusion":
            config = DiffusionConfig("text", 32, None, 16, 3, 4, 32, 1, 2)
            save_diffusion(tmp_path / "model", DiffusionDecoder(config))
        scores = scenes_scores(tmp_path / "model", protocol)
        assert scores["units_an_image"] == unit and scores["latency_s"] > 0
        assert scores["generation"] == 1 and scores["generation_position"] == 1
        assert 0 <= scores["understanding"] <= 1
        rebuilt = {"reconstruction_psnr", "reconstruction_checked", "decode_s"}
        assert (rebuilt & scores.keys()) == (rebuilt if way == "codes" else set())
        assert ("generation_seen_4x_steps" in scores) == (way == "diffusion")
        pictures = scenes_samples(tmp_path / "model", protocol)
        assert pictures.shape == (16, 3, 16, 16) and pictures.abs().max() <= 1
    half = asked.index("diffusion")
    by_codes, by_flow = asked[1:half], asked[half + 1 :]
    held_out, seen = by_flow[:24], by_flow[24:36]  # 12 of each split
    assert by_flow[36:] == seen + seen and steps == [(2,), (2,), (2,), (8,), (2, False), (2,)]
    assert by_codes[:36] == held_out + seen and len(set(held_out)) > 5
    assert not set(held_out[:12]) & set(seen)
    assert len(by_codes) == 36 + 12  # captions of what was rebuilt


def test_codes_are_decoded_by_the_diffusion_detokenizer_of_the_folder(tmp_path):
    save_model(tmp_path / "model", *tiny_model())
    protocol = {"world": "scenes-mini", "diffusion_steps": 2, "guidance": 1.0, "seed": 0}
    protocol["temperature"] = 1.0
    model, paint, _ = painter(tmp_path / "model", protocol)
    convolved = paint(["a red circle"], 3)
    save_diffusion(
        tmp_path / "model",
        DiffusionDecoder(DiffusionConfig("codes", 4, (4, 4), 16, 3, 4, 32, 1, 2)),
    )
    model, paint, units = painter(tmp_path / "model", protocol)
    drawn = paint(["a red circle"], 3)
    assert units == 16 + 2 and drawn.shape == convolved.shape
    assert torch.equal(drawn, paint(["a red circle"], 3)) and not torch.equal(drawn, convolved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, variants, units",
    [
        ("pathways", ["decoupled", "shared", "diffusion"], [16, 16, 2]),
        ("tokenizers", ["vq", "fsq", "simvq", "vq_diffusion"], [16, 16, 16, 18]),
        ("stages", ["three_stages", "one_stage", "frozen_decoder"], [16] * 3),
    ],
)
def test_the_shipped_studies_run(tmp_path, monkeypatch, name, variants, units):
    """Each made so small that it shows only that all of it works."""
    recipe = load_recipe(ROOT / f"train/study_{name}.py")
    pathways = getattr(recipe, "PATHWAYS", recipe)
    small = {"store": 160, "image_tokenizer": 3, "siglip": 2, "words": 300}
    monkeypatch.setattr(pathways, "PIECES", small)
    monkeypatch.setattr(pathways, "PROTOCOL", {**pathways.PROTOCOL, "n": 6, "diffusion_steps": 2})
    for module in {recipe, pathways}:
        monkeypatch.setattr(module, "FLOPS", 4e11, raising=False)
    if name == "tokenizers":
        monkeypatch.setattr(recipe, "STORE", 160)
        monkeypatch.setattr(recipe, "WORDS", 300)
    if name == "stages":
        monkeypatch.setattr(recipe, "STAGE0_STEPS", 2)
    monkeypatch.setattr("unimm.evaluation.compare.load_recipe", lambda path: recipe)
    study = recipe.study
    monkeypatch.setattr(recipe, "study", lambda shared: dataclasses.replace(study(shared), seeds=1))
    rows = rows_of(compare(f"study_{name}.py", tmp_path))
    assert list(rows) == variants
    if name == "pathways":  # samples a step are the same in all phases of this one alone
        spent = [float(row["flops_a_sample"]) * float(row["steps"]) * 64 for row in rows.values()]
        assert all(3e11 < flops < 5e11 for flops in spent)  # steps are whole
    assert [float(row["units_an_image"]) for row in rows.values()] == units
    moved = {variant: float(row["parameters"]) for variant, row in rows.items()}
    assert all(count > 0 for count in moved.values())
    if name == "stages":
        assert moved["frozen_decoder"] < moved["one_stage"] == moved["three_stages"]
    if name == "tokenizers":
        rebuilt = {variant: float(row["reconstruction_psnr"]) for variant, row in rows.items()}
        assert rebuilt["vq_diffusion"] != rebuilt["vq"] and (tmp_path / "curves.png").exists()
