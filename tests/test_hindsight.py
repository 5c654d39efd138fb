"""What a wrong picture shows, and what is learned from it: prompts that are true of it, pairs of
the asked prompt and the true one, edits, preferences whose rejected answer has its own prompt."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model

from unimm.checkpoints.native import save_model
from unimm.cli import main
from unimm.config import Source, load_recipe
from unimm.data.places import around
from unimm.data.processor import assistant, user
from unimm.data.scenes import (
    TASKS,
    WORLDS,
    Spec,
    edit_kind,
    from_array,
    held_out_pair,
    is_held_out,
    nearest,
    parse,
    plain,
    prompt,
    render,
    sample_scene,
    satisfies,
    task_prompt,
)
from unimm.model.unified import CODE
from unimm.pipeline import UniMM
from unimm.training import preferences as made
from unimm.training.dpo import (
    cached_reference,
    collate_pairs,
    encode_pair,
    read_preferences,
    row_key,
)
from unimm.training.dpo import preferences as source

WORLD, MINI = WORLDS["scenes"], WORLDS["scenes-mini"]


def scene_of(words, world=WORLD, tries=20_000):
    spec = parse(words)
    count = sum(group[0] for group in spec.groups)
    for k in range(tries):
        scene = sample_scene(world, np.random.default_rng((9, k)), count=count)
        if satisfies(scene, spec):
            return scene
    raise AssertionError(words)


def drawn(seed):
    codes = np.random.default_rng(seed).integers(0, 32, 16).tolist()
    return {"role": "assistant", "content": [{"type": "image", "codes": codes}]}


# ---------------------------------------------------------------------------- in words


@pytest.mark.parametrize(
    "asked, shown, wanted",
    [
        ("a red star", "a blue star", "a blue star"),
        ("a star", "a blue star", "a star"),
        ("a star and a circle", "two red stars", "two stars"),
        ("two red stars", "three red stars", "three red stars"),
        ("two stars", "a red star", "a star"),
        ("a small star", "a large ring", "a large ring"),
        ("a red star and a circle", "a red circle and a blue star", "a blue star and a circle"),
        ("a star left of a circle", "a star right of a circle", "a star right of a circle"),
        ("a star on gray", "a red ring on a white background", "a ring on a white background"),
        ("a star left of a circle", "two red stars", None),
        ("a star", "a star and a ring", None),
        ("a star and a ring", "a star", None),
        ("two stars", "a star and a ring", None),
    ],
)  # fmt: skip
def test_the_nearest_prompt_that_is_true(asked, shown, wanted):
    found = nearest(parse(asked), scene_of(shown))
    assert (found and plain(found)) == wanted


def test_nearest_is_true_says_as_much_and_is_understood():
    changed = 0
    for k in range(400):
        rng = np.random.default_rng(k)
        task = TASKS[k % 6]
        scene, other = (sample_scene(WORLD, rng, task=task) for _ in range(2))
        spec = parse(prompt(scene, rng) if k % 2 else task_prompt(scene, task, rng))
        assert nearest(spec, scene) == spec
        assert parse(plain(spec)) == spec
        found = nearest(spec, other)
        if found is None:
            continue
        changed += found != spec
        assert satisfies(other, found) and parse(plain(found)) == found
        assert len(found.relations) == len(spec.relations)
        assert (found.background is None) == (spec.background is None)
        if len(found.groups) == len(spec.groups):
            for new, old in zip(found.groups, spec.groups, strict=True):
                assert [value is None for value in new] == [value is None for value in old]
    assert changed > 200


def test_what_cannot_be_said():
    scene = scene_of("a red star")
    unknown = replace(scene, objects=(replace(scene.objects[0], shape="unknown"),))
    assert nearest(parse("a blue star"), unknown) is None
    assert nearest(parse("five red stars"), replace(scene, objects=scene.objects * 7)) is None
    three = Spec(((1, None, None, "star"),) * 3, ((0, "above", 1),))
    with pytest.raises(ValueError, match="no plain words"):
        plain(three)


# ---------------------------------------------------------------------------- pairs


@pytest.fixture
def tiny_unimm(tmp_path):
    model = UniMM(*tiny_model(), {"world": "scenes-mini", "guidance": 1.5})
    model.save_pretrained(tmp_path / "tiny")
    return model


def texts(row):
    return [made.words_of(row[name]) for name in ("prompt", "rejected_prompt")]


def test_wrong_pictures_are_pairs_of_their_prompts(tiny_unimm, monkeypatch, tmp_path):
    shown = ["a red circle", "a red square", "a blue circle", "a red circle"]
    shown.append("a red circle and a green square")
    pictures = [render(scene_of(words, MINI), MINI) for words in shown]
    monkeypatch.setattr(tiny_unimm, "pictures", lambda codes: pictures)
    answers = [[drawn(k)] for k in range(5)]
    row = {"id": "a", "prompt": [user("paint a red circle")], "answers": answers}
    pairs = list(made.hindsight_pairs(tiny_unimm, [row], each=1))
    assert [texts(pair) for pair in pairs] == [
        ["a red square", "a red circle"],
        ["a blue circle", "a red circle"],
        ["a red circle", "a red square"],
    ]
    assert [pair["chosen"] == pair["rejected"] for pair in pairs] == [True] * 3
    assert [pair["chosen"] for pair in pairs] == [row["answers"][k] for k in (1, 2, 0)]
    path = tmp_path / "p.jsonl"
    report = made.choose_pairs(tiny_unimm, [row], made.checker_judge, path, 0.0, 1, hindsight=True)
    assert report["pairs"] == len(read_preferences(path)) == 4


def test_nothing_that_is_held_out_is_learned(tiny_unimm, monkeypatch, tmp_path):
    """Not of wrong pictures, not of right ones, which may be so where the prompt leaves it open."""
    for k in range(999):
        held = sample_scene(MINI, np.random.default_rng(k), split="pairs", count=1)
        o = held.objects[0]
        color = next(c for c in MINI.colors if c != o.color)
        if is_held_out(replace(held, objects=(replace(o, color=color),))) is None:
            break
    other = next(s for s in MINI.shapes if s != o.shape and not held_out_pair(s, "green"))
    wrong = render(scene_of(f"a green {other}", MINI), MINI)
    monkeypatch.setattr(tiny_unimm, "pictures", lambda codes: [render(held, MINI), wrong])
    for words, pairs in ((f"a {color} {o.shape}", 1), (f"a {o.shape}", 1)):
        row = {"id": "a", "prompt": [user(words)], "answers": [[drawn(1)], [drawn(2)]]}
        found = list(made.hindsight_pairs(tiny_unimm, [row]))
        assert [pair["chosen"] for pair in found] == [row["answers"][1]] * pairs
        with pytest.raises(ValueError, match="no preferences"):
            made.choose_pairs(tiny_unimm, [row], made.checker_judge, tmp_path / "p.jsonl")
        by_hand = lambda model, rows: [[1.0, 0.0]]  # noqa: E731
        with pytest.raises(ValueError, match="no preferences"):
            made.choose_pairs(tiny_unimm, [row], by_hand, tmp_path / "p.jsonl")


def test_edits_are_judged_by_the_scene_that_they_make(tiny_unimm, monkeypatch, tmp_path):
    rows = made.scenes_edits(tiny_unimm, 4, "scenes-mini", seed=3)
    how = made.Sampling(3, guidance=1.0)
    found = made.sample_candidates(tiny_unimm, rows, tmp_path / "c.jsonl", how)
    assert [row["scenes"] for row in found] == [row["scenes"] for row in rows]
    assert found == made.sample_candidates(tiny_unimm, rows, tmp_path / "c.jsonl", how)
    before, after = (from_array(np.asarray(a, np.float32)) for a in rows[0]["scenes"])
    gold = tiny_unimm.processor.codes(render(after, MINI)).tolist()
    assert [made.codes_of(row["answers"][0]) for row in (rows[0], found[0])] == [gold, gold]
    assert 1 < len(found[0]["answers"]) <= 4
    for scene in (before, after):
        assert is_held_out(scene) is None
    picture = tiny_unimm.processor.codes(render(before, MINI)).tolist()
    (words, part) = rows[0]["prompt"][0]["content"]
    assert part["codes"] == picture and words["text"]
    pictures = [render(scene, MINI) for scene in (before, after, after, after)]
    monkeypatch.setattr(tiny_unimm, "pictures", lambda codes: pictures[: len(codes)])
    assert made.checker_judge(tiny_unimm, found[:1]) == [
        [0.0, 1.0, 1.0, 1.0][: len(found[0]["answers"])]
    ]
    assert list(made.hindsight_pairs(tiny_unimm, found)) == []
    rows = [{**found[0], "answers": found[0]["answers"][:2]}]
    scored = lambda model, rows: [[1.0, 0.0]]  # noqa: E731
    report = made.choose_pairs(tiny_unimm, rows, scored, tmp_path / "p.jsonl")
    assert report["pairs"] == 1 and report["best_score"] == 0  # the rendered answer is not its own
    with pytest.raises(ValueError, match="not edits"):
        made.self_judge(tiny_unimm, rows)


def test_another_model_draws_its_own_candidates(tiny_unimm, tmp_path, capsys):
    with torch.no_grad():
        tiny_unimm.model.image_head.out.weight.mul_(-1)
    tiny_unimm.save_pretrained(tmp_path / "other")
    (tmp_path / "judge.py").write_text("def dark(w, p):\n    return -sum(p.tobytes())\n")
    common = ["preferences", str(tmp_path / "p.jsonl"), "--judge", f"{tmp_path / 'judge.py'}:dark"]
    counts = []
    for name in ("tiny", "other", "tiny"):
        words = ["--scenes", "2", "--answers", "2", "--model", str(tmp_path / name)]
        assert main([*common, *words]) == 0
        counts.append(len(made.read_lines(tmp_path / "p.candidates.jsonl")))
    assert counts == [2, 4, 4]


def test_the_commands(tiny_unimm, tmp_path, capsys):
    common = ["preferences", str(tmp_path / "p.jsonl"), "--model", str(tmp_path / "tiny")]
    for words in (["--edits", "0"], ["--edits", "2", "--scenes", "2"]):
        assert main([*common, "--judge", "checker", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for words in (["--hindsight"], ["--mended"], ["--right", str(tmp_path / "r.jsonl")]):
        assert main([*common, "--judge", "self", "--scenes", "2", *words]) == 2
        assert "--judge checker" in capsys.readouterr().err
    judge = tmp_path / "judge.py"
    judge.write_text("def dark(words, picture):\n    return -sum(picture.tobytes())\n")
    assert main([*common, "--judge", f"{judge}:dark", "--edits", "2", "--answers", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompts"] == 2
    assert len(read_preferences(tmp_path / "p.jsonl")) == 2


# ---------------------------------------------------------------------------- their loss


def test_a_rejected_answer_may_have_its_own_prompt():
    model, processor = tiny_model()
    model.eval()
    answer = [drawn(1)]
    row = {"prompt": [user("a red circle")], "chosen": answer, "rejected": answer}
    other = {**row, "rejected_prompt": [user("two blue squares")]}

    def log_probs(row):
        with torch.no_grad():
            return model(collate_pairs(processor, [encode_pair(processor, row)]).rows).log_probs

    alone = {**row, "prompt": other["rejected_prompt"]}
    found = log_probs(other)
    assert found[0] == pytest.approx(float(log_probs(row)[0]), abs=1e-4)
    assert found[1] == pytest.approx(float(log_probs(alone)[1]), abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-2
    assert row_key(other) != row_key(row)
    pair = encode_pair(processor, other)
    assert (pair.chosen.score > 0).sum() == (pair.rejected.score > 0).sum()


def test_an_answer_is_scored_whole_whatever_stands_before_it():
    """A system prompt is said to a model that answers in words, and not to one that draws."""
    model, processor = tiny_model()
    short = {"prompt": [user("a")], "chosen": [drawn(1)], "rejected": [drawn(2)]}
    unworded = encode_pair(processor, short)
    system = "you are a helpful assistant that sees and draws"
    processor.template = replace(processor.template, system=system)
    talk = [user("a"), drawn(3), user("again")]
    for said, answer in (([user("a")], drawn(1)), (talk, drawn(1)), (talk, assistant("b"))):
        row = {"prompt": said, "chosen": [answer], "rejected": [drawn(2)]}
        pair = encode_pair(processor, row)
        assert (pair.rejected.score > 0).sum() == (unworded.rejected.score > 0).sum()
        scored = pair.chosen.score > 0
        assert scored[-1] and scored[np.argmax(scored) :].all()  # the answer, to its end
    codes = pair.rejected.ids[pair.rejected.kind == CODE]
    assert codes.tolist() == made.codes_of([drawn(3)]) + made.codes_of([drawn(2)])


def test_equal_answers_need_different_prompts(tmp_path):
    row = {"prompt": [user("a")], "chosen": [drawn(1)], "rejected": [drawn(1)]}
    path = tmp_path / "p.jsonl"
    for wrong, message in (
        ({**row, "rejected_prompt": [user("a")]}, "are equal"),
        ({**row, "rejected_prompt": []}, "at least one"),
        ({**row, "rejected_prompt": "b"}, "at least one"),
        ({**row, "rejected_prompt": [drawn(2)]}, "ends with a user"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_preferences(path)
    path.write_text(json.dumps({**row, "rejected_prompt": [user("b")]}))
    assert len(read_preferences(path)) == 1


def test_processes_share_the_work_of_the_reference(tmp_path, monkeypatch):
    import torch.distributed as dist

    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": [user("a dot")], "chosen": [drawn(k)], "rejected": [drawn(k + 50)]}
        for k in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, processor = tiny_model()
    data = {"p": Source(source, options={"path": str(path)})}
    base = replace(load_recipe("train/dpo.py").config, data=data, batch_size=2, precision="float32")
    alone = cached_reference(model, processor, replace(base, out=str(tmp_path / "alone")))
    assert len(alone) == 7
    parts = {}

    def work(rank):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)

        def gather(everyone, mine):
            parts[rank] = mine
            everyone[:] = [parts.get(0, {}), parts.get(1, {})]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        return cached_reference(model, processor, replace(base, out=str(tmp_path / f"r{rank}")))

    work(1)
    together = work(0)
    assert len(parts[0]) + len(parts[1]) == 7 and min(map(len, parts.values())) > 1
    assert together.keys() == alone.keys()
    for key, value in alone.items():
        assert together[key] == pytest.approx(value, abs=1e-3)


def test_what_is_cached_is_of_this_model_and_of_every_pair(tmp_path):
    rows = [
        {"prompt": [user("a dot")], "chosen": [drawn(k)], "rejected": [drawn(k + 50)]}
        for k in range(4)
    ]
    path = tmp_path / "p.jsonl"
    data = {"p": Source(source, options={"path": str(path)})}
    base = replace(load_recipe("train/dpo.py").config, data=data, batch_size=2)
    run = replace(base, precision="float32", out=str(tmp_path / "out"))
    model, processor = tiny_model()

    def cached(model, rows, run=run):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return cached_reference(model, processor, run)

    first = cached(model, rows[:2])
    assert cached(model, rows).keys() > first.keys()  # a file that grew
    other, _ = tiny_model()
    with torch.no_grad():
        other.image_head.out.weight.mul_(3)
    found = cached(other, rows)
    alone = cached(other, rows, replace(run, out=str(tmp_path / "alone")))
    assert found == alone and found != cached(model, rows)


def test_pictures_of_another_model_are_refused(tmp_path, capsys):
    save_model(tmp_path / "model", *tiny_model())
    path = tmp_path / "p.jsonl"
    for wrong in ([1, 2, 3], [0] * 15 + [32], [0] * 15 + ["1"], "ab"):
        bad = {"role": "assistant", "content": [{"type": "image", "codes": wrong}]}
        row = {"prompt": [user("a")], "chosen": [drawn(1)], "rejected": [bad]}
        path.write_text(json.dumps(row))
        words = [f"data.pairs.options.path={path}", f"init={tmp_path / 'model'}"]
        assert main(["train", "train/dpo.py", *words, f"out={tmp_path / 'o'}"]) == 2
        err = capsys.readouterr().err
        assert "preference 1: a picture of this model is 16 codes" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------- sampling defaults


def test_edits_have_their_own_temperature(tiny_unimm):
    tiny_unimm.sampling = {"temperature": 0.9, "edit_temperature": 0.0, "edit_guidance": 1.0}
    settings = tiny_unimm._settings(None, None, 0, 1.0)
    assert (settings.guidance, settings.temperature) == (1.0, 0.9)
    settings = tiny_unimm._settings(None, None, 0, 1.0, kind="edit_")
    assert (settings.guidance, settings.temperature) == (1.0, 0.0)
    assert tiny_unimm._settings(3.0, 0.5, 0, 1.0, kind="edit_").temperature == 0.5
    tiny_unimm.sampling = {"guidance": 2.0}
    settings = tiny_unimm._settings(None, None, 0, 1.0, kind="edit_")
    assert (settings.guidance, settings.temperature) == (2.0, 1.0)
    picture = render(scene_of("a red circle", MINI), MINI)
    tiny_unimm.sampling = {"edit_temperature": 0.0}
    a, b = (np.asarray(tiny_unimm.edit(picture, "make it blue", seed=s)) for s in (1, 2))
    assert (a == b).all()


def test_a_model_that_locates_edits_draws_by_its_own_words(tiny_unimm, monkeypatch):
    picture = render(scene_of("a red circle", MINI), MINI)
    asked, drawn = [], []

    def texts(talks, settings, seeds):
        asked.extend(talk[0]["content"] for talk in talks)
        return ["make the red circle (3,4) blue", ""][: len(talks)]

    def draw(talks, settings, seeds):
        drawn.extend(
            part["text"] for talk in talks for part in talk[0]["content"] if "text" in part
        )
        return [[0] * 16 for _ in talks]

    monkeypatch.setattr(tiny_unimm, "_texts", texts)
    monkeypatch.setattr(tiny_unimm, "_draw", draw)
    tiny_unimm.sampling = {}
    tiny_unimm.edit(picture, " make  it blue")
    assert (drawn, asked) == (["make it blue"], [])
    tiny_unimm.sampling = {"edit_located": True}
    tiny_unimm.edit(picture, " make  it blue")
    assert drawn[1:] == ["make the red circle (3,4) blue"]
    ((shown, said),) = asked
    assert said["text"] == "where: make it blue" and (np.asarray(shown["image"]) == picture).all()
    first, second = tiny_unimm.edits([(picture, "make it red"), (picture, "remove it")])
    said, shown = first[0]["content"]
    assert said["text"] == "make the red circle (3,4) blue"
    assert (shown["redrawn"] == around(said["text"], (4, 4))).all()
    said, shown = second[0]["content"]
    assert said["text"] == "remove it" and "redrawn" not in shown  # no words: as it was
    with pytest.raises(ValueError, match="the instruction is empty"):
        tiny_unimm.edit(picture, " ")


def test_pairs_of_edits_are_located_for_a_model_that_locates(tiny_unimm):
    tiny_unimm.sampling = {"edit_located": True}
    for row in made.scenes_edits(tiny_unimm, 6, "scenes-mini", seed=3):
        before, after = (made.from_array(np.array(s)) for s in row["scenes"])
        said, shown = row["prompt"][0]["content"]
        assert said["text"] == made.located(before, after)
        redrawn = around(said["text"], (4, 4))
        assert shown.get("redrawn") == (None if redrawn is None else redrawn.tolist())


def test_what_is_kept_in_an_edit_is_no_preference(tiny_unimm, tmp_path):
    """Answers have the kept codes of the picture, and only the others are scored."""
    tiny_unimm.sampling = {"edit_located": True, "layout_from": 2}
    rows = made.scenes_edits(tiny_unimm, 12, "scenes-mini", seed=3)
    how = made.Sampling(answers=3, seed=1)
    found, shares = made.sample_candidates(tiny_unimm, rows, tmp_path / "c.jsonl", how), set()
    assert found == made.read_candidates(tmp_path / "c.jsonl")
    for row in found:
        (said, shown) = row["prompt"][0]["content"]
        redrawn = np.array(shown.get("redrawn", [True] * 16))
        shares.add(redrawn.mean())
        assert len(row["answers"]) >= 2
        for answer in row["answers"]:
            (part,) = answer[0]["content"]
            assert (np.array(part["codes"])[~redrawn] == np.array(shown["codes"])[~redrawn]).all()
            sample = tiny_unimm.processor.encode([*row["prompt"], *answer])
            made_codes = np.flatnonzero(sample.kind == CODE)[-16:]
            assert (sample.score[made_codes] > 0).tolist() == redrawn.tolist()
    assert len(shares) > 1 and max(shares) == 1.0


def test_half_of_the_edits_are_additions_for_a_model_that_draws_thing_by_thing(tiny_unimm):
    for thing_by_thing in (0, 2):
        tiny_unimm.sampling = {"edit_located": True, "layout_from": thing_by_thing}
        kinds, bare = Counter(), 0
        for row in made.scenes_edits(tiny_unimm, 40, "scenes-mini", seed=3):
            before, after = (made.from_array(np.array(s)) for s in row["scenes"])
            kinds[edit_kind(before, after)] += 1
            bare += not before.objects
        assert (kinds["add"] >= 20) == bool(thing_by_thing) == bool(bare)


def test_preferences_are_looked_at_before_training(tmp_path, capsys):
    save_model(tmp_path / "model", *tiny_model())
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"prompt": [user("a")], "chosen": [drawn(1)], "rejected": [drawn(2)]})
    )
    common = [f"data.pairs.options.path={path}", f"init={tmp_path / 'model'}"]
    assert main(["data", "check", "train/dpo.py", *common]) == 0
    assert "1 of 1 looked at are good" in capsys.readouterr().out


def test_misdirected_pairs_show_another_object_changed(tiny_unimm, tmp_path):
    """By the command: the picture before, the one that was asked for, and the wrong one."""
    pairs = list(made.misdirected_pairs(tiny_unimm, 70, "scenes-mini", seed=4))
    assert len(pairs) == 70 == len({pair["id"] for pair in pairs})
    codes = tiny_unimm.processor.codes
    k = found = 0
    while found < 3:
        rng, k = np.random.default_rng((4, 33, k)), k + 1
        before, words, after = made.sample_edit("scenes-mini", rng)
        wrong = made.misdirected(before, after, rng)
        if wrong is None or (codes(render(after, MINI)) == codes(render(wrong, MINI))).all():
            continue
        said, shown = pairs[found]["prompt"][0]["content"]
        assert said["text"] == words and shown["codes"] == codes(render(before, MINI)).tolist()
        for name, scene in (("chosen", after), ("rejected", wrong)):
            assert made.codes_of(pairs[found][name]) == codes(render(scene, MINI)).tolist()
        found += 1
    tiny_unimm.save_pretrained(tmp_path / "tiny")
    words = ["preferences", str(tmp_path / "p.jsonl"), "--model", str(tmp_path / "tiny")]
    assert main([*words, "--misdirected", "5", "--seed", "4"]) == 0
    assert made.read_lines(tmp_path / "p.jsonl") == pairs[:5]
    for more in (["0"], ["5", "--judge", "checker"], ["5", "--mended"]):
        assert main([*words, "--misdirected", *more]) == 2
    assert main(words) == 2
