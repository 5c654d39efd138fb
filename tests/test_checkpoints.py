"""Models between formats and out of broken files: exact ways back, plain words for faults."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, byte_tokenizer, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_janus import (
    TALKS,
    deepseek_state,
    pictures_of,
    tiny_original,
    words_tokenizer,
    write_deepseek,
    write_original,
)

from unimm.checkpoints import janus, shards
from unimm.checkpoints import load as loading
from unimm.checkpoints.convert import convert, mlp_ratio
from unimm.checkpoints.load import load_model, locate
from unimm.checkpoints.native import save_model
from unimm.cli import main
from unimm.data.processor import Processor, Template, assistant, user
from unimm.inference.engine import Engine, Request
from unimm.inference.sampling import Settings
from unimm.model.image_tokenizer import VQConfig, VQTokenizer
from unimm.model.unified import CODE, PATCH, UnifiedModel
from unimm.pipeline import UniMM


def janus_like(seed: int = 0, vision=(), codes=(), config=(), processor=(), **decoder):
    """A native model that Janus can express, but for the changes."""
    torch.manual_seed(seed)
    base = tiny_config(**decoder)
    base = replace(
        base,
        vision=replace(base.vision, **{"activation": "gelu", **dict(vision)}),
        **{"codebook_size": 64, "code_dim": 8, **dict(config)},
    )
    network = VQConfig(16, 64, 8, 32, 32, (1, 2, 1), 1)
    made = VQTokenizer(replace(network, **dict(codes))).eval()
    model = UnifiedModel(base)
    with torch.no_grad():
        for part in (model, made):
            for name, parameter in part.named_parameters():
                if parameter.ndim > 1 and "quantize" not in name:
                    parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
    sizes = {"seen_size": 16, "seen_tokens": 16, "drawn_size": 16, "max_length": 256}
    sizes |= dict(processor)
    return model.eval(), Processor(byte_tokenizer(), made, Template.after(WORDS), **sizes)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in ours
    )


@pytest.fixture(scope="module", params=["grouped", "tied"])
def exported(request, tmp_path_factory):
    """(model, processor, native folder, folder for transformers)"""
    root = tmp_path_factory.mktemp("exported")
    model, processor = janus_like(tied_embeddings=request.param == "tied", rope_theta=50000.0)
    save_model(root / "native", model, processor, {"guidance": 2.5})
    convert(root / "native", root / "hf", "janus-hf")
    return model, processor, root / "native", root / "hf"


# ---------------------------------------------------------------- ours in transformers


def test_transformers_opens_it_without_a_missing_key(exported):
    from transformers import JanusForConditionalGeneration

    theirs, info = JanusForConditionalGeneration.from_pretrained(
        exported[3], output_loading_info=True
    )
    assert not any(info.values()), info
    config = theirs.generation_config
    assert config.guidance_scale == 2.5
    assert config.generation_kwargs == {"boi_token_id": exported[1].template.begin_image}


def test_it_says_the_same_there(exported):
    from transformers import AutoProcessor, JanusForConditionalGeneration

    model, processor, _, folder = exported
    theirs = JanusForConditionalGeneration.from_pretrained(folder).eval()
    reader = AutoProcessor.from_pretrained(folder)
    never = [i for i in range(WORDS, WORDS + 8) if i != processor.template.end_of_turn]
    for talk in TALKS:
        sample = processor.encode(talk, "text")
        text = reader.apply_chat_template(talk, add_generation_prompt=True)
        inputs = reader(text=text, images=pictures_of(talk) or None, return_tensors="pt")
        placeholder = theirs.config.image_token_id
        ids = np.where(sample.kind == PATCH, placeholder, sample.ids)
        assert ids.tolist() == inputs["input_ids"][0].tolist()
        found = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=never)[
            0, len(ids) :
        ].tolist()
        ours = Engine(model, processor).run([Request(sample, "text")], Settings(max_text=8))
        assert ours[0].text == [i for i in found if i != processor.template.end_of_turn]


def test_it_draws_the_same_there(exported):
    """Codes of a drawing: its logits, the codes of a picture, and their pixels."""
    from transformers import JanusForConditionalGeneration

    model, processor, _, folder = exported
    theirs = JanusForConditionalGeneration.from_pretrained(folder).eval()
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    sample = processor.encode([user("a red cat"), assistant(picture)])
    batch = processor.collate([sample])
    codes = batch.ids[batch.kind == CODE][None]
    start = int((batch.kind[0] == CODE).nonzero()[0])
    with torch.inference_mode():
        text = theirs.get_input_embeddings()(batch.ids[:, :start])
        drawn = theirs.prepare_embeddings_for_image_generation(codes)
        hidden = theirs.model.language_model(inputs_embeds=torch.cat([text, drawn], 1))
        there = theirs.model.generation_head(hidden.last_hidden_state[:, start - 1 : -1])
        here = model.logits(model.decoder(model.embed(batch), batch.positions), CODE)
        assert (there - here[:, start - 1 : start + 15]).abs().max() < 1e-4
        pixels = processor.drawn_pixels(picture)[None]
        found = theirs.model.vqmodel.encode(pixels, return_dict=True).image_tokens
        assert torch.equal(found.view(1, 16), codes)
        shown = theirs.decode_image_tokens(codes).permute(0, 3, 1, 2).clamp(-1, 1)
        assert (processor.image_tokenizer.decode(codes, (4, 4)) - shown).abs().max() < 1e-4


def test_the_way_back_is_exact(exported, tmp_path):
    model, processor, native, folder = exported
    convert(folder, tmp_path / "back", "unimm")
    again, reader, sampling = load_model(tmp_path / "back")
    assert same(again, model) and same(reader.image_tokenizer, processor.image_tokenizer)
    assert reader.settings() == processor.settings() and sampling == {"guidance": 2.5}
    for name in ("config.json", "tokenizer.json", "image_tokenizer.json"):
        assert (tmp_path / "back" / name).read_text() == (native / name).read_text(), name
    assert again.config == model.config
    ids = reader.encode([user("<begin_of_image><|User|>")], "text").ids
    assert ids.tolist() == processor.encode([user("<begin_of_image><|User|>")], "text").ids.tolist()


def test_what_transformers_saves_again_comes_back(exported, tmp_path):
    from transformers import AutoProcessor, JanusForConditionalGeneration

    model, processor, _, folder = exported
    JanusForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    again, reader, _ = load_model(tmp_path)
    assert same(again, model) and reader.settings() == processor.settings()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_janus_comes_back_as_it_was(dtype, tmp_path):
    """Hugging Face -> unimm -> Hugging Face, in half precision too."""
    original = tiny_original().to(getattr(torch, dtype))
    write_original(original, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "unimm", "unimm")
    convert(tmp_path / "unimm", tmp_path / "back", "janus-hf")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "vqmodel" not in name:  # the image tokenizer is held in float32
            assert after[name].dtype == tensor.dtype
        if not name.endswith("quantize.embedding.weight"):  # rounded rows get length 1 again
            assert torch.equal(after[name].to(tensor.dtype), tensor), name
    ids = [
        load_model(tmp_path / name)[1].encode(TALKS[1], "text").ids.tolist()
        for name in ("hf", "unimm", "back")
    ]
    assert ids[0] == ids[1] == ids[2]
    templates = [
        json.loads((tmp_path / n / "generation_config.json").read_text()) for n in ("hf", "back")
    ]
    assert templates[0]["generation_kwargs"] == templates[1]["generation_kwargs"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(qk_norm=True), "qk_norm"),
        (dict(attention_bias=True, output_bias=False), "bias"),
        (dict(config={"connector": "linear"}), "connector"),
        (dict(vision={"activation": "gelu_pytorch_tanh"}), "activation"),
        (dict(config={"image_head_dim": 40}), "image head"),
        (dict(config={"code_dim": 4}), "code embedding"),
        (dict(codes={"quantizer": "simvq"}), "simvq"),
        (
            dict(
                codes={"quantizer": "fsq", "levels": (4, 4, 4), "code_dim": 3},
                config={"code_dim": 3},
            ),
            "fsq",
        ),
        (dict(codes={"norm": "rms"}), "rms"),
        (dict(codes={"attention": False}), "attention"),
        (dict(codes={"local": True}), "local"),
        (dict(codes={"patch": 2, "multipliers": (1, 2)}), "patches of 2"),
        (dict(processor={"drawn_size": 32}), "(8, 8)"),
        (dict(processor={"seen_size": 32}), "32 pixels"),
    ],
)
def test_what_janus_cannot_express_is_refused(changes, says, tmp_path):
    save_model(tmp_path / "native", *janus_like(**changes))
    with pytest.raises(ValueError, match="Janus cannot express") as error:
        convert(tmp_path / "native", tmp_path / "hf", "janus-hf")
    assert says in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["native"]


def test_the_shared_pathway_is_refused(tmp_path, capsys):
    save_model(tmp_path / "native", *tiny_model("shared"))
    words = ["convert", str(tmp_path / "native"), str(tmp_path / "hf"), "--to", "janus-hf"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "pathway" in error and error.count("\n") == 1


def test_targets_are_checked_first(exported, tmp_path):
    for target, to, says in (
        (tmp_path, "unimm", "already"),
        (tmp_path / "a" / "b", "unimm", "no such folder"),
        (tmp_path / "a", "onnx", "one of"),
    ):
        with pytest.raises(ValueError, match=says):
            convert(exported[2], target, to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [(48, 100), (1152, 4304), (7, 3), (320, 1281)])
def test_the_mlp_ratio_gives_the_width(sizes):
    vision = replace(tiny_config().vision, dim=sizes[0], heads=1, hidden=sizes[1])
    assert int(sizes[0] * mlp_ratio(vision)) == sizes[1]


# ---------------------------------------------------------------- what is wrong with a folder


@pytest.fixture(scope="module")
def janus_folder(tmp_path_factory):
    """A Janus in two safetensors shards."""
    folder = tmp_path_factory.mktemp("janus")
    write_original(tiny_original(), folder)
    state = load_file(folder / "model.safetensors")
    keys, index = sorted(state), {}
    for number, part in enumerate((keys[:99], keys[99:]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    return folder


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(data))


def rewrite(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def pickled(folder: Path) -> None:
    """Not plain tensors: what a hostile file would look like."""
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"lm_head.weight": Path("x")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (lambda d: (d / SECOND).unlink(), [SECOND, "missing"]),
        (lambda d: os.truncate(d / FIRST, 20_000), [FIRST, "truncated"]),
        (lambda d: (d / FIRST).write_bytes(b""), [FIRST, "truncated"]),
        (lambda d: edit(d / "config.json", model_type="llama"), ["config.json", "'llama'"]),
        (lambda d: edit(d / "config.json", model_type=["x"]), ["config.json", "unknown"]),
        (
            lambda d: edit(d / "config.json", text_config={"intermediate_size": 100}),
            ["mlp", "shape (64, 96)", "not (64, 100)", FIRST],
        ),
        (
            lambda d: edit(d / "config.json", text_config={"num_hidden_layers": 3}),
            ["lacks", "layers.2"],
        ),
        (
            lambda d: edit(d / "config.json", text_config={"hidden_act": "relu"}),
            ["config.json", "relu"],
        ),
        (
            lambda d: edit(d / "config.json", text_config={"model_type": "mamba"}),
            ["config.json", "mamba"],
        ),
        (
            lambda d: edit(d / "config.json", text_config={"hidden_size": "wide"}),
            ["config.json"],
        ),
        (
            lambda d: edit(d / "config.json", text_config={"num_attention_heads": 0}),
            ["config.json", "num_attention_heads is 0"],
        ),
        (
            lambda d: edit(d / "config.json", text_config={"hidden_size": -64}),
            ["config.json", "hidden_size is -64"],
        ),
        (
            lambda d: edit(d / "model.safetensors.index.json", weight_map={"x": 3}),
            ["broken/3 is missing"],
        ),
        (
            lambda d: edit(d / "generation_config.json", guidance_scale="high"),
            ["generation_config.json", "guidance_scale is 'high'"],
        ),
        (
            lambda d: rewrite(d / FIRST, lambda s: s.update({k: t.int() for k, t in s.items()})),
            [FIRST, "holds torch.int32"],
        ),
        (
            lambda d: edit(d / "config.json", vision_config={"image_size": None}),
            ["config.json"],
        ),
        (lambda d: (d / "config.json").write_text("[]"), ["config.json"]),
        (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
        (lambda d: (d / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
        (lambda d: pickled(d), ["pytorch_model.bin", "plain tensors"]),
        (lambda d: rewrite(d / FIRST, lambda s: s.popitem()), ["lacks"]),
        (
            lambda d: rewrite(d / FIRST, lambda s: s.update({"model.new": torch.ones(2)})),
            [FIRST, "model.new"],
        ),
        (lambda d: [p.unlink() for p in d.glob("model*")], ["no weights"]),
    ],
)
def test_broken_folders_are_named_in_one_line(harm, names, janus_folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(janus_folder, broken)
    load_model(broken)
    harm(broken)
    assert main(["generate", "x", "-o", str(tmp_path / "a.png"), "--model", str(broken)]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and "Traceback" not in error and out == ""
    assert all(name in error for name in names), error
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, 9_000), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: torch.save({"gen_embed.weight": Path("x")}, path), "plain tensors"),
        (lambda path: torch.save([torch.ones(2)], path), "plain tensors"),
        (lambda path: torch.save({"gen_embed.weight": torch.ones(2, 2)}, path), "shape (2, 2)"),
        (lambda path: torch.save({"gen_embed.new": torch.ones(2)}, path), "gen_embed.new"),
    ],
)
def test_a_broken_archive_is_named_in_one_line(harm, says, tmp_path, capsys):
    """Of DeepSeek's shards, as Janus-Pro-7B has them."""
    folder, second = tmp_path / "m", "pytorch_model-00002-of-00002.bin"
    write_deepseek(folder, deepseek_state(tiny_original(), torch.ones(256, 1)), "bin")
    harm(folder / second)
    assert main(["generate", "x", "-o", str(tmp_path / "a.png"), "--model", str(folder)]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and out == "" and not (tmp_path / "a.png").exists()
    assert says in error and second in error, error


class Hostile:
    """What unpickling would run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_run(tmp_path):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "was_run"
    torch.save({"lm_head.weight": Hostile(mark)}, path)
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged, or holds more than plain"):
        list(shards.read(path))
    assert not mark.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_the_refusal_of_a_pickle_gives_no_bad_advice(write, tmp_path):
    """torch's message begins with how to run the file all the same."""
    path = tmp_path / "pytorch_model.bin"
    write({"lm_head.weight": Hostile(tmp_path / "was_run")}, path)
    with pytest.raises(ValueError, match="than plain tensors: (Trying|Unsupported)") as caught:
        list(shards.read(path))
    assert "weights_only" not in str(caught.value)


def test_a_missing_tensor_is_found_where_the_index_is_silent(janus_folder, tmp_path):
    """The name that transformers would fill with noise is an error here."""
    shutil.copytree(janus_folder, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"] = {k: v for k, v in data["weight_map"].items() if v == FIRST}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="lacks the tensor"):
        load_model(tmp_path / "m")


def test_archives_may_be_old_or_nested(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.arange(4.0)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"model": tensors}, tmp_path / "nested.pt")
    for name in ("old.bin", "nested.pt"):
        found = dict(shards.read(tmp_path / name))
        assert found.keys() == tensors.keys() and torch.equal(found["b"], tensors["b"])
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="plain tensors"):
        dict(shards.read(tmp_path / "list.bin"))


def test_files_are_read_a_part_at_a_time(tmp_path, monkeypatch):
    tensors = {str(k): torch.randn(64) for k in range(20)}
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(shards, "MAPPED", 600)
    found = dict(shards.read(tmp_path / "m.safetensors"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# ---------------------------------------------------------------- dtypes, the Hub, info


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_weights_come_in_the_dtype_that_is_asked_for(dtype, tmp_path):
    write_original(tiny_original().to(torch.float16), tmp_path)
    model, processor, _ = load_model(tmp_path, dtype)
    wanted = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert {p.dtype for p in processor.image_tokenizer.parameters()} == {torch.float32}
    assert UniMM(model, processor).generate("a", seed=1).size == (32, 32)


def test_another_dtype_is_refused(tmp_path, capsys):
    words = ["generate", "x", "-o", str(tmp_path / "a.png"), "--dtype", "int3"]
    assert main(words) == 2 and "dtype" in capsys.readouterr().err


def test_hub_ids_are_downloaded_once(monkeypatch, tmp_path, janus_folder):
    import huggingface_hub

    calls = []

    def snapshot(name, **options):
        calls.append((name, options["revision"], "*.safetensors" in options["allow_patterns"]))
        return str(janus_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert load_model("someone/Janus-tiny@v2")[2] == {"guidance": 4.0}
    assert main(["info", "someone/Janus-tiny"]) == 0
    assert calls == [("someone/Janus-tiny", "v2", True), ("someone/Janus-tiny", None, False)]
    (tmp_path / "someone" / "here").mkdir(parents=True)  # a folder comes first
    assert locate("someone/here") == Path("someone/here")
    assert locate("./here") == Path("here") and len(calls) == 2  # a path, if to nothing


def test_an_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    def snapshot(name, **options):
        raise OSError("offline mode is on\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="no/model, and the Hub .*offline mode is on$"):
        locate("no/model")
    with pytest.raises(ValueError, match="no such model folder: /no/such/folder"):
        load_model("/no/such/folder")


PRO_7B = {
    "model_type": "multi_modality",
    "aligner_config": {"params": {"depth": 2, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_aligner_config": {"params": {"depth": 2, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_head_config": {"params": {"image_token_embed": 4096, "n_embed": 4096}},
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
    "language_config": {
        "max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30,
        "vocab_size": 102400,
    },
    "vision_config": {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384"}},
}  # fmt: skip


@pytest.mark.timeout(60)
def test_info_of_a_janus_pro_7b_needs_its_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PRO_7B))
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: deepseek\n---\n# Hi\n")
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "7,407,773,323" in text  # the sum of keys/janus_pro_7b_deepseek.txt without statistics
    for line in ("DeepSeek Janus", "deepseek", "576 patches", "576 codes of 16384", "30 layers"):
        assert line in text


def test_info_of_a_janus_pro_7b_takes_under_ten_seconds(tmp_path):
    """As a command, imports and all, in processor time: a busy machine makes it wait longer."""
    (tmp_path / "config.json").write_text(json.dumps(PRO_7B))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "unimm.cli", "info", str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert run.returncode == 0 and "7,407,773,323" in run.stdout
    assert spent < 10, spent


@pytest.mark.parametrize("pathway", ["decoupled", "shared"])
def test_info_counts_what_is_there(pathway, tmp_path, capsys):
    model, processor = tiny_model(pathway, tied_embeddings=True)
    save_model(tmp_path / "m", model, processor)
    assert main(["info", str(tmp_path / "m")]) == 0
    parts = [model, processor.image_tokenizer]
    total = sum(p.numel() for part in parts for p in part.parameters())
    assert f"{total:,}" in capsys.readouterr().out


def test_the_formats_are_named_in_the_refusal(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert all(name in str(error.value) for name in ("chameleon", *loading.FORMATS))


# ---------------------------------------------------------------- memory


LOADED = """
import resource, sys, torch
from unimm.checkpoints.load import load_model
from unimm.pipeline import UniMM
from transformers import SiglipVisionModel

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

start = peak()
model, processor, _ = load_model(sys.argv[1], sys.argv[2])
parts = (model, processor.image_tokenizer)
size = sum({t.data_ptr(): t.nbytes for p in parts for t in p.state_dict().values()}.values())
print((peak() - start) / size, size)
if len(sys.argv) > 3:
    from unimm.inference.engine import Engine, Request
    from unimm.data.processor import user
    engine = Engine(model, processor)
    request = Request(processor.encode([user("a red cat")], "image"), "image")
    from unimm.inference.sampling import Settings
    for answers in engine.stream([request], Settings(guidance=5.0)):
        if len(answers[0].codes) == int(sys.argv[3]):
            break
    print(answers[0].codes)
"""


def write_random(
    folder: Path,
    dim: int,
    layers: int,
    hidden: int,
    kind: str,
    vocab: int = 102400,
    tower: int = 24,
) -> None:
    """A Janus in bfloat16 with the widths of Janus-Pro's encoder and its image tokenizer."""
    folder.mkdir()
    heads = dim // 128
    text = dict(
        hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocab,
        intermediate_size=hidden, max_position_embeddings=16384, head_dim=128,
    )  # fmt: skip
    config = {
        "model_type": "janus",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"projection_dim": dim, "num_hidden_layers": tower},
        "vq_config": {"projection_dim": dim, "image_token_embed_dim": dim},
    }
    (folder / "config.json").write_text(json.dumps(config))
    words_tokenizer().save(str(folder / "tokenizer.json"))
    configs = janus.hugging_face_configs(config, "config.json", head_stored=True)
    model, codes = loading.on_meta(*configs, folder)
    shapes = {janus.their_name(name): t.shape for name, t in model.state_dict().items()}
    for name, tensor in codes.state_dict().items():
        shapes[janus.their_name(f"image_tokenizer.{name}")] = tensor.shape
    names = sorted(shapes)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        path = folder / f"part-{number}.{kind}"
        write = write_noise if kind == "safetensors" else save_noise
        write(path, {name: shapes[name] for name in part})
        index |= dict.fromkeys(part, path.name)
    listed = {"safetensors": shards.INDICES[0], "bin": shards.INDICES[1]}[kind]
    (folder / listed).write_text(json.dumps({"weight_map": index}))


NOISE = (torch.randn(1 << 20) * 0.02).to(torch.bfloat16)


def write_noise(path: Path, shapes: dict[str, torch.Size]) -> None:
    """A safetensors file of NOISE, streamed: a header of JSON, then the tensors' bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text, block = json.dumps(header).encode(), NOISE.view(torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


def save_noise(path: Path, shapes: dict[str, torch.Size]) -> None:
    """The same as a PyTorch archive."""
    counts = {name: shape.numel() for name, shape in shapes.items()}
    torch.save(
        {
            n: NOISE.repeat(c // len(NOISE) + 1)[:c].clone().view(shapes[n])
            for n, c in counts.items()
        },
        path,
    )


def measured(folder: Path, dtype: str, codes: int = 0) -> tuple[float, int]:
    """(peak memory over that of the imports / size of the weights, size) of loading."""
    words = [sys.executable, "-c", LOADED, str(folder), dtype, *([str(codes)] if codes else [])]
    run = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    ratio, size = run.stdout.split()[:2]
    return float(ratio), int(size)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["auto", "float32", "int8"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_takes_little_more_than_the_weights(kind, dtype, tmp_path):
    write_random(tmp_path / "m", 1024, 8, 2816, kind, vocab=8192, tower=4)
    ratio, size = measured(tmp_path / "m", dtype)
    least = 5e8 if dtype == "int8" else 6e8
    assert size > least and ratio < 1.15, (ratio, size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_janus_pro_1b_loads_and_draws_within_its_memory(tmp_path):
    write_random(tmp_path / "m", dim=2048, layers=24, hidden=5632, kind="safetensors")
    ratio, size = measured(tmp_path / "m", "auto", codes=4)
    assert size > 4e9 and ratio < 1.15, (ratio, size)
    shutil.rmtree(tmp_path / "m")
