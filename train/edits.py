"""A push: the model learns to say what an instruction means, and to change that and no more.

unimm train train/stores.py model=scenes
unimm preferences pairs.jsonl --judge checker --scenes 5000 --answers 4 --guidance 1 \\
    --right own.jsonl
unimm train train/locate.py data.own.options.path=own.jsonl
unimm train train/edits.py init=runs/locate data.own.options.path=own.jsonl

An edit is drawn in two steps: "make the circle blue" becomes, in words, "make the small red circle
(5,3) a small blue circle", and what is around that place is drawn (`UniMM.edits`). locate.py brings
the words, this the pictures: four in ten samples are edits, of which only the codes that are drawn
are learned (where all are, one that changes counts three times); the rest is a little of
everything, so that nothing is forgotten. own.jsonl are prompts with pictures that the model itself
has drawn for them, rightly: rendered ones in their place undo what preferences have taught. Half an
hour on two cores without AMX. What was seen: train/README.md.
"""

import dataclasses
from pathlib import Path

from unimm.config import Source, load_recipe
from unimm.data.readers import messages
from unimm.data.sources import scenes_located

longer = load_recipe(Path(__file__).with_name("longer.py")).config
WEIGHTS = {
    "edits": 9.0,
    "located": 4.0,
    "captions": 1.0,
    "mixed": 1.0,
    "questions": 1.5,
    "chats": 0.8,
    "relations": 0.5,
    "unknown": 0.3,
}
# Grounds are easily changed and often so; a shape that becomes another is the hardest.
KINDS = {
    "background": 0.3,
    "recolor": 1.2,
    "resize": 1.2,
    "remove": 1.2,
    "reshape": 1.5,
    "add": 2.0,
}
mixed = {**longer.data["captions"].options, "only": "mixed"}
sources = {
    **longer.data,
    "mixed": dataclasses.replace(longer.data["captions"], options=mixed),
    "located": Source(scenes_located, options={"store": "runs/store"}),
}


def options(name: str) -> dict:
    """Those of `longer.py` without rivals, which would double what a sample costs."""
    plain = {k: v for k, v in sources[name].options.items() if k != "rivals"}
    return {**plain, "kinds": KINDS, "located_share": 0.9} if name == "edits" else plain


data = {
    name: dataclasses.replace(sources[name], weight=weight, options=options(name))
    for name, weight in WEIGHTS.items()
}
config = dataclasses.replace(
    longer,
    out="runs/edits_push",
    train=((r"vision\..*", 3e-4), (r".*", 1e-3)),
    data={**data, "own": Source(messages, weight=4.5, options={"path": "own.jsonl"})},
    steps=320,
    batch_size=64,
    warmup=3,
    options={**longer.options, "changes": 3.0, "sampling": {"edit_located": True}},
)
