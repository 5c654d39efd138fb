"""DPO: the loss by its analytic values, log-probabilities got in other ways, references that
agree, preferences that are what the model drew."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

from unimm.checkpoints.native import load_model, save_model
from unimm.cli import main
from unimm.config import load_recipe
from unimm.data.processor import assistant, user
from unimm.data.scenes import (
    WORLDS,
    implied_questions,
    parse,
    prompt,
    questions,
    sample_scene,
)
from unimm.inference.judging import agreement, wanted
from unimm.model.unified import CODE, TEXT
from unimm.pipeline import UniMM
from unimm.training import preferences as made
from unimm.training.dpo import (
    collate_pairs,
    encode_pair,
    read_preferences,
    row_key,
)
from unimm.training.losses import dpo_loss
from unimm.training.trainer import train

MINI = WORLDS["scenes-mini"]


def codes(seed, count=16):
    return np.random.default_rng(seed).integers(0, 32, count).tolist()


def drawn(seed):
    return {"role": "assistant", "content": [{"type": "image", "codes": codes(seed)}]}


def said(words):
    return assistant(words)


ROWS = [
    {"prompt": [user("a dot")], "chosen": [drawn(1)], "rejected": [drawn(2)]},
    {"prompt": [user("how many?")], "chosen": [said("two")], "rejected": [said("seven of them")]},
    {
        "prompt": [user("draw"), drawn(3), user("again, and say what it is")],
        "chosen": [{**said(""), "content": said("a dot")["content"] + drawn(4)["content"]}],
        "rejected": [drawn(5)],
    },
]  # fmt: skip


# ---------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 5.0, 100.0])
def test_policy_equal_to_reference_gives_ln_2(beta):
    same = torch.randn(2, 7)
    for smoothing in (0.0, 0.2):
        losses, margin = dpo_loss(same, same.clone(), beta, smoothing)
        assert torch.allclose(losses, torch.full((7,), math.log(2))) and (margin == 0).all()


def test_swapping_flips_the_margin():
    policy, reference = torch.randn(2, 5), torch.randn(2, 5)
    losses, margin = dpo_loss(policy, reference, 0.3)
    swapped, other = dpo_loss(policy.flip(0), reference.flip(0), 0.3)
    assert torch.allclose(margin, -other) and (margin != 0).all()
    assert torch.allclose(losses, -F.logsigmoid(margin))
    mixed, _ = dpo_loss(policy, reference, 0.3, 0.25)
    assert torch.allclose(mixed, 0.75 * losses + 0.25 * swapped)


def test_the_gradient_is_that_of_the_paper():
    """Equation 7's: -β σ(-margin) for the chosen answer and the opposite for the rejected one."""
    policy = torch.randn(2, 5, requires_grad=True)
    losses, margin = dpo_loss(policy, torch.randn(2, 5), 0.7)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    expected = 0.7 * torch.sigmoid(-margin)
    assert torch.allclose(gradient, torch.stack((-expected, expected)), atol=1e-6)


def test_beta_zero_has_no_gradient_and_nonsense_is_refused():
    policy = torch.randn(2, 5, requires_grad=True)
    losses, _ = dpo_loss(policy, torch.randn(2, 5), 0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert (gradient == 0).all()
    for wrong in (dict(beta=-1.0), dict(beta=1.0, label_smoothing=0.5)):
        with pytest.raises(ValueError):
            dpo_loss(policy, policy, **wrong)


# ---------------------------------------------------------------------------- log-probabilities


def log_probs(model, processor, rows):
    with torch.no_grad():
        pairs = collate_pairs(processor, [encode_pair(processor, row) for row in rows])
        return model(pairs.rows).log_probs


def test_log_probabilities_of_words_are_transformers(tiny):
    """The same weights as a LlamaForCausalLM, whose own logits are read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, processor = tiny_model()
    c = model.config.decoder
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
            intermediate_size=c.hidden, rms_norm_eps=c.norm_eps, max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    state = {f"model.{k}": v for k, v in model.decoder.state_dict().items()}
    other.load_state_dict(state | {"lm_head.weight": model.text_head.weight})
    ours = log_probs(model, processor, [ROWS[1]])
    for value, name in zip(ours, ("chosen", "rejected"), strict=True):
        talk = [*ROWS[1]["prompt"], *ROWS[1][name]]
        ids = torch.from_numpy(processor.encode(talk).ids)[None]
        start = len(processor.encode(ROWS[1]["prompt"])) + 1  # behind the assistant's mark
        with torch.no_grad():
            each = other(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        assert float(value) == pytest.approx(float(each[start - 1 :].sum()), abs=1e-4)


def test_log_probabilities_of_codes_are_a_plain_loop(tiny):
    model, processor = tiny
    row = ROWS[2]
    ours = log_probs(model, processor, [row])
    offset = model.config.decoder.vocab_size if model.config.pathway == "shared" else 0
    for value, name in zip(ours, ("chosen", "rejected"), strict=True):
        sample = processor.encode([*row["prompt"], *row[name]])
        batch = processor.collate([sample])
        first = len(processor.encode(row["prompt"])) + 1
        with torch.no_grad():
            hidden = model.decoder(model.embed(batch), batch.positions)[0]
            total = 0.0
            for slot in range(first, len(sample)):
                kind = CODE if sample.kind[slot] == CODE else TEXT
                logits = model.logits(hidden[slot - 1], kind, full=True)
                token = int(sample.ids[slot]) + (offset if kind == CODE else 0)
                total += float(logits.log_softmax(-1)[token])
        assert float(value) == pytest.approx(total, abs=1e-3)
        assert (sample.kind[first:] == CODE).sum() == 16


def test_only_the_answer_is_scored(tiny):
    """Not the prompt, not an earlier picture of the assistant, not padding."""
    _, processor = tiny
    pairs = [encode_pair(processor, row) for row in ROWS]
    for pair, row in zip(pairs, ROWS, strict=True):
        start = len(processor.encode(row["prompt"]))
        assert (pair.chosen.score[: start + 1] == 0).all()
        assert (pair.chosen.score[start + 1 :] == 1).all()
    batch = collate_pairs(processor, pairs)
    words = len(processor.words("a dot"))
    answer = 16 + 2  # codes, begin and end of image; and the end of the turn
    assert batch.slots[0].tolist() == [answer + 1, len(processor.words("two")) + 1, words + 19]
    assert batch.slots[1].tolist() == [answer + 1, len(processor.words("seven of them")) + 1, 19]


def test_a_pair_that_differs_in_one_code_differs_only_there(tiny):
    model, processor = tiny
    one, two = codes(1), codes(1)
    two[9] = (two[9] + 1) % 32
    content = [[{"type": "image", "codes": c}] for c in (one, two)]
    row = {
        "prompt": [user("a dot")],
        **{
            name: [{"role": "assistant", "content": c}]
            for name, c in zip(("chosen", "rejected"), content, strict=True)
        },
    }
    pairs = [encode_pair(processor, row)]
    begin = int((pairs[0].chosen.kind == CODE).nonzero()[0][0])

    def scored(first, last):
        for sample in (pairs[0].chosen, pairs[0].rejected):
            sample.score[:] = 0
            sample.score[begin + first : begin + last] = 1
        with torch.no_grad():
            return model(collate_pairs(processor, pairs).rows).log_probs

    before, there = scored(0, 9), scored(9, 10)
    assert float(before[0]) == pytest.approx(float(before[1]), abs=1e-5)
    assert abs(float(there[0] - there[1])) > 1e-3


def test_a_batch_of_mixed_kinds_is_the_pairs_one_by_one(tiny):
    model, processor = tiny
    together = log_probs(model, processor, ROWS).view(2, -1)
    alone = torch.stack([log_probs(model, processor, [row]) for row in ROWS], dim=1)
    assert torch.allclose(together, alone, atol=1e-4)


# ---------------------------------------------------------------------------- training


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def run(tmp_path, pairs_file):
    save_model(tmp_path / "model", *tiny_model())
    config = load_recipe("train/dpo.py").config
    source = dataclasses.replace(config.data["pairs"], options={"path": str(pairs_file)})
    return dataclasses.replace(
        config, init=str(tmp_path / "model"), out=str(tmp_path / "out"), data={"pairs": source},
        steps=4, batch_size=4, accumulate=2, warmup=0, precision="float32", log_every=1,
        preview_every=0, schedule="constant", train=((r"vision\..*", None), (r".*", 3e-3)),
        options={**config.options, "beta": 0.1, "next_token": 0.1},
    )  # fmt: skip


def log_of(folder, key):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_it_learns_to_prefer(run):
    run = dataclasses.replace(run, steps=25)
    out = train(run)
    assert log_of(out, "dpo")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert log_of(out, "dpo")[-1] < 0.2 and log_of(out, "accuracy")[-1] == 1.0
    assert log_of(out, "margin")[-1] > 1
    gains = [log_of(out, f"{name}_gain")[-1] for name in ("chosen", "rejected")]
    assert gains[0] > 0 > gains[1]
    assert log_of(out, "kl")[-1] == pytest.approx(-sum(gains) / 2, rel=1e-3)
    before, after = load_model(run.init)[0], load_model(out)[0]
    processor = load_model(out)[1]
    gain = (log_probs(after, processor, ROWS) - log_probs(before, processor, ROWS)).view(2, -1)
    assert (gain[0] > gain[1]).all()
    for name, value in before.vision.state_dict().items():
        assert torch.equal(value, after.vision.state_dict()[name])


def test_the_three_references_give_the_same_losses(run, tmp_path):
    """Steps after the first too, when the policy has moved away."""
    adapters = ((r".*lora_.*", 3e-3), (r".*", None))
    options = {**run.options, "lora_rank": 4}
    losses = {}
    for how in ("cached", "copy", "adapter"):
        # the policy with adapters is another one than the one without: give all three adapters
        out = tmp_path / how
        changed = dataclasses.replace(
            run, out=str(out), options={**options, "reference": how}, steps=3
        )
        if how == "adapter":
            train(dataclasses.replace(changed, train=adapters))
        else:
            train(changed)
        losses[how] = log_of(out, "main_loss")
    assert losses["cached"] == pytest.approx(losses["copy"], rel=1e-4)
    assert losses["adapter"][0] == pytest.approx(losses["copy"][0], rel=1e-4)
    assert losses["adapter"][-1] < losses["adapter"][0]
    assert losses["copy"][-1] < losses["copy"][0]


def test_adapters_switched_off_are_the_reference(run):
    """With adapters that have learned, the model without them is still what it began as, and
    merging them changes nothing but the form."""
    from unimm.checkpoints.adapters import add_adapters, merge_adapters, without_adapters

    model, processor = tiny_model()
    before = log_probs(model, processor, ROWS)
    names = set(model.state_dict())
    add_adapters(model, 4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    learned = log_probs(model, processor, ROWS)
    with without_adapters(model):
        assert torch.allclose(log_probs(model, processor, ROWS), before, atol=1e-5)
    assert (learned - before).abs().min() > 1e-2
    merge_adapters(model)
    assert set(model.state_dict()) == names
    assert torch.allclose(log_probs(model, processor, ROWS), learned, atol=1e-3)


def test_the_base_may_not_learn_beside_adapters(run):
    changed = dataclasses.replace(run, options={**run.options, "reference": "adapter"})
    with pytest.raises(ValueError, match="adapters alone"):
        train(changed)
    with pytest.raises(ValueError, match="reference is one of"):
        train(dataclasses.replace(run, options={**run.options, "reference": "none"}))


def test_cached_log_probabilities_are_kept_with_the_run(run):
    out = train(run)
    known = json.loads((out / "reference.json").read_text())["pairs"]
    assert set(known) == {row_key(row) for row in ROWS}
    model, processor, _ = load_model(run.init)
    found = log_probs(model, processor, ROWS).view(2, -1)
    for k, row in enumerate(ROWS):
        assert known[row_key(row)] == pytest.approx(found[:, k].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no preference"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": []}', "a preference is"),
        (json.dumps({**ROWS[0], "rejected": ROWS[0]["chosen"]}), "are equal"),
        (json.dumps({**ROWS[0], "prompt": [said("x")]}), "ends with a user"),
        (json.dumps({**ROWS[0], "chosen": [user("x")]}), "assistant messages"),
        (json.dumps({**ROWS[0], "chosen": []}), "at least one"),
    ],
)
def test_what_is_no_preference_is_one_line_and_status_2(text, message, run, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_preferences(path)
    words = [f"data.pairs.options.path={path}", f"init={run.init}", f"out={tmp_path / 'o'}"]
    assert main(["train", "train/dpo.py", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_pair_that_comes_twice_is_read_once(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), "", json.dumps({**ROWS[0], "id": "x"})]))
    assert len(read_preferences(path)) == 1


# ---------------------------------------------------------------------------- preferences


@pytest.fixture
def tiny_unimm(tmp_path):
    model = UniMM(*tiny_model(), {"world": "scenes-mini", "guidance": 1.5})
    model.save_pretrained(tmp_path / "tiny")
    return model


PROMPTS = ["a red circle", "a blue square", "a red circle", "a green circle"]


def test_candidates_are_what_the_model_draws_and_come_once(tiny_unimm, tmp_path):
    how = made.Sampling(3, guidance=1.5, seed=4)
    rows = made.sample_candidates(tiny_unimm, PROMPTS, tmp_path / "c.jsonl", how)
    assert [made.words_of(r["prompt"]) for r in rows] == [
        "a red circle",
        "a blue square",
        "a green circle",
    ]
    seed = made.seed_of(rows[1]["id"], how)
    for k, answer in enumerate(rows[1]["answers"]):
        picture = tiny_unimm.generate("a blue square", guidance=1.5, seed=seed + k)
        assert (np.asarray(made.shown(tiny_unimm, answer)) == np.asarray(picture)).all()


def test_sampling_goes_on_where_it_was_stopped(tiny_unimm, tmp_path, monkeypatch):
    how, path = made.Sampling(2), tmp_path / "c.jsonl"
    whole = made.sample_candidates(tiny_unimm, PROMPTS, tmp_path / "whole.jsonl", how)
    made.sample_candidates(tiny_unimm, PROMPTS[:1], path, how)
    with path.open("a") as file:
        file.write('{"id": "cut')  # killed while writing
    asked = []
    real = made.sample
    monkeypatch.setattr(
        made, "sample", lambda m, talks, *a: asked.append(len(talks)) or real(m, talks, *a)
    )
    assert made.sample_candidates(tiny_unimm, PROMPTS, path, how) == whole
    assert asked == [2]  # the first one was there
    assert made.sample_candidates(tiny_unimm, PROMPTS, path, how) == whole and asked == [2]
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_best_against_worst_with_stored_codes(tiny_unimm, tmp_path):
    rows = made.sample_candidates(tiny_unimm, PROMPTS, tmp_path / "c.jsonl", made.Sampling(3))
    brightness = made.function_judge(lambda words, picture: np.asarray(picture).mean())
    report = made.choose_pairs(tiny_unimm, rows, brightness, tmp_path / "p.jsonl")
    pairs = read_preferences(tmp_path / "p.jsonl")
    assert report["pairs"] == len(pairs) == 3 and report["best_score"] > report["mean_score"]
    for pair, row in zip(pairs, rows, strict=True):
        lights = [np.asarray(made.shown(tiny_unimm, a)).mean() for a in row["answers"]]
        assert pair["chosen"] == row["answers"][int(np.argmax(lights))]
        assert pair["rejected"] == row["answers"][int(np.argmin(lights))]
        assert made.codes_of(pair["chosen"]) in [made.codes_of(a) for a in row["answers"]]
    with pytest.raises(ValueError, match="prefers no answer"):
        made.choose_pairs(tiny_unimm, rows, brightness, tmp_path / "p.jsonl", margin=1e9)


def test_several_pairs_a_prompt(tiny_unimm, tmp_path):
    """The k-th best against the k-th worst, and never an answer against one that is as good."""
    rows = made.sample_candidates(tiny_unimm, PROMPTS[:1], tmp_path / "c.jsonl", made.Sampling(6))
    (answers,) = (row["answers"] for row in rows)
    assert len(answers) == 6
    path, scores = tmp_path / "p.jsonl", [0.0, 1.0, 0.5, 1.0, 0.0, 0.5]
    for each, count in ((1, 1), (2, 2), (9, 2)):
        report = made.choose_pairs(tiny_unimm, rows, lambda m, r: [scores], path, 0.0, each)
        pairs = [(p["chosen"], p["rejected"]) for p in read_preferences(path)]
        assert report["pairs"] == count
        assert pairs == [(answers[1], answers[0]), (answers[3], answers[4])][:count]


def test_words_can_be_preferred_too(tiny_unimm, tmp_path):
    how = made.Sampling(4, answer="text")
    rows = made.sample_candidates(tiny_unimm, ["say a word"], tmp_path / "c.jsonl", how)
    assert len({str(a) for a in rows[0]["answers"]}) == len(rows[0]["answers"]) > 1
    judge = made.function_judge(lambda words, text: len(text))
    made.choose_pairs(tiny_unimm, rows, judge, tmp_path / "p.jsonl")
    (pair,) = read_preferences(tmp_path / "p.jsonl")
    lengths = [len(made.shown(tiny_unimm, pair[name])) for name in ("chosen", "rejected")]
    assert lengths[0] > lengths[1]


def test_the_checker_judges_by_pixels(tiny_unimm, monkeypatch):
    from unimm.data.scenes import render

    rng = np.random.default_rng(0)
    scene = sample_scene(MINI, rng, count=1)
    right, wrong = render(scene, MINI), render(sample_scene(MINI, rng, count=2), MINI)
    monkeypatch.setattr(tiny_unimm, "pictures", lambda codes: [right, wrong])
    o = scene.objects[0]
    row = {
        "id": "a",
        "prompt": [user(f"a {o.color} {o.shape}")],
        "answers": [[drawn(1)], [drawn(2)]],
    }
    assert made.checker_judge(tiny_unimm, [row]) == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="prompts of Scenes"):
        made.checker_judge(tiny_unimm, [{**row, "prompt": [user("a cat")]}])


def test_prompts_are_of_the_train_split():
    words = made.scenes_prompts(200, "scenes-mini")
    assert len(set(words)) == 200 and made.scenes_prompts(200, "scenes-mini") == words
    from unimm.data.scenes import held_out_pair

    groups = [g for w in words for g in parse(w).groups]
    assert not any(color and held_out_pair(shape, color) for _, _, color, shape in groups)


def test_the_command_makes_preferences_and_refuses_nonsense(tiny_unimm, tmp_path, capsys):
    model, out = str(tmp_path / "tiny"), tmp_path / "pairs.jsonl"
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def dark(prompt, picture):\n    return -sum(picture.convert('L').tobytes())\n"
        "def nan(prompt, picture):\n    return float('nan')\n"
        "def nothing(prompt, picture):\n    return None\n"
    )
    common = ["preferences", str(out), "--model", model, "--answers", "2"]
    assert main([*common, "--judge", f"{judge}:dark", "--scenes", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pairs"] == 3
    candidates = made.read_lines(tmp_path / "pairs.candidates.jsonl")
    ratings = tmp_path / "ratings.jsonl"
    ratings.write_text(json.dumps({"id": candidates[1]["id"], "scores": [0, 1]}))
    assert main([*common, "--judge", str(ratings)]) == 0
    (pair,) = read_preferences(out)
    assert pair["chosen"] == candidates[1]["answers"][1]
    assert main([*common, "--judge", "self"]) == 0
    capsys.readouterr()
    for text, message in (
        (json.dumps({"id": "nobody", "scores": [0, 1]}), "no candidate with the id 'nobody'"),
        (json.dumps({"id": candidates[0]["id"], "scores": [1]}), "each needs a score"),
        (json.dumps({"id": candidates[0]["id"], "scores": [1, None]}), "not all numbers"),
        (json.dumps({"id": candidates[0]["id"], "chosen": []}), "holds preferences"),
        ("", "is empty"),
        ("[1]", "not a JSON object"),
    ):
        ratings.write_text(text)
        assert main([*common, "--judge", str(ratings)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    for words in (
        ["--judge", "nobody"],
        ["--judge", f"{judge}:light"],
        ["--judge", "self", "--scenes", "0"],
        ["--judge", "self", "--scenes", "2", "--answers", "1"],
        ["--judge", "self", "--candidates", str(tmp_path / "none.jsonl")],
        ["--judge", "self", "--margin", "-1"],
        ["--judge", "self", "--candidates", str(out)],
        ["--judge", f"{judge}:nan"],
        ["--judge", f"{judge}:nothing"],
    ):
        assert main([*common, *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------- the model as a judge


def test_implied_questions_are_true_of_the_scene():
    """Each is compared with the questions that are made from the scene itself."""
    compared = 0
    for k in range(150):
        rng = np.random.default_rng(k)
        scene = sample_scene(WORLDS["scenes"], rng)
        spec = parse(prompt(scene, rng))
        made_from_scene = {
            q.text: q.answer for j in range(12) for q in questions(scene, np.random.default_rng(j))
        }
        for text, answer in implied_questions(spec):
            if text in made_from_scene:
                compared += 1
                assert made_from_scene[text] == answer, (text, answer, scene)
    assert compared > 300


def test_questions_of_a_prompt():
    asked = dict(wanted("a small red circle left of a blue star on a gray background"))
    assert list(asked.items())[:2] == [
        ("is there a red circle?", "yes"),
        ("is there a blue star?", "yes"),
    ]
    assert asked["how many objects are there?"] == "two"
    assert asked["what color is the star?"] == "blue"
    assert asked["is the circle small or large?"] == "small"
    assert asked["is the red circle left of the blue star?"] == "yes"
    assert asked["what color is the background?"] == "gray"
    assert dict(wanted("three red circles"))["how many circles are there?"] == "three"
    assert wanted("a blue star and a circle")[1] == ("is there a circle?", "yes")
    asked = dict(wanted("a red star and a small blue star"))
    assert "what color is the star?" not in asked and asked["is there a red star?"] == "yes"
    assert asked["is the blue star small or large?"] == "small"
    assert wanted("a cat") == [("does the picture show a cat?", "yes")]


def test_agreement_is_the_log_probability_of_the_wanted_answers(picture):
    model, processor = tiny_model()
    prompts = ["a red circle", "a cat"]
    found = agreement(model, processor, [picture, picture], prompts)
    for words, score in zip(prompts, found, strict=True):
        talk = []
        for k, (question, answer) in enumerate(wanted(words)):
            talk += [user(picture, question) if k == 0 else user(question), assistant(answer)]
        batch = processor.collate([processor.encode(talk)])
        assert score == pytest.approx(-model(batch).nats["text"][0], abs=1e-3) and score < 0


def test_best_of_is_the_candidate_that_the_model_likes_best(tiny_unimm, tmp_path):
    texts = ["a red circle", "two blue squares"]
    all_of_them = tiny_unimm.generate(texts, n=4, seed=7)
    scores = agreement(
        tiny_unimm.model, tiny_unimm.processor, all_of_them, [t for t in texts for _ in range(4)]
    )
    best = [all_of_them[k + int(np.argmax(scores[k : k + 4]))] for k in (0, 4)]
    chosen = tiny_unimm.generate(texts, best_of=4, seed=7)
    for a, b in zip(best, chosen, strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    assert len({np.asarray(p).tobytes() for p in all_of_them}) > 2
    with pytest.raises(ValueError, match="best_of"):
        tiny_unimm.generate("a red circle", best_of=0)
    out = tmp_path / "a.png"
    command = ["generate", texts[0], "--best-of", "4", "--seed", "7", "-o", str(out)]
    assert main([*command, "--model", str(tmp_path / "tiny")]) == 0
    from PIL import Image

    assert (np.asarray(Image.open(out)) == np.asarray(chosen[0])).all()
