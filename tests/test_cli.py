"""The command line on a tiny model: what works, what is refused, that nothing is left behind."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image

from unimm.checkpoints.native import save_model
from unimm.cli import main
from unimm.data.images import open_image
from unimm.pipeline import UniMM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path, *tiny_model(), {"guidance": 2.0})
    return path


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(path)
    return path


def refused(capsys, words, *, says):
    """Exit status 2 and one line on standard error."""
    try:
        status = main([str(w) for w in words])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert err.count("\n") == 1 and says in err and "Traceback" not in err
    assert out == ""


def test_generate_is_the_library_call(folder, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["generate", "a dog", "-o", str(out), "--seed", "3", "--model", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    expected = UniMM.from_pretrained(folder).generate("a dog", seed=3)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]


def test_generate_a_file_of_prompts(folder, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("one\n\ntwo\n")
    words = ["generate", "--prompts", prompts, "-n", 2, "-o", out, "--model", folder]
    assert main([str(w) for w in words]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png",
    ]  # fmt: skip
    model = UniMM.from_pretrained(folder)
    last = model.generate("two", seed=3)  # picture k of a call uses seed + k
    assert np.array_equal(np.asarray(Image.open(out / "0001-1.png")), np.asarray(last))


def test_caption_ask_and_edit(folder, png, tmp_path, capsys):
    model = ["--model", str(folder)]
    assert main(["caption", str(png), str(png), *model]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert main(["ask", str(png), "what?", *model]) == 0
    assert capsys.readouterr().out.strip() == UniMM.from_pretrained(folder).ask(png, "what?")
    out = tmp_path / "b.jpg"
    assert main(["edit", str(png), "make it red", "-o", str(out), *model]) == 0
    assert Image.open(out).format == "JPEG"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "", "-o", "OUT"], "empty"),
        (["generate", " \n ", "-o", "OUT"], "empty"),
        (["generate", "x", "-n", "0", "-o", "OUT"], "1 or more"),
        (["generate", "x" * 5000, "-o", "OUT"], "context"),
        (["generate", "x", "-o", "OUT", "--temperature", "-1"], "temperature"),
        (["generate", "x", "-o", "OUT", "--top-p", "0"], "top_p"),
        (["generate", "x", "-o", "OUT", "--device", "tpu"], "device"),
        (["generate", "x", "-o", "/nonexistent/dir/a.png"], "no such folder"),
        (["generate", "x", "-o", "OUT.exe"], "ends in"),
        (["generate", "-o", "OUT"], "prompt"),
        (["generate", "x", "--seed", "pi"], "invalid int"),
        (["generate", "x", "--seed", "-1", "-o", "OUT"], "seed"),
        (["generate", "x", "--seed", str(10**30), "-o", "OUT"], "seed"),
        (["generate", "x", "--temperature", "nan", "-o", "OUT"], "temperature"),
        (["generate", "x", "-o", "OUT.json"], "ends in"),
        (["eval", "scenes", "--seeds", "0"], "1 or more"),
        (["ask", "PNG", ""], "empty"),
        (["caption", "/nonexistent.png"], "no such image"),
        (["edit", "PNG", "  ", "-o", "OUT"], "empty"),
        (["dance"], "invalid choice"),
        (["train", "/nonexistent.py"], "no such recipe"),
        (["eval", "nothing"], "no benchmark"),
    ],
)
def test_wrong_words_are_refused(words, says, folder, png, tmp_path, capsys):
    places = {"OUT": tmp_path / "o.png", "PNG": png}
    places |= {f"OUT.{end}": tmp_path / f"o.{end}" for end in ("exe", "json")}
    words = [places.get(word, word) for word in words]
    known = words[0] in ("generate", "ask", "caption", "edit", "eval")
    refused(capsys, [*words, *(["--model", folder] if known else [])], says=says)
    assert [p.name for p in tmp_path.iterdir()] == ["in.png"]


def test_absent_device(folder, tmp_path, capsys):
    import torch

    if not torch.backends.mps.is_available():
        words = ["generate", "x", "--device", "mps", "--model", folder, "-o", tmp_path / "a.png"]
        refused(capsys, words, says="mps")
    assert not list(tmp_path.iterdir())


def bomb(path):
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    path.write_bytes(data + struct.pack(">I", zlib.crc32(chunk)) + b"\0" * 64)


def test_what_is_no_image_is_refused(folder, png, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("empty.png", "text.png", "cut.png", "bomb.png")}
    files["empty.png"].write_bytes(b"")
    files["text.png"].write_text("hello")
    files["cut.png"].write_bytes(png.read_bytes()[:600])
    bomb(files["bomb.png"])
    for path in (*files.values(), tmp_path):
        refused(capsys, ["caption", path, "--model", folder], says=str(path))


def test_pictures_of_all_kinds_are_accepted(folder, tmp_path):
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 255, (20, 33, 3), np.uint8))
    kinds = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey.png": rgb.convert("L"),
        "palette.png": rgb.convert("P"),
        "bit.png": rgb.convert("1"),
        "alpha.png": Image.fromarray(rng.integers(0, 255, (9, 9, 4), np.uint8)),
        "deep.png": Image.fromarray(rng.integers(0, 65535, (9, 9)).astype(np.uint16)),
        "dot.png": Image.new("RGB", (1, 1), "red"),
        "line.png": Image.new("RGB", (3000, 1), "blue"),
        "tall.png": Image.new("RGB", (1, 3000), "blue"),
    }
    paths = []
    for name, image in kinds.items():
        image.save(tmp_path / name)
        paths.append(str(tmp_path / name))
    rgb.save(tmp_path / "moves.gif", save_all=True, append_images=[rgb.rotate(90)])
    assert main(["caption", *paths, str(tmp_path / "moves.gif"), "--model", str(folder)]) == 0
    out = tmp_path / "line-edited.png"
    for name in ("line.png", "dot.png"):
        words = ["edit", str(tmp_path / name), "x", "-o", str(out), "--model", str(folder)]
        assert main(words) == 0


def test_transparency_rotation_and_depth_are_honoured(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    turned.save(tmp_path / "t.jpg", exif=exif)
    assert open_image(tmp_path / "t.jpg").size == (4, 8)
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert [p[0] for p in np.asarray(open_image(deep))[0]] == [0, 127, 255]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "JSON"),
        (lambda d: (d / "config.json").write_text('{"format": "other"}'), "format"),
        (lambda d: (d / "config.json").write_text('{"format": "unimm-1", "model": {}}'), "model"),
        (lambda d: (d / "model.safetensors").unlink(), "missing"),
        (lambda d: os.truncate(d / "model.safetensors", 1000), "damaged"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda d: os.truncate(d / "image_tokenizer.safetensors", 100), "broken"),
        (lambda d: wrong_shape(d), "shape"),
    ],
)
def test_broken_models_are_refused(harm, says, folder, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    harm(broken)
    out = tmp_path / "a.png"
    refused(capsys, ["generate", "x", "-o", out, "--model", broken], says=says)
    assert not out.exists()


def wrong_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["decoder"]["hidden"] += 8
    (folder / "config.json").write_text(json.dumps(config))


def test_saved_models_are_the_same_model(folder, tmp_path):
    model = UniMM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = UniMM.from_pretrained(tmp_path / "again")
    for (name, a), (_, b) in zip(
        model.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert (a == b).all(), name
    assert again.sampling == {"guidance": 2.0}
    words = ["日本語", "🦀 crab", "naïve", "\x00"]
    assert len(again.generate(words)) == 4


def test_generate_calls(folder):
    model = UniMM.from_pretrained(folder)
    with pytest.raises(ValueError, match="n >= 1"):
        model.generate("x", n=0)
    four = model.generate(["a", "b"], n=2, seed=10)
    for k, prompt in enumerate(["a", "a", "b", "b"]):
        assert np.array_equal(np.asarray(four[k]), np.asarray(model.generate(prompt, seed=10 + k)))
    frames = list(model.generate_stream("a", every=4, seed=10))
    assert len(frames) == 4
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(four[0]))


def test_chat_returns_the_conversation(folder):
    model = UniMM.from_pretrained(folder)
    start = [{"role": "user", "content": "hello"}]
    talk = model.chat(start)
    assert talk[:1] == start and talk[1]["role"] == "assistant"
    drawn = {"type": "image", "image": model.generate("x")}
    more = [
        {"role": "user", "content": "draw x"},
        {"role": "assistant", "content": [drawn]},
        {"role": "user", "content": "what is it?"},
    ]
    assert len(model.chat(more)) == 4
    with pytest.raises(ValueError, match="user message"):
        model.chat(talk)
