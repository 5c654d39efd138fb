"""Image tokenizers by what they rebuild and by what a decoder then draws with their codes.

unimm compare train/study_tokenizers.py --out runs/tokenizers        # 3 seeds of each, 32 px

VQ, FSQ and SimVQ with (nearly) the same number of codes, and VQ behind a diffusion de-tokenizer,
on one budget of training FLOPs that tokenizer and decoder share: what the de-tokenizer takes, the
two others of its variant lack. The decoder only draws.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from unimm.checkpoints.assemble import assemble
from unimm.config import Run, Source, load_recipe
from unimm.data.sources import Made, scenes_pictures, scenes_pictures_only
from unimm.data.stores import PictureStore
from unimm.evaluation.compare import Study, scenes_samples, scenes_scores
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import UnifiedConfig
from unimm.training.flow_matching import flow_matching, pictures, setup_detokenizer
from unimm.training.next_token import next_token, scored_weight, setup_unified
from unimm.training.trainer import Parts

HERE = Path(__file__).parent
PATHWAYS = load_recipe(HERE / "study_pathways.py")
WORLD, PIXELS = PATHWAYS.WORLD, PATHWAYS.PIXELS
STORE, WORDS = 8_000, 20_000
FLOPS = 1.2e14  # of training, for each run: some 20 to 25 minutes of a core
QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {"quantizer": "vq"},
    "fsq": {"quantizer": "fsq", "levels": (8, 5, 5, 5), "code_dim": 4, "codebook_size": 1000},
    "simvq": {"quantizer": "simvq"},
}


def study(shared: Path) -> Study:
    """The study, with its pictures and its text tokenizer in `shared`."""
    store = shared / "pictures"
    PictureStore.build(store, WORLD, STORE)
    load_recipe(HERE.parent / "tokenizers/train_text.py").main(
        str(shared / "text"), lines=WORDS, world=WORLD
    )
    place = {"store": str(store)}
    tokenizer: Run = load_recipe(HERE.parent / "tokenizers/train_image.py").config
    options = {**tokenizer.options, "image_size": PIXELS}
    base = replace(
        tokenizer,
        data={"pictures": Source(scenes_pictures_only, options=place)},
        steps=1,  # set by the budget
        preview_every=0,
        options=options,
    )
    draws = {
        "setup": setup_drawing,
        "step": next_token,
        "count": scored_weight,
        "train": ((r".*", 2e-3),),
        "optimizer": "muon",
        "compile": True,
        "batch_size": 64,
        "packing": 256,
        "data": {"pictures": Source(drawn, options=place)},
        "schedule": "cosine",
        "options": {"words": str(shared / "text")},
    }
    rebuilds = {
        "setup": setup_detokenizer,
        "step": flow_matching,
        "count": pictures,
        "train": ((r"decoder\..*", 2e-3), (r".*", None)),
        "optimizer": "muon",
        "schedule": "cosine",
        "options": {"dim": 192, "layers": 6, "heads": 6, "patch": 8},
    }
    return Study(
        base=base,
        variants={
            **{
                name: [
                    {"share": 0.4, "options": {**options, **quantizer}},
                    {"share": 0.6, **draws},
                ]
                for name, quantizer in QUANTIZERS.items()
            },
            "vq_diffusion": [{"share": 0.3}, {"share": 0.2, **rebuilds}, {"share": 0.5, **draws}],
        },
        budget={"flops": FLOPS},
        seeds=3,
        protocol=PATHWAYS.PROTOCOL,
        evaluate=scenes_scores,
        draw=scenes_samples,
    )


def drawn(run: Run, store: str) -> Made:
    """Source: text -> picture in the codes of the tokenizer in `run.init`, which are made once."""
    codes = Path(run.init) / "codes.npy"
    encode = load_recipe(HERE / "scenes.py").encoder(Path(run.init))
    PictureStore(store, codes).add_codes(encode)
    return scenes_pictures(run, store, world=WORLD, codes=str(codes))


def setup_drawing(run: Run) -> Parts:
    """A new decoder that only draws, around the image tokenizer in `run.init`."""
    config = UnifiedConfig(
        decoder=PATHWAYS.DECODER,
        vision=None,
        connector="mlp",
        codebook_size=0,  # set by `assemble`
        code_dim=ImageTokenizer.load(run.init).code_vectors().shape[1],  # all begin as the codes
        image_head_dim=PATHWAYS.DECODER.dim,
    )
    begin = Path(run.init) / "begin"
    words = Path(run.options["words"]) / "tokenizer.json"
    assemble(begin, config, words, run.init, None, PIXELS, {"world": WORLD}, run.seed)
    parts = setup_unified(replace(run, init=str(begin)))
    save: Any = parts.save

    def save_all(folder: Path) -> None:
        save(folder)
        for path in Path(run.init).glob("diffusion_codes.*"):
            shutil.copy(path, folder)

    return replace(parts, save=save_all)
