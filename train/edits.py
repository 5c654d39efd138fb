"""A push: the model learns what an instruction changes in a picture, and to leave all else alone.

unimm train train/stores.py model=scenes
unimm preferences pairs.jsonl --judge checker --scenes 5000 --answers 4 --guidance 1 \\
    --right own.jsonl
unimm train train/edits.py data.own.options.path=own.jsonl out=runs/edits_push

More than half of all slots are edits, in which a code that changes counts three times one that
stays; the rest is a little of everything, so that nothing is forgotten. own.jsonl are prompts with
pictures that the model itself has drawn for them, rightly: rendered ones in their place undo what
preferences have taught. An hour on two cores without AMX. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.readers import messages

longer = load_recipe(Path(__file__).with_name("longer.py")).config
WEIGHTS = {
    "edits": 7.5,
    "captions": 1.5,
    "mixed": 1.5,
    "questions": 1.5,
    "chats": 0.8,
    "relations": 0.8,
    "unknown": 0.3,
}
# Grounds are easily changed and often so; a shape that becomes another is the hardest.
KINDS = {"background": 0.3, "recolor": 1.2, "remove": 1.3, "reshape": 1.5, "add": 3.0}
mixed = {**longer.data["captions"].options, "only": "mixed"}
sources = {**longer.data, "mixed": dataclasses.replace(longer.data["captions"], options=mixed)}


def options(name: str) -> dict:
    """Those of `longer.py` without rivals, which would double what a sample costs."""
    plain = {k: v for k, v in sources[name].options.items() if k != "rivals"}
    return {**plain, "kinds": KINDS} if name == "edits" else plain


data = {
    name: dataclasses.replace(sources[name], weight=weight, options=options(name))
    for name, weight in WEIGHTS.items()
}
config = dataclasses.replace(
    longer,
    out="runs/edits_push",
    train=((r"vision\..*", 3e-4), (r".*", 1e-3)),
    data={**data, "own": Source(messages, weight=6.0, options={"path": "own.jsonl"})},
    steps=440,
    batch_size=96,
    warmup=10,
    options={**longer.options, "changes": 3.0},
)
