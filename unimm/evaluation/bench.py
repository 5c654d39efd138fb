"""`unimm bench`: draws, answers and trains, against transformers on the same weights and the floor.

Both models are in one process and take turns, so that what else the machine does hits both; a
figure is a median over turns. transformers is taken at its best: each kind of cache and attention
is timed, and the fastest counts. Drawing by the loop of DeepSeek's script is timed beside it, over
transformers' modules (DeepSeek's package has the same ones, and does not import under transformers
5). Steps are timed at mid-image. The floor of a step is what its bytes cost at the bandwidth, or
its products at the speed of a large product (in its own dtype or in float32, whichever is faster),
measured on the spot; that of a first word, what transformers' operations for it cost at that speed.
"""

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unimm.data.processor import Sample
from unimm.evaluation.bench_clock import alternate, bandwidth, flops, machine, result
from unimm.evaluation.bench_pair import ATTENTION, PROMPT, SIZES, Pair, loaded_pair, random_pair
from unimm.evaluation.bench_train import train
from unimm.inference.engine import Request
from unimm.inference.sampling import Settings, guide
from unimm.inference.stepper import prepare
from unimm.model.unified import CODE, PATCH, TEXT, SeenImage, UnifiedModel

GUIDANCE = 5.0
WARM = 2  # steps of a run that are not counted
CODES = 64  # of a run whose steps try several
CACHES = ("dynamic", "static")


def bench(
    sizes: list[str],
    dtypes: list[str],
    batches: list[int],
    what: list[str],
    rounds: int = 3,
    steps: int = 16,
    model: str | None = None,
) -> dict[str, Any]:
    """All rows of the table: {"machine": {…}, "rows": [{…}]}; times in milliseconds.

    what: "draw" (a step, and a code), "picture" (all codes and the pixels), "answer" (to a
    picture), "train" (a forward and backward). model: a Hugging Face Janus folder in place of
    `sizes`. Raises ValueError for names that are not there, and where the two models do not train
    alike.
    """
    from transformers import logging

    logging.set_verbosity_error()
    for given, known in ((what, MEASURES), (dtypes, ("float32", "bfloat16")), (sizes, SIZES)):
        for name in given:
            if name not in known:
                raise ValueError(f"no {name!r} to measure: choose from {', '.join(known)}")
    rows = []
    for name in [model] if model else sizes:
        load = partial(loaded_pair, name) if model else partial(random_pair, SIZES[name])
        made = lru_cache(1)(partial(make_pair, load))
        for dtype in dtypes:
            kind = getattr(torch, dtype)
            for measure in what:
                learns = measure == "train"  # by autocast
                weights = torch.float32 if learns else kind
                pair = replace(made(weights, learns), dtype=kind)
                for batch in batches if measure == "draw" else batches[:1]:
                    case = {"what": measure, "size": Path(name).name, "dtype": dtype}
                    found = MEASURES[measure](pair, batch, rounds, steps)
                    rows += [{**case, "batch": batch, **row} for row in found]
    return {"machine": machine(), "rows": rows}


def make_pair(load: Callable[[torch.dtype], Pair], dtype: torch.dtype, learns: bool) -> Pair:
    """Both models; ours, where it is not to learn, as `from_pretrained` gives it."""
    pair = load(dtype)
    if not learns:  # which packed layers do not
        prepare(pair.engine.model)
    return pair


def draw(pair: Pair, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Drawing at mid-image, where prompts are half a picture longer than usual: a step of one code
    a picture, and a code as the engine draws them, which may try several in a step. How many of
    these come out as guessed depends on the weights: with random ones noise decides more."""
    codes = pair.engine.processor.codes_per_image
    ids = prompts(pair, batch, PROMPT + codes // 2)
    steps = min(steps + WARM, codes // 2)
    made: list[float] = []
    turns: dict[str, Callable[[], list[float]]] = {
        "unimm": lambda: our_steps(pair, ids, steps),
        "code": lambda: our_codes(pair, ids, min(max(steps, CODES), codes), made),
    }
    for cache in CACHES:
        for attention in ATTENTION:
            turns[f"{cache}, {attention}"] = partial(
                their_steps, pair, ids, steps, cache, attention
            )
    turns["deepseek"] = lambda: deepseek_steps(pair, ids, steps)
    speed = flops(pair.dtype)  # before and after: a shared machine is slow for seconds at a time
    timed, memory = alternate(turns, rounds)
    speed = max(speed, flops(pair.dtype))
    moved = step_bytes(pair, batch, PROMPT + codes // 2)
    model = pair.engine.model
    parameters = sum(p.numel() for p in step_parameters(model))
    products = 2 * parameters * 2 * batch / speed
    floor = max(moved / bandwidth(moved), products) * 1e3
    code = timed.pop("code")
    row = {"part": "step", **result(timed, memory), "floor": floor}
    row |= {"share": floor / row["unimm"], "agreement": agreement(pair, ids, steps)}
    coded = result({**timed, "unimm": code}, {**memory, "unimm": memory["code"]})
    return [row, {"part": "code", **coded, "codes_a_step": statistics.median(made)}]


def picture(pair: Pair, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A whole picture with its pixels."""
    processor, ids = pair.engine.processor, prompts(pair, batch, PROMPT)
    count = processor.codes_per_image

    def ours() -> list[float]:
        start = time.perf_counter()
        answers = pair.engine.run(requests(pair, ids), Settings(GUIDANCE))
        processor.pixels([answer.codes for answer in answers], pair.dtype)
        return [time.perf_counter() - start]

    def theirs(drawn: Callable[..., Tensor], *how: str) -> list[float]:
        start = time.perf_counter()
        codes = drawn(pair, ids, count, *how)
        with torch.inference_mode():
            pair.theirs.decode_image_tokens(codes)
        return [time.perf_counter() - start]

    turns: dict[str, Callable[[], list[float]]] = {"unimm": ours}
    for cache in CACHES:
        for attention in ATTENTION:
            turns[f"{cache}, {attention}"] = partial(theirs, their_codes, cache, attention)
    turns["deepseek"] = partial(theirs, deepseek_codes)
    return [result(*alternate(turns, rounds))]


def answer(pair: Pair, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Words about a picture: the first one, and each further one."""
    sample = question(pair)
    turns: dict[str, Callable[[], list[float]]] = {"unimm": lambda: our_words(pair, sample, steps)}
    for cache in CACHES:
        for attention in ATTENTION:
            turns[f"{cache}, {attention}"] = partial(
                their_words, pair, sample, steps, cache, attention
            )
    speed = flops(pair.dtype)
    timed, memory = alternate(turns, rounds, whole=True)
    speed = max(speed, flops(pair.dtype))
    first = {name: [run[0] for run in runs] for name, runs in timed.items()}
    rest = {name: [statistics.median(run[1:]) for run in runs] for name, runs in timed.items()}
    with FlopCounterMode(display=False) as counted:
        their_words(pair, sample, 1, CACHES[0], ATTENTION[0])
    moved = step_bytes(pair, 1, len(sample), TEXT)
    floors = counted.get_total_flops() / speed, moved / bandwidth(moved)
    rows: list[dict[str, Any]] = []
    for part, runs, floor in zip(("first", "further"), (first, rest), floors, strict=True):
        row = {"part": part, **result(runs, memory), "floor": floor * 1e3}
        rows.append({**row, "share": row["floor"] / row["unimm"]})
    return rows


MEASURES: dict[str, Callable[[Pair, int, int, int], list[dict[str, Any]]]] = {
    "draw": draw,
    "picture": picture,
    "answer": answer,
    "train": train,
}


# ---------------------------------------------------------------- the two sides


def our_steps(pair: Pair, ids: Tensor, steps: int) -> list[float]:
    """Seconds of each step of one code a picture but the first few."""
    marks: list[float] = []
    usual, pair.engine.window = pair.engine.window, 1
    try:
        for _ in pair.engine.stream(requests(pair, ids), Settings(GUIDANCE)):
            marks.append(time.perf_counter())
            if len(marks) > steps:
                break
    finally:
        pair.engine.window = usual
    return np.diff(marks)[WARM:].tolist()


def our_codes(pair: Pair, ids: Tensor, codes: int, made: list[float]) -> list[float]:
    """Seconds a code (of each picture) but the first few; to `made`, codes of a step."""
    marks: list[tuple[float, float]] = []  # seconds, and codes of a picture
    for answers in pair.engine.stream(requests(pair, ids), Settings(GUIDANCE)):
        drawn = [len(answer.codes) for answer in answers]
        marks.append((time.perf_counter(), statistics.mean(drawn)))
        if min(drawn) >= codes:
            break
    warm = min(WARM, len(marks) - 2)
    (start, first), (end, last) = marks[warm], marks[-1]
    made.append((last - first) / (len(marks) - 1 - warm))
    return [(end - start) / (last - first)]


def their_steps(pair: Pair, ids: Tensor, steps: int, cache: str, attention: str) -> list[float]:
    clock = Clock()
    their_codes(pair, ids, steps + 1, cache, attention, clock)
    return np.diff(clock.marks)[WARM:].tolist()


def their_codes(
    pair: Pair,
    ids: Tensor,
    count: int,
    cache: str,
    attention: str,
    clock: Any = None,
    greedy: bool = False,
) -> Tensor:
    """`count` codes of transformers' own loop, (B, count)."""
    from transformers import LogitsProcessorList

    model = pair.theirs
    model.set_attn_implementation(attention)
    vision = model.model.vision_model.config
    usual, vision.num_image_tokens = vision.num_image_tokens, count
    room = ids.shape[1] + max(count, usual // 2 if ids.shape[1] > PROMPT else usual)
    try:
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_mode="image",
                guidance_scale=GUIDANCE,
                do_sample=not greedy,
                logits_processor=LogitsProcessorList([clock] if clock else []),
                **their_cache(model, cache, room),
            )
    finally:
        vision.num_image_tokens = usual


def deepseek_steps(pair: Pair, ids: Tensor, steps: int) -> list[float]:
    clock = Clock()
    deepseek_codes(pair, ids, steps + 1, clock)
    return np.diff(clock.marks)[WARM:].tolist()


def deepseek_codes(
    pair: Pair, ids: Tensor, count: int, clock: Any = None, greedy: bool = False
) -> Tensor:
    """`count` codes by the loop of DeepSeek's generation_inference.py, (B, count).

    Both branches are rows one behind the other, there is no mask, and cache and attention are
    those that transformers takes when it is told nothing.
    """
    model = pair.theirs
    model.set_attn_implementation(ATTENTION[0])
    cache = their_cache(model, CACHES[0], 0)
    rows, found = ids.repeat_interleave(2, 0), []
    rows[1::2, 1:-1] = pair.template.pad
    with torch.inference_mode():
        x = model.get_input_embeddings()(rows)
        for _ in range(count):
            out = model.model.language_model(inputs_embeds=x, use_cache=True, **cache)
            logits = model.model.generation_head(out.last_hidden_state[:, -1])
            logits = guide(logits[0::2], logits[1::2], GUIDANCE)
            codes = logits.argmax(-1) if greedy else logits.softmax(-1).multinomial(1)[:, 0]
            found.append(codes)
            x = model.prepare_embeddings_for_image_generation(codes.repeat_interleave(2)[:, None])
            if clock:
                clock(ids, logits)
    return torch.stack(found, 1)


def our_words(pair: Pair, sample: Sample, steps: int) -> list[float]:
    marks = [time.perf_counter()]
    pair.engine._prompts.kept = None
    request = Request(sample, "text")
    for _ in pair.engine.stream([request], Settings(max_text=steps)):
        marks.append(time.perf_counter())
    return np.diff(marks).tolist()


def their_words(pair: Pair, sample: Sample, steps: int, cache: str, attention: str) -> list[float]:
    model, clock = pair.theirs, Clock()
    model.set_attn_implementation(attention)
    ids = torch.from_numpy(sample.ids)[None].clone()
    ids[0, torch.from_numpy(sample.kind == PATCH)] = model.config.image_token_id
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            pixel_values=sample.images[0].pixels[None].to(pair.dtype),
            attention_mask=torch.ones_like(ids),
            generation_mode="text",
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            streamer=clock,  # a list of logits processors would be dropped
            **their_cache(model, cache, ids.shape[1] + steps),
        )
    return np.diff([start, *clock.marks[1:]]).tolist()  # the first is the prompt's


def their_cache(model: Any, kind: str, room: int) -> dict[str, Any]:
    """A cache, by the name that this transformers has for the argument (another before 5.24)."""
    from transformers import DynamicCache, StaticCache

    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    if kind == "dynamic":
        return {name: DynamicCache()}
    return {name: StaticCache(config=model.config.get_text_config(), max_cache_len=room)}


class Clock:
    """A logits processor, or a streamer, that notes when it is called."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.marks.append(time.perf_counter())
        return scores

    def put(self, ids: Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def agreement(pair: Pair, ids: Tensor, steps: int) -> float:
    """Share of greedy codes that are transformers' own."""
    theirs = their_codes(pair, ids, steps, CACHES[0], ATTENTION[0], greedy=True)
    ours: list[list[int]] = []
    for answers in pair.engine.stream(requests(pair, ids), Settings(GUIDANCE, temperature=0.0)):
        ours = [answer.codes[:steps] for answer in answers]
        if all(len(codes) == steps for codes in ours):
            break
    return float((torch.tensor(ours) == theirs).float().mean())


# ---------------------------------------------------------------- prompts and floors


def prompts(pair: Pair, batch: int, length: int) -> Tensor:
    """Random words (B, length) between begin of sequence and begin-of-image."""
    rng = np.random.default_rng(1)
    ids = rng.integers(10, pair.template.bos, (batch, length))
    ids[:, 0], ids[:, -1] = pair.template.bos, pair.template.begin_image
    return torch.from_numpy(ids)


def requests(pair: Pair, ids: Tensor) -> list[Request]:
    found = []
    for k, row in enumerate(ids.numpy()):
        words = np.ones(len(row), dtype=bool)
        words[[0, -1]] = False  # the unguided prompt keeps its ends (Janus)
        kind = np.full(len(row), TEXT, dtype=np.int64)
        sample = Sample(row, kind, np.zeros(len(row), dtype=np.float32), words, draws=True)
        found.append(Request(sample, "image", k))
    return found


def question(pair: Pair) -> Sample:
    """A picture and 32 words."""
    processor = pair.engine.processor
    count, size = processor.seen_tokens, processor.seen_size
    ids = prompts(pair, 1, PROMPT)[0].numpy()
    ids = np.concatenate([ids[:2], np.zeros(count, dtype=np.int64), ids[2:]])
    kind = np.full(len(ids), TEXT, dtype=np.int64)
    kind[2 : 2 + count] = PATCH
    pixels = torch.rand(3, size, size) * 2 - 1
    image = SeenImage(pixels, 0, 2, count)
    none = np.zeros(len(ids), dtype=bool)
    return Sample(ids, kind, none.astype(np.float32), none, [image])


def step_parameters(model: UnifiedModel, kind: int = CODE) -> list[Tensor]:
    """What a step of drawing, or of words, reads."""
    stored = model.decoder.state_dict()  # packed weights are no parameters
    drawing = kind == CODE and model.config.pathway == "decoupled"
    head = model.image_head if drawing else model.text_head
    kept = [tensor for name, tensor in stored.items() if not name.startswith("embed_tokens")]
    return [*kept, *head.state_dict().values()]


def step_bytes(pair: Pair, batch: int, slots: int, kind: int = CODE) -> int:
    """Weights, and keys and values of `slots` slots in a row for each word or two for each code."""
    c = pair.engine.model.config.decoder
    rows = 2 * batch if kind == CODE else batch
    cached = rows * slots * 2 * c.layers * c.kv_heads * c.head_dim
    numbers = cached + sum(p.numel() for p in step_parameters(pair.engine.model, kind))
    return numbers * torch.finfo(pair.dtype).bits // 8


# ---------------------------------------------------------------- a table and a chart


def table(found: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [
        f"{'':38}{'unimm':>10}{'transformers':>14}{'ratio':>8}  floor  {'at its best':16}DeepSeek"
    ]
    for row in found["rows"]:
        floor = f"{row['share']:6.0%}" if "share" in row else f"{'':6}"
        deepseek = f"{row['deepseek_ratio']:.2f}x" if "deepseek" in row else ""
        lines.append(
            f"{label(row):38}{row['unimm']:8.2f}ms{row['transformers'][row['best']]:12.2f}ms"
            f"{row['ratio']:7.2f}x {floor}  {row['best']:16}{deepseek}".rstrip()
        )
        if "codes_a_step" in row:
            lines.append(f"{'':38}{row['codes_a_step']:.2f} codes a step")
        if "tokens_per_second" in row:
            ours, theirs = (row["tokens_per_second"][k] for k in ("unimm", "transformers"))
            held = row["memory_ratio"] and f", {row['memory_ratio']:.2f} of the peak memory"
            lines.append(f"{'':38}{ours:.0f} against {theirs:.0f} tokens/s{held or ''}")
    return "\n".join(lines)


def label(row: dict[str, Any]) -> str:
    what = row["what"] + (f" {row['part']}" if "part" in row else "")
    return f"{row['size']} {what}, batch {row['batch']}, {row['dtype']}"


def chart(found: dict[str, Any], path: Path) -> None:
    """A picture of the ratios: one bar a row, 1 is transformers at its best."""
    rows = found["rows"]
    longest = max(row["ratio"] for row in rows)
    left, width, step = 300, 500, 28
    picture = Image.new("RGB", (left + width + 80, step * (len(rows) + 2)), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((10, 8), f"times faster than transformers, {found['machine']['processor']}", "black")
    for k, row in enumerate(rows, 1):
        top, end = k * step + 4, left + round(width * row["ratio"] / longest)
        pen.text((10, top + 4), label(row), "black")
        pen.rectangle((left, top, end, top + step - 8), fill=(70, 130, 180))
        pen.text((end + 6, top + 4), f"{row['ratio']:.2f}", "black")
    one = left + round(width / longest)
    pen.line((one, step, one, step * (len(rows) + 1)), fill="black")
    picture.save(path, format="PNG")
