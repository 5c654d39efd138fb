"""Your own data: every reader on small real files, broken rows, what is held out, fine-tuning."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from unimm import UniMM
from unimm.checkpoints.native import save_model
from unimm.cli import main
from unimm.config import Source, load_recipe, override
from unimm.data import readers
from unimm.data.mixture import Mixture
from unimm.data.stores import VALIDATION
from unimm.training import previews
from unimm.training.next_token import open_init, setup_unified
from unimm.training.trainer import Parts, make_mixture, mixing_weights, train

RUN = SimpleNamespace(seed=3)
WORDS = ["a red dot", "a blue dot", "two green dots", "a black line"]


def picture(k):
    rng = np.random.default_rng(k)
    return Image.fromarray(rng.integers(0, 255, (20, 16, 3), np.uint8))


def png(k):
    buffer = io.BytesIO()
    picture(k).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def files(tmp_path):
    """Four pictures with an index of each kind beside them."""
    (tmp_path / "images").mkdir()
    for k, words in enumerate(WORDS):
        picture(k).save(tmp_path / f"images/{k}.png")
        (tmp_path / f"images/{k}.txt").write_text(words + "\n")
    rows = [
        {"file": f"images/{k}.png", "text": w, "name": w.split()[-1], "style": "plain"}
        for k, w in enumerate(WORDS)
    ]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (tmp_path / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    coco = {
        "images": [{"id": k + 5, "file_name": f"{k}.png"} for k in range(4)],
        "annotations": [{"image_id": k + 5, "caption": w} for k, w in enumerate(WORDS)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    asked = [
        {"file": f"images/{k}.png", "question": "what?", "answer": w} for k, w in enumerate(WORDS)
    ]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    talks = [
        {
            "id": k,
            "image": f"{k}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": w},
                {"from": "human", "value": "sure?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for k, w in enumerate(WORDS)
    ]
    (tmp_path / "llava.json").write_text(json.dumps(talks))
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": f"images/{k}.png"}]},
                {"role": "assistant", "content": [{"type": "text", "text": w}]},
            ]
        }
        for k, w in enumerate(WORDS)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for shard in range(2):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as tar:
            for k in (2 * shard, 2 * shard + 1):
                for ending, data in (("png", png(k)), ("txt", WORDS[k].encode())):
                    info = tarfile.TarInfo(f"sample/{k:05d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return tmp_path


def content(sample):
    """(pixels of the picture, all words) of a sample."""
    parts = [part for message in sample["messages"] for part in message["content"]]
    shown = [part["image"] for part in parts if part["type"] == "image"]
    assert len(shown) == 1
    opened = shown[0] if isinstance(shown[0], Image.Image) else Image.open(shown[0])
    return np.asarray(opened.convert("RGB")), [p["text"] for p in parts if p["type"] == "text"]


READERS = {
    "jsonl": lambda p: readers.captions(RUN, f"{p}/index.jsonl"),
    "csv": lambda p: readers.captions(RUN, f"{p}/index.csv"),
    "folder": lambda p: readers.folder(RUN, f"{p}/images"),
    "coco": lambda p: readers.coco(RUN, f"{p}/coco.json", f"{p}/images"),
    "vqa": lambda p: readers.vqa(RUN, f"{p}/vqa.jsonl"),
    "llava": lambda p: readers.llava(RUN, f"{p}/llava.json", f"{p}/images"),
    "messages": lambda p: readers.messages(RUN, f"{p}/talks.jsonl"),
    "webdataset": lambda p: readers.webdataset(RUN, f"{p}/s*.tar"),
    "own index": lambda p: readers.own(RUN, f"{p}/index.jsonl"),
    "own folder": lambda p: readers.own(RUN, f"{p}/images"),
    "own talks": lambda p: readers.own(RUN, f"{p}/talks.jsonl"),
    "own questions": lambda p: readers.own(RUN, f"{p}/vqa.jsonl"),
    "own shards": lambda p: readers.own(RUN, f"{p}/s*.tar"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_gives_each_picture_with_its_words(name, files):
    rows = READERS[name](files)
    _, processor = tiny_model()
    for turn in range(3):
        seen = set()
        for i in range(4 * turn, 4 * turn + 4):
            pixels, words = content(rows[i])
            (k,) = [k for k, w in enumerate(WORDS) if w in words]
            assert (pixels == np.asarray(picture(k))).all()
            seen.add(k)
            assert len(processor.encode(rows[i]["messages"])) > 16
        assert seen == {0, 1, 2, 3}  # each once a pass
    again = READERS[name](files)
    assert [content(again[i])[1] for i in range(9)] == [content(rows[i])[1] for i in range(9)]


def test_drawing_and_describing(files):
    for task, roles in (
        ("draw", {"assistant"}),
        ("describe", {"user"}),
        ("both", {"user", "assistant"}),
    ):
        rows = readers.captions(RUN, f"{files}/index.jsonl", task=task)
        found = set()
        for i in range(40):
            for message in rows[i]["messages"]:
                if any(part["type"] == "image" for part in message["content"]):
                    found.add(message["role"])
        assert found == roles
    with pytest.raises(ValueError, match="task is one of"):
        readers.captions(RUN, f"{files}/index.jsonl", task="paint")[0]


def test_a_form_of_several_columns_and_a_list_of_texts(files):
    rows = readers.captions(
        RUN, f"{files}/index.jsonl", text="a {style} picture of {name}", task="draw"
    )
    assert {content(rows[i])[1][0] for i in range(4)} == {
        "a plain picture of dot", "a plain picture of dots", "a plain picture of line",
    }  # fmt: skip
    line = json.dumps({"file": "images/0.png", "text": ["one", "two"]})
    (files / "lists.jsonl").write_text(line + "\n")
    rows = readers.captions(RUN, f"{files}/lists.jsonl", task="draw")
    assert {content(rows[i])[1][0] for i in range(20)} == {"one", "two"}


def test_what_is_held_out_is_never_trained_on_and_goes_whole(tmp_path):
    rows = [{"file": "x.png", "text": f"t{k}", "name": f"n{k % 50}"} for k in range(400)]
    path = tmp_path / "i.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = readers.captions(RUN, str(path), keep=0.2, keep_by="name", task="draw")
    train = {row["name"] for row in found.rows}
    kept = {row["name"] for row in found.kept}
    assert not train & kept and train | kept == {f"n{k}" for k in range(50)}
    assert 3 <= len(kept) <= 18 and len(found.rows) + len(found.kept) == 400

    def words(i):
        return found[i]["messages"][0]["content"][0]["text"]

    texts = {row["text"] for row in found.kept}
    assert {words(VALIDATION + i) for i in range(len(texts))} == texts
    assert not {words(i) for i in range(800)} & texts


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: readers.captions(RUN, f"{p}/none.jsonl"), "no such file"),
        (lambda p: readers.captions(RUN, f"{p}/index.jsonl", text="title"), "no column 'title'"),
        (lambda p: readers.captions(RUN, f"{p}/index.jsonl", image="path"), "no column 'path'"),
        (lambda p: readers.captions(RUN, f"{p}/index.jsonl", keep=1.0), "share of rows"),
        (lambda p: readers.folder(RUN, f"{p}/nowhere"), "no such folder"),
        (lambda p: readers.webdataset(RUN, f"{p}/none*.tar"), "no shard matches"),
        (lambda p: readers.webdataset(RUN, f"{p}/index.jsonl"), "cannot be read as a tar"),
        (lambda p: readers.coco(RUN, f"{p}/index.csv", "x"), "not valid JSON"),
        (lambda p: readers.own(RUN, ""), "say where the data is"),
    ],
)
def test_wrong_places_are_named(make, message, files):
    with pytest.raises(ValueError, match=message):
        make(files)


# ---------------------------------------------------------------------------- broken rows


def test_a_broken_row_is_left_out_and_named(files):
    good = (files / "index.jsonl").read_text() * 30
    (files / "images/bad.png").write_bytes(b"not a picture")
    broken = json.dumps({"file": "images/bad.png", "text": "x", "name": "x", "style": "x"})
    (files / "mixed.jsonl").write_text(good + broken + "\n{half a li\n")
    rows = readers.captions(RUN, f"{files}/mixed.jsonl")
    _, processor = tiny_model()
    notes = []
    mixture = Mixture(
        {"mine": rows}, {"mine": 1.0}, 0, lambda item, rng: processor.encode(item["messages"]),
        lambda name, reason: notes.append((name, reason)),
    )  # fmt: skip
    samples = mixture.take(122)
    assert len(samples) == 122 and len(notes) == mixture.broken["mine"] == 2
    assert any("bad.png" in r for _, r in notes) and any("not JSON" in r for _, r in notes)
    halves = [
        Mixture(
            {"mine": rows}, {"mine": 1}, 0, lambda i, rng: processor.encode(i["messages"])
        ).take(122, k, 2)
        for k in range(2)
    ]
    together = [s for half in halves for s in half]
    assert [s.ids.tolist() for s in together] == [s.ids.tolist() for s in samples]


def test_too_many_broken_rows_stop_the_run():
    class Bad:
        def __getitem__(self, i):
            if i % 4 == 0:
                raise ValueError(f"row {i} is broken")
            return i

    mixture = Mixture({"good": range(10**9), "bad": Bad()}, {"good": 1, "bad": 1})
    with pytest.raises(ValueError, match="of the source 'bad' are broken; the last one: row"):
        mixture.take(400)
    assert len(Mixture({"bad": Bad()}, {"bad": 1}, most_broken=0.5).take(400)) == 400


# ---------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_learns_from_an_index_and_reports_what_is_held_out(files, tmp_path):
    save_model(tmp_path / "tiny", *tiny_model())
    words = [
        f"data.mine.path={files}/index.jsonl", f"init={tmp_path / 'tiny'}", f"out={tmp_path / 'o'}",
        "data.mine.keep=0.4", "steps=25", "batch_size=8", "warmup=2", "log_every=5",
        "preview_every=25", "precision=float32", "drop_prompt=0.0",
    ]  # fmt: skip
    config = load_recipe("train/finetune.py").config
    run = override(config, words)
    assert run.data["mine"].options["keep"] == 0.4
    run = dataclasses.replace(run, train=((r".*", 3e-3),))
    out = train(run)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [entry["main_loss"] for entry in log if "main_loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    held = [
        entry
        for entry in log
        if "mine_held_out_text_nats" in entry or "mine_held_out_code_nats" in entry
    ]
    assert held and held[-1]["step"] == 25


def test_a_preview_draws_and_answers_what_is_held_out(files, tmp_path, monkeypatch):
    """The same each time, and beside what the data has."""
    save_model(tmp_path / "tiny", *tiny_model())
    words = [f"data.mine.path={files}/index.jsonl", f"init={tmp_path / 'tiny'}",
             "data.mine.keep=0.999", "options.previews=2", "precision=float32"]  # fmt: skip
    run = override(load_recipe("train/finetune.py").config, words)
    every = readers.captions(RUN, f"{files}/index.jsonl", task="draw")
    rows = dataclasses.replace(every, kept=every.rows)
    told = readers.captions(RUN, f"{files}/index.jsonl", task="describe")
    also = dataclasses.replace(told, kept=told.rows)
    data = {name: Source(lambda run, r=r: r) for name, r in (("a", rows), ("b", also))}
    run = dataclasses.replace(run, data=data, options={**run.options, "prompts": ["a cat"]})
    parts = setup_unified(run)
    monkeypatch.setattr(
        previews, "answer_texts", lambda model, processor, talks: ["a dot"] * len(talks)
    )
    parts.model.eval()
    with torch.no_grad():
        found = parts.preview(tmp_path, 3)
    said = (tmp_path / "preview-000003.txt").read_text().splitlines()
    assert said[0] == "drawn 1: a cat" and len(said) == 5
    drawn = [rows[VALIDATION + i]["messages"][0]["content"][0]["text"] for i in range(2)]
    assert said[1:3] == [f"drawn {k + 2}: {text}" for k, text in enumerate(drawn)]
    for i, line in enumerate(said[3:]):
        asked, answered, there = line.split(" | ")
        talk = also[VALIDATION + i]["messages"]
        assert asked.startswith("asked: [picture] ") and asked.endswith(
            talk[0]["content"][1]["text"]
        )
        assert answered == "answered: a dot"
        assert there == "in the data: " + talk[1]["content"][0]["text"]
    assert found["preview_answers_exact"] == 0.0
    width, height = Image.open(tmp_path / "preview-000003.png").size
    assert (width, height) == (8 * 18 + 2, 18 + 2)
    monkeypatch.setattr(
        previews, "answer_texts", lambda m, p, t: [line.split("the data: ")[1] for line in said[3:]]
    )
    with torch.no_grad():
        assert parts.preview(tmp_path, 4)["preview_answers_exact"] == 1.0
        monkeypatch.undo()
        assert 0 <= parts.preview(tmp_path, 5)["preview_answers_exact"] <= 1  # of the model itself


def test_what_stops_a_run_is_named_by_its_row(files):
    rows = readers.captions(RUN, f"{files}/index.jsonl")
    ((origin, item),) = Mixture({"mine": rows}, {"mine": 1.0}).draw(1)
    assert origin[0] == "mine"
    (file,) = {m["image"] for p in item["messages"] for m in p["content"] if "image" in m}
    assert f"'file': 'images/{file[-5:]}'" in origin[1]
    streamed = readers.webdataset(RUN, f"{files}/s*.tar", stream=True)
    ((origin, item),) = Mixture({"mine": streamed}, {"mine": 1.0}).draw(1)
    assert re.fullmatch(r"\{'png': s\d.tar:\d+, 'txt': s\d.tar:\d+\}", origin[1])


def test_broken_rows_among_the_held_out_do_not_stop_a_run(files, tmp_path):
    """A picture that is none, words beyond the context, no message at all: left out, as ever."""
    save_model(tmp_path / "tiny", *tiny_model())
    good = [talk(str(files / f"images/{k}.png"), f"answer {k}") for k in range(3)]
    bad = [talk(str(files / "none.png"), "x"), talk(str(files / "images/3.png"), "x" * 900)]
    rows = [*bad, {"messages": []}, {"messages": [{"content": None}]}, *good]
    every = readers.messages(RUN, lines(tmp_path / "t.jsonl", rows))
    found = dataclasses.replace(every, kept=every.rows)
    data = {"mine": Source(lambda run: found)}
    run = dataclasses.replace(
        load_recipe("train/finetune.py").config, init=str(tmp_path / "tiny"), data=data,
        precision="float32", batch_size=2,
    )  # fmt: skip
    parts = setup_unified(run)
    parts.model.eval()
    with torch.no_grad():
        metrics = parts.preview(tmp_path, 1)
        assert metrics["mine_held_out_text_nats"] > 0
        (tmp_path / "t.jsonl").unlink()
        assert parts.preview(tmp_path, 2) == metrics  # the rows are read once
    said = (tmp_path / "preview-000001.txt").read_text().strip().split("\n")
    assert sorted(line[-8:] for line in said) == ["answer 0", "answer 1", "answer 2"]


def test_the_command_says_what_is_wrong_with_data(files, tmp_path, capsys):
    save_model(tmp_path / "tiny", *tiny_model())
    (files / "images/3.png").write_bytes(b"")
    words = ["data", "check", "train/finetune.py", f"init={tmp_path / 'tiny'}"]
    sheet = tmp_path / "sheet.png"
    path = f"data.mine.path={files}/index.jsonl"
    assert main([*words, path, "data.mine.keep=0.0", "--sheet", str(sheet)]) == 2
    report, last = capsys.readouterr()
    assert "too many rows are broken to train on" in last
    assert "4 rows, 0 held out; 3 of 4 looked at are good" in report
    assert "1 x" in report and "3.png cannot be read as an image: empty file" in report
    shown = np.asarray(Image.open(sheet))
    assert (shown[:160, :480] < 200).any(axis=2).mean() > 0.2
    assert main([*words, f"data.mine.path={files}/none.jsonl"]) == 2
    assert "no such file" in capsys.readouterr().err
    alone = ["data", "check", f"{files}/index.jsonl", f"init={tmp_path / 'tiny'}"]
    assert main([*alone, "data.mine.keep=0.0"]) == 2
    assert capsys.readouterr().out == report
    assert main(["data", "check", f"{files}/none.jsonl"]) == 2
    assert "no such file" in capsys.readouterr().err


def talk(file, question):
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": file}]},
            {"role": "assistant", "content": question},
        ]
    }


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_picture_is_never_on_both_sides(files, tmp_path):
    """However many rows speak of it."""
    asked = [(k, n) for k in range(40) for n in range(3)]
    talks = lines(tmp_path / "m.jsonl", [talk(f"{k}.png", f"answer {n}") for k, n in asked])
    said = [
        {"id": f"{k}-{n}", "image": f"{k}.png", "conversations": [{"from": "gpt", "value": str(n)}]}
        for k, n in asked
    ]
    (tmp_path / "l.json").write_text(json.dumps(said))
    llava = readers.llava(RUN, str(tmp_path / "l.json"), "", keep=0.2)
    of = lambda row: row["messages"][0]["content"][0]["image"]  # noqa: E731
    for rows, name in (
        (readers.messages(RUN, talks, keep=0.2), of),
        (llava, lambda row: row["image"]),
    ):
        kept, rest = ({name(row) for row in part} for part in (rows.kept, rows.rows))
        assert kept and rest and not kept & rest
        assert len(rows.kept) == 3 * len(kept)


def test_pictures_that_rows_link_are_on_one_side(tmp_path):
    """[a], [a, b], [b, c]: nothing of a row held out is in one of training."""
    rows = []
    for k in range(60):
        shown = [[f"{k}a"], [f"{k}a", f"{k}b"], [f"{k}c", f"{k}b"]]
        for names in shown:
            content = [{"type": "image", "image": f"{name}.png"} for name in names]
            rows.append({"messages": [{"role": "user", "content": content}]})
    found = readers.messages(RUN, lines(tmp_path / "m.jsonl", rows), keep=0.3)
    kept, rest = (
        {part["image"] for row in side for part in row["messages"][0]["content"]}
        for side in (found.kept, found.rows)
    )
    assert len(kept) % 3 == 0 and 20 < len(kept) < 100 and not kept & rest


def test_several_pictures_of_a_llava_row_stand_where_they_are_named(files):
    turns = ["<image>\nand <image> differ how?", "a dot", "sure?", "yes"]
    talk = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
    rows = [{"image": ["0.png", "1.png"], "conversations": talk}]
    rows += [{"image": ["0.png"] * n, "conversations": talk} for n in (0, 3)]
    (files / "several.json").write_text(json.dumps(rows))
    found = readers.llava(RUN, f"{files}/several.json", f"{files}/images")
    first = found.make(found.rows[0], np.random.default_rng(0))["messages"][0]["content"]
    assert [part.get("text", Path(part.get("image", "")).name) for part in first] == [
        "0.png", "and", "1.png", "differ how?",
    ]  # fmt: skip
    again = found.make({**rows[0], "image": "0.png"}, np.random.default_rng(0))["messages"][0]
    assert [Path(p.get("image", "")).name for p in again["content"]] == ["0.png", "", "0.png", ""]
    unnamed = {"image": "0.png", "conversations": [{"from": "human", "value": "what?"}]}
    (alone,) = found.make(unnamed, np.random.default_rng(0))["messages"]
    assert Path(alone["content"][0]["image"]).name == "0.png" and len(alone["content"]) == 2
    for row, wrong in zip(found.rows[1:], ("more <image> than", "more pictures than"), strict=True):
        with pytest.raises(ValueError, match=wrong):
            found.make(row, np.random.default_rng(0))


def test_brackets_without_end_are_a_broken_row(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + '\n{"file": "a.png", "text": "a"}\n')
    broken, row = readers.read_jsonl(str(tmp_path / "deep.jsonl"))
    assert "line 1 is not JSON" in broken["broken"] and row["text"] == "a"


def test_too_much_that_is_broken_is_known_and_leaves_a_checkpoint(files, tmp_path, capsys):
    save_model(tmp_path / "tiny", *tiny_model())
    rows = [{"file": f"images/{k % 4 if k < 20 else 9}.png", "text": "a dot"} for k in range(24)]
    words = [
        f"data.mine.path={lines(files / 'b.jsonl', rows)}", "data.mine.keep=0.0",
        f"init={tmp_path / 'tiny'}",
    ]  # fmt: skip
    assert main(["data", "check", "train/finetune.py", *words]) == 2
    said = capsys.readouterr()
    assert "so many broken ones stop a run" in said.out and "too many rows" in said.err
    words += [
        f"out={tmp_path / 'o'}",
        "steps=40",
        "batch_size=4",
        "preview_every=0",
        "save_every=0",
    ]
    assert main(["train", "train/finetune.py", *words]) == 2
    assert "samples of the source 'mine' are broken" in capsys.readouterr().err
    (left,) = (tmp_path / "o").glob("checkpoint-*")
    assert int(left.name.split("-")[1]) > 3
    assert main(["train", "train/finetune.py", *words, "most_broken=0.5"]) == 0
    log = [json.loads(x) for x in (tmp_path / "o/log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log] == sorted({x["step"] for x in log}) and log[-1]["step"] == 40


def test_held_out_words_are_words(files, tmp_path):
    """The slots around a drawn picture, which are known beforehand, are none."""
    save_model(tmp_path / "tiny", *tiny_model())
    words = [f"init={tmp_path / 'tiny'}", "batch_size=2", "precision=float32"]
    run = override(load_recipe("train/finetune.py").config, words)
    model, processor, _ = open_init(run)
    found = {}
    for task in ("draw", "describe"):
        rows = readers.captions(RUN, f"{files}/index.jsonl", task=task)
        found[task] = [(m, processor.encode(m)) for m in (rows[i]["messages"] for i in range(4))]
    with torch.no_grad():
        drawn = previews.held_out_nats(run, model, processor, {"a": found["draw"]})
        told = previews.held_out_nats(run, model, processor, {"a": found["describe"]})
        both = previews.held_out_nats(run, model, processor, {"a": sum(found.values(), [])})
        rows = processor.collate([sample for _, sample in found["describe"]])
        total, count = model(rows).nats["text"]
    assert drawn.keys() == {"a_held_out_code_nats"} and told.keys() == {"a_held_out_text_nats"}
    assert both == pytest.approx(drawn | told, rel=1e-5)
    assert told["a_held_out_text_nats"] == pytest.approx(total / count, rel=1e-5)


def test_pictures_of_one_name_in_several_folders_are_several(tmp_path):
    for k in range(40):
        (tmp_path / str(k)).mkdir()
        picture(k).save(tmp_path / f"{k}/image.png")
        (tmp_path / f"{k}/image.txt").write_text("a dot")
    rows = readers.folder(RUN, str(tmp_path), keep=0.2)
    assert 2 <= len(rows.kept) <= 16


def test_shards_as_tar_writes_them(tmp_path):
    for k in range(3):
        (tmp_path / f"v1.0-{k}.png").write_bytes(png(k))
        (tmp_path / f"v1.0-{k}.txt").write_text(WORDS[k])
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for k in range(3):
            for ending in ("png", "txt"):
                name = f"./v1.0/{k}.{ending}"
                tar.add(tmp_path / f"v1.0-{k}.{ending}", arcname=name)
    rows = readers.webdataset(RUN, str(tmp_path / "*.tar"), task="describe")
    assert sorted(content(rows[i])[1][-1] for i in range(3)) == sorted(WORDS[:3])
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match="a.tar (is cut short|cannot be read)"):
        readers.webdataset(RUN, str(shard))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": None}, "text is no text, but None"),
        ({"text": []}, "text is no text"),
        ({"text": {"a": 1}}, "text is no text"),
        ({"text": "  "}, "empty text"),
        ({"text": True}, "text is no text, but True"),
        ({"text": float("nan")}, "text is no text, but nan"),
    ],
)
def test_what_is_no_text_is_not_learned(row, reason, files):
    path = lines(files / "odd.jsonl", [{"file": "images/0.png", **row}])
    with pytest.raises(ValueError, match=f"0.png.*{reason}"):
        readers.captions(RUN, path)[0]
    (named,) = ({"alt text.en": value} for value in row.values())
    path = lines(files / "odd.jsonl", [{"file": "images/0.png", **named}])
    for text in ("alt text.en", "{alt text.en}"):
        with pytest.raises(ValueError, match=f"0.png.*{reason.replace('text is', 'en is')}"):
            readers.captions(RUN, path, text=text)[0]


def test_columns_of_any_name_make_a_text(files):
    row = {"file": "images/0.png", "alt text": "a dot", "meta.by": "me", "n": 3}
    path = lines(files / "odd.jsonl", [row])
    rows = readers.captions(RUN, path, text="{alt text} by {meta.by}, {n} times", task="draw")
    assert content(rows[0])[1] == ["a dot by me, 3 times"]
    for form, reason in (
        ("{n", "is no form"),
        ("{n:3d} times", "nothing else"),
        ("{} times", "nothing else"),
        ("{m} times", "no column 'm', only file, alt text, meta.by, n"),
    ):
        with pytest.raises(ValueError, match=reason):
            readers.captions(RUN, path, text=form)


def test_a_first_row_that_lacks_something_is_one_broken_row(files):
    path = lines(
        files / "odd.jsonl",
        [{"file": "images/0.png"}, {"file": "images/1.png", "text": "a dot"}],
    )
    rows = readers.captions(RUN, path, task="draw")
    made = []
    for i in range(2):
        try:
            made.append(content(rows[i])[1])
        except ValueError as error:
            assert "images/0.png" in str(error) and "text" in str(error)
    assert made == [["a dot"]]


def test_a_name_that_is_not_utf_8_is_a_name(files):
    before = sum(1 for _ in (files / "images").glob("*.png"))
    (files / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(png(7))
    rows = readers.folder(RUN, str(files / "images"), keep=0.5)
    assert len(rows.rows) + len(rows.kept) == before + 1
    run = SimpleNamespace(
        data={"mine": Source(lambda run: readers.folder(RUN, str(files / "images")))},
        out=str(files), seed=3, mixing="weights", most_broken=0.5, workers=1,
    )  # fmt: skip
    make_mixture(run, Parts(torch.nn.Identity(), list), {}).take(8)
    assert "has no text" in (files / "left_out.txt").read_text(encoding="utf-8")


def test_parquet_with_pictures_in_it_and_long_cells(files):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = [{"image": {"bytes": png(k), "path": f"{k}.png"}, "text": WORDS[k]} for k in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(table), files / "in.parquet")
    rows = readers.captions(RUN, f"{files}/in.parquet", image="image", task="describe")
    found = {content(rows[i])[1][-1]: content(rows[i])[0] for i in range(3)}
    for k in range(3):
        assert (found[WORDS[k]] == np.asarray(picture(k))).all()
    (files / "long.csv").write_text(f"file,text,more\nimages/0.png,a dot,{'x' * 200_000}\n")
    assert content(readers.captions(RUN, f"{files}/long.csv", task="draw")[0])[1] == ["a dot"]


@pytest.mark.parametrize(
    "line, reason",
    [("images/0.png", "is no text"), ("images/0.png,a cat, a dog", "more cells than columns")],
)
def test_a_csv_row_of_other_length_is_broken(line, reason, files):
    (files / "odd.csv").write_text(f"file,text\n{line}\n", encoding="utf-8-sig")  # as Excel writes
    with pytest.raises(ValueError, match=f"images/0.png: .*{reason}"):
        readers.captions(RUN, f"{files}/odd.csv")[0]
    (files / "odd.csv").write_bytes("file,text\nimages/0.png,un café".encode("latin-1"))
    with pytest.raises(ValueError, match="odd.csv cannot be read as CSV in UTF-8"):
        readers.captions(RUN, f"{files}/odd.csv")


def test_answers_are_words_and_only_answers(files):
    rows = [{"file": "images/0.png", "question": "how many?", "answer": a} for a in (2, None)]
    asked = readers.vqa(RUN, lines(files / "n.jsonl", rows))
    found = []
    for i in range(2):
        try:
            found.append(asked[i]["messages"][1]["content"])
        except ValueError as error:
            assert "images/0.png: the answer is None" in str(error)
    assert found == [[{"type": "text", "text": "2"}]]
    turns = [{"from": who, "value": "hm"} for who in ("system", "human", "gpt")]
    (files / "s.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    with pytest.raises(ValueError, match="system"):
        readers.llava(RUN, f"{files}/s.json", f"{files}/images")[0]


def test_files_that_are_something_else_are_said_to_be(files):
    with pytest.raises(ValueError, match="vqa.jsonl is not valid JSON"):
        readers.coco(RUN, f"{files}/vqa.jsonl", "")
    with pytest.raises(ValueError, match="none of COCO's"):
        readers.coco(RUN, f"{files}/llava.json", "")
    (files / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="empty.csv holds no row"):
        readers.captions(RUN, f"{files}/empty.csv")
    with pytest.raises(ValueError, match="a role and a content, and this is 'hi'"):
        tiny_model()[1].encode(["hi"])


@pytest.mark.parametrize("name", ["talks.jsonl", "vqa.jsonl", "images", "s*.tar"])
def test_options_that_say_nothing_of_such_data_are_refused(name, files):
    with pytest.raises(ValueError, match="keep_by is not an option of"):
        readers.own(RUN, f"{files}/{name}", keep_by="style")


@pytest.mark.parametrize(
    "part, reason",
    [
        ({"type": "text", "text": 5}, "is a string"),
        ({"type": "image", "image": None}, "is a path"),
        ({"type": "image", "image": ["a"]}, "is a path"),
        ({"type": "image", "codes": [0] * 16, "view": 3}, "view holds"),
        ({"type": "image", "codes": [0] * 15}, "16 codes, not 15"),
        ({"type": "image", "codes": [0] * 15 + [10**6]}, "codes are 0 to"),
        ({"type": "image", "codes": ["a"] * 16}, "whole numbers"),
    ],
)
def test_wrong_parts_are_said_to_be_wrong(part, reason):
    _, processor = tiny_model()
    words = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    with pytest.raises(ValueError, match=reason):
        processor.encode([{"role": "user", "content": [part]}, words])


def test_the_check_looks_at_all_that_a_run_would(files, tmp_path, capsys):
    save_model(tmp_path / "tiny", *tiny_model())
    words = ["data", "check", "train/finetune.py", f"init={tmp_path / 'tiny'}"]
    rows = [{"file": f"images/{k % 4}.png", "text": "a", "n": str(k)} for k in range(40)]
    kept = readers.captions(RUN, lines(files / "h.jsonl", rows), keep=0.2, keep_by="n").kept
    for row in rows:
        row["file"] = "images/none.png" if row in kept else row["file"]
    path = lines(files / "h.jsonl", rows)
    some = [f"data.mine.path={path}", "data.mine.keep=0.2", "data.mine.keep_by=n"]
    assert main([*words, *some, "most_broken=0.01"]) == 2
    report = capsys.readouterr().out
    assert f"{len(kept)} x no such image" in report and f"{40 - len(kept)} of 40" in report
    assert "stop a run (most_broken=0.01)" in report
    path = lines(files / "u.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    assert main([*words, f"data.mine.path={path}", "data.mine.keep=0.0"]) == 2
    assert "1 x there is nothing to learn" in capsys.readouterr().out


def test_a_folder_with_a_model_in_it_is_not_written_over(files, tmp_path):
    save_model(tmp_path / "tiny", *tiny_model())
    run = load_recipe("train/finetune.py").config
    run = override(run, [f"data.mine.path={files}/index.jsonl", f"init={tmp_path / 'tiny'}"])
    before = (tmp_path / "tiny/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="choose another out"):
        train(dataclasses.replace(run, out=str(tmp_path / "tiny"), steps=1))
    assert (tmp_path / "tiny/model.safetensors").read_bytes() == before


def test_an_image_tokenizer_of_own_pictures_takes_the_place_of_a_models_own(files, tmp_path):
    run = load_recipe("tokenizers/train_own_image.py").config
    small = ["image_size=16", "multipliers=(1,2)", "base_channels=8", "z_channels=8"]
    words = [f"options.{word}" for word in [*small, "codebook_size=32", "code_dim=8"]]
    words += ["steps=2", "batch_size=2", "preview_every=2", "precision=float32", "log_every=1"]
    words += [f"data.mine.path={files}/index.jsonl", f"out={tmp_path / 'own'}"]
    out = train(override(run, words))
    assert (out / "preview-000002.png").exists()
    rows = readers.pictures(override(run, words), f"{files}/index.jsonl", keep=0.5)
    assert rows[0].shape == (16, 16, 3) and rows[0].dtype == np.uint8
    first = {rows[i].tobytes() for i in range(len(rows))}
    assert not first & {rows[VALIDATION + i].tobytes() for i in range(len(rows.kept))}
    save_model(tmp_path / "tiny", *tiny_model())
    before = UniMM.from_pretrained(tmp_path / "tiny").processor.codes(picture(0))
    for name in ("json", "safetensors"):
        shutil.copy(out / f"image_tokenizer.{name}", tmp_path / "tiny")
    run = load_recipe("train/finetune.py").config
    words = [f"data.mine.path={files}/index.jsonl", f"init={tmp_path / 'tiny'}", "steps=1"]
    made = UniMM.from_pretrained(train(override(run, [*words, f"out={tmp_path / 'mine'}"])))
    assert (made.processor.codes(picture(0)) != before).any()
    assert made.generate("a red dot", seed=0).size == (16, 16)


def test_sources_are_mixed_by_the_roots_of_their_sizes(files):
    run = load_recipe("train/finetune.py").config
    path = {"path": lines(files / "a.jsonl", [{"file": "images/0.png", "text": "a"}] * 36)}
    four = {"path": f"{files}/index.jsonl"}
    mine = {
        "large": Source(readers.own, options=path),
        "small": Source(readers.own, weight=2.0, options=four),
    }
    run = dataclasses.replace(run, data=mine, mixing="sqrt")
    sources = {name: source.make(run, **source.options) for name, source in mine.items()}
    assert mixing_weights(run, sources) == {"large": 6.0, "small": 4.0}
    run = dataclasses.replace(run, mixing="weights")
    assert mixing_weights(run, sources) == {"large": 1.0, "small": 2.0}
    with pytest.raises(ValueError, match="mixing is"):
        mixing_weights(dataclasses.replace(run, mixing="root"), sources)
    with pytest.raises(ValueError, match="'endless' has no size"):
        mixing_weights(
            dataclasses.replace(run, mixing="sqrt", data={"endless": mine["large"]}),
            {"endless": iter(())},
        )


def test_options_of_a_source_are_reached_by_their_short_name():
    run = load_recipe("train/finetune.py").config
    changed = override(run, ["data.mine.path=x", "data.mine.task=draw", "data.mine.weight=2"])
    assert changed.data["mine"].options == {**_defaults_of_own(), "path": "x", "task": "draw"}
    assert changed.data["mine"].weight == 2.0
    for wrong in ("data.mine.pth=x", "data.yours.path=x"):
        with pytest.raises(ValueError, match="unknown key"):
            override(run, [wrong])


def _defaults_of_own():
    names = {"image": "file", "text": "text", "task": "both", "keep_by": "", "codes": ""}
    return {**names, "keep": 0.1, "stream": False, "block": 1000}
