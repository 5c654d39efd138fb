"""Pictures and edits of Scenes with a model's codes, for what goes on from its weights.

unimm train train/stores.py model=scenes
unimm train train/longer.py init=scenes out=runs/longer

Three picture stores of the train split, OUT/store, OUT/edits and OUT/additions. What is there
already is not made again but for codes of another image tokenizer; new pictures need another seed
and folder.
"""

from pathlib import Path

from unimm.checkpoints.native import BUNDLED, load_model
from unimm.data.codes import encoder
from unimm.data.stores import PictureStore, sample_addition


def main(
    model: str = "scenes",
    out: str = "runs",
    world: str = "scenes",
    pictures: int = 100_000,
    edits: int = 40_000,
    additions: int = 20_000,
    seed: int = 1,
) -> str:
    """Make what is not there yet; returns what to print."""
    encode = encoder(load_model(BUNDLED if model == "scenes" else Path(model))[1])
    for name, count, edited, change in (
        ("store", pictures, False, None),
        ("edits", 2 * edits, True, None),
        ("additions", 2 * additions, True, sample_addition),
    ):
        store = PictureStore.build(Path(out) / name, world, count, seed, edited, change)
        store.add_codes(encode)
    return f"{pictures} pictures in {out}/store, {edits} edits and {additions} additions beside it"
