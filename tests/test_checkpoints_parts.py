"""Models begun from other people's parts: each part computes what the original computes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, byte_tokenizer
from safetensors.torch import load_file, save_file
from test_emu3 import tiny_original as tiny_emu3
from test_emu3 import write_original as write_emu3
from test_emu3 import write_own as write_own_emu3
from test_janus import deepseek_state, picture, tiny_original, write_deepseek, write_original

from unimm.checkpoints.load import load_model
from unimm.checkpoints.parts import (
    begin,
    begun,
    load_image_tokenizer,
    load_llamagen,
    load_vision,
)
from unimm.cli import main
from unimm.config import Begin, load_recipe, override
from unimm.data.processor import user
from unimm.model.unified import TEXT
from unimm.pipeline import UniMM
from unimm.training.next_token import open_init

SIZES = dict(
    vocab_size=WORDS + 20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


def language_model(kind: str, tied: bool):
    import transformers as t

    llama = (t.LlamaConfig, t.LlamaForCausalLM)
    stretched = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0)
    stretched |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
    kinds = {
        "llama": (*llama, {"rms_norm_eps": 1e-5, "rope_parameters": stretched}),
        "smollm2": (*llama, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        "deepseek": (*llama, {"num_key_value_heads": 4}),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM, {"max_window_layers": 1}),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {"head_dim": 16}),
    }
    config, model, options = kinds[kind]
    torch.manual_seed(1)
    made = model(config(**{**SIZES, **options}, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """(original, its folder): text and vision in one, as the public checkpoints are."""
    from transformers import SiglipConfig, SiglipModel

    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    config = SiglipConfig(
        text_config=dict(**sizes, vocab_size=50),
        vision_config=dict(**sizes, image_size=16, patch_size=4),
    )
    torch.manual_seed(2)
    model = SiglipModel(config).eval()
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    """(transformers' VQ network, the same in LlamaGen's layout)"""
    original = tiny_original()
    state = deepseek_state(original, torch.rand(256, 1) + 0.5)
    prefix = "gen_vision_model."
    path = tmp_path_factory.mktemp("vq") / "vq_ds16_t2i.pt"
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    torch.save({"model": state}, path)
    return original.model.vqmodel, path


def in_shards(folder) -> None:
    """The weights as two .bin files with their index: DeepSeek-LLM's are."""
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    keys, index = sorted(state), {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({key: state[key] for key in part}, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


FAMILIES = [
    ("llama", False), ("llama", True), ("smollm2", True), ("deepseek", False), ("qwen2", True),
    ("qwen2", False), ("qwen3", False), ("qwen3", True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_a_model_begins_as_its_parts(kind, tied, siglip, codebook, tmp_path):
    theirs = language_model(kind, tied)
    theirs.save_pretrained(tmp_path / "words")
    if kind == "deepseek":
        in_shards(tmp_path / "words")
    byte_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    begin(
        tmp_path / "out", tmp_path / "words", codebook[1], siglip[1], drawn_size=32,
        sampling={"guidance": 3.0},
    )  # fmt: skip
    model, processor, sampling = load_model(tmp_path / "out")
    assert sampling == {"guidance": 3.0} and model.config.decoder.vocab_size == WORDS + 7
    assert model.config.decoder.tied_embeddings == tied
    assert (model.text_head.weight is model.decoder.embed_tokens.weight) == tied
    ids = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        x = model.embed_ids(ids, torch.zeros_like(ids))
        hidden = model.decoder(x, torch.arange(9)[None])
        ours, special = model.logits(hidden, TEXT).split([WORDS, 7], -1)
        # a new token is as likely as an average word
        assert (special - ours.mean(-1, keepdim=True)).abs().max() < 1e-4
        assert (ours - theirs(ids).logits[..., :WORDS]).abs().max() < 1e-4
        assert ours.std() > 0.1
        features = siglip[0].vision_model(pixels).last_hidden_state
        assert (model.vision(pixels) - features).abs().max() < 1e-4
    table = model.decoder.embed_tokens.weight
    assert torch.allclose(table[WORDS:], table[:WORDS].mean(0).expand(7, -1), atol=1e-6)
    whole = UniMM(model, processor)
    image = whole.generate("a cat", seed=1)
    assert image.size == (32, 32) and isinstance(whole.ask(image, "what?"), str)
    assert (processor.encode([user(image, "x")], "text").kind == 1).sum() == 16


def test_the_vq_network_of_llamagen(codebook, tmp_path):
    theirs, path = codebook
    ours = load_llamagen(path)
    assert ours.config.multipliers == (1, 1, 2, 2) and ours.config.codebook_size == 256
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        codes = theirs.encode(pixels, return_dict=True).image_tokens.view(2, 16)
        assert torch.equal(ours.encode(pixels), codes)
        assert (ours.decode(codes, (4, 4)) - theirs.decode(codes).clamp(-1, 1)).abs().max() < 1e-4
    assert F.normalize(ours.code_vectors(), dim=-1).allclose(ours.code_vectors(), atol=1e-5)
    torch.save({"model": {"other": torch.ones(2)}}, tmp_path / "no.pt")
    with pytest.raises(ValueError, match="no.pt is no VQ network"):
        load_llamagen(tmp_path / "no.pt")


def test_the_image_tokenizer_of_a_janus(tmp_path):
    original = tiny_original()
    write_original(original, tmp_path / "hf")
    lengths = torch.ones(256, 1)
    write_deepseek(tmp_path / "own", deepseek_state(original, lengths), "safetensors")
    a, b = (load_image_tokenizer(tmp_path / name).state_dict() for name in ("hf", "own"))
    wanted = original.model.vqmodel.state_dict()
    assert a.keys() == b.keys() == wanted.keys()
    assert all((a[k] - wanted[k]).abs().max() < 1e-6 and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("layout", ["hf", "own"])
def test_the_image_tokenizer_of_an_emu3(layout, tmp_path):
    original = tiny_emu3()
    if layout == "hf":
        write_emu3(original, tmp_path / "hf")
        folder = tmp_path / "hf"
    else:
        folder = write_own_emu3(tmp_path, original).parent / "Emu3-VisionTokenizer"
    made = load_image_tokenizer(folder)
    network = original.model.vqmodel
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        sizes = torch.tensor([[32, 32]] * 2)
        theirs = network.encode(pixels, sizes, return_dict=True).image_tokens
        codes = made.encode(pixels)
        assert torch.equal(codes, torch.stack(theirs).flatten(1))
        drawn = network.decode(torch.stack(theirs)).clamp(-1, 1)
        assert (made.decode(codes, (4, 4)) - drawn).abs().max() < 1e-4
    language_model("qwen3", True).save_pretrained(tmp_path / "words")
    byte_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    begin(tmp_path / "out", tmp_path / "words", folder, drawn_size=16)
    whole = UniMM.from_pretrained(tmp_path / "out", "cpu")
    assert whole.generate("a cat", seed=1).size == (16, 16)
    assert whole.model.code_embed.weight.std() > 0.5  # of entries of size one


@pytest.mark.parametrize("names", ["whole", "vision_model", "bare"])
def test_an_encoder_under_every_name(names, siglip, tmp_path):
    """A pair, its vision half alone, and weights without a prefix; SigLIP2's are the same."""
    original, folder = siglip
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    if names != "whole":
        state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "vision" in k}
        state = {k.removeprefix("vision_model." * (names == "bare")): v for k, v in state.items()}
        config = {**original.config.vision_config.to_dict(), "model_type": "siglip_vision_model"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(state, tmp_path / "model.safetensors")
        folder = tmp_path
    with torch.inference_mode():
        features = original.vision_model(pixels).last_hidden_state
        ours = load_vision(folder, torch.float32)(pixels)
    assert (ours - features).abs().max() < 1e-4 and features.std() > 0.1


def test_a_recipe_begins_with_parts(siglip, codebook, tmp_path, capsys):
    theirs = language_model("qwen3", True)
    theirs.save_pretrained(tmp_path / "words")
    byte_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(8):
        picture(seed=k).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"picture {k}")
    (tmp_path / "stage1.py").write_text(RECIPE)
    run = load_recipe(tmp_path / "stage1.py").config
    named = [f"init.decoder={tmp_path / 'words'}", f"init.vision={siglip[1]}"]
    named += [f"init.image_tokenizer={codebook[1]}", f"data.mine.path={pictures}"]
    changed = override(run, named)
    assert changed.init == Begin(str(tmp_path / "words"), str(codebook[1]), str(siglip[1]), 32)
    assert json.loads(json.dumps(changed.record()))["init"]["drawn_size"] == 32
    assert override(run, ["init=runs/other"]).init == "runs/other"
    changed = begun(replace(changed, out=str(tmp_path / "out")))
    assert begun(changed) is changed
    model, processor, sampling = load_model(changed.init)
    assert sampling == {"guidance": 5.0} and processor.grid == (4, 4)
    direct = open_init(replace(override(run, named), out=str(tmp_path / "none")))  # data check's
    assert direct[2] == sampling and not (tmp_path / "none").exists()
    state = direct[0].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    before = theirs.model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.decoder.layers[0].mlp.up_proj.weight, before)
    out, written = tmp_path / "out", (tmp_path / "out" / "begun" / "model.safetensors").stat()
    assert main(["train", str(tmp_path / "stage1.py"), *named, f"out={out}"]) == 0
    assert (out / "begun" / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns  # once
    after = UniMM.from_pretrained(capsys.readouterr().out.strip().splitlines()[-1], "cpu").model
    assert torch.equal(after.decoder.layers[0].mlp.up_proj.weight, before)  # frozen
    learned = [(m.connector.fc1.weight, m.image_head.out.weight) for m in (after, model)]
    assert not all(torch.equal(a, b) for a, b in zip(*learned, strict=True))
    wrong = [*named, f"init.decoder={tmp_path / 'nothing'}", f"out={tmp_path / 'b'}"]
    assert main(["train", str(tmp_path / "stage1.py"), *wrong]) == 2
    assert "nothing" in capsys.readouterr().err and not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="begun was made of other parts"):
        begun(replace(override(run, named), out=str(out), init=replace(run.init, seed=1)))


RECIPE = r"""
from unimm.config import Begin, Run, Source
from unimm.data.readers import folder
from unimm.training.next_token import next_token, scored_weight

config = Run(
    init=Begin("Qwen/Qwen3-0.6B", "vq_ds16_t2i.pt", "google/siglip-base-patch16-256", 32),
    step=next_token,
    count=scored_weight,
    train=((r"connector\..*|code_.*|image_head\..*", 1e-3), (r".*", None)),
    data={"mine": Source(folder, options={"path": ""})},
    steps=2,
    batch_size=2,
    preview_every=100,
    precision="float32",
    options={"prompts": [], "guidance": 2.0},
)
"""


def test_special_tokens_come_behind_the_last_word(codebook, tmp_path):
    """A tokenizer whose added words leave gaps: the new ids meet none of them."""
    language_model("llama", True).save_pretrained(tmp_path / "words")
    data = json.loads(byte_tokenizer().to_str())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"][last] = WORDS + 9
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(data))
    begin(tmp_path / "out", tmp_path / "words", codebook[1])
    _, processor, _ = load_model(tmp_path / "out")
    assert processor.template.bos == WORDS + 10


def test_what_is_no_such_part_is_refused(tmp_path, siglip, codebook):
    with pytest.raises(ValueError, match="no text tokenizer"):
        begin(tmp_path / "out", siglip[1], codebook[1])
    language_model("llama", True).save_pretrained(tmp_path / "words")
    byte_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    with pytest.raises(ValueError, match="'llama' is no SigLIP"):
        begin(tmp_path / "out", tmp_path / "words", codebook[1], tmp_path / "words")
    edit(siglip[1], tmp_path / "naflex", model_type="siglip2")
    with pytest.raises(ValueError, match="NaFlex.*fixed resolution"):
        begin(tmp_path / "out", tmp_path / "words", codebook[1], tmp_path / "naflex")
    with pytest.raises(ValueError, match="config.json: 'llama' has no image tokenizer"):
        begin(tmp_path / "out", tmp_path / "words", tmp_path / "words")
    with pytest.raises(ValueError, match="multiples of 8"):
        begin(tmp_path / "out", tmp_path / "words", codebook[1], drawn_size=30)
    for kind in ("mistral", "gemma2"):
        edit(tmp_path / "words", tmp_path / kind, model_type=kind)
        with pytest.raises(ValueError, match=f"{kind}.*is unknown here"):
            begin(tmp_path / "out", tmp_path / kind, codebook[1])
    assert not (tmp_path / "out").exists()


def edit(source, target, **changes) -> None:
    shutil.copytree(source, target)
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**data, **changes}))
