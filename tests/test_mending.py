"""Wrong pictures put right: which object is changed, what stays, and the pairs that come of it."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model
from test_hindsight import MINI, WORLD, drawn, scene_of

from unimm.cli import main
from unimm.data.processor import user
from unimm.data.scenes import (
    TASKS,
    UNKNOWN,
    Scene,
    edit_holds,
    edit_kind,
    held_out_pair,
    is_held_out,
    look,
    mend,
    parse,
    render,
    repaint,
    sample_scene,
    satisfies,
)
from unimm.pipeline import UniMM
from unimm.training import preferences as made


@pytest.fixture
def tiny_unimm():
    model, processor = tiny_model()
    return UniMM(model.eval(), processor, sampling={"world": "scenes-mini"})


def changed(scene, k, **values):
    objects = list(scene.objects)
    objects[k] = replace(objects[k], **values)
    return replace(scene, objects=tuple(objects))


@pytest.mark.parametrize("values", [{"shape": "ring"}, {"color": "blue"}, {"shape": UNKNOWN}])
def test_the_wrong_object_is_found(values):
    scene = scene_of("three red stars")
    right = lambda s: satisfies(s, parse("three red stars"))  # noqa: E731
    for k in range(3):
        assert mend(changed(scene, k, **values), right) == (k, scene.objects[k])
    assert mend(changed(changed(scene, 0, **values), 1, **values), right) is None


def test_sizes_and_objects_too_many_or_too_few():
    scene = scene_of("a large star")
    small = changed(scene, 0, size="small")
    assert mend(small, lambda s: satisfies(s, parse("a large star"))) == (0, scene.objects[0])
    three = scene_of("a red star and two blue rings")
    k, new = mend(three, lambda s: satisfies(s, parse("two blue rings")))
    assert three.objects[k].shape == "star" and new is None
    assert mend(scene, lambda s: satisfies(s, parse("two stars"))) is None
    assert mend(scene, lambda s: not s.objects) is None  # an empty picture is nobody's wish


@pytest.mark.parametrize("world", [WORLD, MINI])
def test_the_repainted_picture_shows_the_other_object_and_all_else_as_it_was(world):
    right = total = 0
    for i in range(60):
        rng = np.random.default_rng((5, i))
        scene = sample_scene(world, rng, task=TASKS[i % 6])
        pixels = render(scene, world)
        seen = look(pixels, world)
        k = int(rng.integers(len(seen.objects)))
        names = [name for name in world.shapes if name != seen.objects[k].shape]
        new = replace(seen.objects[k], shape=names[int(rng.integers(len(names)))])
        new = new if i % 3 or len(seen.objects) == 1 else None
        better, where = repaint(pixels, seen, k, new, world)
        assert better.dtype == np.uint8 and (better[~where] == pixels[~where]).all()
        empty = render(Scene((), scene.background), world)
        ground = (pixels == empty).all(-1) & (better == empty).all(-1)
        assert where.any() and not (where & ground).any()
        away = [np.hypot(o.x - seen.objects[k].x, o.y - seen.objects[k].y) for o in scene.objects]
        rest = [o for i, o in enumerate(scene.objects) if i != np.argmin(away)]
        others = replace(scene, objects=tuple(rest))
        added = Scene((new,) if new else (), scene.background)
        theirs, its = ((render(s, world) != empty).any(-1) for s in (others, added))
        assert not (where & theirs & ~its).any()
        rest = (*seen.objects[:k], *([new] if new else []), *seen.objects[k + 1 :])
        aim = Scene(rest, seen.background)
        total += 1
        right += edit_holds(aim, look(better, world), aim)
    assert right >= 0.93 * total


def test_a_pair_differs_where_the_mistake_is(tiny_unimm, monkeypatch):
    words = "two red stars"
    right = scene_of(words, MINI)
    other = next(s for s in MINI.shapes if s != "star" and not held_out_pair(s, "red"))
    wrong = changed(right, 1, shape=other)
    answers = [[drawn(1)], [drawn(2)], [drawn(3)]]
    first = tuple(made.codes_of(answers[0]))
    shows = {first: wrong, tuple(made.codes_of(answers[1])): right}
    shows[tuple(made.codes_of(answers[2]))] = Scene((), right.background)
    later = [right]

    def pictures(codes):
        return [render(shows.get(tuple(c), later[0]), MINI) for c in codes]

    monkeypatch.setattr(tiny_unimm, "pictures", pictures)
    row = {"id": "a", "prompt": [user(words)], "answers": answers}
    (pair,) = made.mended_pairs(tiny_unimm, [row])
    assert pair["prompt"] == row["prompt"] and pair["rejected"] == answers[0]
    mended = np.array(made.codes_of(pair["chosen"]))
    pixels = render(wrong, MINI)
    seen = look(pixels, MINI)
    change = mend(seen, lambda s: satisfies(s, parse(words)), MINI)
    better, where = repaint(pixels, seen, *change, MINI)
    touched = made.squares(where, 16)
    assert 0 < touched.sum() < 16
    assert (mended[~touched] == np.array(first)[~touched]).all()
    assert (mended[touched] == tiny_unimm.processor.codes(better)[touched]).all()
    for scene in (wrong, Scene((), right.background)):  # what the codes show decides
        made.looked_at.cache_clear()
        later[0] = scene
        assert not list(made.mended_pairs(tiny_unimm, [row]))


def test_edits_are_mended_and_what_is_given_is_not(tiny_unimm, monkeypatch):
    rows = made.scenes_edits(tiny_unimm, 12, "scenes-mini", seed=3)
    for row in rows:
        before, after = (made.from_array(np.asarray(a, np.float32)) for a in row["scenes"])
        if before.background == after.background and len(after.objects) == len(before.objects):
            break
    row["answers"].append([drawn(5)])
    shows = {tuple(made.codes_of(answer)): before for answer in row["answers"]}
    monkeypatch.setattr(
        tiny_unimm,
        "pictures",
        lambda codes: [render(shows.get(tuple(c), after), MINI) for c in codes],
    )
    (pair,) = made.mended_pairs(tiny_unimm, [{**row, "id": "b"}])
    assert pair["rejected"] == row["answers"][1] and pair["prompt"] == row["prompt"]


def test_what_is_kept_in_an_edit_is_not_mended(tiny_unimm, monkeypatch):
    """A change of many squares mends those alone that are drawn anew, and says which."""
    monkeypatch.setitem(tiny_unimm.sampling, "edit_located", True)
    for row in made.scenes_edits(tiny_unimm, 12, "scenes-mini", seed=3):
        before, after = (made.from_array(np.asarray(a, np.float32)) for a in row["scenes"])
        if edit_kind(before, after) == "recolor":
            break
    redrawn = row["prompt"][0]["content"][1]["redrawn"]
    assert 0 < sum(redrawn) < 16
    (part,) = drawn(5)["content"]
    row["answers"].append([{"role": "assistant", "content": [{**part, "redrawn": redrawn}]}])
    shows = {tuple(made.codes_of(answer)): before for answer in row["answers"]}
    monkeypatch.setattr(
        tiny_unimm,
        "pictures",
        lambda codes: [render(shows.get(tuple(c), after), MINI) for c in codes],
    )
    monkeypatch.setattr(made, "squares", lambda changed, codes: np.ones(codes, bool))
    (pair,) = made.mended_pairs(tiny_unimm, [{**row, "id": "b"}])
    ((chosen,),) = (message["content"] for message in pair["chosen"])
    same = np.array(chosen["codes"]) == made.codes_of([drawn(5)])
    assert same[~np.array(redrawn)].all() and not same.all() and chosen["redrawn"] == redrawn


def test_the_command_writes_mended_pairs_and_right_pictures(tiny_unimm, monkeypatch, tmp_path):
    rows = made.scenes_edits(tiny_unimm, 12, "scenes-mini", seed=3)
    scenes = [[made.from_array(np.asarray(a, np.float32)) for a in r["scenes"]] for r in rows]
    one = [a.background == b.background and len(a.objects) == len(b.objects) for a, b in scenes]
    (before, after), row = scenes[one.index(True)], rows[one.index(True)]
    row |= {"id": "c", "answers": [*row["answers"], [drawn(5)], [drawn(6)]]}
    made.write_lines(tmp_path / "p.candidates.jsonl", [row])
    tiny_unimm.save_pretrained(tmp_path / "tiny")
    wrong = tuple(made.codes_of([drawn(5)]))

    def pictures(self, codes):
        return [render(before if tuple(c) == wrong else after, MINI) for c in codes]

    monkeypatch.setattr(UniMM, "pictures", pictures)
    words = ["preferences", str(tmp_path / "p.jsonl"), "--model", str(tmp_path / "tiny")]
    words += ["--judge", "checker", "--mended", "--right", str(tmp_path / "own.jsonl")]
    assert main(words) == 0
    best, mended = made.read_lines(tmp_path / "p.jsonl")
    assert best["chosen"] == row["answers"][0] and best["rejected"] == row["answers"][1]
    assert mended["rejected"] == row["answers"][1]
    (own,) = made.read_lines(tmp_path / "own.jsonl")
    assert own == {"messages": [*row["prompt"], drawn(6)]}  # the rendered one is not its own


def test_what_is_held_out_is_not_preferred(tiny_unimm, monkeypatch, tmp_path):
    for k in range(10_000):
        held = sample_scene(MINI, np.random.default_rng(k), split="pairs", task="single_object")
        o = held.objects[0]
        other = next((s for s in MINI.shapes if not held_out_pair(s, o.color)), None)
        if other and is_held_out(held):
            break
    wrong = changed(held, 0, shape=other)
    codes = tuple(made.codes_of([drawn(1)]))
    monkeypatch.setattr(
        tiny_unimm,
        "pictures",
        lambda asked: [render(wrong if tuple(c) == codes else held, MINI) for c in asked],
    )
    row = {"id": "a", "prompt": [user(f"a {o.color} {o.shape}")], "answers": [[drawn(1)]]}
    assert not list(made.mended_pairs(tiny_unimm, [row]))
    made.looked_at.cache_clear()
    held, wrong = wrong, held  # nor is it what another is preferred to
    row = {**row, "prompt": [user(f"a {o.color} {other}")]}
    assert not list(made.mended_pairs(tiny_unimm, [row]))
    assert made.checker_judge(tiny_unimm, [row]) == [[0.0]]
    row = {**row, "prompt": [user(f"a {o.color} {o.shape}")]}
    assert made.checker_judge(tiny_unimm, [row]) == [[1.0]]
    assert made.right_answers(tiny_unimm, [row], tmp_path / "right.jsonl") == 0


def test_squares_near_a_change():
    where = np.zeros((32, 32), bool)
    where[9, 20] = True  # 3 pixels around it are rows 6 to 12 and columns 17 to 23
    found = made.squares(where, 16).reshape(4, 4)
    assert np.argwhere(found).tolist() == [[0, 2], [1, 2]]
