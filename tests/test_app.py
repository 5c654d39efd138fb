"""The demo as its users meet it: a served page called through gradio_client, and the scripts."""

import os
import runpy
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.update(
    GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1"
)

import numpy as np
import pytest
from conftest import tiny_model
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from unimm import app, pipeline
from unimm.checkpoints.native import save_model
from unimm.cli import main
from unimm.pipeline import UniMM

DEMO = Path(__file__).parents[1] / "demo"
DRAW = {"n": 2, "guidance": 2.0, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return UniMM(*tiny_model(), {"guidance": 2.0})


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return tmp_path_factory.mktemp("ratings") / "ratings.jsonl"


@pytest.fixture(scope="module")
def address(model, ratings, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    page, url, _ = app.launch(model, "127.0.0.1", 0, ratings, prevent_thread_lock=True, quiet=True)
    yield url
    page.blocks.close(verbose=False)
    patch.undo()


@pytest.fixture
def client(address, tmp_path):
    return Client(address, verbose=False, download_files=tmp_path / "got")


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(path)
    return path


def pixels(path):
    """What the model drew: a lossless file whose squares are pixels again."""
    shown = Image.open(path)
    assert shown.format == "PNG" and shown.size == (320, 320)
    shown = np.asarray(shown)
    small = shown[::20, ::20]
    assert np.array_equal(small.repeat(20, 0).repeat(20, 1), shown)  # crisp
    return small


def drawn(client, prompt, **how):
    found = client.predict(prompt=prompt, **{**DRAW, **how}, api_name="/draw")
    return [pixels(one["image"]) for one in found]


def generated(model, prompt, **how):
    how = {**DRAW, **how}
    images = model.generate([prompt], how.pop("n"), **how)
    return [np.asarray(image) for image in images]


def same(found, expected):
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def refused(call, says):
    """One line for the user, whatever the server thinks of it."""
    with pytest.raises(AppError) as caught:
        call()
    message = str(caught.value)
    assert says in message and "\n" not in message and "Traceback" not in message


def test_endpoints(client):
    names = {"/draw", "/ask", "/caption", "/edit", "/chat"}
    names |= {"/compare", "/prefer_left", "/prefer_right"}
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == names


@pytest.mark.parametrize("how", [{}, {"n": 1}, {"n": 3, "guidance": 1.0}, {"temperature": 0}])
def test_draw_is_the_library_call(how, client, model):
    assert same(drawn(client, "a red dog", **how), generated(model, "a red dog", **how))


def test_one_picture_comes_row_by_row(client, model):
    job = client.submit("a dog", 1, 2.0, 1.0, 5, api_name="/draw")
    job.result(timeout=60)
    frames = [pixels(frame[0]["image"]) for frame in job.outputs()]
    assert same(frames, [np.asarray(f) for f in model.generate_stream("a dog", 4, seed=5)])
    assert len(frames) == 4
    assert (frames[0][4:] == 224).all() and (frames[2][12:] == 224).all()  # not drawn yet


def test_ask_caption_and_edit(client, model, png):
    picture = handle_file(str(png))
    assert client.predict(picture, "what?", api_name="/ask") == model.ask(png, "what?")
    assert client.predict(picture, api_name="/caption") == model.caption(png)
    found = pixels(client.predict(picture, "make it red", 7, api_name="/edit"))
    assert np.array_equal(found, np.asarray(model.edit(png, "make it red", seed=7)))


def test_a_drawn_picture_comes_back_as_it_was_drawn(client, model, tmp_path, monkeypatch):
    image = model.generate("a dog", seed=1)
    app.enlarged(image).save(tmp_path / "drawn.png")
    asked = []
    monkeypatch.setattr(model, "ask", lambda picture, _: asked.append(picture) or "yes")
    assert client.predict(handle_file(str(tmp_path / "drawn.png")), "is it?", api_name="/ask")
    assert np.array_equal(np.asarray(asked[0]), np.asarray(image))


def texts(window):
    return [(m["role"], part["text"]) for m in window for part in m["content"] if "text" in part]


def words(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def test_chat_of_two_turns(client, model):
    _, window = client.predict("hello there", api_name="/chat")
    first = model.chat([words("user", "hello there")], seed=0)
    left, window = client.predict("and again", api_name="/chat")
    second = model.chat([*first, words("user", "and again")], seed=2)
    assert left == ""
    shown = [part["text"] for m in second for part in m["content"] if part["type"] == "text"]
    assert [text for _, text in texts(window)] == shown and len(shown) == 4
    assert [role for role, _ in texts(window)] == ["user", "assistant"] * 2


def test_conversations_are_kept_apart(address, client, model):
    client.predict("hello there", api_name="/chat")
    _, window = Client(address, verbose=False).predict("something else", api_name="/chat")
    assert texts(window)[0] == ("user", "something else") and len(texts(window)) == 2


def test_drawn_pictures_in_chat(client, model, monkeypatch):
    """A model that draws, then says nothing: the codes stay with the picture from turn to turn."""
    image, codes, seen = model.generate("a dog"), list(range(16)), []
    answers = [[{"type": "image", "image": image, "codes": codes}], []]

    def chat(messages, seed):
        seen.append(messages)
        return [*messages, {"role": "assistant", "content": answers[len(seen) - 1]}]

    monkeypatch.setattr(model, "chat", chat)
    client.predict("draw a dog", api_name="/chat")
    _, window = client.predict("what is it?", api_name="/chat")
    part = seen[1][1]["content"][0]
    assert part["codes"] == codes and np.array_equal(np.asarray(part["image"]), np.asarray(image))
    assert np.array_equal(pixels(window[1]["content"][0]["value"]), np.asarray(image))
    assert texts(window)[-1] == ("assistant", "(no answer)")


@pytest.mark.parametrize(
    ("prompt", "how", "says"),
    [
        ("", {}, "the prompt is empty"),
        (" \n ", {"n": 1}, "the prompt is empty"),
        ("x" * 5000, {}, "shorten"),
        ("x" * 5000, {"n": 1}, "shorten"),
        (["x", "y"], {}, "the prompt is empty"),
        ("x", {"n": 1000}, "Pictures is a number from 1 to 8"),
        ("x", {"n": None}, "Pictures is a number from 1 to 8"),
        ("x", {"guidance": 0.5}, "Guidance is a number from 1 to 8"),
        ("x", {"temperature": -1}, "Temperature is a number from 0 to 1.5"),
        ("x", {"seed": 2**70}, "Seed is a number from 0 to 4294967295"),
        ("x", {"seed": "pi"}, "Seed is a number"),
    ],
)
def test_draw_refuses(prompt, how, says, client, capfd):
    refused(lambda: drawn(client, prompt, **how), says)
    assert "Traceback" not in capfd.readouterr().err


def test_pictures_and_words_that_are_refused(client, png, tmp_path, capfd):
    picture = handle_file(str(png))
    (tmp_path / "notes.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    notes, empty = (handle_file(str(tmp_path / name)) for name in ("notes.png", "empty.png"))
    for call, says in [
        ((None, "what?", "/ask"), "choose a picture"),
        ((None, "/caption"), "choose a picture"),
        ((None, "make it red", 0, "/edit"), "choose a picture"),
        ((picture, " ", "/ask"), "the question is empty"),
        ((picture, "x" * 5000, "/ask"), "shorten"),
        ((picture, "", 0, "/edit"), "the instruction is empty"),
        ((picture, "make it red", -1, "/edit"), "Seed is a number"),
        ((notes, "what?", "/ask"), "notes.png cannot be read as an image"),
        ((empty, "/caption"), "empty.png cannot be read as an image: empty file"),
        ((notes, "make it red", 0, "/edit"), "notes.png cannot be read"),
        (("  ", "/chat"), "the message is empty"),
        (("x" * 5000, "/chat"), "shorten"),
    ]:
        refused(lambda call=call: client.predict(*call[:-1], api_name=call[-1]), says)
    assert "Traceback" not in capfd.readouterr().err
    assert client.predict(picture, api_name="/caption") is not None  # and the page goes on


def test_large_uploads_are_refused(client, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 * 2**20))
    with pytest.raises(Exception, match="413|[Ss]ize"):
        client.predict(handle_file(str(large)), api_name="/caption")


def test_parallel_requests(address, client, model):
    """Each gets its own answer, and the model is never in two calls at once."""
    other = Client(address, verbose=False)
    calls = [(client, "a red dog", 4), (other, "two blue cats", 3), (other, "a red dog", 1)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda c: drawn(c[0], c[1], n=c[2]), calls))
    for (_, prompt, n), pictures in zip(calls, found, strict=True):
        assert same(pictures, generated(model, prompt, n=n))


def test_one_call_at_a_time(address, client, model, monkeypatch, png):
    inside, most, gate = [], [], threading.Lock()

    def slow(*_, **__):
        with gate:
            inside.append(1)
            most.append(len(inside))
        time.sleep(0.3)
        inside.pop()
        return "yes"

    monkeypatch.setattr(model, "ask", slow)
    monkeypatch.setattr(model, "caption", slow)
    picture = handle_file(str(png))
    jobs = [client.submit(picture, "what?", api_name="/ask") for _ in range(2)]
    jobs.append(Client(address, verbose=False).submit(picture, api_name="/caption"))
    assert [job.result(timeout=30) for job in jobs] == ["yes"] * 3
    assert most == [1, 1, 1]


@pytest.fixture
def folder(tmp_path, model):
    save_model(tmp_path / "model", model.model, model.processor, {"guidance": 2.0})
    return tmp_path / "model"


def one_line(capsys, says):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", None, "in use"),
        ("127.0.0.1", 99_999, "0-65535"),
        ("no such host", 7860, "no such host:7860"),
    ],
)
def test_addresses_that_cannot_be_had(host, port, says, folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        words = ["demo", "--model", str(folder), "--host", host, "--port", str(port)]
        assert main(words) == 2
    one_line(capsys, says)


def test_a_port_in_use_is_a_value_error(model):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="in use"):
        app.launch(model, port=taken.getsockname()[1], prevent_thread_lock=True)


def script(name, *words):
    """Exit status of a demo script."""
    sys.argv = [str(DEMO / name), *map(str, words)]
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    return stop.value.code


@pytest.fixture
def bundled(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "BUNDLED", folder)
    monkeypatch.setattr(sys, "argv", [])


def test_scripts(bundled, model, png, tmp_path, capsys):
    assert script("text_to_image.py", "a dog", tmp_path / "a.png") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.png")
    found = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(found), np.asarray(model.generate("a dog")))
    assert script("image_to_text.py", png) == 0
    assert capsys.readouterr().out.strip() == model.caption(png)
    assert script("image_to_text.py", png, "what?") == 0
    assert capsys.readouterr().out.strip() == model.ask(png, "what?")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["text_to_image.py"], "usage"),
        (["text_to_image.py", "a", "b.png", "c"], "usage"),
        (["text_to_image.py", " "], "the prompt is empty"),
        (["text_to_image.py", "a dog", "/nonexistent/a.png"], "no such folder"),
        (["image_to_text.py"], "usage"),
        (["image_to_text.py", "a", "b", "c"], "usage"),
        (["image_to_text.py", "/nonexistent.png"], "no such image"),
        (["image_to_text.py", "PNG", ""], "the question is empty"),
        (["app.py", "--port", "x"], "invalid int"),
    ],
)
def test_scripts_refuse_in_one_line(words, says, bundled, png, capsys):
    assert script(*[png if word == "PNG" else word for word in words]) == 2
    one_line(capsys, says)


def test_the_better_of_two_pictures_becomes_a_preference(client, model, ratings):
    from unimm.training.dpo import read_preferences
    from unimm.training.preferences import shown

    with pytest.raises(AppError, match="draw two pictures first"):
        client.predict(api_name="/prefer_left")
    seen = {}
    for name, seed in (("left", 1), ("right", 2)):
        found = client.predict(prompt="a red star", seed=seed, api_name="/compare")
        seen[name] = [pixels(path) for path in found[:2]]
        kept = client.predict(api_name=f"/prefer_{name}")
        assert kept == f"{seed} in ratings.jsonl"
    with pytest.raises(AppError, match="draw two"):  # a choice is made once
        client.predict(api_name="/prefer_right")
    pairs = read_preferences(ratings)
    assert [p["prompt"][0]["content"][0]["text"] for p in pairs] == ["a red star"] * 2
    for pair, name in zip(pairs, ("left", "right"), strict=True):
        best, worst = (np.asarray(shown(model, pair[k])) for k in ("chosen", "rejected"))
        pictures = seen[name] if name == "left" else seen[name][::-1]
        assert (best == pictures[0]).all() and (worst == pictures[1]).all()
    with pytest.raises(AppError, match="Seed is a number"):
        client.predict(prompt="a red star", seed=-1, api_name="/compare")


def test_both_decoders_side_by_side(client, tmp_path_factory, tmp_path):
    """A folder with a diffusion decoder offers it; one without refuses it."""
    from unimm.model.diffusion import DiffusionConfig, DiffusionDecoder, save_diffusion

    refused(lambda: drawn(client, "a dog", decoder="both"), "Decoder is one of codes")
    folder = tmp_path_factory.mktemp("both")
    save_model(folder, *tiny_model(), {"guidance": 2.0})
    config = DiffusionConfig(
        condition="text", condition_dim=32, codes=None, size=16, channels=3, patch=8, dim=16,
        layers=1, heads=2,
    )  # fmt: skip
    save_diffusion(folder, DiffusionDecoder(config))
    model = UniMM.from_pretrained(folder)
    page, url, _ = app.launch(
        model, "127.0.0.1", 0, tmp_path / "r.jsonl", prevent_thread_lock=True, quiet=True
    )
    try:
        found = Client(url, verbose=False, download_files=tmp_path / "got").predict(
            prompt="a dog", **DRAW, decoder="both", api_name="/draw"
        )
    finally:
        page.blocks.close(verbose=False)
    assert [one["caption"] for one in found] == ["codes", "diffusion"] * 2
    shown = [pixels(one["image"]) for one in found]
    codes = generated(model, "a dog")
    flow = generated(model, "a dog", decoder="diffusion")
    assert same(shown, [codes[0], flow[0], codes[1], flow[1]])
