"""Preferences: several answers of the model to a prompt, a judge, the best against the worst.

Two files: CANDIDATES holds all answers with the codes that were drawn (a picture that is encoded
again would have others); from it and a judge come the preferences that `train/dpo.py` reads.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from unimm.data.codes import encoder
from unimm.data.places import around
from unimm.data.processor import BOTH, MARKED, Message, assistant, user
from unimm.data.scenes import (
    TASKS,
    UNKNOWN,
    WORLDS,
    Scene,
    Spec,
    edit_holds,
    from_array,
    get_world,
    is_held_out,
    located,
    look,
    mend,
    misdirected,
    nearest,
    parse,
    plain,
    prompt,
    render,
    repaint,
    sample_scene,
    satisfies,
    task_prompt,
    to_array,
)
from unimm.data.stores import sample_addition, sample_edit
from unimm.inference.engine import Request
from unimm.inference.judging import agreement
from unimm.inference.sampling import Settings
from unimm.model.unified import CODE
from unimm.pipeline import UniMM, checked_text

Row = dict[str, Any]
Judge = Callable[[UniMM, list[Row]], list[list[float]]]  # rows of candidates -> a score an answer
PROMPTS_AT_ONCE = 8
MENDED = 3  # pixels around a change that its codes see


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn. answer: "image", or "text" for words. of: a name of the model, that
    one model's answers are not taken for another's."""

    answers: int = 8
    guidance: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    answer: str = "image"
    of: str = ""

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise ValueError("to prefer one answer to another takes 2 or more of them")
        if self.answer not in ("image", "text"):
            raise ValueError(f"an answer is 'image' or 'text', not {self.answer!r}")


def scenes_prompts(count: int, world: str, seed: int = 0) -> list[str]:
    """`count` different prompts about scenes of the train split: half of them free, half as those
    of GenEval's tasks in turn."""
    found: dict[str, None] = {}
    for k in range(100 * count):
        if len(found) == count:
            break
        rng = np.random.default_rng((seed, 31, k))
        task = TASKS[k // 2 % len(TASKS)] if k % 2 else None
        scene = sample_scene(WORLDS[world], rng, task=task)
        found.setdefault(task_prompt(scene, task, rng) if task else prompt(scene, rng))
    return list(found)


def scenes_edits(model: UniMM, count: int, world: str, seed: int = 0) -> list[Row]:
    """`count` instructions to edit scenes of the train split, as rows for `sample_candidates`.

    The prompt shows the picture as its codes, and is located where `UniMM.edit` draws by such ones.
    For a model that draws thing by thing every other one is such an addition (`sample_addition`).
    The first of the answers to come is not the model's ("given" is 1) but the rendered one, from
    which what is drawn differs by little but mistakes.
    "scenes" are those before and after, as `to_array` has them, for the judge.
    """
    rows = []
    for k in range(count):
        added = k % 2 and model.sampling.get("layout_from")
        change = sample_addition if added else sample_edit
        before, words, after = change(world, np.random.default_rng((seed, 32, k)))
        words = located(before, after) if model.sampling.get("edit_located") else words
        old, new = (model.processor.codes(render(s, world)).tolist() for s in (before, after))
        shown: Message = {"codes": old, "view": BOTH}
        made: Message = {"codes": new}
        if (redrawn := around(words, model.processor.grid)) is not None:
            shown |= {"redrawn": redrawn.tolist(), "view": MARKED}
            made = {"codes": np.where(redrawn, new, old).tolist(), "redrawn": redrawn.tolist()}
        row: Row = {"prompt": [user(words, shown)]}
        row |= {"answers": [[assistant(made)]], "given": 1}
        rows.append({**row, "scenes": [to_array(s).tolist() for s in (before, after)]})
    return rows


def sample_candidates(
    model: UniMM, prompts: Iterable[str | list[Message] | Row], path: Path, how: Sampling
) -> list[Row]:
    """Answers to every prompt, a line of `path` each; what is there already is not drawn again.

    A prompt is a text, messages that end with the user's, or a row with them as its "prompt" (what
    else is in it is kept, and answers that it has come first). Prompts and answers that come twice
    are kept once. Returns the rows {"id", "prompt", "answers": [[message], …]} in order.
    """
    wanted: dict[str, Row] = {}
    for given in prompts:
        talk = [user(checked_text(given, "prompt"))] if isinstance(given, str) else given
        row = talk if isinstance(talk, dict) else {"prompt": talk}
        wanted.setdefault(name_of(row["prompt"], how), row)
    if not wanted:
        raise ValueError("there is no prompt to sample answers for")
    begun = path.exists() and b"\n" in path.read_bytes()  # one whole line at least
    there = {row["id"]: row for row in read_candidates(path)} if begun else {}
    write_lines(path, there.values())  # without a line that a stopped run left unfinished
    missing = [name for name in wanted if name not in there]
    with path.open("a", encoding="utf-8") as file:
        for k in tqdm(range(0, len(missing), PROMPTS_AT_ONCE), desc="sampling", disable=None):
            names = missing[k : k + PROMPTS_AT_ONCE]
            for row in sample(model, {n: wanted[n] for n in names}, how):
                there[row["id"]] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
    return [there[name] for name in wanted]


def sample(model: UniMM, rows: dict[str, Row], how: Sampling) -> Iterator[Row]:
    """Answers to prompts by their names: {"id", "prompt", "answers", …}, equal answers once."""
    settings = Settings(how.guidance, how.temperature, text_temperature=how.temperature)
    requests = [
        Request(model.processor.encode(r["prompt"], how.answer), how.answer, seed_of(name, how) + k)
        for name, r in rows.items()
        for k in range(how.answers)
    ]
    answers = iter(zip(model.engine.run(requests, settings), requests, strict=True))
    for name, row in rows.items():
        found = list(row.get("answers", ()))
        for _ in range(how.answers):
            answer, request = next(answers)
            kept = request.sample.kept
            drawn = {} if kept is None else {"redrawn": (kept < 0).tolist()}
            parts = [
                {"type": "image", "codes": [int(code) for code in ids], **drawn}
                if kind == CODE
                else {"type": "text", "text": model.processor.text(ids)}
                for kind, ids in answer.parts
            ]
            message = {"role": "assistant", "content": parts}
            if parts and [message] not in found:
                found.append([message])
        yield {"id": name, **row, "answers": found}


def name_of(talk: list[Message], how: Sampling) -> str:
    """A name for a prompt with its way of sampling, from what is in them."""
    text = json.dumps([talk, asdict(how)], sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def seed_of(name: str, how: Sampling) -> int:
    return (how.seed << 40) + int(name[:8], 16)


# ---------------------------------------------------------------------------- judges


def checker_judge(model: UniMM, rows: list[Row]) -> list[list[float]]:
    """1 for a picture that shows exactly what a Scenes prompt says, or that an edit of a scene was
    to make, else 0, from its pixels."""
    return [[*map(float, map(aim(row), seen(model, row)))] for row in rows]


def aim(row: Row) -> Callable[[Scene], bool]:
    """Whether a scene is what a row asks for: what its prompt says, or its edit was to make."""
    if "scenes" in row:
        before, after = (from_array(np.asarray(array, np.float32)) for array in row["scenes"])
        return lambda scene: edit_holds(before, scene, after)
    spec = meaning(row)
    return lambda scene: satisfies(scene, spec)


def meaning(row: Row) -> Spec:
    """What the prompt of a row says; ValueError if it is none of Scenes."""
    spec = parse(words := words_of(row["prompt"]))
    if spec is None:
        raise ValueError(f"the checker judges prompts of Scenes, and this is none: {words!r}")
    return spec


def seen(model: UniMM, row: Row) -> list[Scene]:
    """What the checker sees in each answer of a row."""
    return looked_at(model, tuple(tuple(codes_of(answer)) for answer in row["answers"]))


@lru_cache(maxsize=PROMPTS_AT_ONCE)  # judges, `allowed` and both kinds of pairs ask for the same
def looked_at(model: UniMM, codes: tuple[tuple[int, ...], ...]) -> list[Scene]:
    """What the checker sees in the pictures of these codes."""
    pictures = np.stack([np.asarray(p) for p in model.pictures([[*c] for c in codes])])
    scenes = look(pictures, model.sampling.get("world", "scenes"))
    assert isinstance(scenes, list)
    return scenes


def hindsight_pairs(model: UniMM, rows: list[Row], each: int = 1) -> Iterator[Row]:
    """Of the pictures of Scenes prompts: what was drawn for one prompt and shows another.

    A wrong picture is preferred behind the plain prompt that is true of it (`nearest`) to itself
    behind that which was asked; up to `each` right ones of the same prompt the other way round.
    Pictures that show something held out are left out.
    """
    for row in rows:
        if "scenes" in row:
            continue
        asked, others, right = meaning(row), [], []
        for scene, answer in zip(seen(model, row), row["answers"], strict=True):
            if shows_held_out(scene):
                continue
            if (shown := nearest(asked, scene)) == asked:
                right.append(answer)
            elif shown is not None:
                others.append(shown)
                yield relabelled(row, answer, shown, asked)
        for k, answer in enumerate(right[:each] if others else ()):
            yield relabelled(row, answer, asked, others[k % len(others)])


def mended_pairs(model: UniMM, rows: list[Row]) -> Iterator[Row]:
    """Wrong pictures of Scenes, of prompts and of edits, and the same with the one thing changed
    that was wrong (`mend`), which are preferred.

    The codes are new where a pixel within MENDED of their square has changed, of those that were
    drawn. Left out is what no one change makes right, what is not right when it has become codes,
    and what shows, before or after, something held out.
    """
    world = get_world(model.sampling.get("world", "scenes"))
    for row in rows:
        right = aim(row)
        found, before = [], []
        for scene, answer in own_pictures(model, row):
            mended = None if right(scene) else mend(scene, right, world)
            if mended:
                codes = codes_of(answer)
                pixels = np.asarray(model.pictures([codes])[0])
                better, changed = repaint(pixels, scene, *mended, world)
                new = model.processor.codes(better)
                near = squares(changed, len(codes)) & picture_of(answer).get("redrawn", True)
                found.append(tuple(np.where(near, new, codes).tolist()))
                before.append(answer)
        scenes = looked_at.__wrapped__(model, tuple(found)) if found else []  # asked for once
        for drawn, scene, answer in zip(found, scenes, before, strict=True):
            if right(scene) and not shows_held_out(scene):
                chosen = [assistant({**picture_of(answer), "codes": [*drawn]})]
                pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": answer}
                yield {**pair, "id": row["id"]}


def misdirected_pairs(model: UniMM, count: int, world: str, seed: int = 0) -> Iterator[Row]:
    """Edits of scenes of the train split, of two objects or more, rendered: preferred to the same
    done to another object, or to both. Nothing is drawn, so these cost next to nothing."""
    encode = encoder(model.processor)
    edits = (_misdirected(world, np.random.default_rng((seed, 33, k))) for k in count_from(0))
    found, made = filter(None, edits), 0
    while made < count:
        part = list(islice(found, 64))
        befores, instructions, afters, wrong = zip(*part, strict=True)
        old, new, other = (
            encode(np.stack([render(scene, world) for scene in scenes])).tolist()
            for scenes in (befores, afters, wrong)
        )
        for k, words in enumerate(instructions):
            if new[k] != other[k] and made < count:
                prompt = [user(words, {"codes": old[k], "view": BOTH})]
                a, b = ([assistant({"codes": codes[k]})] for codes in (new, other))
                yield {"prompt": prompt, "chosen": a, "rejected": b, "id": f"other-{seed}-{made}"}
                made += 1


def _misdirected(world: str, rng: np.random.Generator) -> tuple[Scene, str, Scene, Scene] | None:
    """An edit, and the scene after the same was done to another object."""
    before, words, after = sample_edit(world, rng)
    wrong = misdirected(before, after, rng)
    return None if wrong is None else (before, words, after, wrong)


def right_answers(model: UniMM, rows: list[Row], path: Path, each: int = 3) -> int:
    """Write conversations of at most `each` pictures a prompt that the model drew and that are
    right, for the checker; nothing held out. Returns how many. `readers.messages` reads them."""
    kept = []
    for row in rows:
        right = aim(row)
        good = [answer for scene, answer in own_pictures(model, row) if right(scene)]
        kept += [{"messages": [*row["prompt"], *answer]} for answer in good[:each]]
    write_lines(path, kept)
    return len(kept)


def own_pictures(model: UniMM, row: Row) -> list[tuple[Scene, list[Message]]]:
    """The answers that the model itself drew, with what they show; nothing held out."""
    both = list(zip(seen(model, row), row["answers"], strict=True))[row.get("given", 0) :]
    return [(scene, answer) for scene, answer in both if not shows_held_out(scene)]


def squares(changed: np.ndarray, codes: int) -> np.ndarray:
    """Which squares of a picture, bool (codes,), have a changed pixel in them or MENDED around."""
    side = math.isqrt(codes)
    step = len(changed) // side
    y, x = np.nonzero(changed)
    found = np.zeros((side, side), bool)
    for dy in (-MENDED, 0, MENDED):
        for dx in (-MENDED, 0, MENDED):
            rows, columns = (np.clip(v, 0, len(changed) - 1) // step for v in (y + dy, x + dx))
            found[rows, columns] = True
    return found.ravel()


def allowed(model: UniMM, row: Row) -> list[bool]:
    """Which answers may be learned from: all but pictures of Scenes with something held out."""
    of_scenes = "scenes" in row or parse(words_of(row["prompt"])) is not None
    if not of_scenes or not all(codes_of(answer) for answer in row["answers"]):
        return [True] * len(row["answers"])
    return [not shows_held_out(scene) for scene in seen(model, row)]


def shows_held_out(scene: Scene) -> bool:
    """Whether something held out is among what the checker knows in a picture."""
    known = tuple(o for o in scene.objects if o.shape != UNKNOWN)
    return is_held_out(replace(scene, objects=known)) is not None


def relabelled(row: Row, answer: list[Message], true: Spec, false: Spec) -> Row:
    """The answer behind a true prompt, preferred to itself behind a false one."""
    prompts = {"prompt": [user(plain(true))], "rejected_prompt": [user(plain(false))]}
    return {**prompts, "chosen": answer, "rejected": answer, "id": row["id"]}


def self_judge(model: UniMM, rows: list[Row]) -> list[list[float]]:
    """How well the model itself thinks that each picture fits, see `agreement`."""
    pictures, prompts = [], []
    for row in rows:
        if "scenes" in row:
            raise ValueError("the model judges pictures drawn for a text, not edits")
        pictures += model.pictures([codes_of(answer) for answer in row["answers"]])
        prompts += [words_of(row["prompt"])] * len(row["answers"])
    scores = iter(agreement(model.model, model.processor, pictures, prompts))
    return [[next(scores) for _ in row["answers"]] for row in rows]


def ratings_judge(path: Path, rows: list[Row]) -> Judge:
    """People's ratings: JSONL lines {"id": of a candidate row, "scores": [one an answer]}.

    Candidates without a rating are left out. Raises ValueError for an unknown id, or scores that
    are too many, too few or no numbers.
    """
    known = {row["id"]: len(row["answers"]) for row in rows}
    rated: dict[str, list[float]] = {}
    for line in read_lines(path):
        name, scores = str(line.get("id")), line.get("scores")
        if "chosen" in line:
            raise ValueError(f"{path} holds preferences: train/dpo.py takes it as it is")
        if name not in known:
            raise ValueError(f"{path}: there is no candidate with the id {name!r}")
        if not isinstance(scores, list) or len(scores) != known[name]:
            raise ValueError(f"{path}: {name} has {known[name]} answers, each needs a score")
        if not all(isinstance(score, int | float) for score in scores):
            raise ValueError(f"{path}: the scores of {name} are not all numbers")
        rated[name] = [float(score) for score in scores]

    def judge(model: UniMM, rows: list[Row]) -> list[list[float]]:
        return [rated.get(row["id"], []) for row in rows]

    return judge


def function_judge(function: Callable[[str, Any], float]) -> Judge:
    """Any Python function (text of the last user message, PIL image or text) -> score."""

    def score(row: Row, answer: list[Message], model: UniMM) -> float:
        found = function(words_of(row["prompt"]), shown(model, answer))
        try:
            return float(found)
        except (TypeError, ValueError):
            raise ValueError(f"the judge gives a score that is no number: {found!r}") from None

    return lambda model, rows: [[score(row, a, model) for a in row["answers"]] for row in rows]


def find_judge(name: str, rows: list[Row]) -> Judge:
    """'checker', 'self', a ratings file, or FILE.py:function."""
    if name in ("checker", "self"):
        return {"checker": checker_judge, "self": self_judge}[name]
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        from unimm.config import load_recipe

        module = load_recipe(file)
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{file} has no function {function!r}")
        return function_judge(getattr(module, function))
    if not Path(name).is_file():
        raise ValueError(
            f"a judge is 'checker', 'self', a ratings file or FILE.py:function, not {name!r}"
        )
    return ratings_judge(Path(name), rows)


def choose_pairs(
    model: UniMM,
    rows: list[Row],
    judge: Judge,
    path: Path,
    margin: float = 0.0,
    each: int = 1,
    hindsight: bool = False,
    mended: bool = False,
) -> dict[str, Any]:
    """Write the best against the worst answer of every prompt; returns counts and mean scores.

    `each`: so many pairs of a prompt at most, the second best against the second worst and so on.
    `hindsight`: the pairs of `hindsight_pairs` too; `mended`: those of `mended_pairs`. Answers of
    scores that differ by `margin` or less give no preference. Of equal scores the earlier answer
    counts as the better one, and as the worse one. Pictures of Scenes that show something held out
    are not learned from, whatever the judge. The scores are of the model's own answers.
    """
    if margin < 0:
        raise ValueError(f"the margin is 0 or more, not {margin}")
    pairs: list[Row] = []
    more: dict[str, list[Row]] = {"hindsight": [], "mended": []}
    scores = []
    for k in tqdm(range(0, len(rows), PROMPTS_AT_ONCE), desc="judging", disable=None):
        part = rows[k : k + PROMPTS_AT_ONCE]
        for row, found in zip(part, judge(model, part), strict=True):
            if hindsight:
                more["hindsight"] += hindsight_pairs(model, [row], each)
            if mended:
                more["mended"] += mended_pairs(model, [row])
            if not found:
                continue
            if not np.isfinite(found).all():
                raise ValueError(f"the judge gives a score that is no number: {found}")
            own = found[row.get("given", 0) :]
            scores.append((float(np.mean(own)), max(own)) if own else (0.0, 0.0))
            if max(found) - min(found) <= margin:  # no pair, so no need to look at the pictures
                continue
            ranked = np.argsort([-score for score in found], kind="stable")
            learned = allowed(model, row)
            order = [k for k in ranked.tolist() if learned[k]]
            other = [k for k in np.argsort(found, kind="stable").tolist() if learned[k]]
            for best, worst in zip(order[:each], other[:each], strict=True):
                if found[best] - found[worst] > margin:
                    a, b = row["answers"][best], row["answers"][worst]
                    kept = {"id": row["id"], "scores": [found[best], found[worst]]}
                    pairs.append({"prompt": row["prompt"], "chosen": a, "rejected": b, **kept})
    pairs += chain(*more.values())
    if not pairs:
        raise ValueError("the judge prefers no answer to another, so there are no preferences")
    write_lines(path, pairs)
    mean, best_mean = np.mean(scores, axis=0)
    return {
        "prompts": len(rows),
        "pairs": len(pairs),
        **{name: len(found) for name, found in more.items() if found},  # of them
        "mean_score": round(float(mean), 4),
        "best_score": round(float(best_mean), 4),
    }


def shown(model: UniMM, answer: list[Message]) -> Any:
    """An answer as a person sees it: a PIL image, or text."""
    codes = codes_of(answer)
    if codes:
        return model.pictures([codes])[0]
    return " ".join(p["text"] for m in answer for p in m["content"] if p["type"] == "text")


def codes_of(answer: Sequence[Message]) -> list[int]:
    """The codes of the first picture in an answer; none in words alone."""
    return picture_of(answer).get("codes", [])


def picture_of(answer: Sequence[Message]) -> dict[str, Any]:
    """The first picture in an answer as it is there; {} in words alone."""
    parts = (part for message in answer for part in message["content"])
    return next((part for part in parts if part["type"] == "image"), {})


def words_of(talk: Sequence[Message]) -> str:
    """The text of the last user message."""
    content = talk[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def add_preference(path: Path, row: Row, best: int, worst: int) -> int:
    """Append what somebody preferred among a row of candidates; returns how many there are now."""
    pair = {"chosen": row["answers"][best], "rejected": row["answers"][worst]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": row["prompt"], **pair, "id": row["id"]}) + "\n")
    return len(read_lines(path))


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """JSONL, written whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def read_candidates(path: Path) -> list[Row]:
    """The rows of a candidates file; ValueError for one that is none."""
    rows = read_lines(path)
    for row in rows:
        if not all(row.get(name) for name in ("id", "prompt", "answers")):
            raise ValueError(f'{path}: a row of candidates has "id", "prompt" and "answers"')
    return rows


def read_lines(path: Path) -> list[Row]:
    """JSONL; ValueError with the line's number for what is no JSON object. An unfinished last line
    (of a killed run) is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
