"""What a prompt or caption means, and whether a scene is what it says.

A sentence not understood to its last word means nothing (None): no score rests on a guess.
"""

import re
from dataclasses import dataclass

from .language import NUMBERS, RELATION_PHRASES, Group, describe, plural
from .world import RELATIONS, WORLDS, Object, Scene, relation_holds

_WORLD = WORLDS["scenes"]


@dataclass(frozen=True)
class Spec:
    """Groups (count, size | None, colour | None, shape), relations (i, relation, j) between groups
    by their index, and the background (None: not said)."""

    groups: tuple[Group, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


_SYNONYMS = {
    "disc": "circle",
    "disk": "circle",
    "crescent": "moon",
    "plus": "cross",
    "rhombus": "diamond",
    "lightning bolt": "bolt",
}
_SHAPES = {s: s for s in _WORLD.shapes} | {plural(s): s for s in _WORLD.shapes}
_SHAPES |= _SYNONYMS | {plural(s): shape for s, shape in _SYNONYMS.items()}
_COLORS = {c: c for c in _WORLD.colors} | {"violet": "purple", "turquoise": "cyan"}
_GROUNDS = {b: b for b in _WORLD.backgrounds} | {"grey": "gray", "cream": "beige"}
_SIZES = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
_COUNTS = {w: i for i, w in enumerate(NUMBERS)} | {str(i): i for i in range(6)}
_COUNTS |= {"a": 1, "an": 1, "single": 1, "pair": 2}
_JOINING = {
    "and",
    "with",
    "also",
    "next",
    "to",
    "beside",
    ",",
    "is",
    "are",
    "there",
    "it",
    "of",
    "in",
    "please",
}
_OPENING = set(
    "please draw paint show me can could you i want would like give make create generate picture "
    "image photo drawing painting scene this shows contains has".split()
)

VOCABULARY = {*_SHAPES, *_COLORS, *_GROUNDS, *_SIZES, *_COUNTS, *_JOINING, *_OPENING}
VOCABULARY |= {
    word for said in RELATION_PHRASES.values() for words in said for word in words.split()
}

_ground = "|".join(_GROUNDS)
_BACKGROUND = re.compile(
    rf"(?:,? ?(?:and )?the background is (?:plain )?({_ground})\b"
    r"|,? ?\b(?:(?:on|against|with|over|in) )?(?:an? |the )?"
    rf"(?:plain )?({_ground}) background\b ?,?"
    rf"|,? ?\b(?:on|against) (?:plain )?({_ground})(?= ?$))"
)
_RELATION = {
    relation: re.compile(r"\b(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")\b")
    for relation, words in RELATION_PHRASES.items()
}


def parse(text: str) -> Spec | None:
    """The meaning of a prompt or caption, or None if any of it is not understood.

    Understands what `describe`, `prompt` and `task_prompt` say and natural variants: articles,
    plurals, digits, synonyms, "the star" for a star named before.
    """
    text = re.sub(r"[.,;:!?]+", " , ", text.lower().replace("lightning bolt", "bolt"))
    text = re.sub(r"\s+", " ", text).strip(" ,\"'")
    background, found = None, _BACKGROUND.findall(text)
    if found:
        named = {_GROUNDS[word] for words in found for word in words if word}
        if len(named) > 1:
            return None
        (background,) = named
        text = _BACKGROUND.sub(" , ", text)
    for relation, pattern in _RELATION.items():
        text = pattern.sub(f" {relation.split()[0].upper()} ", text)
    found_groups = _groups(text.split())
    return None if found_groups is None else Spec(*found_groups, background)


_MARKS = {r.split()[0].upper(): r for r in RELATIONS}


def _groups(words: list[str]) -> tuple[tuple[Group, ...], tuple[tuple[int, str, int], ...]] | None:
    """Noun phrases and the relations between them, read word by word."""
    groups: list[Group] = []
    relations: list[tuple[int, str, int]] = []
    last: int | None = None  # the noun phrase just read
    waiting: tuple[int, str] | None = None  # "a star left of ...": waits for its second half
    count: int | None = None
    size = color = None
    definite = False
    for word in words:
        if word in _SHAPES:
            if definite:
                index = _mentioned(groups, count, size, color, _SHAPES[word])
                count = count or 1
            else:
                index = None
            if count is None or count == 0:
                return None
            if index is None:
                index = len(groups)
                groups.append((count, size, color, _SHAPES[word]))
            if waiting:
                relations.append((*waiting, index))
            last, waiting, count, size, color, definite = index, None, None, None, None, False
        elif word in _SIZES and size is None:
            size = _SIZES[word]
        elif word in _COLORS and color is None:
            color = _COLORS[word]
        elif size or color:
            return None  # an adjective without a noun
        elif word in _COUNTS:
            count = _COUNTS[word]
        elif word == "the":
            definite = True
        elif word in _MARKS and last is not None and waiting is None:
            waiting = (last, _MARKS[word])
        elif word in _OPENING and not groups:
            count, definite = None, False
        elif word not in _JOINING:
            return None
    if not groups or waiting or size or color or count is not None or definite:
        return None
    return tuple(groups), tuple(relations)


def _mentioned(
    groups: list[Group], count: int | None, size: str | None, color: str | None, shape: str
) -> int | None:
    """The one group that "the (small) (red) star" can refer to, if there is one."""
    said = (count, size, color, shape)
    fits = [
        i for i, g in enumerate(groups) if all(s in (None, v) for s, v in zip(said, g, strict=True))
    ]
    return fits[0] if len(fits) == 1 else None


def not_there(text: str, scene: Scene) -> str | None:
    """The first thing that a text speaks of as there ("remove the large star") and that is not in
    the scene: "large star". None where all are."""
    size, color, shape = ("|".join(words) for words in (_SIZES, _COLORS, _SHAPES))
    for said in re.findall(rf"\bthe (?:({size}) )?(?:({color}) )?({shape})\b", text.lower()):
        wanted = [
            known.get(word) for known, word in zip((_SIZES, _COLORS, _SHAPES), said, strict=True)
        ]
        looks = ((o.size, o.color, o.shape) for o in scene.objects)
        if not any(
            all(w in (None, v) for w, v in zip(wanted, look, strict=True)) for look in looks
        ):
            return " ".join(word for word in said if word)
    return None


# ---------------------------------------------------------------------------- judging


def satisfies(scene: Scene, spec: Spec) -> bool:
    """Whether the scene is exactly what was said: every group with exactly its count of objects, no
    object left over, every stated attribute right and every stated relation true."""
    return assigned(scene, spec) is not None


def assigned(scene: Scene, spec: Spec) -> list[list[Object]] | None:
    """The objects of each group, in the order of the scene; None where it is not what was said."""
    if spec.background not in (None, scene.background):
        return None
    slots = [i for i, group in enumerate(spec.groups) for _ in range(group[0])]
    if len(slots) != len(scene.objects):
        return None
    found = _assign(scene.objects, spec, slots, {})
    return None if found is None else [found.get(i, []) for i in range(len(spec.groups))]


def _assign(
    objects: tuple[Object, ...], spec: Spec, slots: list[int], members: dict[int, list[Object]]
) -> dict[int, list[Object]] | None:
    """The members with every object in a free slot that it fits; None where that cannot be."""
    if not objects:
        true = all(
            relation_holds(a, relation, b)
            for i, relation, j in spec.relations
            for a in members[i]
            for b in members[j]
        )
        return members if true else None
    o, rest = objects[0], objects[1:]
    for i in set(slots):
        _, size, color, shape = spec.groups[i]
        if shape != o.shape or size not in (None, o.size) or color not in (None, o.color):
            continue
        left = slots.copy()
        left.remove(i)
        found = _assign(rest, spec, left, members | {i: [*members.get(i, []), o]})
        if found is not None:
            return found
    return None


def complete(spec: Spec, scene: Scene) -> bool:
    """Whether the scene is what was said and nothing is missing that `describe` would say: every
    colour, the background, the relation of two objects, the size of a single one."""
    want = parse(describe(scene)) if satisfies(scene, spec) else None
    if want is None:
        return False
    return (
        all(color for _, _, color, _ in spec.groups)
        and spec.background is not None
        and bool(spec.relations) >= bool(want.relations)
        and (len(scene.objects) > 1 or spec.groups[0][1] is not None)
    )
