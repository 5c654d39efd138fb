"""Codes ahead of time: equal to those made in training, by any processes, whole or not at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_readers import files  # noqa: F401 (a fixture)

from unimm.checkpoints.native import load_model, save_model
from unimm.cli import main
from unimm.config import Begin, load_recipe, override
from unimm.data import codes as module
from unimm.data import readers
from unimm.data.codes import CodeShards, made_by
from unimm.training.trainer import train

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "tokenizers/encode_images.py")


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "model", *tiny_model())
    return tmp_path / "model"


def encode(*words):
    return main(["train", SCRIPT, *map(str, words)])


@pytest.mark.parametrize("source", ["images", "index.jsonl", "index.csv", "s*.tar"])
def test_a_reader_takes_codes_in_place_of_pixels(files, model, source, capsys):  # noqa: F811
    out = files / "codes"
    words = [f"source={files}/{source}", f"out={out}", f"model={model}", "shard=3"]
    assert encode(*words, "part=1", "parts=2") == 0
    assert len(list(out.glob("*.safetensors"))) == 1
    assert encode(*words) == 0  # what another process has made is not made again
    assert "3 of 4 pictures encoded here" in capsys.readouterr().out
    assert len(list(out.glob("*"))) == 2
    processor = load_model(model)[1]
    run = SimpleNamespace(seed=3, init=str(model))
    path = f"{files}/{source}"
    plain = readers.own(run, path, task="draw")
    fast = readers.own(run, path, task="draw", codes=str(out))
    wanted = [processor.encode(plain[i]["messages"]) for i in range(4)]
    for picture in (files / "images").glob("*.png"):
        picture.unlink()
    if source != "s*.tar":
        with pytest.raises((ValueError, OSError)):
            processor.encode(plain[0]["messages"])
    processor.drawn_pixels = None  # nothing is encoded any more
    for i in range(4):
        assert (processor.encode(fast[i]["messages"]).ids == wanted[i].ids).all()
    assert any((wanted[0].ids[-20:] != w.ids[-20:]).any() for w in wanted[1:])


def test_what_cannot_be_read_is_left_out_and_named(files, model, capsys):  # noqa: F811
    (files / "images/1.png").write_bytes(b"no picture")
    out = files / "codes"
    assert encode(f"source={files}/images", f"out={out}", f"model={model}") == 0
    said = capsys.readouterr().out
    assert "1.png: " in said and "3 of 4 pictures" in said
    known = CodeShards(out, made_by(model))
    assert "0.png" in known and "1.png" not in known
    listed = {picture.name: picture for picture in readers.list_pictures(f"{files}/images")}
    assert known.of(listed["0.png"]).shape == (16,)


def test_codes_are_of_the_content_not_of_the_name(files, model, tmp_path, capsys):  # noqa: F811
    """A picture painted over, and two folders that call theirs alike, in one folder of codes."""
    out, processor = tmp_path / "codes", load_model(model)[1]
    run = SimpleNamespace(seed=3, init=str(model))

    def codes_of(folder):
        rows = readers.own(run, str(folder), task="draw", codes=str(out))
        parts = [rows.make(row, np.random.default_rng(0))["messages"][1] for row in rows.rows]
        return [np.asarray(part["content"][0]["codes"]) for part in parts]

    def right(folder):
        wanted = [processor.codes(path) for path in sorted(folder.glob("*.png"))]
        return all((a == b).all() for a, b in zip(codes_of(folder), wanted, strict=True))

    first, second = files / "images", tmp_path / "second"
    shutil.copytree(first, second)
    for k, path in enumerate(sorted(second.glob("*.png"))):
        Image.new("RGB", (20, 20), (250, 40 * k, 10)).save(path)
    words = [f"out={out}", f"model={model}"]
    for folder in (first, second):
        assert encode(f"source={folder}", *words) == 0
        assert "4 of 4 pictures" in capsys.readouterr().out
    assert right(first) and right(second)
    shutil.copy(second / "2.png", first / "1.png")
    with pytest.raises(ValueError, match="1.png is not the picture that it was"):
        codes_of(first)
    assert encode(f"source={first}", *words) == 0
    assert right(first) and right(second)
    (first / "1.png").unlink()  # two were called so: which it was, nobody knows
    known = CodeShards(out)
    with pytest.raises(ValueError, match="no such image"):
        known.of(readers.Picture("1.png", lambda: readers.bytes_of(first / "1.png")))


def test_codes_of_none_of_the_pictures_are_no_mistake_to_pass_over(files, model, tmp_path):  # noqa: F811
    assert encode(f"source={files}/images", f"out={tmp_path}/codes", f"model={model}") == 0
    run = SimpleNamespace(seed=3, init=str(model))
    with pytest.raises(ValueError, match="none of these pictures: .*'images/0.png'.*'0.png'"):
        readers.own(run, f"{files}/index.jsonl", codes=f"{tmp_path}/codes")


def test_pictures_inside_parquet_have_codes_too(files, model, tmp_path):  # noqa: F811
    import pyarrow
    import pyarrow.parquet

    paths = sorted((files / "images").glob("*.png"))
    rows = [{"image": {"bytes": p.read_bytes(), "path": "a.png"}, "text": p.stem} for p in paths]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    words = [f"source={tmp_path}/d.parquet", "image=image", f"model={model}"]
    assert encode(*words, f"out={tmp_path}/codes") == 0
    run = SimpleNamespace(seed=3, init=str(model))
    how = {"image": "image", "task": "draw", "codes": f"{tmp_path}/codes"}
    source = readers.own(run, f"{tmp_path}/d.parquet", **how)
    for row, path in zip(source.rows, paths, strict=True):  # all of one name
        part = source.make(row, np.random.default_rng(0))["messages"][1]["content"][0]
        assert (part["codes"] == load_model(model)[1].codes(path)).all()


def test_codes_are_of_the_tokenizer_not_of_the_file_it_is_in(model, tmp_path):
    weights = load_file(model / "image_tokenizer.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    other = {name: tensor + 0.5 for name, tensor in weights.items()}
    names = []
    for k, one in enumerate((rounded, {n: t.float() for n, t in rounded.items()}, other)):
        (tmp_path / str(k)).mkdir()
        save_file(one, tmp_path / f"{k}/image_tokenizer.safetensors")
        names.append(made_by(tmp_path / str(k)))
    assert names[0] == names[1] != names[2] and len(names[0]) == 8
    (tmp_path / "adapters").mkdir()
    for base, name in ((str(tmp_path / "0"), names[0]), ("scenes", made_by("scenes"))):
        about = tmp_path / "adapters/adapter_config.json"
        about.write_text(json.dumps({"base_model_name_or_path": base}))
        assert made_by(tmp_path / "adapters") == name != ""


def test_a_kill_leaves_no_half_shard(files, model, monkeypatch):  # noqa: F811
    def killed(tensors, path, about):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    out, processor = files / "codes", load_model(model)[1]
    pictures = readers.list_pictures(f"{files}/images")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            module.encode_pictures(pictures, processor, out)
    assert not list(out.glob("codes-*"))
    with pytest.raises(ValueError, match="holds no codes"):
        CodeShards(out)
    assert module.encode_pictures(pictures, processor, out, shard=2) == (4, [])
    (shard, *_) = out.glob("codes-*")
    shard.write_bytes(shard.read_bytes()[:30])
    with pytest.raises(ValueError, match="cannot be read as a code shard"):
        CodeShards(out)


def test_codes_of_another_tokenizer_are_refused(files, model, tmp_path):  # noqa: F811
    assert encode(f"source={files}/images", f"out={files}/codes", f"model={model}") == 0
    save_model(tmp_path / "other", *tiny_model(seed=4))
    (tmp_path / "janus").mkdir()  # of a folder in another format, or of parts, nobody knows
    for init in (str(tmp_path / "other"), str(tmp_path / "janus"), Begin("a", "b", "c")):
        run = SimpleNamespace(seed=3, init=init)
        with pytest.raises(ValueError, match="of another image tokenizer"):
            readers.own(run, f"{files}/images", codes=f"{files}/codes")


def test_mistakes_end_in_a_line(files, model, capsys):  # noqa: F811
    for words, message in (
        (["out=x"], "say what to encode"),
        ([f"source={files}/none.jsonl", "out=x", f"model={model}"], "no such file"),
        ([f"source={files}", "out=x", "part=2", "parts=2"], "counts from 0"),
        ([f"source={files}/index.jsonl", "image=path", "out=x", f"model={model}"], "no picture"),
    ):
        assert encode(*words) == 2
        assert message in capsys.readouterr().err


def test_finetuning_on_codes_is_finetuning_on_pixels(files, model):  # noqa: F811
    assert encode(f"source={files}/images", f"out={files}/codes", f"model={model}") == 0
    recipe = load_recipe(ROOT / "train/finetune.py").config
    logs = []
    for name, words in (("pixels", []), ("codes", [f"data.mine.codes={files}/codes"])):
        words = [f"data.mine.path={files}/images", "data.mine.keep=0.0", *words]
        run = override(recipe, [*words, f"init={model}", f"out={files}/{name}", "steps=2"])
        out = train(replace(run, batch_size=4, log_every=1, preview_every=0, precision="float32"))
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs.append([entry["main_loss"] for entry in log])
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert np.isfinite(logs).all()
