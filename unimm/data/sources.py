"""The Scenes world as training data: conversations made from the pictures of a store.

Each source is a function `make(run, store=..., ...)` whose result's `[i]` is a pure function of i.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unimm.data.places import LAYOUT, LOOK, WHERE, around, plain_ground
from unimm.data.processor import BOTH, MARKED, Message, assistant, user
from unimm.data.scenes import (
    EDITS,
    WORLDS,
    Scene,
    World,
    absent_questions,
    describe,
    edit_holds,
    edit_kind,
    edits,
    express,
    fits,
    is_held_out,
    laid_out,
    located,
    main_relation,
    open_questions,
    parse,
    prompt,
    render,
    sample_placed,
    sample_scene,
    satisfies,
    text_dialogue,
    unknown_question,
    upright,
    yes_no_pairs,
)
from unimm.data.scenes.language import pick
from unimm.data.stores import VALIDATION, PictureStore, coded_store

ASK_CAPTION = (
    "describe the picture",
    "what is in the picture?",
    "what do you see?",
    "caption this",
)
OFF = ((0, 0), (0, 0), (0, 0), (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # columns, rows
EXCHANGES = ("places", "colors", "colors")  # ways to say something false of a scene, as often
FALSE = (*EXCHANGES, "places", "same", "unlike", "shape", "color", "size", "number")
OF_SOME = {  # what is said falsely where a source has some of a store's pictures alone
    "": FALSE,
    "single": ("size", "size", "shape", "color"),
    "pairs": (*EXCHANGES, "same"),
    "related": EXCHANGES,
    "alike": ("unlike",),
    "equal": ("number",),
    "mixed": FALSE,
}


@dataclass
class Made:
    """A source made of a function (rng, i) -> item, with a generator that depends on i alone."""

    make: Callable[[np.random.Generator, int], Any]
    key: tuple[int, ...]

    def __getitem__(self, i: int) -> Any:
        return self.make(np.random.default_rng((*self.key, i)), i)


def _talk(*messages: Message) -> dict[str, Any]:
    return {"messages": list(messages)}


def _about(
    image: dict[str, Any], turns: list[tuple[str, str]], looked: Scene | None = None
) -> dict[str, Any]:
    """Questions and answers about a picture, which the first question shows; `looked`: what is
    there, to be said before all else."""
    turns = [(LOOK, laid_out(looked)), *turns] if looked else turns
    messages = [message for q, a in turns for message in (user(q), assistant(a))]
    return _talk(user(image, turns[0][0]), *messages[1:])


def _sometimes(scene: Scene, share: float, rng: np.random.Generator) -> Scene | None:
    """The scene, that often."""
    return scene if share and rng.random() < share else None


def scenes_pictures(
    run: Any,
    store: str,
    only: str = "",
    rivals: bool = False,
    world: str = "scenes",
    codes: str = "",
) -> Made:
    """Text -> picture; `codes`: a file of codes in place of the store's own.

    Objects are named in the order in which codes begin to draw them. `only`: some of the pictures
    (`PictureStore.chosen`), with plain prompts about what drawing learns last: sizes, which colour
    goes with which shape, places, numbers. `rivals`: each with the same picture behind a false
    prompt, as "false_messages" (see `training.contrast`).
    """
    pictures = coded_store(run, store, codes)
    chosen = pictures.chosen(only)

    def say(scene: Scene, rng: np.random.Generator) -> str:
        if not only:
            return prompt(scene, rng, ordered=True)
        background, related, partly = (bool(rng.random() < share) for share in (0.2, 0.4, 0.35))
        color = 0.5 if partly else 1.0
        return express(
            scene,
            rng,
            size=only == "single" and not partly,
            color=color,
            background=background,
            relation=related or only == "related",
            ordered=True,
        )

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(chosen[rng.integers(len(chosen))])
        scene, picture = pictures.scene(k), assistant(pictures.image(k))
        key = int(rng.integers(2**32))  # true and false prompt are worded in the same way
        talk = _talk(user(say(scene, np.random.default_rng(key))), picture)
        for _ in range(4 if rivals else 0):  # a change may be one that the prompt says nothing of
            false = falsified(scene, WORLDS[world], rng, OF_SOME[only])
            other = say(false, np.random.default_rng(key))
            spec = parse(other)
            if spec is not None and not satisfies(scene, spec):
                talk["false_messages"] = [user(other), picture]
                break
        return talk

    return Made(make, (run.seed, 1, *map(ord, only)))


def falsified(
    scene: Scene, world: World, rng: np.random.Generator, kinds: tuple[str, ...] = FALSE
) -> Scene:
    """The scene with two objects or colours exchanged, or one object changed, more or less.

    Only for what is said of it (objects may overlap); of the train split. The scene itself, where
    nothing of these kinds was found.
    """
    for _ in range(30):
        objects = list(scene.objects)
        a, b = rng.integers(len(objects), size=2).tolist()
        kind = pick(kinds, rng)
        if kind == "places":
            one, other = objects[a], objects[b]
            objects[a] = replace(one, shape=other.shape, color=other.color, size=other.size)
            objects[b] = replace(other, shape=one.shape, color=one.color, size=one.size)
        elif kind == "colors":
            colors = objects[a].color, objects[b].color
            objects[b] = replace(objects[b], color=colors[0])
            objects[a] = replace(objects[a], color=colors[1])
        elif kind == "same":
            objects[a] = replace(objects[a], shape=objects[b].shape)
        elif kind == "unlike":  # what two have in common is said of one alone
            if a != b and objects[a].shape == objects[b].shape:
                objects[a] = replace(objects[a], shape=pick(world.shapes, rng))
            elif a != b and objects[a].color == objects[b].color:
                objects[a] = replace(objects[a], color=pick(tuple(world.colors), rng))
        elif kind == "size":
            objects[a] = replace(
                objects[a], size="large" if objects[a].size == "small" else "small"
            )
        elif kind == "shape":
            objects[a] = replace(objects[a], shape=pick(world.shapes, rng))
        elif kind == "color":
            objects[a] = replace(objects[a], color=pick(tuple(world.colors), rng))
        elif len(objects) > 1 and rng.random() < 0.5:
            del objects[a]
        elif len(objects) < world.max_objects:
            objects.append(objects[a])
        changed = replace(scene, objects=tuple(objects))
        if changed != scene and is_held_out(changed) is None:
            return changed
    return scene


def scenes_captions(run: Any, store: str, only: str = "", looked: float = 0.0) -> Made:
    """Picture, or some of them (`only`, see `PictureStore.chosen`) -> the complete caption.

    `looked`, here and below: how often it is first said what is where (`UniMM.ask_all`).
    """
    pictures = PictureStore(store)
    chosen = pictures.chosen(only)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(chosen[rng.integers(len(chosen))])
        ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
        scene, image = pictures.scene(k), pictures.image(k, codes=False)
        return _about(image, [(ask, describe(scene))], _sometimes(scene, looked, rng))

    return Made(make, (run.seed, 2, *map(ord, only)))


def scenes_questions(
    run: Any,
    store: str,
    most: int = 4,
    only: str = "",
    types: tuple[str, ...] = (),
    absent: float = 0.0,
    looked: float = 0.0,
) -> Made:
    """Picture and question -> answer; up to `most` turns about one picture.

    `only`: some of the pictures (`PictureStore.chosen`). `types`: only such questions (of
    QUESTION_TYPES), where a picture has any. `absent`: in how many conversations two questions
    are about what is not there.
    """
    pictures = PictureStore(store)
    chosen = pictures.chosen(only)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(chosen[rng.integers(len(chosen))])
        scene, image = pictures.scene(k), pictures.image(k, codes=False)
        turns = some_questions(scene, rng, most, types)
        if absent and rng.random() < absent:
            turns += two_in_vain(scene, rng)
            turns = [turns[k] for k in rng.permutation(len(turns))]
        return _about(image, turns, _sometimes(scene, looked, rng))

    return Made(make, (run.seed, 3, *map(ord, only)))


def two_in_vain(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two questions about what is not there, and what is said to them."""
    vain = absent_questions(scene, rng)
    return [(vain[k].text, vain[k].answer) for k in rng.permutation(len(vain))[:2]]


def scenes_several(run: Any, store: str, looked: float = 0.0) -> Made:
    """Two pictures in one conversation: questions about the one, then about the other, and then
    about both."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        messages, scenes = [], []
        look = looked > 0 and rng.random() < looked
        for k in rng.integers(len(pictures), size=2).tolist():
            scene = pictures.scene(k)
            scenes.append(scene)
            asks = (ASK_CAPTION[rng.integers(len(ASK_CAPTION))], describe(scene))
            turns = [asks] if rng.random() < 0.3 else some_questions(scene, rng, 3)
            image = pictures.image(k, codes=False)
            messages += _about(image, turns, scene if look else None)["messages"]
        for question, answer in about_both(scenes, rng):
            messages += [user(question), assistant(answer)]
        return _talk(*messages)

    return Made(make, (run.seed, 12))


def about_both(scenes: list[Scene], rng: np.random.Generator) -> list[tuple[str, str]]:
    """One or two questions about two pictures, the first and the second."""
    counts = [len(scene.objects) for scene in scenes]
    which = ("the first picture", "the second picture")
    more = "both have as many" if counts[0] == counts[1] else which[int(counts[1] > counts[0])]
    k = int(rng.integers(2))
    inside = some_questions(scenes[k], rng, 1)[0]
    asked = [
        (f"what is in {which[k]}?", describe(scenes[k])),
        (f"in {which[k]}, {inside[0]}", inside[1]),
        (pick(("which picture has more objects?", "where are there more objects?"), rng), more),
    ]
    return [asked[n] for n in rng.permutation(len(asked))[: rng.integers(1, 3)]]


def scenes_unknown(run: Any, store: str, looked: float = 0.0) -> Made:
    """Questions that no scene answers, alone, or about a picture beside questions that it does."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        if rng.random() < 0.3:
            question, answer = unknown_question(rng)
            return _talk(user(question), assistant(answer))
        k = int(rng.integers(len(pictures)))
        scene, image = pictures.scene(k), pictures.image(k, codes=False)
        turns = [unknown_question(rng), *some_questions(scene, rng, 3)]
        turns = [turns[t] for t in rng.permutation(len(turns))]
        return _about(image, turns, _sometimes(scene, looked, rng))

    return Made(make, (run.seed, 9))


def scenes_text(run: Any, world: str = "scenes") -> Made:
    """Text alone: questions about described scenes, and descriptions said again."""

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        scene = sample_scene(WORLDS[world], rng)
        if rng.random() < 0.3:
            return _talk(user("say it again: " + retold(scene, rng)), assistant(describe(scene)))
        turns = text_dialogue(scene, rng)[:4]
        return _talk(*(m for q, a in turns for m in (user(q), assistant(a))))

    return Made(make, (run.seed, 4))


def scenes_said(
    run: Any, most: int = 8, types: tuple[str, ...] = (), world: str = "scenes"
) -> Made:
    """What is where (`laid_out`), in words alone; then the caption and up to `most` questions, in
    some talks two about what is not there, and one that no scene answers (`UniMM.ask_all`)."""

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        count = int(rng.choice(5, p=(0.1, 0.3, 0.2, 0.2, 0.2))) + 1
        scene = sample_scene(WORLDS[world], rng, count=min(count, WORLDS[world].max_objects))
        ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
        turns = [(ask, describe(scene)), *some_questions(scene, rng, most, types)]
        if rng.random() < 0.25:
            turns += two_in_vain(scene, rng)
        if rng.random() < 0.15:
            turns.append(unknown_question(rng))
        turns = [turns[k] for k in rng.permutation(len(turns))]
        turns[0] = (f"{laid_out(scene)}. {turns[0][0]}", turns[0][1])
        return _talk(*(m for q, a in turns for m in (user(q), assistant(a))))

    return Made(make, (run.seed, 14, len(types)))


def retold(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in other words that hold all of `describe`; where none can, in its own."""
    objects = scene.objects
    plain = len(objects) == 2 and main_relation(*objects) is not None and objects[0] != objects[1]
    if len(objects) == 1 or (plain and describe(scene).count(" and ") == 0):
        one = len(objects) == 1
        return express(
            scene, rng, size=one, color=True, background=True, relation=True, opening=False
        )
    return describe(scene)


def scenes_edits(
    run: Any,
    store: str,
    rivals: float = 0.0,
    kinds: dict[str, float] | None = None,
    located_share: float = 0.0,
    world: str = "scenes",
) -> Made:
    """Instruction and picture -> the changed picture.

    The instruction comes first, so that a code of the picture knows what is to become of it, and
    each code of the answer is at one distance from its own in the picture. `rivals`: the share that
    also has "false_messages", the same pictures with the instruction most like the true one of some
    that would not have changed the one into the other. `kinds`: how often an edit of each kind
    (`EDITS`) comes, times its share of the store; 1 where nothing is said. `located_share`: of how
    many the instruction is the one that `scenes_located` teaches; what is not around its place is
    then kept, and every other place is off by one, as a model may be.
    """
    pictures = coded_store(run, store)
    count = len(pictures.instructions)
    if wrong := set(kinds or {}) - {*EDITS}:
        raise ValueError(f"no edits of kind {', '.join(sorted(wrong))}: only {', '.join(EDITS)}")
    up_to = None
    if kinds:
        both = ((pictures.scene(2 * k), pictures.scene(2 * k + 1)) for k in range(count))
        chance = np.array([float(kinds.get(edit_kind(*pair), 1.0)) for pair in both])
        if not (chance >= 0).all() or not 0 < chance.sum() < np.inf:
            raise ValueError(f"kinds are weights of 0 or more, and not all 0, not {kinds}")
        up_to = np.cumsum(chance)

    side = math.isqrt(pictures.codes.shape[1])
    grid = (side, side)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        if up_to is None:
            k = int(rng.integers(count))
        else:
            k = int(np.searchsorted(up_to, rng.random() * up_to[-1], side="right"))
        before, after = {**pictures.image(2 * k), "view": BOTH}, pictures.image(2 * k + 1)
        words = pictures.instructions[k]
        if rng.random() < located_share:
            off = OFF[rng.integers(len(OFF))]
            words = located(pictures.scene(2 * k), pictures.scene(2 * k + 1), off)
            redrawn = around(words, grid)
            if redrawn is not None:
                codes = np.where(redrawn, after["codes"], before["codes"])
                before |= {"redrawn": redrawn, "view": MARKED}
                after = {"codes": codes, "redrawn": redrawn}
        talk = _talk(user(words, before), assistant(after))
        if rng.random() < rivals:
            old, new = pictures.scene(2 * k), pictures.scene(2 * k + 1)
            others = [edits(WORLDS[world], old, rng) for _ in range(8)]
            false = [said for said, made in others if not edit_holds(old, new, made)]
            if false:
                alike = max(false, key=lambda said: len({*said.split()} & {*words.split()}))
                talk["false_messages"] = [user(alike, before), assistant(after)]
        return talk

    return Made(make, (run.seed, 5))


def scenes_located(
    run: Any,
    store: str,
    most: int = 4,
    added: float = 0.0,
    looked: float = 0.0,
    world: str = "scenes",
) -> Made:
    """A picture, and one to `most` instructions to be said precisely (`scenes.located`).

    `added`: how often it is an addition alone, and as "false_messages" the same in a place without
    room for it (see `training.contrast`).
    """
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = pictures.pick(rng, i)
        scene, image = pictures.scene(k), pictures.image(k, codes=False)
        seen = _sometimes(scene, looked, rng)
        if added and rng.random() < added:
            return addition(scene, image, seen, rng)
        made = [edits(WORLDS[world], scene, rng) for _ in range(rng.integers(1, most + 1))]
        made = [(words, with_room(scene, after, WORLDS[world], rng)) for words, after in made]
        turns = [(WHERE + words, located(scene, after)) for words, after in made]
        return _about(image, turns, seen)

    def addition(
        scene: Scene, image: Any, seen: Scene | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        made = (edits(WORLDS[world], scene, rng) for _ in range(40))
        found = (pair for pair in made if edit_kind(scene, pair[1]) == "add")
        words, after = next(found, edits(WORLDS[world], scene, rng))  # some have no room at all
        after, false = with_room(scene, after, WORLDS[world], rng), None
        if edit_kind(scene, after) == "add" and fits(
            WORLDS[world], after.objects[-1], scene.objects
        ):
            false = crowded(after, len(scene.objects), WORLDS[world], rng)
        talk = _about(image, [(WHERE + words, located(scene, after))], seen)
        if false:
            talk["false_messages"] = [*talk["messages"][:-1], assistant(located(scene, false))]
        return talk

    return Made(make, (run.seed, 11))


def crowded(scene: Scene, k: int, world: World, rng: np.random.Generator) -> Scene | None:
    """The scene with object k in the middle of a place that has no room for it, if one is found."""
    before, after = scene.objects[:k], scene.objects[k + 1 :]
    for x, y in rng.random((20, 2)).tolist():
        moved = upright(replace(scene.objects[k], x=x, y=y))
        tight = replace(scene, objects=(*before, moved, *after))
        if not fits(world, moved, (*before, *after)) and not is_held_out(tight):
            return tight
    return None


def with_room(before: Scene, after: Scene, world: World, rng: np.random.Generator) -> Scene:
    """The scene after an edit, with what it adds upright in a place that has room for it."""
    if len(after.objects) <= len(before.objects):
        return after
    new, tries = after.objects[-1], rng.random((20, 2))
    found = [upright(replace(new, x=float(x), y=float(y))) for x, y in tries]
    o = next((o for o in found if fits(world, o, before.objects)), upright(new))
    return replace(after, objects=(*before.objects, o))


def scenes_layouts(
    run: Any,
    least: int = 0,
    related: bool = False,
    rivals: float = 0.0,
    world: str = "scenes",
) -> Made:
    """A prompt, and what is to be where so that it comes true (`scenes.laid_out`): words alone.

    `least`: so many objects or more, each number as often; 0 for a natural mix. `related`: two
    objects with their relation told, and as "false_messages" the same layout of a prompt with the
    opposite one (see `training.contrast`). `rivals`: the share that has there the same prompt, and
    the layout with one object where there is no room for it.
    """

    def say(scene: Scene, rng: np.random.Generator) -> str:
        if not related:
            return prompt(scene, rng)
        size, background, partly = (bool(rng.random() < share) for share in (0.3, 0.3, 0.3))
        color = 0.5 if partly else 1.0
        return express(scene, rng, size=size, color=color, background=background, relation=True)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        task = "position" if related else None
        count = int(rng.integers(least, WORLDS[world].max_objects + 1)) if least else None
        scene = sample_placed(world, rng, task=task, count=count)
        key = int(rng.integers(2**32))  # true and false prompt are worded in the same way
        words = say(scene, np.random.default_rng(key))
        spec = parse(words)
        assert spec is not None, words
        layout = assistant(laid_out(scene, spec))
        talk = _talk(user(LAYOUT + words), layout)
        if related:
            a, b = scene.objects
            moved = (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))
            false = replace(scene, objects=moved)
            other = say(false, np.random.default_rng(key))
            untrue = parse(other)
            if untrue and not satisfies(scene, untrue) and not is_held_out(false):
                talk["false_messages"] = [user(LAYOUT + other), layout]
        elif rivals and rng.random() < rivals:
            k = int(rng.integers(len(scene.objects)))
            tight = crowded(scene, k, WORLDS[world], rng)
            if tight and satisfies(tight, spec):
                talk["false_messages"] = [user(LAYOUT + words), assistant(laid_out(tight, spec))]
        return talk

    return Made(make, (run.seed, 12, least, related))


def scenes_grounds(run: Any, world: str = "scenes") -> Made:
    """Pictures of nothing but a background, to begin a picture of many things with."""
    grounds = {name: render(Scene((), name), world) for name in WORLDS[world].backgrounds}

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        name = pick(tuple(grounds), rng)
        return _talk(user(plain_ground(name)), assistant({"image": grounds[name]}))

    return Made(make, (run.seed, 13))


def scenes_chats(run: Any, store: str, looked: float = 0.0) -> Made:
    """Draw it, answer about it, change it, in one conversation."""
    pictures = coded_store(run, store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        k = int(rng.integers(len(pictures.instructions)))
        scene = pictures.scene(2 * k)
        messages = [user(prompt(scene, rng, ordered=True)), assistant(pictures.image(2 * k))]
        if _sometimes(scene, looked, rng):
            messages += [user(LOOK), assistant(laid_out(scene))]
        if rng.random() < 0.3:
            ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
            messages += [user(ask), assistant(describe(scene))]
        else:
            for question, answer in some_questions(scene, rng, 2):
                messages += [user(question), assistant(answer)]
        messages += [user(pictures.instructions[k]), assistant(pictures.image(2 * k + 1))]
        return _talk(*messages)

    return Made(make, (run.seed, 6))


def scenes_pairs(run: Any, store: str, variants: int = 1, world: str = "scenes") -> Made:
    """For contrastive training: {"pixels": uint8 (H, W, 3), "text": the complete caption}.

    Of `variants` items in a row the first is a picture of the store, and each other one the same
    but for the shape of one object: negatives that only somebody who sees shapes can tell apart.
    """
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> dict[str, Any]:
        first, variant = divmod(i % VALIDATION, variants)
        base = np.random.default_rng((run.seed, 71, first))
        k = pictures.pick(base, i)
        scene, pixels = pictures.scene(k), np.asarray(pictures.pictures[k])
        if variant:
            scene = reshaped(scene, WORLDS[world], rng)
            pixels = render(scene, world)
        return {"pixels": pixels, "text": describe(scene)}

    return Made(make, (run.seed, 7))


def reshaped(scene: Scene, world: World, rng: np.random.Generator) -> Scene:
    """The scene with another shape in the place of one object; still of the train split."""
    while True:
        k = int(rng.integers(len(scene.objects)))
        shape = world.shapes[rng.integers(len(world.shapes))]
        objects = list(scene.objects)
        objects[k] = replace(objects[k], shape=shape)
        changed = replace(scene, objects=tuple(objects))
        if changed != scene and is_held_out(changed) is None:
            return changed


def scenes_pictures_only(run: Any, store: str) -> Made:
    """For the image tokenizer: uint8 (H, W, 3)."""
    pictures = PictureStore(store)

    def make(rng: np.random.Generator, i: int) -> np.ndarray:
        return np.asarray(pictures.pictures[pictures.pick(rng, i)])

    return Made(make, (run.seed, 8))


def some_questions(
    scene: Scene, rng: np.random.Generator, most: int, types: tuple[str, ...] = ()
) -> list[tuple[str, str]]:
    """One to `most` questions and answers about a scene, of yes/no and open form.

    All types (or `types` alone) are equally likely; of a scene's own most are counts and colours.
    """
    by_type: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for q in yes_no_pairs(scene, rng) + open_questions(scene, rng):
        by_type.setdefault((q.type, q.yes_no), []).append((q.text, q.answer))
    wanted = [pool for (name, _), pool in by_type.items() if name in types]
    pools, chosen = wanted or list(by_type.values()), []
    for _ in range(int(rng.integers(1, most + 1))):
        if pools:
            pool = pools[int(rng.integers(len(pools)))]
            chosen.append(pool.pop(int(rng.integers(len(pool)))))
            pools = [pool for pool in pools if pool]
    return chosen
