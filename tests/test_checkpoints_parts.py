"""Models begun from other people's parts: each part computes what the original computes."""

import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, byte_tokenizer
from test_janus import deepseek_state, tiny_original, write_deepseek, write_original

from unimm.checkpoints.load import load_model
from unimm.checkpoints.parts import begin, load_image_tokenizer, load_llamagen
from unimm.data.processor import user
from unimm.model.unified import TEXT
from unimm.pipeline import UniMM

SIZES = dict(
    vocab_size=WORDS + 20, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip


def language_model(kind: str, tied: bool):
    import transformers as t

    kinds = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, {"rms_norm_eps": 1e-5}),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM, {}),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {"head_dim": 16}),
    }
    config, model, options = kinds[kind]
    torch.manual_seed(1)
    made = model(config(**SIZES, **options, tie_word_embeddings=tied)).eval()
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


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)]
)
def test_a_model_begins_as_its_parts(kind, tied, siglip, codebook, tmp_path):
    theirs = language_model(kind, tied)
    theirs.save_pretrained(tmp_path / "words")
    byte_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    begin(
        tmp_path / "out", tmp_path / "words", codebook[1], siglip[1], drawn_size=32,
        sampling={"guidance": 3.0},
    )  # fmt: skip
    model, processor, sampling = load_model(tmp_path / "out")
    assert sampling == {"guidance": 3.0} and model.config.decoder.vocab_size == WORDS + 7
    ids = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        x = model.embed_ids(ids, torch.zeros_like(ids))
        ours = model.logits(model.decoder(x, torch.arange(9)[None]), TEXT)[..., :WORDS]
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


def test_what_is_no_such_part_is_refused(tmp_path, siglip, codebook):
    with pytest.raises(ValueError, match="no text tokenizer"):
        begin(tmp_path / "out", siglip[1], codebook[1])
    language_model("llama", True).save_pretrained(tmp_path / "words")
    byte_tokenizer().save(str(tmp_path / "words" / "tokenizer.json"))
    with pytest.raises(ValueError, match="'llama' is no SigLIP"):
        begin(tmp_path / "out", tmp_path / "words", codebook[1], tmp_path / "words")
    assert not (tmp_path / "out").exists()
