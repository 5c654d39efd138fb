"""Questions that no scene answers, so that a model learns to say what it does not know.

A tenth of the things spoken of is held out: no training text has them.
"""

import hashlib
from functools import cache

import numpy as np

from .language import pick, with_article

UNKNOWN_ANSWER = "i only know simple scenes"

_THINGS = tuple(
    (
        "dog cat bird horse fish cow sheep lion tiger bear rabbit mouse snake elephant monkey "
        "duck car bus train bicycle boat airplane truck road bridge house tower castle city "
        "village man woman child boy girl person teacher doctor king queen friend crowd player "
        "singer tree flower forest river lake sea beach mountain island cloud sky sun rain snow "
        "storm table chair bed lamp window door kitchen cup bottle plate knife spoon book pen "
        "phone computer screen keyboard camera clock watch hat shoe shirt dress coat bag "
        "umbrella ball apple banana juice bread cheese pizza cake egg potato tomato soup coffee "
        "tea guitar piano drum song movie game letter word sentence number year month country "
        "planet rocket robot ghost dragon fire stone gold silver glass wood paper money market"
    ).split()
)
_QUESTIONS = (
    "is there {a} in the picture?",
    "is there {a}?",
    "where is the {it}?",
    "what color is the {it}?",
    "how many {it}s are there?",
    "what is the {it} doing?",
    "who is the {it}?",
    "how old is the {it}?",
    "why is the {it} so big?",
    "what is {a}?",
    "tell me about the {it}",
    "can you write a story about {a}?",
    "what do you think of the {it}?",
    "how much does {a} cost?",
    "do you like the {it}?",
    "what is the best {it} in the world?",
    "who made the {it}?",
    "translate {it} into french",
    "what is the name of the {it}?",
    "when was the {it} built?",
    "is the {it} left of the {other}?",
    "which is older, the {it} or the {other}?",
    "what comes after the {it}?",
    "how do i get to the {it}?",
    "does {a} eat {other}s?",
    "describe the {it}",
)


def held_out_thing(thing: str) -> bool:
    """Whether no training text may speak of it."""
    return hashlib.sha256(f"unimm unknown {thing}".encode()).digest()[0] < 26


def unknown_question(rng: np.random.Generator, split: str = "train") -> tuple[str, str]:
    """A question about what is in no scene, and the answer to it.

    split: "train", or "held_out" for a question about a thing that no training text has.
    """
    things = _things(split)
    it, other = pick(things, rng), pick(things, rng)
    words = pick(_QUESTIONS, rng).format(it=it, a=with_article(it), other=other)
    return words, UNKNOWN_ANSWER


@cache
def _things(split: str) -> tuple[str, ...]:
    return tuple(t for t in _THINGS if held_out_thing(t) == (split != "train"))
