"""The whole way: from nothing to a model that sees and draws Scenes, by one command.

unimm train train/scenes.py size=small out=runs/scenes      # 64 px; 66 minutes on 2 cores
unimm train train/scenes.py size=quick out=runs/quick       # 32 px, a few minutes: does it work?
unimm train train/scenes.py size=base out=runs/base         # 128 px, for one GPU: not trained yet
torchrun --nproc-per-node 2 -m unimm.cli train train/scenes.py ...    # a core a process: faster

Text tokenizer, pictures, image tokenizer, SigLIP encoder, codes, then stages 0 to 3. Each piece is
made once; stopped at any moment, the same command goes on where it was. The result is OUT/model.
Costs and figures by piece: train/README.md.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from accelerate import PartialState

from unimm.checkpoints.assemble import assemble
from unimm.checkpoints.native import load_model, save_model
from unimm.config import Run, load_recipe
from unimm.data.scenes import WORLDS, prompt, sample_scene
from unimm.data.stores import PictureStore
from unimm.model.decoder import DecoderConfig
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import UnifiedConfig
from unimm.model.vision import VisionConfig
from unimm.training.trainer import train

HERE = Path(__file__).parent

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(
        world="scenes",
        compile=True,
        pictures=60_000,
        edits=24_000,
        decoder=dict(dim=320, layers=8, heads=5, kv_heads=5, head_dim=64, hidden=896),
        vision=dict(dim=192, layers=6, heads=3, hidden=512, patch_size=8),
        steps=dict(
            image_tokenizer=1_600, siglip=160, stage0=100, stage1=40, stage2=330, stage3=170
        ),
        batch=dict(image_tokenizer=32, siglip=256, stage0=64, stage1=128, stage2=128, stage3=128),
    ),
    "base": dict(
        world="scenes-128",
        compile=True,
        pictures=100_000,
        edits=24_000,
        decoder=dict(dim=448, layers=10, heads=7, kv_heads=7, head_dim=64, hidden=1216),
        vision=dict(dim=256, layers=6, heads=4, hidden=704, patch_size=16),
        steps=dict(
            image_tokenizer=6_000, siglip=1_500, stage0=500, stage1=200, stage2=4_000, stage3=1_500
        ),
        batch=dict(image_tokenizer=64, siglip=512, stage0=128, stage1=256, stage2=256, stage3=256),
    ),
    "quick": dict(
        world="scenes-mini",
        compile=False,
        pictures=3_000,
        edits=1_000,
        decoder=dict(dim=128, layers=3, heads=2, kv_heads=2, head_dim=64, hidden=256),
        vision=dict(dim=64, layers=2, heads=1, hidden=128, patch_size=8),
        steps=dict(image_tokenizer=200, siglip=60, stage0=40, stage1=40, stage2=150, stage3=60),
        batch=dict(image_tokenizer=32, siglip=64, stage0=32, stage1=32, stage2=32, stage3=32),
    ),
}  # fmt: skip


def main(size: str = "small", out: str = "runs/scenes", seed: int = 0, steps: float = 1.0) -> str:
    """Make everything that is not there yet; `steps` scales the number of steps of all pieces."""
    if size not in SIZES:
        raise ValueError(f"size is one of {', '.join(SIZES)}, not {size!r}")
    plan, root = SIZES[size], Path(out)
    world = WORLDS[plan["world"]]
    pixels = world.image_size
    store, edits = root / "pictures", root / "edits"

    def run(name: str, recipe: str, **changes: Any) -> Path:
        """The recipe's run with this size's numbers, into OUT/name."""
        config: Run = load_recipe(HERE / recipe).config
        options = {**config.options, **changes.pop("options", {})}
        count = max(2, round(plan["steps"][name] * steps))
        return train(
            dataclasses.replace(
                config,
                out=str(root / name),
                data=_placed(config.data, store, edits, world.name),
                steps=count,
                warmup=min(config.warmup, count // 8),
                batch_size=plan["batch"][name],
                seed=crc32(f"{seed} {name}".encode()),  # each piece sees a stream of its own
                options=options,
                **changes,
            )
        )

    text = load_recipe(HERE.parent / "tokenizers/train_text.py")
    first = PartialState(cpu=not torch.cuda.is_available()).main_process_first  # of several ranks
    with first():
        words = text.main(str(root / "text"), lines=20_000, world=world.name, seed=seed)
        pictures = PictureStore.build(store, world.name, plan["pictures"], seed)
        changed = PictureStore.build(edits, world.name, plan["edits"], seed, edited=True)
    vision = VisionConfig(image_size=pixels, **plan["vision"])
    codebook = run(
        "image_tokenizer",
        "../tokenizers/train_image.py",
        options={"image_size": pixels, "rate": 0.015},  # of near equals the usual code
    )
    seeing = run(
        "siglip",
        "siglip.py",
        options={"text_tokenizer": words, "vision": dataclasses.asdict(vision)},
        compile=plan["compile"],
    )
    decoder = DecoderConfig(
        vocab_size=0,  # set by `assemble`, as is the number of codes
        rope_theta=10_000.0,
        norm_eps=1e-6,
        max_positions=768 if pixels <= 64 else 1_536,  # an edit in a chat
        qk_norm=True,
        **plan["decoder"],
    )
    config = UnifiedConfig(
        decoder=decoder,
        vision=vision,
        connector="mlp",
        codebook_size=0,
        code_dim=8,
        image_head_dim=decoder.dim,
    )
    defaults = {"guidance": 2.0, "edit_guidance": 1.0, "edit_temperature": 0.0, "plain": True}
    sampling = {**defaults, "world": world.name}
    pieces = root / "pieces"
    with first():
        encode = encoder(codebook)
        pictures.add_codes(encode)
        changed.add_codes(encode)
        if not (pieces / "config.json").exists():
            eyes = seeing / "vision.safetensors"
            assemble(pieces, config, words, codebook, eyes, pixels, sampling, seed)
    drawn = {"options": {"prompts": preview_prompts(world.name, 32)}, "compile": plan["compile"]}
    stage0 = run("stage0", "stage0_text.py", init=str(pieces), compile=plan["compile"])
    stage1 = run("stage1", "stage1_align.py", init=str(stage0), **drawn)
    stage2 = run("stage2", "stage2_pretrain.py", init=str(stage1), **drawn)
    stage3 = run("stage3", "stage3_sft.py", init=str(stage2), **drawn)
    with first():
        if not (root / "model" / "config.json").exists():
            save_model(root / "model", *load_model(stage3), dtype=torch.bfloat16)
    return str(root / "model")


def encoder(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 pictures (n, H, W, 3) -> codes (n, k) by the image tokenizer in `folder`."""
    device = PartialState().device
    tokenizer = ImageTokenizer.load(folder).to(device)

    @torch.inference_mode()
    def encode(pictures: np.ndarray) -> np.ndarray:
        pixels = torch.tensor(pictures, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return tokenizer.encode(pixels).cpu().numpy()

    return encode


def preview_prompts(world: str, count: int) -> list[str]:
    """Prompts of the train split, always the same."""
    generators = [np.random.default_rng((99, k)) for k in range(count)]
    return [prompt(sample_scene(WORLDS[world], rng), rng) for rng in generators]


def _placed(data: dict[str, Any], store: Path, edits: Path, world: str) -> dict[str, Any]:
    """The sources of a recipe with this run's folders and world."""
    places = {"runs/store": str(store), "runs/edits": str(edits), "scenes": world}
    return {
        name: dataclasses.replace(
            source, options={key: places.get(v, v) for key, v in source.options.items()}
        )
        for name, source in data.items()
    }
