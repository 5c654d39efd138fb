"""The Scenes benchmark: an oracle gets everything, a liar nothing, and the protocol is kept."""

import json

import numpy as np
import pytest
from conftest import tiny_model

import unimm.evaluation.scenes as bench
from unimm.cli import main
from unimm.data.scenes import EDITS, WORLDS, describe, is_held_out, render
from unimm.pipeline import UniMM


class Oracle:
    """Knows every scene that the benchmark makes, in order; `lie` answers about the next one."""

    sampling = {"world": "scenes-mini"}

    def __init__(self, monkeypatch, lie=False):
        self.lie, self.drawn, self.asked, self.after = lie, [], {}, []
        self.processor = None
        sample_scene, sample_edit, chosen = bench.sample_scene, bench.sample_edit, bench._chosen

        def watched(world, rng, **options):
            scene = sample_scene(world, rng, **options)
            if "task" in options:
                self.drawn.append(scene)
            else:
                picture = render(scene, world).tobytes()
                self.asked[picture, "describe the picture"] = describe(scene)
                self.scene = scene
            return scene

        def questions(scene, world, rng):
            found = chosen(scene, world, rng)
            for q in found:
                self.asked[render(scene, world).tobytes(), q.text] = q.answer
            return found

        def edited(world, rng, split):
            before, words, after = sample_edit(world, rng, split)
            self.after.append(after)
            return before, words, after

        def draw(model, talks, settings, seed, protocol):
            scenes = self.after if settings.guidance == 7.5 else self.drawn
            scenes = scenes[1:] + scenes[:1] if lie else scenes
            yield from [render(scene, "scenes-mini") for scene in scenes]
            scenes = self.after if settings.guidance == 7.5 else self.drawn
            scenes.clear()

        monkeypatch.setattr(bench, "sample_scene", watched)
        monkeypatch.setattr(bench, "_chosen", questions)
        monkeypatch.setattr(bench, "sample_edit", edited)
        monkeypatch.setattr(bench, "draw", draw)
        self.sampling = {"world": "scenes-mini", "guidance": 2.0, "edit_guidance": 7.5}

    def edits(self, pairs):
        return [[] for _ in pairs]

    def ask_all(self, pairs, tries):
        answers = [self.asked[picture.tobytes(), question] for picture, question in pairs]
        flip = {"yes": "no", "no": "yes"}
        return [flip.get(a, "a blue nothing") for a in answers] if self.lie else answers


def test_an_oracle_has_every_score_one(monkeypatch):
    result = bench.evaluate(Oracle(monkeypatch), n=36, seeds=2)
    for group in ("held_out", "seen"):
        for kind, scores in result[group].items():
            assert set(scores.values()) == {1.0}, (group, kind, scores)
        assert set(bench.TASKS) < set(result[group]["generation"])
        assert {"overall", "open", "caption_exact", "accuracy_plus"} < set(
            result[group]["understanding"]
        )
    protocol = result["protocol"]
    assert protocol["n"] == 36 and protocol["seeds"] == 2 and protocol["guidance"] == 2.0
    assert set(protocol["splits"]) == {"train", "pairs", "triples"}
    assert protocol["spread"]["held_out.generation"] == 0
    json.dumps(result)


def test_a_liar_has_every_score_near_zero(monkeypatch):
    result = bench.evaluate(Oracle(monkeypatch, lie=True), n=36)
    for group in ("held_out", "seen"):
        understanding = result[group]["understanding"]
        assert all(v == 0 for k, v in understanding.items()), understanding
        assert result[group]["generation"]["overall"] < 0.4  # some scenes fit two prompts
        assert result[group]["edits"]["overall"] == 0


def test_the_splits_are_what_they_say(monkeypatch):
    seen = {}
    oracle = Oracle(monkeypatch)
    inner = bench.sample_scene
    monkeypatch.setattr(bench, "sample_scene", lambda w, r, **o: note(inner(w, r, **o), o))

    def note(scene, options):
        seen.setdefault(options["split"], []).append(is_held_out(scene))
        return scene

    bench.evaluate(oracle, n=24)
    assert set(seen["pairs"]) == {"pairs"} and set(seen["triples"]) == {"triples"}
    assert set(seen["train"]) == {None}


def test_questions_come_in_pairs_of_yes_and_no():
    for k in range(50):
        rng = np.random.default_rng(k)
        scene = bench.sample_scene(WORLDS["scenes"], rng, split="train")
        questions = bench._chosen(scene, "scenes", rng)
        pairs = {}
        for q in questions:
            if q.yes_no:
                pairs.setdefault(q.pair, []).append(q.answer)
        assert 1 <= len(pairs) <= 2
        assert all(sorted(answers) == ["no", "yes"] for answers in pairs.values())


def test_a_real_model_runs_through_and_is_reproducible(tmp_path, capsys):
    model = UniMM(*tiny_model(max_positions=1024), {"world": "scenes-mini", "guidance": 2.0})
    first, second = (bench.evaluate(model, n=6) for _ in range(2))
    assert first == second
    two, other = bench.evaluate(model, n=6, seeds=2), bench.evaluate(model, n=6, first_seed=1001)
    assert two["items"] == [*first["items"], *other["items"]] and two["items"][0] != two["items"][1]
    blind = bench.evaluate(model, n=6, blind=True)
    assert blind["protocol"]["blind"] and blind["protocol"]["counts"] == first["protocol"]["counts"]
    model.sampling["edit_located"] = True
    asked, texts = [], model._texts

    def watched(talks, *how):
        asked.extend(talk[-1]["content"][-1]["text"] for talk in talks)
        return texts(talks, *how)

    model._texts = watched
    for hidden in (True, False):  # blind, nothing may say where something is
        bench.evaluate(model, n=6, blind=hidden)
        assert any(said.startswith("where: ") for said in asked) != hidden
    model.sampling["edit_located"] = False
    model.save_pretrained(tmp_path / "m")
    words = ["eval", "scenes", "--n", "6", "--model", str(tmp_path / "m")]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(capsys.readouterr().out)


def test_best_of_counts_the_picture_that_the_model_chooses(monkeypatch):
    """Of three tries the second is right; a judge that sees takes it, one that errs does not."""
    oracle, seeds = Oracle(monkeypatch), []

    def draw(model, talks, settings, seed, protocol):
        if settings.guidance == 2.0:
            seeds.append(seed)
        right = len(seeds) % 3 == 2 or settings.guidance == 7.5
        scenes = oracle.after if settings.guidance == 7.5 else oracle.drawn
        yield from [
            render(s, "scenes-mini") for s in (scenes if right else scenes[1:] + scenes[:1])
        ]
        if len(seeds) % 3 == 0 or settings.guidance == 7.5:
            scenes.clear()

    def judge(sign):
        return lambda model, processor, pictures, prompts: [
            sign * bench.check(picture, words, "scenes-mini")
            for picture, words in zip(pictures, prompts, strict=True)
        ]

    oracle.model = None
    monkeypatch.setattr(bench, "draw", draw)
    for sign, low, high in ((1.0, 1.0, 1.0), (-1.0, 0.0, 0.4)):
        monkeypatch.setattr(bench, "agreement", judge(sign))
        result = bench.evaluate(oracle, n=36, best_of=3)
        assert low <= result["seen"]["generation"]["overall"] <= high
        edits = result["seen"]["edits"]
        assert set(edits.values()) == {1.0} and {*edits} <= {"overall", *EDITS} and len(edits) > 3
        assert result["protocol"]["best_of"] == 3
    assert seeds[0] == 1000 * 100_003 and len(set(seeds)) == 3  # the first try is that of best_of=1


@pytest.mark.parametrize("words", [["--n", "0"], ["--n", "-3"], ["--best-of", "0"]])
def test_n_is_checked(words, capsys):
    assert main(["eval", "scenes", *words]) == 2
    assert "1 or more" in capsys.readouterr().err


def test_intervals_know_that_questions_of_a_scene_hang_together():
    """Ten copies of each answer are no more evidence than one."""
    rng = np.random.default_rng(0)
    once, often = bench.Tally(), bench.Tally()
    for k in range(400):
        right = rng.random() < 0.3
        once.add("x", k, right)
        for _ in range(10):
            often.add("x", k, right)
    p = once.rate("x")
    assert once.variance("x") == pytest.approx(p * (1 - p) / 400)
    assert often.variance("x") == pytest.approx(once.variance("x"))
    loose = bench.Tally()
    for k in range(4000):
        loose.add("x", k // 10, k % 10 < 3)  # every scene is the same
    assert loose.variance("x") == pytest.approx(0, abs=1e-12)


def test_intervals_are_those_of_repeated_runs():
    """The stated half-width against the spread of the figure itself, over 300 simulated runs."""
    rng, figures, widths = np.random.default_rng(1), [], []
    for _ in range(300):
        run = {s: {k: bench.Tally() for k in bench.HEADS} for s in ("train", "pairs", "triples")}
        for split, kinds in run.items():
            for t, task in enumerate(bench.TASKS if split != "triples" else ("position",)):
                for k in range(20):
                    kinds["generation"].add(task, k, rng.random() < 0.2 + 0.1 * t)
            kinds["understanding"].add("yes_no", 0, 1)
            kinds["edits"].add("edit", 0, 1)
        figures.append(bench.scores(run)["held_out"]["generation"]["overall"])
        widths.append(bench.interval([run])["held_out.generation"])
    assert np.mean(widths) == pytest.approx(1.96 * np.std(figures), rel=0.15)


def test_paired_differences(monkeypatch, tmp_path, capsys):
    right = bench.evaluate(Oracle(monkeypatch), n=36)
    monkeypatch.undo()
    wrong = bench.evaluate(Oracle(monkeypatch, lie=True), n=36, before=right["items"])
    assert wrong["paired"]["change"]["held_out.understanding"] == -1
    assert wrong["paired"]["interval95"]["held_out.understanding"] == 0
    change = wrong["paired"]["change"]["seen.generation"]
    assert change == pytest.approx(wrong["seen"]["generation"]["overall"] - 1, abs=1e-4)
    half = [{s: {k: {n: [(i, r if j % 2 else 0) for j, (i, r) in enumerate(items)]
             for n, items in names.items()} for k, names in kinds.items()}
             for s, kinds in run.items()} for run in right["items"]]  # fmt: skip
    found = bench.paired(half, right["items"])
    assert found["change"]["seen.generation"] == pytest.approx(0.5, abs=0.01)
    assert 0.1 < found["interval95"]["seen.generation"] < 0.25  # 1.96 * 0.5 / 6
    for other in ([], [{"train": {}}]):
        with pytest.raises(ValueError, match="same"):
            bench.paired(other, right["items"])


def test_the_command_compares_two_models(tmp_path, capsys):
    UniMM(*tiny_model(max_positions=1024), {"world": "scenes-mini"}).save_pretrained(tmp_path / "m")
    words = ["eval", "scenes", "--n", "6", "--model", str(tmp_path / "m")]
    items = str(tmp_path / "items.json")
    assert main([*words, "--items", items]) == 0
    capsys.readouterr()
    assert main([*words, "--before", items]) == 0
    assert set(json.loads(capsys.readouterr().out)["paired"]["change"].values()) == {0.0}
    (tmp_path / "items.json").write_text("{")
    assert main([*words, "--before", items]) == 2
    assert "not valid JSON" in capsys.readouterr().err
