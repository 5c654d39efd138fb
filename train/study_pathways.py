"""Three ways to draw, like for like: decoupled (Janus), shared (Emu3) and a diffusion decoder.

unimm compare train/study_pathways.py --out runs/pathways        # 3 seeds of each, 32 px

Started once a core, with OMP_NUM_THREADS=1, the processes share the work.

One text decoder, one image tokenizer, one data mixture and one budget of training FLOPs. The
diffusion variant learns to understand with half of the budget and to draw with the other, its
language model frozen; its flow ends in the vectors of the codes that the others choose from. Image
tokenizer and encoder are one for all, and in no budget; all other weights begin anew with each
seed. The result is table.md, table.csv, curves.png and samples.png; stopped, it goes on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from unimm.checkpoints.assemble import assemble
from unimm.config import Run, Source, load_recipe
from unimm.data.sources import scenes_captions, scenes_pictures, scenes_questions, scenes_text
from unimm.data.stores import PictureStore
from unimm.evaluation.compare import Study, scenes_samples, scenes_scores
from unimm.model.decoder import DecoderConfig
from unimm.model.unified import UnifiedConfig
from unimm.model.vision import VisionConfig
from unimm.training.flow_matching import flow_matching, pictures, setup_diffusion
from unimm.training.next_token import next_token, scored_weight
from unimm.training.trainer import train

HERE = Path(__file__).parent
WORLD, PIXELS = "scenes-mini", 32
PIECES: dict[str, Any] = {"store": 8_000, "image_tokenizer": 4_000, "siglip": 200, "words": 20_000}
SEEDS = 3
FLOPS = 6e13  # of training, for each run, the optimizer's included
PROTOCOL = {
    "world": WORLD,
    "n": 300,
    "seed": 1000,
    "guidance": 2.0,
    "temperature": 1.0,
    "diffusion_guidance": 2.0,
    "diffusion_steps": 20,
}
DECODER = DecoderConfig(
    vocab_size=0,  # set by `assemble`, as is the number of codes
    dim=192,
    layers=4,
    heads=3,
    kv_heads=3,
    head_dim=64,
    hidden=512,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    max_positions=512,
    qk_norm=True,
)


def study(shared: Path) -> Study:
    """The study, with its pieces made in `shared` where they are not there yet."""
    store = make_pieces(shared)
    sources = {
        "captions": Source(scenes_captions, weight=1, options={"store": store}),
        "questions": Source(scenes_questions, weight=1, options={"store": store}),
        "text": Source(scenes_text, weight=1, options={"world": WORLD}),
        "pictures": Source(scenes_pictures, weight=3, options={"store": store}),
    }
    base = Run(
        init=str(shared / "decoupled-{seed}"),
        step=next_token,
        count=scored_weight,
        train=((r"vision\..*", None), (r".*", 2e-3)),
        optimizer="muon",
        compile=True,
        data=sources,
        steps=1,  # set by the budget
        batch_size=64,
        packing=256,  # slots a row, so that little is padding
        warmup=20,
        schedule="cosine",
        preview_every=0,
    )
    understanding = {name: source for name, source in sources.items() if name != "pictures"}
    draws = {
        "share": 0.5,
        "setup": setup_diffusion,
        "step": flow_matching,
        "count": pictures,
        "train": ((r"decoder\..*", 2e-3), (r".*", None)),
        "compile": False,
        "packing": 0,
        "data": {"pictures": sources["pictures"]},
        "options": {"autoencoder": "codes", "patch": 1, "dim": 192, "layers": 6, "heads": 6},
    }
    return Study(
        base=base,
        variants={
            "decoupled": [{}],
            "shared": [{"init": str(shared / "shared-{seed}"), "train": ((r".*", 2e-3),)}],
            "diffusion": [{"share": 0.5, "data": understanding}, draws],
        },
        budget={"flops": FLOPS},
        seeds=SEEDS,
        protocol=PROTOCOL,
        evaluate=scenes_scores,
        draw=scenes_samples,
    )


def make_pieces(shared: Path) -> str:
    """Tokenizers, pictures, encoder and the models to begin with; returns the store."""
    store = shared / "pictures"
    made_of = json.dumps([WORLD, PIXELS, PIECES, dataclasses.asdict(DECODER), SEEDS])
    if (shared / "made_of.json").exists():
        if (shared / "made_of.json").read_text() != made_of:
            raise ValueError(f"{shared} holds pieces of another study: choose another --out")
        return str(store)
    whole = load_recipe(HERE / "scenes.py")
    text = load_recipe(HERE.parent / "tokenizers/train_text.py")
    words = text.main(str(shared / "text"), lines=PIECES["words"], world=WORLD)
    drawn = PictureStore.build(store, WORLD, PIECES["store"])
    vision = VisionConfig(dim=64, layers=2, heads=1, hidden=128, image_size=PIXELS, patch_size=8)

    def run(name: str, recipe: str, **options: Any) -> Path:
        made: Run = load_recipe(HERE / recipe).config
        (source,) = made.data
        place = {source: dataclasses.replace(made.data[source], options={"store": str(store)})}
        return train(
            dataclasses.replace(
                made,
                out=str(shared / name),
                data=place,
                steps=PIECES[name],
                batch_size=32 if name == "image_tokenizer" else 128,
                options={**made.options, **options},
            )
        )

    codebook = run("image_tokenizer", "../tokenizers/train_image.py", image_size=PIXELS)
    eyes = run("siglip", "siglip.py", text_tokenizer=words, vision=dataclasses.asdict(vision))
    drawn.add_codes(whole.encoder(codebook))
    for pathway in ("decoupled", "shared"):
        sees = pathway == "decoupled"
        config = UnifiedConfig(
            decoder=DECODER,
            vision=vision if sees else None,
            connector="mlp",
            codebook_size=0,
            code_dim=8,
            image_head_dim=DECODER.dim,
            pathway=pathway,
        )
        weights = eyes / "vision.safetensors" if sees else None
        for seed in range(SEEDS):
            begin, how = shared / f"{pathway}-{seed}", {"world": WORLD}
            assemble(begin, config, words, codebook, weights, PIXELS, how, seed)
    (shared / "made_of.json").write_text(made_of)
    return str(store)
