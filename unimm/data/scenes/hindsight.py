"""What a wrong picture shows, said in the way of the prompt that it was drawn for.

A picture that misses its prompt is a right one for another: goals relabelled in hindsight
(Andrychowicz et al., 2017, arXiv 1707.01495). The two prompts of one picture are then a contrast in
which everything but the mistake is equal.
"""

from dataclasses import replace
from itertools import permutations

from .drawing import SHAPES
from .language import NUMBERS, Group, enumerate_words, phrase
from .meaning import Spec, satisfies
from .world import RELATIONS, WORLDS, Object, Scene, relation_holds


def plain(spec: Spec) -> str:
    """The meaning in plain words, which `parse` understands.

    Raises ValueError where groups are more than two and related.
    """
    said = [phrase(group) for group in spec.groups]
    body = enumerate_words(said)
    if spec.relations:
        if len(said) != 2 or len(spec.relations) != 1:
            raise ValueError(f"no plain words for {len(spec.relations)} relations of {said}")
        ((i, relation, j),) = spec.relations
        body = f"{said[i]} {relation} {said[j]}"
    return f"{body} on a {spec.background} background" if spec.background else body


def nearest(spec: Spec, scene: Scene) -> Spec | None:
    """The meaning nearest to `spec` that the scene satisfies, saying as much: of each group the
    same attributes, a relation where `spec` has one. `spec` itself, if that is satisfied.
    Groups that have become equal are one.

    None where nothing like it is true: something unknown in the scene, objects too many or too few
    (except of a single group, whose number then changes), a group that fell apart.
    """
    if satisfies(scene, spec):
        return spec
    objects, groups = scene.objects, spec.groups
    if any(o.shape not in SHAPES for o in objects):
        return None
    if len(groups) == 1 and 0 < len(objects) < len(NUMBERS):
        groups = ((len(objects), *groups[0][1:]),)
    slots = [i for i, group in enumerate(groups) for _ in range(group[0])]
    if len(slots) != len(objects) or len(slots) > WORLDS["scenes"].max_objects:
        return None
    found: list[tuple[int, Spec]] = []
    for order in sorted(set(permutations(slots))):
        members: list[list[Object]] = [[] for _ in groups]
        for o, i in zip(objects, order, strict=True):
            members[i].append(o)
        said = tuple(_said(group, mine[0]) for group, mine in zip(groups, members, strict=True))
        related = tuple((i, _relation(r, members[i], members[j]), j) for i, r, j in spec.relations)
        other = Spec(said, related, spec.background and scene.background)
        if satisfies(scene, other) and not (related and len(set(said)) < len(said)):
            alike = sum(
                a == b
                for pair in zip(groups, said, strict=True)
                for a, b in zip(*pair, strict=True)
            )
            found.append(
                (alike + (related == spec.relations), replace(other, groups=_merged(said)))
            )
    return max(found, key=lambda scored: scored[0])[1] if found else None


def _merged(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups of one look as one: "a star and a star" is "two stars"."""
    counts: dict[tuple, int] = {}
    for count, *look in groups:
        counts[tuple(look)] = counts.get(tuple(look), 0) + count
    return tuple((count, *look) for look, count in counts.items())


def _said(group: Group, o: Object) -> Group:
    """What the group says of its objects, with one object's values."""
    count, size, color, _ = group
    return count, size and o.size, color and o.color, o.shape


def _relation(wanted: str, mine: list[Object], others: list[Object]) -> str:
    """The relation itself, or the first that holds in its place; itself where none does."""
    for relation in (wanted, *RELATIONS):
        if all(relation_holds(a, relation, b) for a in mine for b in others):
            return relation
    return wanted
