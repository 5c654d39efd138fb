"""Flow matching against what is known in closed form, and the diffusion decoder in all its uses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from unimm.checkpoints.native import load_model, save_model
from unimm.config import Source, load_recipe
from unimm.data.mixture import Mixture
from unimm.data.processor import assistant, user
from unimm.model.diffusion import (
    DiffusionConfig,
    DiffusionDecoder,
    code_vectors,
    euler,
    flow_loss,
    load_diffusion,
    noise,
    save_diffusion,
    to_latents,
    to_pixels,
)
from unimm.training.flow_matching import setup_detokenizer, setup_diffusion
from unimm.training.trainer import make_optimizers, train

ROOT = Path(__file__).parent.parent
COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
SIZES = {"dim": 32, "layers": 2, "heads": 2, "patch": 4}


def picture_of(color):
    return np.tile(np.array(COLORS[color], np.uint8), (16, 16, 1))


def talks(run):
    class Talks:
        def __getitem__(self, i):
            color = list(COLORS)[i % 2]
            return {"messages": [user(color), assistant(picture_of(color))]}

    return Talks()


def pictures_only(run):
    class Pictures:
        def __getitem__(self, i):
            return np.random.default_rng(i % 7).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    return Pictures()


def pixels_of(color):
    return torch.tensor(picture_of(color)).permute(2, 0, 1) / 127.5 - 1


def decoder_of(condition="text", seed=0, **changes):
    """A tiny decoder whose output depends on everything: nothing in it is zero."""
    torch.manual_seed(seed)
    codes = (4, 4) if condition == "codes" else None
    sizes = dict(condition_dim=32, codes=codes, size=16, channels=3, **SIZES)
    decoder = DiffusionDecoder(DiffusionConfig(condition, **{**sizes, **changes}))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval()


def run_for(recipe, root, source, **changes):
    config = load_recipe(ROOT / "train" / recipe).config
    options = {**config.options, **SIZES, "autoencoder": "", "sampling_steps": 8, "decay": 0.9}
    if "previews" in options:
        options |= {"previews": 2, "preview_offset": 0}
    base = dict(
        init=str(root / "model"), data={"pictures": Source(source)}, steps=4, batch_size=4,
        out=str(root / "out"), precision="float32", log_every=1, warmup=0, save_every=2,
        preview_every=0, options={**options, **changes.pop("options", {})}, optimizer="adamw",
        train=((r"decoder\..*", 1e-3), (r".*", None)),
    )  # fmt: skip
    return dataclasses.replace(config, **{**base, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    save_model(folder / "model", *tiny_model())
    return folder


@pytest.fixture(scope="module")
def trained(root):
    return train(run_for("diffusion.py", root, talks, steps=250, batch_size=8, save_every=0))


def pipeline_of(folder, condition="text"):
    from unimm.inference.diffusion import UniMMDiffusionPipeline

    pipeline = UniMMDiffusionPipeline.from_pretrained(folder, condition)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_analytic_velocity_of_one_picture_has_no_loss_and_euler_arrives():
    picture = torch.rand(3, 4, 4)

    def velocity(x, t):
        return (picture - x) / (1 - t.view(-1, 1, 1, 1))

    start, t = torch.randn(64, 3, 4, 4), torch.linspace(0, 0.95, 64)
    loss = flow_loss(velocity, picture.expand_as(start), start, t)
    assert loss.shape == (64,) and loss.max() < 1e-8
    for steps in (1, 7, 30):
        reached = euler(velocity, start, steps)
        assert torch.allclose(reached, picture.expand_as(start), atol=1e-5), steps
    with pytest.raises(ValueError, match="one step"):
        euler(velocity, start, 0)


def test_the_optimal_velocity_on_gaussian_data_has_the_loss_of_the_closed_form():
    """Data N(m, s²) a pixel: E[x1 - x0 | x_t] is linear, its variance s² / ((1-t)² + t² s²)."""
    mean, spread = 0.4, 0.5

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 + t**2 * spread**2
        return mean + (t * spread**2 - (1 - t)) / variance * (x - t * mean)

    generator = torch.Generator().manual_seed(0)
    shape = (4000, 3, 8, 8)
    data = mean + spread * torch.randn(shape, generator=generator)
    t = torch.randn(4000, generator=generator).sigmoid()
    start = torch.randn(shape, generator=generator)
    found = flow_loss(velocity, data, start, t)
    expected = spread**2 / ((1 - t) ** 2 + t**2 * spread**2)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=5e-3)
    for low in (0.1, 0.4, 0.7):
        part = (t > low) & (t < low + 0.2)
        ours, theirs = float(found[part].mean()), float(expected[part].mean())
        assert ours == pytest.approx(theirs, rel=2e-2)
    drawn = euler(velocity, start, 400)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5e-3)
    assert float(drawn.std()) == pytest.approx(spread, abs=5e-3)
    coarse = [(euler(velocity, start[:100], n) - drawn[:100]).abs().mean() for n in (5, 20, 80)]
    assert coarse[0] > 2 * coarse[1] > 4 * coarse[2] > 0  # first order: 4 N steps, a quarter


def test_euler_is_the_scheduler_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / 10 for k in range(10)])
    decoder = decoder_of()
    start = noise([3, 4], (3, 16, 16))
    with torch.no_grad():
        velocity = decoder.velocity(None)
        x = start
        for k, time in enumerate(scheduler.timesteps):
            v = velocity(x, torch.full((2,), k / 10))
            x = scheduler.step(-v, time, x, return_dict=False)[0]
        assert torch.allclose(euler(velocity, start, 10), x, atol=1e-4)


def test_guidance_is_a_step_from_free_to_led():
    """In double precision: in single a CPU may round a batch of both by more than the bound."""
    torch.manual_seed(0)
    decoder, condition = decoder_of().double(), torch.randn(2, 5, 32).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    x, t = torch.randn(2, 3, 16, 16).double(), torch.tensor([0.2, 0.7]).double()
    with torch.no_grad():
        led, free = decoder(x, t, condition, mask), decoder(x, t)
        guided = decoder.velocity(condition, mask, 3.0)(x, t)
        assert torch.allclose(guided, free + 3 * (led - free), atol=1e-5)
        assert torch.equal(decoder.velocity(condition, mask, 1.0)(x, t), led)
        assert not torch.allclose(led, free, atol=1e-2)


@pytest.mark.parametrize("condition", ["text", "codes"])
def test_a_dropped_condition_is_no_condition_and_padding_is_not_seen(condition):
    decoder = decoder_of(condition)
    length = 16 if condition == "codes" else 6
    vectors = torch.randn(3, length, 32)
    mask = torch.arange(length)[None] < torch.tensor([length, 4, 2])[:, None]
    x, t = torch.randn(3, 3, 16, 16), torch.rand(3)
    with torch.no_grad():
        dropped = torch.tensor([True, False, True])
        mixed = decoder(x, t, vectors, mask, dropped)
        free, led = decoder(x, t), decoder(x, t, vectors, mask)
        assert torch.allclose(mixed[[0, 2]], free[[0, 2]], atol=1e-4)
        assert torch.allclose(mixed[1], led[1], atol=1e-5)
        changed = vectors.masked_fill(~mask[..., None], 9.0)
        assert torch.allclose(decoder(x, t, changed, mask), led, atol=1e-5)
        flipped = decoder(x, t, vectors.flip(1))  # words carry their places, codes get theirs here
        same = torch.allclose(flipped, decoder(x, t, vectors), atol=1e-3)
        assert same == (condition == "text")


def test_training_lowers_the_loss_and_learns_what_words_mean(trained, root):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [entry["main_loss"] for entry in log if "main_loss" in entry]
    assert np.mean(losses[-30:]) < 0.4 * np.mean(losses[:5])
    pipeline = pipeline_of(trained)
    drawn = pipeline(["red", "blue"], guidance=1.0, steps=8)
    own = [(drawn[k] - pixels_of(c)).square().mean().item() for k, c in enumerate(COLORS)]
    swapped = [(drawn[1 - k] - pixels_of(c)).square().mean().item() for k, c in enumerate(COLORS)]
    assert max(own) < 0.5 * min(swapped), (own, swapped)

    fresh = train(run_for("diffusion.py", root, talks, steps=1, out=str(root / "fresh")))
    before = pipeline_of(fresh)(["red", "blue"], guidance=1.0, steps=8)
    untrained = [(before[k] - pixels_of(c)).square().mean().item() for k, c in enumerate(COLORS)]
    assert max(own) < 0.2 * min(untrained), (own, untrained)


def test_more_steps_come_nearer_to_the_exact_flow(trained):
    pipeline = pipeline_of(trained)
    exact = pipeline(["red", "blue"], guidance=1.0, steps=256)
    drawn = [pipeline(["red", "blue"], guidance=1.0, steps=n) for n in (16, 64)]
    errors = [(pixels - exact).abs().mean() for pixels in drawn]
    assert errors[1] < 0.5 * errors[0]


def test_a_picture_depends_on_its_seed_and_prompt_alone(trained, monkeypatch):
    import unimm.inference.diffusion as module

    monkeypatch.setattr(module, "BATCH", 2)
    pipeline = pipeline_of(trained)
    prompts = ["red", "a much longer prompt for blue", "blue"]
    together = pipeline(prompts, steps=4, seed=5)
    assert together.shape == (3, 3, 16, 16) and together.abs().max() <= 1
    for k, prompt in enumerate(prompts):
        assert torch.allclose(pipeline(prompt, steps=4, seed=5 + k)[0], together[k], atol=1e-4), k
    assert not torch.allclose(pipeline("red", steps=4, seed=6)[0], together[0], atol=1e-2)
    talk = pipeline([[user("red")]], steps=4, seed=5)
    assert torch.equal(talk, pipeline("red", steps=4, seed=5))
    with pytest.raises(ValueError, match="nothing to draw"):
        pipeline([])
    with pytest.raises(ValueError, match="draws text"):
        pipeline.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_a_pipeline_saves_and_loads(trained, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = pipeline_of(trained)
    assert isinstance(pipeline, DiffusionPipeline) and pipeline.device.type == "cpu"
    pipeline.save_pretrained(tmp_path / "copy")
    again = pipeline_of(tmp_path / "copy")
    assert torch.equal(again("red", steps=2), pipeline("red", steps=2))
    assert again.to(torch.float64) is again and again.decoder.null.dtype == torch.float64
    exact = again("red", steps=2)
    assert exact.dtype == torch.float32
    assert torch.allclose(exact, pipeline("red", steps=2), atol=1e-3)
    load_model(tmp_path / "copy")
    (tmp_path / "copy/diffusion_text.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken"):
        load_diffusion(tmp_path / "copy", "text")
    with pytest.raises(ValueError, match="holds no"):
        load_diffusion(tmp_path / "copy", "codes")
    with pytest.raises(ValueError, match="'text' or 'codes'"):
        decoder_of("words")


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_with_the_same_weights_and_average(root, tmp_path, monkeypatch):
    from unimm.training import flow_matching

    run = run_for("diffusion.py", root, talks, steps=5, out=str(tmp_path / "whole"))
    whole = train(run)
    calls = []

    def stopping(self, decay, share, follow=flow_matching.FlowMatching.follow):
        calls.append(decay)
        if len(calls) == 4:
            raise Stop
        follow(self, decay, share)

    cut = dataclasses.replace(run, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(flow_matching.FlowMatching, "follow", stopping)
        train(cut)
    assert (tmp_path / "cut/checkpoint-2").exists()
    a, b = (load_diffusion(folder, "text")[0].state_dict() for folder in (whole, train(cut)))
    for name in a:
        assert torch.equal(a[name], b[name]), name

    # the average is neither where it began nor where the decoder is, and pieces share its step
    pieces = dataclasses.replace(run, out=str(tmp_path / "pieces"), accumulate=2)
    c = load_diffusion(train(pieces), "text")[0].state_dict()
    for name in a:
        assert torch.allclose(a[name], c[name], atol=1e-5), name


def test_the_average_is_the_recurrence(root, tmp_path):
    parts = setup_diffusion(run_for("diffusion.py", root, talks))
    flow = parts.model
    begin = flow.decoder.null.detach().clone()
    with torch.no_grad():
        flow.decoder.null.add_(1.0)
    flow.follow(0.9, 1)  # keeps min(0.9, 1 / 10) of zero
    assert torch.allclose(flow.average.null, begin + 0.9)
    parts.save(tmp_path)
    assert torch.equal(load_diffusion(tmp_path, "text")[0].null, flow.average.null)
    for _ in range(200):
        flow.follow(0.5, 1)
    assert torch.allclose(flow.average.null, flow.decoder.null)
    assert not any(p.requires_grad for p in flow.average.parameters())
    assert {"average.null", "decoder.null", "updates"} <= set(flow.state_dict())


def test_the_condition_may_be_the_bundled_model(root, tmp_path):
    run = run_for("diffusion.py", root, talks, init="scenes")
    parts = setup_diffusion(run)
    assert parts.model.decoder.config.size == 64
    (item,) = Mixture({"a": talks(run)}, {"a": 1.0}, 3, parts.prepare).take(1)
    assert item.pixels.shape == (3, 64, 64)
    parts.save(tmp_path)
    assert load_diffusion(tmp_path, "text")[0].config == parts.model.decoder.config


def test_what_is_random_follows_from_the_place_in_the_stream(root):
    run = run_for("diffusion.py", root, talks)
    parts = setup_diffusion(run)
    sources = {"a": talks(run)}
    items = Mixture(sources, {"a": 1.0}, 3, parts.prepare).take(600)
    late = Mixture(sources, {"a": 1.0}, 3, parts.prepare)
    late.skip(599)
    (again,) = late.take(1)
    assert np.array_equal(again.start, items[-1].start) and again.t == items[-1].t
    assert 0.07 < np.mean([item.dropped for item in items]) < 0.14
    logits = np.log([item.t / (1 - item.t) for item in items])
    assert abs(logits.mean()) < 0.15 and abs(logits.std() - 1) < 0.12
    assert np.std([item.start for item in items[:50]]) == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="end in a drawn picture"):
        parts.prepare({"messages": [user("x"), assistant("y")]}, np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown options"):
        setup_diffusion(dataclasses.replace(run, options={"dims": 3}))


def test_the_language_model_is_frozen_unless_the_rates_name_it(root, tmp_path):
    before = load_model(root / "model")[0].state_dict()
    rates = (("decoder\\..*", 1e-3), ("conditioner\\.decoder\\..*", 1e-3), (".*", None))
    for name, train_list in (("frozen", None), ("learns", rates)):
        run = run_for("diffusion.py", root, talks, steps=2, out=str(tmp_path / name))
        run = run if train_list is None else dataclasses.replace(run, train=train_list)
        after = load_model(train(run))[0].state_dict()
        moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert moved == (set() if train_list is None else {"decoder"}), name


def test_codes_become_pictures(root):
    run = run_for("detokenizer.py", root, pictures_only, out=str(root / "codes"), preview_every=4)
    out = train(run)
    assert (out / "preview-000004.png").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any({"psnr", "psnr_convolutional"} <= set(entry) for entry in log)
    save_diffusion(root / "model", load_diffusion(out, "codes")[0])
    pipeline = pipeline_of(root / "model", "codes")
    codes = torch.randint(32, (3, 16))
    alone = pipeline_of(out, "codes")  # the image tokenizer and the decoder, no model
    assert alone.model is None
    assert torch.equal(alone.decode(codes, steps=3), pipeline.decode(codes, steps=3))
    alone.save_pretrained(root / "alone")
    again = pipeline_of(root / "alone", "codes")
    assert torch.equal(again.decode(codes, steps=3), alone.decode(codes, steps=3))
    drawn = pipeline.decode(codes, steps=3, seed=2)
    assert drawn.shape == (3, 3, 16, 16)
    assert torch.allclose(pipeline.decode(codes[1:2], steps=3, seed=3)[0], drawn[1], atol=1e-4)
    vectors = code_vectors(pipeline.processor.image_tokenizer, codes)
    assert vectors.shape == (3, 16, 4) and 0.5 < vectors.std() < 2


def test_the_flow_can_end_in_the_latents_of_an_autoencoder(root, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
        shift_factor=0.1, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    autoencoder.save_pretrained(tmp_path / "kl")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        plain = autoencoder.encode(pixels).latent_dist.mode()
        latents = to_latents(autoencoder, pixels)
        assert torch.allclose(latents, (plain - 0.1) * 0.5)
        expected = autoencoder.decode(plain).sample.clamp(-1, 1)
        assert torch.allclose(to_pixels(autoencoder, latents), expected, atol=1e-5)
    options = {"autoencoder": str(tmp_path / "kl"), "patch": 2}
    for recipe, source, condition in (
        ("diffusion.py", talks, "text"),
        ("detokenizer.py", pictures_only, "codes"),
    ):
        run = run_for(recipe, root, source, out=str(tmp_path / condition), steps=1, options=options)
        out = train(run)
        decoder, loaded = load_diffusion(out, condition)
        assert decoder.config.channels == 4 and decoder.config.size == 8
        for name, weight in autoencoder.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
    assert pipeline_of(tmp_path / "text")("red", steps=2).shape == (1, 3, 16, 16)


def test_the_flow_can_end_in_the_vectors_of_codes(root, tmp_path):
    """Of the model's own image tokenizer; codes that the data has are not made again."""
    _, processor, _ = load_model(root / "model")
    tokenizer = processor.image_tokenizer
    codes = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    latents = to_latents(tokenizer, codes)
    assert latents.shape == (3, 4, 4, 4)
    nearly = latents + 1e-3 * torch.randn(latents.shape)
    assert torch.equal(to_pixels(tokenizer, nearly), tokenizer.decode(codes, (4, 4)))
    pixels = tokenizer.decode(codes, (4, 4))
    made = to_latents(tokenizer, pixels)
    assert torch.equal(made, to_latents(tokenizer, tokenizer.encode(pixels)))
    vectors = code_vectors(tokenizer, codes)  # row by row of the grid
    assert torch.equal(latents[1, :, 2, 3], vectors[1, 2 * 4 + 3])

    def known(run):
        class Talks:
            def __getitem__(self, i):
                part = {"codes": codes[i % 3].numpy(), "image": picture_of("red")}
                return {"messages": [user("red"), assistant(part)]}

        return Talks()

    options = {"autoencoder": "codes", "patch": 1}
    run = run_for("diffusion.py", root, known, out=str(tmp_path / "known"), options=options)
    parts = setup_diffusion(run)
    assert not any(p.requires_grad for p in parts.model.autoencoder.parameters())
    optimizers = make_optimizers(parts.model, dataclasses.replace(run, optimizer="muon"))
    by_muon = {id(p) for g in optimizers["main_matrices"].param_groups for p in g["params"]}
    blocks = parts.model.decoder.transformer.transformer_blocks
    matrices = {n: p for n, p in blocks.named_parameters() if p.ndim == 2}
    tables = {n for n in matrices if n.endswith("scale_shift_table")}  # rows of shifts, one a use
    assert tables and by_muon == {id(p) for n, p in matrices.items() if n not in tables}
    item = parts.prepare(known(run)[1], np.random.default_rng(0))
    assert torch.equal(item.pixels, codes[1])
    seen = parts.prepare(talks(run)[0], np.random.default_rng(0))
    expected = tokenizer.encode(processor.drawn_pixels(picture_of("red"))[None])[0]
    assert torch.equal(seen.pixels, expected)
    drawn = pipeline_of(train(run))("red", steps=2)
    assert drawn.shape == (1, 3, 16, 16)
    sizes = load_diffusion(tmp_path / "known", "text")[0].config
    assert (sizes.channels, sizes.size, sizes.latents) == (4, 4, "codes")
    wrong = run_for("detokenizer.py", root, pictures_only, options=options)
    with pytest.raises(ValueError, match="autoencoder=codes is for text"):
        setup_detokenizer(wrong)


def test_setups_want_a_model():
    for setup in (setup_diffusion, setup_detokenizer):
        run = load_recipe(ROOT / "train/diffusion.py").config
        with pytest.raises(ValueError, match="init"):
            setup(dataclasses.replace(run, init=""))


def test_generate_can_draw_by_diffusion(trained, root, tmp_path):
    from unimm.cli import main
    from unimm.data.processor import to_picture
    from unimm.pipeline import UniMM

    model = UniMM.from_pretrained(trained)
    drawn = model.generate(["red", "blue"], decoder="diffusion", guidance=1.0, seed=3)
    expected = pipeline_of(trained)(["red", "blue"], guidance=1.0, seed=3)
    for image, pixels in zip(drawn, expected, strict=True):
        assert (np.asarray(image) == np.asarray(to_picture(pixels))).all()
    few = model.generate("red", decoder="diffusion", steps=2, guidance=1.0, seed=3)
    (pixels,) = pipeline_of(trained)("red", steps=2, guidance=1.0, seed=3)
    assert (np.asarray(few) == np.asarray(to_picture(pixels))).all()
    assert (np.asarray(few) != np.asarray(drawn[0])).any()
    with pytest.raises(ValueError, match="one step or more"):
        model.generate("red", decoder="diffusion", steps=0)
    with pytest.raises(ValueError, match="decoder is"):
        model.generate("red", decoder="brush")
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    words = ["generate", "red", "--model", str(plain), "-o", str(tmp_path / "x.png")]
    assert main([*words, "--decoder", "diffusion"]) == 2
    assert not (tmp_path / "x.png").exists()
    words[3] = str(trained)
    how = ["--decoder", "diffusion", "--steps", "2", "--guidance", "1", "--seed", "3"]
    assert main([*words, *how]) == 0
    assert (np.asarray(Image.open(tmp_path / "x.png")) == np.asarray(few)).all()


def test_the_compare_command_refuses_what_is_no_study(tmp_path, capsys):
    from unimm.cli import main

    (tmp_path / "x.py").write_text("y = 1\n")
    assert main(["compare", str(tmp_path / "x.py"), "-o", str(tmp_path / "o")]) == 2
    assert "is not a study" in capsys.readouterr().err and not (tmp_path / "o").exists()
