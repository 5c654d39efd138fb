"""Pictures and edits of Scenes with a model's codes, for what goes on from its weights.

unimm train train/stores.py model=scenes
unimm train train/longer.py init=scenes out=runs/longer

Two picture stores of the train split, OUT/store and OUT/edits. What is there already is not made
again but for codes of another image tokenizer; new pictures need another seed and folder.
"""

from pathlib import Path

from unimm.checkpoints.native import BUNDLED, load_model
from unimm.data.codes import encoder
from unimm.data.sources import PictureStore


def main(
    model: str = "scenes",
    out: str = "runs",
    world: str = "scenes",
    pictures: int = 100_000,
    edits: int = 40_000,
    seed: int = 1,
) -> str:
    """Make what is not there yet; returns what to print."""
    encode = encoder(load_model(BUNDLED if model == "scenes" else Path(model))[1])
    for name, count in (("store", pictures), ("edits", 2 * edits)):
        store = PictureStore.build(Path(out) / name, world, count, seed, edited=name == "edits")
        store.add_codes(encode)
    return f"{pictures} pictures in {out}/store, {edits} edits in {out}/edits"
