"""The SigLIP wrap against transformers' Janus encoder, and the connectors."""

import pytest
import torch

from unimm.model.connectors import CONNECTORS
from unimm.model.vision import VisionConfig, VisionEncoder

TINY = VisionConfig(
    dim=32, layers=2, heads=2, hidden=48, image_size=16, patch_size=4, activation="gelu"
)


@pytest.fixture
def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(TINY).eval()


@torch.no_grad()
def test_same_features_as_janus(encoder):
    from transformers import JanusVisionConfig, JanusVisionModel

    settings = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1.5,
        image_size=16,
        patch_size=4,
        hidden_act="gelu",
    )
    janus = JanusVisionModel(settings).eval()
    for weight in janus.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    state = {
        name.replace("projection_layer", "out_proj"): tensor
        for name, tensor in janus.state_dict().items()
    }
    encoder.model.load_state_dict(state)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    expected = janus(pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width", "count"), [(16, 16, 16), (32, 16, 32), (18, 23, 20)])
@torch.no_grad()
def test_tokens_is_the_number_of_features(encoder, height, width, count):
    assert encoder.tokens(height, width) == count
    assert encoder(torch.zeros(1, 3, height, width)).shape == (1, count, 32)


def test_training_attention_is_the_same(encoder):
    """Few patches in bfloat16 training on a CPU take eager attention, all else SDPA."""
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        trained = encoder(pixels)
        assert encoder.model.config._attn_implementation == "eager"
        with torch.no_grad():
            used = encoder(pixels)
    assert encoder.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(trained, used, atol=0.03, rtol=0.03)
    trained.float().square().sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


@torch.no_grad()
def test_built_on_meta_then_loaded(encoder):
    with torch.device("meta"):
        empty = VisionEncoder(TINY).eval()
    empty.load_state_dict(encoder.state_dict(), assign=True)
    pixels = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(empty(pixels), encoder(pixels))


def test_bad_config_is_refused():
    with pytest.raises(ValueError, match="heads"):
        VisionConfig(dim=30, layers=1, heads=4, hidden=8, image_size=8, patch_size=4)


@pytest.mark.parametrize("name", CONNECTORS)
def test_connectors(name):
    connector = CONNECTORS[name](12, 20)
    assert connector(torch.randn(2, 5, 12)).shape == (2, 5, 20)


def test_mlp_is_the_aligner_of_janus():
    mlp = CONNECTORS["mlp"](6, 8)
    x = torch.randn(3, 6)
    first, second = mlp.fc1, mlp.fc2
    expected = second(torch.nn.functional.gelu(first(x), approximate="none"))
    torch.testing.assert_close(mlp(x), expected)
