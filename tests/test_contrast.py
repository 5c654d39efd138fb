"""Training against false prompts: the term, what it leaves alone, and prompts that are false."""

import dataclasses
import functools
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from unimm.config import Run, Source
from unimm.data import sources
from unimm.data.places import LOOK, around
from unimm.data.processor import assistant, user
from unimm.data.scenes import (
    UNKNOWN_ANSWER,
    WORLDS,
    Object,
    Scene,
    describe,
    edit_kind,
    fits,
    is_held_out,
    laid_out,
    located,
    main_relation,
    parse,
    sample_scene,
    satisfies,
    unknown_question,
    upright,
)
from unimm.data.scenes.language import NUMBERS, raster
from unimm.data.sources import (
    OFF,
    falsified,
    scenes_captions,
    scenes_edits,
    scenes_grounds,
    scenes_layouts,
    scenes_located,
    scenes_pictures,
    scenes_said,
    scenes_unknown,
)
from unimm.data.stores import PictureStore, sample_addition
from unimm.model.unified import CODE
from unimm.training.contrast import (
    Contrast,
    collate_contrasts,
    contrast_step,
    contrast_weight,
    setup_contrast,
    stress_changes,
)
from unimm.training.next_token import next_token, scored_weight

RUN = Run(
    step=contrast_step,
    train=((r".*", 1e-3),),
    data={"a": Source(lambda run: [])},
    steps=1,
    batch_size=4,
    options={"contrast": 2.0},
)


@pytest.fixture(scope="module")
def tiny():
    model, processor = tiny_model()
    return model.eval(), processor


def talk(words, codes):
    return [user(words), assistant({"codes": codes})]


def items(processor, model):
    k = processor.codes_per_image
    pictures = [(np.arange(k) * 7 + n) % model.config.codebook_size for n in range(3)]
    true = ["a red circle", "a blue square above a star", "two moons"]
    false = ["a blue circle", None, "three moons and a ring"]
    return [
        Contrast(processor.encode(talk(t, codes)), processor.encode(talk(f, codes)) if f else None)
        for t, f, codes in zip(true, false, pictures, strict=True)
    ]


def loss_of(step, model, batch, total, run):
    ((_, loss, metrics),) = step(model, batch, total, run)
    return loss, metrics


def test_the_term_is_that_of_single_forwards(tiny):
    model, processor = tiny
    rows = items(processor, model)
    batch = collate_contrasts(processor, [rows[:2], rows[2:]])
    total = contrast_weight(batch, RUN)
    plain = processor.collate([row.sample for row in rows])
    assert total == pytest.approx(scored_weight(plain, RUN))
    with torch.no_grad():
        loss, metrics = loss_of(contrast_step, model, batch, total, RUN)
        base, nats = loss_of(next_token, model, plain, total, RUN)
        alone = [
            [float(model(processor.collate([s])).log_probs) for s in (row.sample, row.rival)]
            for row in rows
            if row.rival
        ]
    term = sum(F.softplus(torch.tensor(false - true)) for true, false in alone)
    assert float(loss) == pytest.approx(float(base) + 2.0 * float(term) / total, rel=1e-5)
    assert metrics["code_nats"] == pytest.approx(nats["code_nats"])
    assert metrics["rival_nats"] == pytest.approx((float(term), 2), rel=1e-5)
    assert metrics["told_apart"] == (sum(true > false for true, false in alone), 2)


def test_without_rivals_it_is_the_next_token_loss(tiny):
    model, processor = tiny
    rows = [Contrast(row.sample) for row in items(processor, model)]
    batch = collate_contrasts(processor, [[row] for row in rows])
    with torch.no_grad():
        loss, metrics = loss_of(contrast_step, model, batch, 5.0, RUN)
        base, _ = loss_of(next_token, model, batch.rows, 5.0, RUN)
    assert float(loss) == pytest.approx(float(base), rel=1e-6) and "told_apart" not in metrics


def test_packed_rows_have_the_loss_of_single_ones(tiny):
    model, processor = tiny
    rows = items(processor, model)
    single = collate_contrasts(processor, [[row] for row in rows])
    packed = collate_contrasts(processor, [rows[1:], rows[:1]])
    assert packed.of.tolist() == [1, 3] and packed.rivals.tolist() == [2, 4]
    assert packed.true.tolist() == [True, True, False, True, False]
    assert contrast_weight(packed, RUN) == contrast_weight(single, RUN)
    with torch.no_grad():
        one, two = (loss_of(contrast_step, model, batch, 9.0, RUN) for batch in (single, packed))
    assert float(two[0]) == pytest.approx(float(one[0]), rel=1e-5)
    assert two[1] == {name: pytest.approx(pair, rel=1e-5) for name, pair in one[1].items()}


def test_what_an_edit_changes_counts_more(tiny):
    _, processor = tiny
    old = np.arange(processor.codes_per_image)
    new = np.where(old % 5 == 1, old + 1, old)
    shown = {"codes": old, "view": ["codes"]}
    edit = processor.encode([user("make it blue", shown), assistant({"codes": new})])
    stressed = stress_changes(edit, 3.0)
    drawn = (edit.kind == CODE) & (edit.score > 0)
    assert np.array_equal(stressed.score[drawn], np.where(old != new, 3.0, 1.0))
    assert np.array_equal(stressed.score[~drawn], edit.score[~drawn])
    assert set(edit.score[drawn]) == {1.0}  # the sample itself is as it was
    plain = processor.encode(talk("a star", new))
    chat = processor.encode([*talk("a star", old), *talk("make it blue", new)])
    assert stress_changes(plain, 3.0) is plain and stress_changes(chat, 3.0) is chat


def test_training_learns_to_tell_prompts_apart():
    model, processor = tiny_model()
    batch = collate_contrasts(processor, [items(processor, model)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = dataclasses.replace(RUN, kind_weights={"text": 0.0, "code": 0.0})  # the term alone
    margins = []
    for _ in range(12):
        loss, metrics = loss_of(contrast_step, model, batch, 1.0, run)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        margins.append(metrics["rival_nats"][0])
    assert margins[-1] < 0.2 * margins[0]


def test_false_prompts_are_false_and_of_the_train_split():
    world, kinds = WORLDS["scenes"], set()
    for k in range(400):
        rng = np.random.default_rng(k)
        scene = sample_scene(world, rng)
        changed = falsified(scene, world, rng)
        assert changed != scene and is_held_out(changed) is None
        kinds.add(
            (
                len(changed.objects) - len(scene.objects),
                sorted(o.color for o in scene.objects) == sorted(o.color for o in changed.objects),
                sorted(o.shape for o in scene.objects) == sorted(o.shape for o in changed.objects),
            )
        )
    assert {d for d, _, _ in kinds} == {-1, 0, 1}  # less and more
    assert {(0, True, True), (0, False, True), (0, True, False)} <= kinds


def test_what_two_have_in_common_is_said_of_one_alone():
    world, changes = WORLDS["scenes"], set()
    for k in range(600):
        rng = np.random.default_rng(k)
        scene = sample_scene(world, rng, count=2)
        shared = {n for n in ("shape", "color") if len({getattr(o, n) for o in scene.objects}) == 1}
        changed = falsified(scene, world, rng, ("unlike",))
        if not shared:
            assert changed == scene
            continue
        (name,) = {
            n
            for n in ("shape", "color", "size")
            for old, new in zip(scene.objects, changed.objects, strict=True)
            if getattr(old, n) != getattr(new, n)
        }
        assert name == ("shape" if "shape" in shared else "color")
        assert sum(a != b for a, b in zip(scene.objects, changed.objects, strict=True)) == 1
        changes.add(name)
    assert changes == {"shape", "color"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("mini"), np.random.default_rng(0)
    for name, edited in (("pictures", False), ("edits", True)):
        PictureStore.build(folder / name, "scenes-mini", 240, edited=edited)
        codes = rng.integers(32, size=(240, 16), dtype=np.uint16)
        np.save(folder / name / "codes.npy", codes)
    return folder


def scene_of(store, image):
    (k,) = [k for k in range(len(store)) if np.array_equal(store.pictures[k], image)]
    return store.scene(k)


@pytest.mark.parametrize("only", ["", "single", "pairs", "related", "alike", "equal"])
def test_the_source_gives_true_prompts_in_the_order_of_drawing_and_rivals(store, only):
    run, pictures = dataclasses.replace(RUN, seed=3), PictureStore(store / "pictures")
    source = scenes_pictures(run, store / "pictures", only, rivals=True, world="scenes-mini")
    found = unrelated = partly = sized = 0
    for i in range(80):
        item = source[i]
        scene = scene_of(pictures, item["messages"][1]["content"][0]["image"])
        looks = {(o.shape, o.color) for o in scene.objects}
        said = parse(item["messages"][0]["content"][0]["text"])
        assert said is not None and satisfies(scene, said)
        sized += any(size for _, size, _, _ in said.groups)
        if only in ("single", "equal"):
            assert len(looks) == 1 and (len(scene.objects) > 1) == (only == "equal")
        elif only:
            assert len(scene.objects) == len(looks) == 2
            assert only != "related" or main_relation(*scene.objects)
            shared = [len({getattr(o, name) for o in scene.objects}) for name in ("shape", "color")]
            assert only != "alike" or 1 in shared
        if only in ("pairs", "related") and not said.relations and len(said.groups) == 2:
            first = min(scene.objects, key=raster)
            assert said.groups[0][3] == first.shape
            assert said.groups[0][2] in (None, first.color)
            unrelated += 1
        colors = [color is None for _, _, color, _ in said.groups]
        partly += any(colors) and not all(colors)
        if "false_messages" in item:
            found += 1
            other = parse(item["false_messages"][0]["content"][0]["text"])
            assert other is not None and not satisfies(scene, other)
            assert item["false_messages"][1] == item["messages"][1]
    assert found > 50
    assert unrelated > 5 or only != "pairs"
    assert partly > 2 or only not in ("pairs", "related")
    assert sized > 20 if only == "single" else only == "" or not sized
    plain = scenes_pictures(run, store / "pictures", only)[0]
    assert "false_messages" not in plain


def test_objects_begin_in_the_order_of_codes():
    base = sample_scene(WORLDS["scenes"], np.random.default_rng(0), task="single_object").objects[0]
    high = dataclasses.replace(base, size="small", scale=1.0, x=0.8, y=0.30)
    left = dataclasses.replace(high, x=0.2, y=0.32)  # begins in the same row of codes
    tall = dataclasses.replace(high, size="large", x=0.5, y=0.29)  # begins a row earlier
    assert sorted([high, left, tall], key=raster) == [tall, left, high]


def test_edits_of_a_kind_come_as_often_as_is_said(store):
    pictures = PictureStore(store / "edits")
    kinds = Counter(
        edit_kind(pictures.scene(k), pictures.scene(k + 1)) for k in range(0, len(pictures), 2)
    )
    made = functools.partial(scenes_edits, RUN, store / "edits", world="scenes-mini")

    def share(kind, **options):
        shown = [made(**options)[i]["messages"][0]["content"][1]["image"] for i in range(300)]
        befores = pictures.pictures[::2]
        places = [next(k for k in range(len(befores)) if (befores[k] == p).all()) for p in shown]
        both = [(pictures.scene(2 * k), pictures.scene(2 * k + 1)) for k in places]
        return np.mean([edit_kind(*pair) == kind for pair in both])

    plain = kinds["recolor"] / kinds.total()
    assert share("recolor") == pytest.approx(plain, abs=0.08)
    often = 4 * plain / (1 + 3 * plain)
    assert share("recolor", kinds={"recolor": 4.0}) == pytest.approx(often, abs=0.08)
    assert share("background", kinds={"background": 0.0}) == 0
    with pytest.raises(ValueError, match="no edits of kind color: only recolor"):
        made(kinds={"color": 1.0})
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights of 0 or more"):
            made(kinds={"recolor": weight})


def test_instructions_that_say_where_come_as_often_as_is_said(store):
    """With them what is around the place is drawn, from the picture after, and the rest is kept."""
    pictures = PictureStore(store / "edits")
    count, offs = len(pictures.instructions), Counter()
    both = [(pictures.scene(2 * k), pictures.scene(2 * k + 1)) for k in range(count)]
    true = [[located(*pair, off) for off in sorted({*OFF})] for pair in both]
    for share in (0.0, 0.4, 1.0):
        source = scenes_edits(RUN, store / "edits", located_share=share, world="scenes-mini")
        right = []
        for i in range(200):
            (words, before), (after,) = (m["content"] for m in source[i]["messages"])
            text = words["text"]
            k = next(
                k
                for k in range(count)
                if (pictures.pictures[2 * k] == before["image"]).all()
                and text in (pictures.instructions[k], *true[k])
            )
            right.append(text in true[k])
            redrawn = around(text, (4, 4))
            old, new = pictures.codes[2 * k], pictures.codes[2 * k + 1]
            assert (before["codes"] == old).all()
            if redrawn is None:
                assert "redrawn" not in before and (after["codes"] == new).all()
            else:
                assert (before["redrawn"] == redrawn).all() and 0 < redrawn.sum() < 16
                assert (after["redrawn"] == redrawn).all()
                assert (after["codes"][redrawn] == new[redrawn]).all()
                assert (after["codes"][~redrawn] == old[~redrawn]).all()
                offs[text == located(*both[k])] += 1
        same = np.mean([a in b for a, b in zip(pictures.instructions, true, strict=True)])
        assert np.mean(right) == pytest.approx(share + (1 - share) * same, abs=0.12)
    assert 0.4 < offs[True] / offs.total() < 0.75  # half of them, and those at an edge


def asked_and_laid_out(messages):
    """The meaning of the prompt, and the scene of its layout."""
    (asked,), (answer,) = (m["content"] for m in messages)
    assert asked["text"].startswith("layout: ")
    return parse(asked["text"].removeprefix("layout: ")), scene_said(answer["text"])


def scene_said(layout):
    things = re.findall(r"(small|large) (\w+) (\w+) \((\d),(\d)\)", layout)
    objects = tuple(
        Object(shape, color, size, (int(c) - 0.5) / 8, (int(r) - 0.5) / 8)
        for size, color, shape, c, r in things
    )
    return Scene(objects, layout.split(" on a ")[1].split()[0])


def test_layouts_are_true_of_their_prompts():
    """All looks and relations are as the prompt says, and every object is clear of the others."""
    world, counts = WORLDS["scenes"], Counter()
    for least, related in ((0, False), (3, False), (0, True)):
        source = scenes_layouts(RUN, least, related)
        for i in range(80):
            spec, scene = asked_and_laid_out(source[i]["messages"])
            assert satisfies(scene, spec) and is_held_out(scene) is None
            assert bool(spec.relations) or not related
            for k, o in enumerate(scene.objects):
                assert fits(world, o, scene.objects[:k])
            counts[least, related, len(scene.objects)] += 1
    assert {n for least, _, n in counts if least == 3} == {3, 4, 5}
    assert {n for least, related, n in counts if not least and not related} == {1, 2, 3, 4, 5}
    assert {n for _, related, n in counts if related} == {2}
    assert source[3] == scenes_layouts(RUN, 0, True)[3] != source[4]


def test_a_layout_is_told_from_one_of_the_opposite_relation():
    source, rivals = scenes_layouts(RUN, related=True), 0
    for i in range(60):
        talk = source[i]
        if "false_messages" in talk:
            (true, scene), (false, same) = map(
                asked_and_laid_out, (talk["messages"], talk["false_messages"])
            )
            assert same == scene and not satisfies(scene, false)
            assert [g[3] for g in false.groups] == [g[3] for g in true.groups]
            assert [r for _, r, _ in false.relations] != [r for _, r, _ in true.relations]
            rivals += 1
    assert rivals > 40


def test_a_layout_is_told_from_one_without_room():
    world, rivals = WORLDS["scenes"], 0
    source = scenes_layouts(RUN, 3, rivals=0.5)
    for i in range(80):
        talk = source[i]
        if "false_messages" in talk:
            (spec, scene), (same, tight) = map(
                asked_and_laid_out, (talk["messages"], talk["false_messages"])
            )
            assert same == spec and satisfies(tight, spec) and is_held_out(tight) is None
            (moved,) = Counter(tight.objects) - Counter(scene.objects)
            others = Counter(tight.objects) - Counter([moved])
            assert others == Counter(scene.objects) & Counter(tight.objects)
            assert not fits(world, moved, list(others.elements()))
            rivals += 1
    assert 20 < rivals < 60
    assert not any("false_messages" in scenes_layouts(RUN, 3)[i] for i in range(20))


def test_additions_begin_with_nothing_and_say_where(tmp_path):
    store = PictureStore.build(tmp_path / "s", "scenes-mini", 400, 3, True, sample_addition)
    before = Counter(len(store.scene(2 * k).objects) for k in range(200))
    assert set(before) == {0, 1} and before[0] > 60 < before[1]
    for k, words in enumerate(store.instructions):
        old, new = store.scene(2 * k), store.scene(2 * k + 1)
        assert new.objects[:-1] == old.objects and is_held_out(new) is None
        assert [upright(o) for o in new.objects] == [*new.objects]
        assert words == located(old, new) and around(words, (4, 4)).any()
        assert (store.pictures[2 * k] != store.pictures[2 * k + 1]).any()


def test_grounds_are_plain():
    seen = set()
    source = scenes_grounds(RUN, "scenes-mini")
    for i in range(20):
        (asked,), (drawn,) = (m["content"] for m in source[i]["messages"])
        assert len(np.unique(drawn["image"].reshape(-1, 3), axis=0)) == 1
        name = asked["text"].split()[2]
        assert tuple(drawn["image"][0, 0]) == WORLDS["scenes-mini"].backgrounds[name]
        seen.add(name)
    assert seen == {"white", "gray"}


def test_what_is_to_be_located_is_about_the_picture_that_is_shown(store):
    pictures = PictureStore(store / "pictures")
    source = scenes_located(RUN, store / "pictures", most=3, world="scenes-mini")
    turns, room = Counter(), Counter()
    for i in range(200):
        talk = source[i]["messages"]
        image, _ = talk[0]["content"]
        scene = scene_of(pictures, image["image"])
        assert "codes" not in image
        turns[len(talk) // 2] += 1
        for asked, answer in zip(talk[::2], talk[1::2], strict=True):
            words, said = asked["content"][-1]["text"], answer["content"][0]["text"]
            assert words.startswith("where: ") and not said.startswith("where")
            if "background" in words:
                assert said.split()[-1] in words
                continue
            if said.startswith("add"):
                *named, where = said.split()
                assert set(named) - {"add"} <= set(words.split())
                c, r = ((int(n) - 0.5) / 8 for n in where[1:-1].split(","))
                new = Object(named[4], named[3], named[2], c, r)
                room[fits(WORLDS["scenes-mini"], new, scene.objects)] += 1
                continue
            size, color, shape = re.search(r"(\w+) (\w+) (\w+) \(", said).groups()
            here = [o for o in scene.objects if (o.size, o.color, o.shape) == (size, color, shape)]
            assert here and shape in words
    assert set(turns) == {1, 2, 3} and room[True] > 4 > room[False]


def test_a_place_of_an_addition_is_told_from_one_without_room(store):
    pictures, world = PictureStore(store / "pictures"), WORLDS["scenes-mini"]
    source = scenes_located(RUN, store / "pictures", added=0.6, looked=0.5, world="scenes-mini")
    rivals, looks = 0, Counter()
    for i in range(400):
        talk = source[i]
        looks[talk["messages"][0]["content"][1]["text"] == LOOK] += 1
        if "false_messages" not in talk:
            continue
        *before, asked, answer = talk["messages"]
        *again, false = talk["false_messages"]
        assert again == [*before, asked] and len(again) in (1, 3)
        scene = scene_of(pictures, again[0]["content"][0]["image"])
        if before:
            assert before[1]["content"][0]["text"] == laid_out(scene)
        room = []
        for said in (answer, false):
            words = said["content"][0]["text"]
            size, color, shape, c, r = re.search(r"(\w+) (\w+) (\w+) \((.),(.)\)", words).groups()
            assert words.startswith("add ") and shape in asked["content"][-1]["text"]
            new = Object(shape, color, size, (int(c) - 0.5) / 8, (int(r) - 0.5) / 8)
            room.append(fits(world, new, scene.objects))
        assert room == [True, False]
        rivals += 1
    assert rivals > 20  # of those with one object, if there is room
    assert 150 < looks[True] < 250
    plain = scenes_located(RUN, store / "pictures", world="scenes-mini")
    assert not any("false_messages" in plain[i] for i in range(20))


@pytest.mark.parametrize("name", ["captions", "questions", "several", "unknown", "chats"])
def test_what_is_where_is_said_of_each_picture_before_all_else(store, name):
    folder = store / ("edits" if name == "chats" else "pictures")
    make = getattr(sources, f"scenes_{name}")
    pictures, looks = PictureStore(folder), Counter()
    for i in range(60):
        messages = make(RUN, folder, looked=0.7)[i]["messages"]
        for k, message in enumerate(messages):
            shown = [part["image"] for part in message["content"] if "image" in part]
            if not shown or (name == "chats" and k > 1):  # the last is a change
                continue
            asked = messages[k if name != "chats" else k + 1]["content"][-1]["text"]
            looks[asked == LOOK] += 1
            if asked == LOOK:
                answer = messages[k + 1 + (name == "chats")]["content"][0]["text"]
                assert answer == laid_out(scene_of(pictures, shown[0]))
        assert not any(
            part.get("text") == LOOK
            for message in make(RUN, folder)[i]["messages"]
            for part in message["content"]
        )
    share = looks[True] / looks.total()
    assert looks.total() >= 40 and 0.5 < share < 0.85, looks


def test_what_is_said_in_words_alone_is_asked_about():
    """The layout stands before the first question, and the answers are true of it."""
    source, counts, captions = scenes_said(RUN, most=3), Counter(), 0
    vain = unknown = 0
    for i in range(60):
        messages = source[i]["messages"]
        texts = [part["text"] for message in messages for part in message["content"]]
        layout, first = texts[0].split(". ", 1)
        scene = scene_said(layout)
        counts[len(scene.objects)] += 1
        assert 2 <= len(messages) // 2 <= 7
        assert is_held_out(scene) != "pairs"  # a place is too coarse to tell all triples by
        asks = [first, *texts[2::2]]
        assert not any("(" in ask for ask in asks)
        for ask, answer in zip(asks, texts[1::2], strict=True):
            if ask in sources.ASK_CAPTION:
                captions += 1
                groups = parse(answer).groups
                looks = Counter(o.shape for o in scene.objects)
                said = Counter(shape for n, _, _, shape in groups for _ in range(n))
                assert said == looks
            if ask == "how many objects are there?":
                assert answer == NUMBERS[len(scene.objects)]
            vain += answer.startswith("there is no ")
            unknown += answer == UNKNOWN_ANSWER
    assert captions == 60 and set(counts) == {1, 2, 3, 4, 5}
    assert vain > 5 and 2 < unknown < 25


def test_a_picture_laid_out_names_all_of_it_row_by_row():
    small = [Object("star", "red", "small", x, y) for x, y in ((0.8, 0.2), (0.2, 0.2))]
    scene = Scene((Object("ring", "blue", "large", 0.1, 0.8), *small), "mint")
    said = "a small red star (2,2), a small red star (7,2) and a large blue ring (1,7)"
    assert laid_out(scene) == said + " on a mint background"


def test_captions_of_three_objects_and_more(tmp_path):
    store = PictureStore.build(tmp_path, "scenes", 40)
    source = scenes_captions(RUN, tmp_path, only="mixed")
    for i in range(40):
        (picture, _), (caption,) = (m["content"] for m in source[i]["messages"])
        scene = scene_of(store, picture["image"])
        assert len(scene.objects) > 2 and len({(o.shape, o.color) for o in scene.objects}) > 1
        assert caption["text"] == describe(scene)
    with pytest.raises(ValueError, match="none of the pictures of .* are 'mixed'"):
        PictureStore.build(tmp_path / "few", "scenes-mini", 4).chosen("mixed")


def test_false_instructions_do_not_make_the_edit(store):
    run, pictures = dataclasses.replace(RUN, seed=4), PictureStore(store / "edits")
    source = scenes_edits(run, store / "edits", rivals=0.5, world="scenes-mini")
    items = [source[i] for i in range(120)]
    false = [item for item in items if "false_messages" in item]
    assert 35 < len(false) < 85
    alike = 0
    for item in false:
        (words, before), (wrong, wrong_before) = (
            item[name][0]["content"] for name in ("messages", "false_messages")
        )
        assert np.array_equal(wrong_before["image"], before["image"]) and wrong != words
        assert item["false_messages"][1] == item["messages"][1]
        alike += len({*wrong["text"].split()} & {*words["text"].split()}) > 1
        for k, instruction in enumerate(pictures.instructions):  # never another true one
            if np.array_equal(pictures.pictures[2 * k], before["image"]):
                assert wrong["text"] != instruction
    assert alike > 0.7 * len(false)


def test_a_word_that_is_no_kind_of_picture_is_refused(store):
    with pytest.raises(ValueError, match="no pictures 'odd'.*single, pairs, related, alike, equal"):
        scenes_pictures(RUN, store / "pictures", "odd")


def test_unknown_things_get_one_polite_answer_among_others(store):
    source = scenes_unknown(dataclasses.replace(RUN, seed=5), store / "pictures")
    alone = beside = 0
    for i in range(60):
        talk = source[i]["messages"]
        asked = [m["content"][-1]["text"] for m in talk if m["role"] == "user"]
        answers = [m["content"][0]["text"] for m in talk if m["role"] == "assistant"]
        assert answers.count(UNKNOWN_ANSWER) == 1
        assert parse(asked[answers.index(UNKNOWN_ANSWER)]) is None
        alone += talk[0]["content"][0]["type"] == "text"
        beside += len(answers) > 1
    assert alone > 5 and beside > 20
    held_out = {unknown_question(np.random.default_rng(k), "held_out")[0] for k in range(300)}
    seen = {unknown_question(np.random.default_rng(k))[0] for k in range(2000)}
    assert len(held_out) > 100 and not held_out & seen


def test_a_hidden_prompt_has_no_rival(tmp_path):
    from unimm.checkpoints.native import save_model

    model, processor = tiny_model()
    save_model(tmp_path / "m", model, processor, {})
    run = dataclasses.replace(RUN, init=str(tmp_path / "m"), setup=setup_contrast, drop_prompt=0.5)
    parts = setup_contrast(run)
    codes = [1] * processor.codes_per_image
    item = {"messages": talk("a moon", codes), "false_messages": talk("a star", codes)}
    made = [parts.prepare(item, np.random.default_rng(k)) for k in range(40)]
    assert 0 < sum(m.rival is None for m in made) < 40
    for m in made:
        seen = np.array_equal(m.sample.ids, processor.encode(item["messages"]).ids)
        assert (m.rival is not None) == seen
    parts = setup_contrast(dataclasses.replace(run, drop_prompt=0.0, options={"changes": 3.0}))
    shown, changed = {"codes": codes, "view": ["codes"]}, [*codes[1:], 2]
    edit, other = (
        [user(words, shown), assistant({"codes": changed})] for words in ("make it", "leave it")
    )
    made = parts.prepare({"messages": edit, "false_messages": other}, np.random.default_rng(0))
    for sample in (made.sample, made.rival):  # the same weights, or margins would be of them
        assert sample.score.max() == 3 and (sample.score == 3).sum() == 1
