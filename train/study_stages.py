"""In how many stages? Three (Janus), one with everything trainable (Molmo), or a frozen decoder.

unimm compare train/study_stages.py --out runs/stages        # 3 seeds of each, 32 px, on 2 cores

All begin with one SigLIP encoder and one decoder that knows text alone, see the same mixture in
the stage that is longest, and have one budget of training FLOPs.
"""

import dataclasses
from pathlib import Path

from unimm.config import Run, Source, load_recipe
from unimm.data.sources import scenes_captions, scenes_pictures, scenes_questions, scenes_text
from unimm.evaluation.compare import Study, scenes_samples, scenes_scores
from unimm.training.next_token import next_token, scored_weight
from unimm.training.trainer import train

HERE = Path(__file__).parent
PATHWAYS = load_recipe(HERE / "study_pathways.py")
STAGE0_STEPS = 300
BRIDGE = r"connector\..*|code_(embed|adapter)\..*|image_head\..*"  # between decoder and pictures


def study(shared: Path) -> Study:
    """The study, with its pieces made in `shared` where they are not there yet."""
    store = PATHWAYS.make_pieces(shared)
    text = Source(scenes_text, weight=1, options={"world": PATHWAYS.WORLD})
    sources = {
        "captions": Source(scenes_captions, weight=1, options={"store": store}),
        "questions": Source(scenes_questions, weight=1, options={"store": store}),
        "text": text,
        "pictures": Source(scenes_pictures, weight=3, options={"store": store}),
    }
    base = Run(
        init="",
        step=next_token,
        count=scored_weight,
        train=((r".*", 2e-3),),
        optimizer="muon",
        compile=True,
        data=sources,
        steps=1,  # set by the budget
        batch_size=64,
        packing=256,
        warmup=20,
        schedule="cosine",
        preview_every=0,
    )
    begin = train(
        dataclasses.replace(
            base,
            init=str(shared / "decoupled-0"),
            out=str(shared / "stage0"),
            data={"text": text},
            steps=STAGE0_STEPS,
        )
    )
    drawn = {name: sources[name] for name in ("captions", "pictures")}
    return Study(
        base=dataclasses.replace(base, init=str(begin)),
        variants={
            "three_stages": [
                {"share": 0.1, "train": ((BRIDGE, 2e-3), (r".*", None)), "data": drawn},
                {
                    "share": 0.6,
                    "train": ((r"vision\..*", None), (r".*", 2e-3)),
                    "schedule": "constant",
                },
                {"share": 0.3, "train": ((r".*", 2e-3),), "warmup": 0},
            ],
            "one_stage": [{}],
            "frozen_decoder": [{"train": ((BRIDGE, 2e-3), (r".*", None))}],
        },
        budget={"flops": PATHWAYS.FLOPS},
        seeds=3,
        protocol=PATHWAYS.PROTOCOL,
        evaluate=scenes_scores,
        draw=scenes_samples,
    )
