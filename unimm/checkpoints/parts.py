"""A unified model begun from other people's parts: a language model, an encoder, a VQ network.

    begin("runs/begun", decoder="Qwen/Qwen3-0.6B", vision="google/siglip-large-patch16-384",
          image_tokenizer="vq_ds16_t2i.pt")

or, in a recipe, `init=Begin(decoder=..., vision=..., image_tokenizer=...)`. The adaptors and the
image head are new and random; stage 1 trains them.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoints import emu3, janus
from unimm.checkpoints.llama import decoder_config
from unimm.checkpoints.load import Loaded, janus_configs, locate, on_meta
from unimm.checkpoints.native import save_model
from unimm.checkpoints.shards import (
    Places,
    fill,
    names,
    optional_json,
    read,
    read_json,
    weight_files,
)
from unimm.config import Begin, Run
from unimm.data.processor import Processor, Template, load_tokenizer
from unimm.model.decoder import Decoder, DecoderConfig
from unimm.model.image_tokenizer import Emu3Tokenizer, ImageTokenizer, VQConfig, VQTokenizer
from unimm.model.unified import UnifiedConfig, UnifiedModel
from unimm.model.vision import VisionConfig, VisionEncoder

SIGLIP = {  # what transformers' SiglipVisionConfig assumes
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}  # fmt: skip


def begin(
    out: str | Path,
    decoder: str | Path,
    image_tokenizer: str | Path,
    vision: str | Path | None = None,
    drawn_size: int | None = None,
    sampling: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a native model folder around the parts; returns it.

    decoder: a folder or Hub id of the Llama family, with its tokenizer.json. vision: one of SigLIP;
    None makes a model that sees codes. image_tokenizer: a folder of unimm, Janus or Emu3, or a file
    in LlamaGen's layout. drawn_size: pixels of a drawn picture, by default the tokenizer's own.
    """
    parts = Begin(str(decoder), str(image_tokenizer), str(vision or ""), drawn_size or 0, seed=seed)
    model, processor, _ = assemble_parts(parts, dtype)
    save_model(out, model, processor, sampling)
    return Path(out)


def begun(run: Run) -> Run:
    """`run` from a folder: its parts, where it names some, are put together once as OUT/begun.

    Ranks that do so at a time make the same, and one of them is kept. Raises ValueError where
    OUT/begun was made of other parts.
    """
    if not isinstance(run.init, Begin):
        return run
    folder, parts = Path(run.out) / "begun", asdict(run.init)
    if not folder.exists():
        model, processor, sampling = assemble_parts(run.init, torch.float32)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".begun-"))
        try:
            save_model(scratch, model, processor, sampling)
            (scratch / "parts.json").write_text(json.dumps(parts, indent=1))
            scratch.chmod(0o755)  # mkdtemp makes folders that only their owner can enter
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another rank was first
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if optional_json(folder / "parts.json") != parts:
        raise ValueError(f"{folder} was made of other parts: name another folder with out=")
    return replace(run, init=str(folder))


def assemble_parts(parts: Begin, dtype: torch.dtype | None) -> Loaded:
    """The model that `parts` makes; dtype None is the decoder's own.

    Its seven special tokens are new words behind the decoder's, with rows of their own.
    Raises ValueError, naming the file, for a part that cannot be read or does not fit.
    """
    source = locate(parts.decoder)
    words = load_tokenizer(source / "tokenizer.json")
    template = Template.after(1 + max(words.get_vocab().values()))
    torch.manual_seed(parts.seed)
    config, state = load_decoder(source, template.bos, template.end_image + 1, dtype)
    kept = state["decoder.norm.weight"].dtype
    eyes = load_vision(locate(parts.vision), kept) if parts.vision else None
    codes = load_image_tokenizer(parts.image_tokenizer)
    whole = UnifiedConfig(
        decoder=config,
        vision=eyes.config if eyes is not None else None,
        connector="mlp",
        codebook_size=codes.codebook_size,
        code_dim=codes.code_vectors().shape[1],
        image_head_dim=config.dim,
    )
    with torch.device("meta"):
        model = UnifiedModel(whole)
    model.load_state_dict(state, strict=False, assign=True)
    if config.tied_embeddings:
        model.text_head.weight = model.decoder.embed_tokens.weight
    model.vision = eyes
    for part in (model.connector, model.code_embed, model.code_adapter, model.image_head):
        if part is not None:
            renew(part)
    with torch.no_grad():
        rows = codes.code_vectors().float()
        size = rows.square().mean().sqrt()  # entries of size one, whatever the codebook's scale
        model.code_embed.weight.copy_(rows / size)
    drawn = parts.drawn_size or codes.config.image_size
    codes.grid(drawn, drawn)
    seen = eyes.config.image_size if eyes is not None else drawn
    patches = eyes.tokens(seen, seen) if eyes is not None else 0
    processor = Processor(words, codes, template, seen, patches, drawn, config.max_positions)
    return model.to(kept).eval(), processor, {"guidance": parts.guidance}


def renew(part: nn.Module) -> None:
    """Random weights, as torch begins with, for a module that was built on "meta"."""
    part.to_empty(device="cpu")
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()


def load_decoder(
    folder: Path, words: int, rows: int, dtype: torch.dtype | None
) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Configuration and state of a decoder whose table gets `rows` rows.

    The first `words` rows are the original's; the others, for special tokens, are their mean, so
    that a new token is as likely as an average one.
    """
    path = folder / "config.json"
    config = decoder_config(read_json(path), str(path))
    if words > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {words} words, the table {config.vocab_size}"
        )
    files = weight_files(folder)
    tied = not any("lm_head.weight" in names(file) for file in files)
    config = replace(config, tied_embeddings=tied)
    with torch.device("meta"):
        model = nn.ModuleDict({"decoder": Decoder(config)})
        if not tied:
            model["text_head"] = nn.Linear(config.dim, config.vocab_size, bias=False)

    def place(name: str, tensor: Tensor) -> Places:
        if name.endswith("rotary_emb.inv_freq"):
            return {}
        if name == "lm_head.weight":
            return {"text_head.weight": tensor}
        return {f"decoder.{name.removeprefix('model.')}": tensor}

    fill({"": model}, files, place, {"": dtype})
    state = model.state_dict()
    for name in ("decoder.embed_tokens.weight", "text_head.weight"):
        if name in state:
            old = state[name][:words]
            new = old.float().mean(0).to(old.dtype).expand(rows - words, -1)
            state[name] = torch.cat([old, new])
    return replace(config, vocab_size=rows), state


def load_vision(folder: Path, dtype: torch.dtype) -> VisionEncoder:
    """The encoder of a SigLIP folder: vision alone, or the pair whose text half is left out."""
    data = read_json(folder / "config.json")
    kind = data.get("model_type")
    if kind == "siglip2":
        raise ValueError(
            f"{folder / 'config.json'}: this SigLIP2 sees pictures of any size (NaFlex); take one "
            "of a fixed resolution, such as google/siglip2-base-patch16-256"
        )
    if kind not in ("siglip", "siglip_vision_model"):
        raise ValueError(f"{folder / 'config.json'}: {kind!r} is no SigLIP")
    c = {**SIGLIP, **data.get("vision_config", data)}
    config = VisionConfig(
        dim=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        activation=c["hidden_act"],
        norm_eps=c["layer_norm_eps"],
    )
    with torch.device("meta"):
        encoder = VisionEncoder(config)

    def place(name: str, tensor: Tensor) -> Places:
        name = name.removeprefix("vision_model.")
        other = name.startswith(("text_model.", "logit_", "head.")) or name.endswith("position_ids")
        return {} if other else {f"model.{name}": tensor}

    fill({"": encoder}, weight_files(folder), place, {"": dtype})
    return encoder


def load_image_tokenizer(source: str | Path) -> ImageTokenizer:
    """From a folder of unimm's, of a Janus or an Emu3 in either layout, or a file of LlamaGen's."""
    path = locate(source)
    if path.is_file():
        return load_llamagen(path)
    if (path / "image_tokenizer.json").exists():
        return ImageTokenizer.load(path)
    kind = read_json(path / "config.json").get("model_type")
    if kind in ("emu3", "Emu3", "Emu3VisionVQ"):
        path = emu3.vision_folder(path) if kind == "Emu3" else path
        with torch.device("meta"):
            network = Emu3Tokenizer(emu3.network_config(path))
        own = emu3.from_hugging_face if kind == "emu3" else emu3.from_original
        return filled(network, weight_files(path), own)
    if kind not in ("janus", "multi_modality"):
        raise ValueError(f"{path / 'config.json'}: {kind!r} has no image tokenizer that is known")
    config, made, data = janus_configs(path)
    _, tokenizer = on_meta(config, made, path)
    deepseek = data["model_type"] == "multi_modality"
    place = janus.from_deepseek if deepseek else janus.from_hugging_face
    return filled(tokenizer, weight_files(path), place)


def load_llamagen(path: Path) -> VQTokenizer:
    """`vq_ds16_t2i.pt` and its kind (arXiv 2406.06525): the names of Janus's network, bare."""
    prefix = "gen_vision_model."
    shapes = {name: tuple(tensor.shape) for name, tensor in read(path)}
    try:
        config = llamagen_config(shapes)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no VQ network in LlamaGen's layout: {error}") from None
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    return filled(tokenizer, [path], lambda name, t: janus.from_deepseek(prefix + name, t))


def llamagen_config(shapes: dict[str, tuple[int, ...]], grid: int = 16) -> VQConfig:
    """The sizes of a network from its shapes, for pictures of `grid` x `grid` codes."""
    stages = 0
    while f"encoder.conv_blocks.{stages}.res.0.conv1.weight" in shapes:
        stages += 1
    blocks = 0
    while f"encoder.conv_blocks.0.res.{blocks}.conv1.weight" in shapes:
        blocks += 1
    base = shapes["encoder.conv_in.weight"][0]
    widths = [shapes[f"encoder.conv_blocks.{i}.res.0.conv1.weight"][0] for i in range(stages)]
    size, dim = shapes["quantize.embedding.weight"]
    return VQConfig(
        image_size=grid * 2 ** (stages - 1),
        codebook_size=size,
        code_dim=dim,
        z_channels=shapes["encoder.conv_out.weight"][0],
        base_channels=base,
        multipliers=tuple(width // base for width in widths),
        res_blocks=blocks,
    )


def filled(tokenizer: Any, files: list[Path], place: Any) -> Any:
    """The image tokenizer with its part of the files' tensors, in float32."""

    def own(name: str, tensor: Tensor) -> Places:
        found = place(name, tensor)
        return {n: t for n, t in found.items() if n.startswith("image_tokenizer.")}

    fill({"image_tokenizer": tokenizer}, files, own, {"image_tokenizer": torch.float32})
    return tokenizer.eval()
