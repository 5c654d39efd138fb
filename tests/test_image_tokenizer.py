"""The image tokenizer: parity with JanusVQVAE and the quantizer library, saving, training, metrics.

Everything runs on tiny random networks and made-up pictures.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unimm.config import Source, load_recipe
from unimm.model.image_tokenizer import (
    ChannelRMSNorm,
    ImageTokenizer,
    VQConfig,
    VQTokenizer,
    with_rate,
)
from unimm.training import image_tokenizer as training
from unimm.training.image_tokenizer import TokenizerTraining, VQTraining
from unimm.training.trainer import train

ROOT = Path(__file__).parent.parent
JANUS = VQConfig(32, 256, 8, 32, 32, (1, 1, 2, 2), 1)
RUN = SimpleNamespace(precision="float32", batch_size=8)


def setup_of(recipe, **changes):
    return training.setup_image_tokenizer(dataclasses.replace(recipe, **changes))


def small(**changes) -> VQConfig:
    fields = dict(image_size=16, codebook_size=32, code_dim=4, z_channels=16, base_channels=16)
    fields |= dict(multipliers=(1, 2), res_blocks=1, norm="rms", attention=False, patch=2)
    return VQConfig(**{**fields, **changes})


FSQ = dict(quantizer="fsq", levels=(8, 5, 5, 4), codebook_size=800)


def pictures(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Rectangles of random colours, uint8 (n, 3, size, size)."""
    rng = np.random.default_rng(seed)
    made = np.empty((n, size, size, 3), np.uint8)
    for picture in made:
        picture[:] = rng.choice((0, 128, 255), 3)
        y, x = rng.integers(0, size // 2, 2)
        picture[y : y + size // 2, x : x + size // 2] = rng.choice((0, 128, 255), 3)
    return training.collate(list(made))


# ---------------------------------------------------------------- parity


def test_the_weights_of_janus_give_the_codes_and_pixels_of_janus():
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    torch.manual_seed(0)
    theirs = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=256,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 2, 2],
            num_res_blocks=1,
            num_patches=4,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # lively weights: 42 codes occur
            if parameter.ndim > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
            elif "norm" not in name:
                parameter.normal_(0, 0.1)
        rows = theirs.quantize.embedding.weight
        rows.copy_(F.normalize(rows, dim=-1))  # encode of transformers does not do it
    ours = VQTokenizer(JANUS).eval()
    ours.load_state_dict(theirs.state_dict())  # the names are equal
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        codes = theirs.encode(pixels, return_dict=True).image_tokens.view(4, 16)
        drawn = theirs.decode(codes)
        vectors = ours.code_vectors()[codes.view(4, 4, 4)].permute(0, 3, 1, 2)
        assert (ours.pixels(vectors) - drawn).abs().max() < 1e-4
    assert len(codes.unique()) > 20 and torch.equal(ours.encode(pixels), codes)
    assert (ours.decode(codes, (4, 4)) - drawn.clamp(-1, 1)).abs().max() < 1e-4


def test_a_network_of_janus_size_has_its_72_million_parameters():
    with torch.device("meta"):
        janus = VQTokenizer(VQConfig(384, 16384, 8, 256, 128, (1, 1, 2, 2, 4), 2))
    assert sum(p.numel() for p in janus.parameters()) == 71_883_403
    assert janus.grid(384, 384) == (24, 24)


@pytest.mark.parametrize("changes", [{}, dict(quantizer="simvq"), FSQ], ids=["vq", "simvq", "fsq"])
def test_codes_and_vectors_are_those_of_the_library(changes):
    torch.manual_seed(0)
    model = TokenizerTraining(small(**changes), VQTraining()).eval()
    if "quantizer" not in changes:  # rows as training leaves them
        model.quantizer.codebook = F.normalize(torch.randn(32, 4), dim=-1)
    tokenizer = model.export()
    z = torch.randn(3, 500, 4)
    with torch.no_grad():
        vectors, codes, *_ = model.quantizer(z)
    assert torch.equal(tokenizer.quantize.look_up(z), codes.long())
    assert len(codes.unique()) > 16
    assert (tokenizer.code_vectors()[codes.long()] - vectors).abs().max() < 1e-6


def test_the_look_up_in_chunks_is_the_look_up():
    torch.manual_seed(0)
    quantize = VQTokenizer(small()).quantize
    z = torch.randn(7, 11, 4)
    assert torch.equal(quantize.look_up(z, products=100), quantize.look_up(z))
    assert quantize.look_up(z).shape == (7, 11)


def test_training_and_inference_see_the_same_codes_and_pixels():
    torch.manual_seed(0)
    model = TokenizerTraining(small(), VQTraining()).eval()
    model.spread.running_mean.normal_(0, 0.2)  # as training leaves them
    model.spread.running_var.uniform_(0.05, 0.2)
    tokenizer, pixels = model.export(), training.to_signed(pictures(4))
    with torch.no_grad():
        drawn, codes, _ = model(pixels)
    assert len(codes.unique()) > 8
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert (tokenizer.decode(codes, (4, 4)) - drawn.clamp(-1, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("changes", [{}, FSQ], ids=["vq", "fsq"])
def test_a_tokenizer_is_trained_further(tmp_path, changes):
    """It begins with the same codes and pixels; then its rows move on from where they were."""
    torch.manual_seed(0)
    config, pixels = small(**changes), training.to_signed(pictures(64))
    model = TokenizerTraining(config, VQTraining())
    fit(model, 60)
    model.export().save(tmp_path)
    before = ImageTokenizer.load(tmp_path)
    recipe = load_recipe(ROOT / "tokenizers/train_image.py").config
    options = {**dataclasses.asdict(config), "l1": 1.0, "dead_code": 0.0, "decay": 0.97}
    begun = setup_of(recipe, init=str(tmp_path), options=options).model
    after = begun.export()
    assert torch.equal(after.encode(pixels), before.encode(pixels))
    drawn = [t.decode(before.encode(pixels), (4, 4)) for t in (before, after)]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4
    losses = fit(begun, 20, rate=1e-3)
    new = TokenizerTraining(config, VQTraining())
    assert np.mean(losses[:5]) < 0.8 * np.mean(fit(new, 5, rate=1e-3))
    if not changes:
        weighed = setup_of(recipe, init=str(tmp_path), options={**options, "rate": 0.1}).model
        assert torch.equal(weighed.export().encode(pixels), before.encode(pixels))
        weighed.export().save(tmp_path / "weighed")
        kept = {name: value for name, value in options.items() if name != "rate"}
        for said, rate in ((options, 0.0), (kept, 0.1)):  # the rate stays if nothing is said
            made = setup_of(recipe, init=str(tmp_path / "weighed"), options=said).model
            assert made.export().config.rate == rate
        rows = begun.export().code_vectors()
        assert not torch.equal(rows, before.code_vectors())
        assert F.cosine_similarity(rows, before.code_vectors()).median() > 0.95
    with pytest.raises(ValueError, match="to begin with is"):
        setup_of(recipe, init=str(tmp_path), options={**options, "z_channels": 32})
    with pytest.raises(ValueError, match="kind vq or fsq"):
        TokenizerTraining(small(quantizer="simvq"), VQTraining()).begin_with(before)


def test_rms_norm_is_that_of_torch_with_its_gradients():
    torch.manual_seed(0)
    norm = ChannelRMSNorm(6).double()
    norm.weight.data.normal_()
    x = torch.randn(2, 6, 3, 5, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    theirs = F.rms_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.eps).permute(0, 3, 1, 2)
    upstream = torch.randn_like(x)
    for ours, expected in zip(
        (norm(x), *torch.autograd.grad(norm(x), (x, norm.weight), upstream)),
        (theirs, *torch.autograd.grad(theirs, (x, norm.weight), upstream)),
        strict=True,
    ):
        assert (ours - expected).abs().max() < 1e-12


def test_a_code_of_a_local_tokenizer_depends_on_its_neighbourhood_alone():
    torch.manual_seed(0)
    near, far = {}, {}
    for norm, base in (("rms", 16), ("group", 32)):
        tokenizer = VQTokenizer(small(norm=norm, base_channels=base, local=True))
        pixels = training.to_signed(pictures(1, size=64))
        changed = pixels.clone()
        changed[..., :4, :4] *= -1  # the top left corner
        with torch.no_grad():
            moved = (tokenizer.latents(pixels) - tokenizer.latents(changed)).abs().amax((0, 1))
        near[norm], far[norm] = moved[0, 0].item(), moved[8:, 8:].max().item()
    assert far["rms"] == 0 < far["group"] and min(near.values()) > 0


@pytest.mark.parametrize("quantizer", ["vq", "simvq"])
def test_a_rate_prefers_the_usual_among_codes_about_as_near(quantizer):
    torch.manual_seed(0)
    tokenizer = VQTokenizer(small(quantizer=quantizer)).eval()
    pixels = training.to_signed(pictures(60))
    plain = tokenizer.encode(pixels)
    assert torch.equal(with_rate(tokenizer, [pixels], 0.0).encode(pixels), plain)
    entropy = {0.0: entropy_of(plain)}
    for rate in (0.01, 0.05):
        weighed = with_rate(tokenizer, [pixels], rate, rounds=20)  # until the shares stand still
        codes = weighed.encode(pixels)
        x = weighed.latents(pixels).detach().permute(0, 2, 3, 1).flatten(1, 2)
        x = F.normalize(x, dim=-1) if quantizer == "vq" else x
        apart = (x[..., None, :] - weighed.code_vectors()).square().sum(-1)  # (N, gh gw, K)
        counts = torch.bincount(codes.flatten(), minlength=32) + 1
        cost = apart / 2 - rate * (counts / counts.sum()).log()
        assert torch.equal(cost.argmin(-1), codes)
        entropy[rate] = entropy_of(codes)
    assert entropy[0.05] < entropy[0.01] < entropy[0.0] and entropy[0.05] > 0


def entropy_of(codes: torch.Tensor) -> float:
    return torch.special.entr(torch.bincount(codes.flatten()) / codes.numel()).sum().item()


# ---------------------------------------------------------------- saving, errors


@pytest.mark.parametrize(
    "changes",
    [{}, dict(quantizer="simvq"), FSQ, dict(rate=0.1)],
    ids=["vq", "simvq", "fsq", "rate"],
)
def test_save_and_load_are_exact(tmp_path, changes):
    torch.manual_seed(0)
    tokenizer = TokenizerTraining(small(**changes), VQTraining()).export().eval()
    pixels = training.to_signed(pictures(4))
    if tokenizer.config.rate:
        tokenizer = with_rate(tokenizer, [pixels], tokenizer.config.rate)
        assert tokenizer.quantize.log_share.std() > 0
    tokenizer.save(tmp_path)
    again = ImageTokenizer.load(tmp_path)
    assert again.config == tokenizer.config and not again.training
    codes = tokenizer.encode(pixels)
    assert torch.equal(again.encode(pixels), codes)
    assert torch.equal(again.decode(codes, (4, 4)), tokenizer.decode(codes, (4, 4)))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"image_tokenizer.json", "image_tokenizer.safetensors"}


def test_bfloat16_files_are_small_and_keep_the_codebook(tmp_path):
    tokenizer = VQTokenizer(small()).eval()
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        tokenizer.save(tmp_path, dtype=dtype)
        sizes.append((tmp_path / "image_tokenizer.safetensors").stat().st_size)
    again = ImageTokenizer.load(tmp_path, dtype=torch.bfloat16)
    drawn = again.decode(torch.zeros(1, 16, dtype=torch.long), (4, 4))
    assert sizes[1] < 0.6 * sizes[0] and drawn.dtype == torch.float32
    assert torch.equal(ImageTokenizer.load(tmp_path).code_vectors(), tokenizer.code_vectors())


def test_errors_say_what_is_wrong(tmp_path):
    tokenizer = VQTokenizer(small())
    assert tokenizer.grid(16, 32) == (4, 8)
    for call, words in (
        (lambda: tokenizer.grid(16, 18), "multiples of 4"),
        (lambda: tokenizer.encode(torch.zeros(1, 3, 18, 16)), "multiples of 4"),
        (lambda: tokenizer.encode(torch.zeros(3, 16, 16)), r"\(N, 3, H, W\)"),
        (lambda: tokenizer.decode(torch.zeros(1, 15, dtype=torch.long), (4, 4)), "do not fill"),
        (lambda: tokenizer.decode(torch.full((1, 16), 32), (4, 4)), r"not in 0\.\.31"),
        (lambda: small(quantizer="lfq"), "not one of vq"),
        (lambda: small(norm="batch"), "not one of group"),
        (lambda: small(norm="group"), "base_channels"),
        (lambda: small(image_size=18), "multiple of 4"),
        (lambda: small(rate=-0.1), "rate is 0 or more"),
        (lambda: VQConfig(**{**vars(small(**FSQ)), "rate": 0.1}), "0 for fsq"),
        (lambda: small(quantizer="fsq"), "product is codebook_size"),
        (lambda: ImageTokenizer.load(tmp_path), "holds no image_tokenizer.json"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    tokenizer.save(tmp_path)
    (tmp_path / "image_tokenizer.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="broken"):
        ImageTokenizer.load(tmp_path)


# ---------------------------------------------------------------- training


def fit(model: TokenizerTraining, steps: int, rate: float = 3e-3) -> list[float]:
    """The reconstruction losses of a short training."""
    parameters = [p for n, p in model.named_parameters() if not n.startswith("discriminator")]
    optimizer = torch.optim.AdamW(parameters, rate)
    losses = []
    for step in range(steps):
        for name, loss, metrics in training.image_tokenizer_step(
            model, pictures(8, seed=step), 1, RUN
        ):
            loss.backward()
            if name == "main":
                losses.append(metrics["reconstruction"])
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("changes", [{}, dict(quantizer="simvq"), FSQ], ids=["vq", "simvq", "fsq"])
def test_a_few_steps_lower_the_loss(changes):
    torch.manual_seed(0)
    model = TokenizerTraining(small(**changes), VQTraining(l2=1, edges=0.5))
    losses = fit(model, 40)
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])
    assert int(model.pictures) == 320


def test_dead_codes_are_replaced():
    """64 codes that all begin in one place, and vectors around four others."""
    used = []
    for dead_code in (0, 2):
        torch.manual_seed(0)
        quantizer = training.make_quantizer(
            small(code_dim=8, codebook_size=64), VQTraining(dead_code=dead_code)
        )
        rows = F.normalize(torch.ones(64, 8) + 0.01 * torch.randn(64, 8), dim=-1)
        quantizer._codebook.embed.copy_(rows)
        quantizer._codebook.embed_avg.copy_(rows)
        places = torch.randn(4, 8)
        for _ in range(20):
            quantizer(places[torch.randint(4, (1, 500))] + 0.3 * torch.randn(1, 500, 8))
        vectors = places[torch.randint(4, (1, 2000))] + 0.3 * torch.randn(1, 2000, 8)
        used.append(len(quantizer.eval()(vectors)[1].unique()))
    assert used[0] < 20 and used[1] > 60


@pytest.mark.parametrize("adaptive", [False, True])
def test_each_optimizer_gets_its_own_gradients(adaptive):
    torch.manual_seed(0)
    settings = VQTraining(adversarial=0.5, adversarial_start=1, adaptive=adaptive)
    model = TokenizerTraining(small(), settings)
    judge = list(model.discriminator.parameters())

    def parts():
        return training.image_tokenizer_step(model, pictures(8), 1, RUN)

    assert [name for name, *_ in parts()] == ["main"]  # step 1: not yet
    seen = []
    for name, loss, _ in parts():
        seen.append(name)
        loss.backward()
        if name == "main":
            assert all(p.grad is None for p in judge)
            before = model.tokenizer.decoder.conv_out.weight.grad.clone()
            assert before.abs().sum() > 0
    assert seen == ["main", "discriminator"]
    assert all(p.grad is not None for p in judge)
    assert torch.equal(model.tokenizer.decoder.conv_out.weight.grad, before)
    assert model.tokenizer.quantize.embedding.weight.grad is None

    model.eval()  # nothing moves: the judge alone makes the difference
    last = model.tokenizer.decoder.conv_out.weight
    gradients = []
    for weight in (0.5, 1e-9):
        model.zero_grad()
        model.settings = dataclasses.replace(settings, adversarial=weight)
        next(parts())[1].backward()
        gradients.append(last.grad.clone())
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_the_adaptive_weight_makes_two_gradients_equally_long():
    last = torch.ones(4, requires_grad=True)
    rebuilt, fooled = 6 * last.sum(), -2 * last.sum()
    assert training.adaptive_weight(rebuilt, fooled, last) == pytest.approx(3, rel=1e-3)


def test_the_quantizer_stays_in_float32_under_autocast():
    model = TokenizerTraining(small(), VQTraining())
    seen = []
    model.quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    run = SimpleNamespace(precision="bf16", batch_size=8)
    next(training.image_tokenizer_step(model, pictures(8), 1, run))
    assert seen == [torch.float32]
    assert {b.dtype for b in model.quantizer.buffers() if b.is_floating_point()} == {torch.float32}


class Rectangles:
    def __getitem__(self, i: int) -> np.ndarray:
        return pictures(1, seed=i)[0].permute(1, 2, 0).numpy()


def test_the_setup_previews_and_saves(tmp_path):
    from unimm.config import Run, Source

    fields = dict(image_size=16, codebook_size=32, code_dim=4, z_channels=16, base_channels=16)
    fields |= dict(multipliers=(1, 2), res_blocks=1, norm="rms", attention=False, patch=2)
    run = Run(
        setup=training.setup_image_tokenizer,
        step=training.image_tokenizer_step,
        train=((r".*", 1e-3),),
        data={"pictures": Source(lambda run: Rectangles())},
        steps=1,
        batch_size=2,
        options={**fields, "previews": 5, "l2": 1.0},
    )
    parts = training.setup_image_tokenizer(run)
    assert parts.collate([Rectangles()[0], Rectangles()[1]]).shape == (2, 3, 16, 16)
    metrics = parts.preview(tmp_path, 7)
    assert metrics.keys() == {"psnr", "ssim", "usage", "perplexity"}
    assert parts.preview(tmp_path, 7) == metrics and (tmp_path / "preview-000007.png").exists()
    assert parts.model.training
    parts.save(tmp_path)
    assert ImageTokenizer.load(tmp_path).config == small()
    weighed = dataclasses.replace(run, options={**run.options, "rate": 0.2, "counted": 4})
    parts = training.setup_image_tokenizer(weighed)
    random = torch.get_rng_state()
    parts.preview(tmp_path, 8)
    assert torch.equal(torch.get_rng_state(), random)  # looking changes nothing of the training
    parts.save(tmp_path)
    tokenizer = ImageTokenizer.load(tmp_path)
    pixels = training.to_signed(parts.collate([Rectangles()[i] for i in range(4)]))
    wanted = with_rate(parts.model.export(), [pixels], 0.2)
    assert torch.equal(tokenizer.quantize.log_share, wanted.quantize.log_share)
    run.options["l3"] = 1
    with pytest.raises(ValueError, match="unknown options.*l3"):
        training.setup_image_tokenizer(run)


# ---------------------------------------------------------------- metrics


def test_a_preview_passes_over_what_cannot_be_read(tmp_path):
    def torn(run):
        class Torn:
            def __getitem__(self, i):
                if i % 3 == 0:
                    raise ValueError("torn")
                return pictures(1, seed=i % 1000)[0].permute(1, 2, 0).numpy()

        return Torn()

    recipe = load_recipe(ROOT / "tokenizers/train_image.py").config
    options = {**dataclasses.asdict(small()), "previews": 4}
    parts = setup_of(recipe, data={"mine": Source(torn)}, options=options)
    assert parts.preview(tmp_path, 1)["psnr"] > 0
    assert (tmp_path / "preview-000001.png").exists()

    def nothing(run):
        class Nothing:
            def __getitem__(self, i):
                raise OSError("gone")

        return Nothing()

    parts = setup_of(recipe, data={"mine": Source(nothing)}, options=options)
    with pytest.raises(ValueError, match="none of the pictures"):
        parts.preview(tmp_path, 2)


def test_psnr_and_ssim_have_their_known_values():
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), -0.4)  # 0.6 and 0.3 of 1
    assert training.psnr(a, b).item() == pytest.approx(-10 * np.log10(0.09), abs=1e-4)
    assert training.psnr(a, a).item() == pytest.approx(100)
    expected = (2 * 0.6 * 0.3 + 1e-4) / (0.6**2 + 0.3**2 + 1e-4)  # flat: luminance alone
    assert training.ssim(a, b).item() == pytest.approx(expected, abs=1e-4)

    rng = np.random.default_rng(0)
    x, y = rng.random((2, 11, 11))  # one window: the formula written out
    t = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(t, t) / t.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, vxy = (
        (w * p * q).sum() - m for p, q, m in ((x, x, mx**2), (y, y, my**2), (x, y, mx * my))
    )
    expected = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4)
    expected /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    pair = (torch.tensor(2 * p - 1).expand(1, 3, 11, 11) for p in (x, y))
    assert training.ssim(*pair).item() == pytest.approx(expected, abs=1e-4)


def test_usage_and_perplexity_count_codes():
    class Halves(ImageTokenizer):
        """Left half code 0, right half code 1, of four."""

        codebook_size = 4

        def grid(self, h, w):
            return 2, 2

        def encode(self, pixels):
            return torch.tensor([0, 1, 0, 1]).repeat(len(pixels), 1)

        def decode(self, codes, grid):
            return torch.zeros(len(codes), 3, 16, 16)

    metrics = training.reconstruction_metrics(Halves(), torch.zeros(5, 3, 16, 16), batch=2)
    assert metrics["usage"] == 0.5 and metrics["perplexity"] == pytest.approx(2)
    assert metrics["psnr"] == pytest.approx(100) and metrics["ssim"] == pytest.approx(1)


def test_the_recipe_with_its_discriminator_through_the_trainer(tmp_path):
    """The judge learns to tell pictures from reconstructions (LlamaGen's arguments are swapped)."""
    recipe = load_recipe(Path(__file__).parent.parent / "tokenizers/train_image.py").config
    made = pictures(64).permute(0, 2, 3, 1).numpy()
    source = Source(lambda run: Cycle(made))
    kept = {}

    def setup(run):
        torch.manual_seed(0)
        parts = training.setup_image_tokenizer(run)
        kept["model"] = parts.model
        return parts

    options = {**recipe.options, **dataclasses.asdict(small()), "previews": 8}
    options |= {"adversarial": 0.1, "adversarial_start": 10}
    run = dataclasses.replace(
        recipe, out=str(tmp_path), data={"pictures": source}, steps=80, batch_size=16,
        options=options, setup=setup, precision="float32", preview_every=0, warmup=0,
    )  # fmt: skip
    train(run)
    model = kept["model"]
    pixels = training.to_signed(pictures(64))
    with torch.no_grad():
        drawn = model(pixels)[0]
        real, fake = model.discriminator(pixels).mean(), model.discriminator(drawn).mean()
    assert real > fake + 0.1, (float(real), float(fake))
    losses = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "hinge" in line]
    assert losses and (tmp_path / "image_tokenizer.safetensors").exists()


def test_the_tokenizer_is_pulled_to_what_the_judge_likes():
    """The adversarial part alone raises the judge's opinion of the reconstructions."""
    torch.manual_seed(0)
    settings = VQTraining(l1=0.0, l2=0.0, commitment=0.0, adversarial=1.0)
    model = TokenizerTraining(small(**FSQ), settings)
    moving = [p for p in model.tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, 1e-3)

    def opinion():
        with torch.no_grad():
            return float(model.discriminator(model(training.to_signed(pictures(8)))[0]).mean())

    before = opinion()
    for _ in range(10):
        optimizer.zero_grad()
        next(training.image_tokenizer_step(model, pictures(8), 1, RUN))[1].backward()
        optimizer.step()
    assert opinion() > before


class Cycle:
    def __init__(self, items):
        self.items = items

    def __getitem__(self, i):
        return self.items[i % len(self.items)]
