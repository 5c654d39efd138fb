"""Training against false prompts: the term, what it leaves alone, and prompts that are false."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from unimm.config import Run, Source
from unimm.data.processor import assistant, user
from unimm.data.scenes import WORLDS, is_held_out, main_relation, parse, sample_scene, satisfies
from unimm.data.sources import PictureStore, falsified, scenes_pictures
from unimm.training.contrast import (
    Contrast,
    collate_contrasts,
    contrast_step,
    contrast_weight,
    setup_contrast,
)
from unimm.training.next_token import next_token, scored_weight
from unimm.training.trainer import train

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
    batch = collate_contrasts(processor, rows)
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
    batch = collate_contrasts(processor, rows)
    with torch.no_grad():
        loss, metrics = loss_of(contrast_step, model, batch, 5.0, RUN)
        base, _ = loss_of(next_token, model, batch.rows, 5.0, RUN)
    assert float(loss) == pytest.approx(float(base), rel=1e-6) and "told_apart" not in metrics


def test_training_learns_to_tell_prompts_apart():
    model, processor = tiny_model()
    batch = collate_contrasts(processor, items(processor, model))
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


def test_the_source_gives_prompts_of_related_objects_and_rivals(tmp_path):
    store = PictureStore.build(tmp_path / "store", "scenes-mini", 120)
    np.save(tmp_path / "store" / "codes.npy", np.zeros((120, 16), dtype=np.uint16))
    run = dataclasses.replace(RUN, seed=3)
    place = {"store": str(tmp_path / "store"), "world": "scenes-mini"}
    for related in (False, True):
        source = scenes_pictures(run, **place, related=related, rivals=True)
        found = unrelated = 0
        for i in range(80):
            item = source[i]
            (k,) = [
                k
                for k in range(len(store))
                if np.array_equal(store.pictures[k], item["messages"][1]["content"][0]["image"])
            ]
            scene = store.scene(k)
            said = parse(item["messages"][0]["content"][0]["text"])
            assert said is not None and satisfies(scene, said)
            if related:
                assert len(scene.objects) == 2 and main_relation(*scene.objects)
                assert all(color for _, _, color, _ in said.groups)
                if not said.relations:  # told from top to bottom
                    top = min(scene.objects, key=lambda o: o.y)
                    assert said.groups[0][2:] == (top.color, top.shape)
                    unrelated += 1
            if "false_messages" in item:
                found += 1
                words = item["false_messages"][0]["content"][0]["text"]
                other = parse(words)
                assert other is not None and not satisfies(scene, other)
                assert item["false_messages"][1] == item["messages"][1]
        assert found > 60 and (unrelated > 5 or not related)
    plain = scenes_pictures(run, **place)[0]
    assert "false_messages" not in plain


def test_a_hidden_prompt_has_no_rival(tmp_path):
    from unimm.checkpoints.native import save_model

    model, processor = tiny_model()
    save_model(tmp_path / "m", model, processor, {})
    run = dataclasses.replace(RUN, init=str(tmp_path / "m"), setup=setup_contrast, drop_prompt=0.5)
    with pytest.raises(ValueError, match="cannot pack"):  # in one line, not in the first step
        train(dataclasses.replace(run, out=str(tmp_path / "packed"), packing=64))
    parts = setup_contrast(run)
    codes = [1] * processor.codes_per_image
    item = {"messages": talk("a moon", codes), "false_messages": talk("a star", codes)}
    made = [parts.prepare(item, np.random.default_rng(k)) for k in range(40)]
    assert 0 < sum(m.rival is None for m in made) < 40
    for m in made:
        seen = np.array_equal(m.sample.ids, processor.encode(item["messages"]).ids)
        assert (m.rival is not None) == seen
