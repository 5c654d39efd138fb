"""`unimm bench`: drawing and answering, against transformers on the same weights and the floor.

Both models are in one process and take turns, so that what else the machine does hits both; a
figure is a median over turns. transformers is taken at its best: each kind of cache and attention
is timed, and the fastest counts. Steps are timed at mid-image. The floor of a step is what its
bytes cost at the bandwidth, or its products at the speed of a large product, measured on the spot.
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unimm.checkpoints import janus
from unimm.checkpoints.load import load_model
from unimm.data.processor import Processor, Sample, Template
from unimm.inference.engine import Engine, Request
from unimm.inference.sampling import Settings
from unimm.model.image_tokenizer import VQTokenizer
from unimm.model.unified import PATCH, TEXT, SeenImage, UnifiedModel

PROMPT = 32  # slots of a prompt
GUIDANCE = 5.0
WARM = 2  # steps of a run that are not counted
CACHES = ("dynamic", "static")
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Size:
    """A Janus of random weights. side: pixels of a picture, 16 a code and a patch."""

    dim: int
    layers: int
    heads: int
    hidden: int
    words: int
    codes: int
    side: int
    vq_channels: int
    vision: tuple[int, int, int]  # width, layers, heads


SIZES = {
    "tiny": Size(256, 6, 4, 1024, 8192, 1024, 128, 32, (256, 4, 4)),
    "mid": Size(768, 12, 12, 3072, 32000, 16384, 384, 128, (384, 12, 6)),
}


@dataclass
class Pair:
    """transformers' model, and ours with the same weights."""

    theirs: Any
    engine: Engine
    dtype: torch.dtype

    @property
    def template(self) -> Template:
        return self.engine.processor.template


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

    what: "draw" (a step), "picture" (all codes and the pixels), "answer" (to a picture). model: a
    Hugging Face Janus folder in place of `sizes`. Raises ValueError for names that are not there.
    """
    from transformers import logging

    logging.set_verbosity_error()
    for given, known in ((what, MEASURES), (dtypes, ("float32", "bfloat16")), (sizes, SIZES)):
        for name in given:
            if name not in known:
                raise ValueError(f"no {name!r} to measure: choose from {', '.join(known)}")
    rows = []
    for name in [model] if model else sizes:
        for dtype in dtypes:
            kind = getattr(torch, dtype)
            pair = loaded_pair(name, kind) if model else random_pair(SIZES[name], kind)
            for measure in what:
                for batch in batches if measure == "draw" else batches[:1]:
                    case = {"what": measure, "size": Path(name).name, "dtype": dtype}
                    found = MEASURES[measure](pair, batch, rounds, steps)
                    rows += [{**case, "batch": batch, **row} for row in found]
    return {"machine": machine(), "rows": rows}


def draw(pair: Pair, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A step of drawing at mid-image: prompts are half a picture longer than usual."""
    codes = pair.engine.processor.codes_per_image
    ids = prompts(pair, batch, PROMPT + codes // 2)
    steps = min(steps + WARM, codes // 2)
    turns: dict[str, Callable[[], list[float]]] = {"unimm": lambda: our_steps(pair, ids, steps)}
    for cache in CACHES:
        for attention in ATTENTION:
            turns[f"{cache}, {attention}"] = partial(
                their_steps, pair, ids, steps, cache, attention
            )
    timed, memory = alternate(turns, rounds)
    moved = step_bytes(pair, batch, PROMPT + codes // 2)
    model = pair.engine.model
    parameters = sum(p.numel() for p in step_parameters(model))
    floor = max(
        moved / bandwidth(moved) * 1e3, 2 * parameters * 2 * batch / flops(pair.dtype) * 1e3
    )
    row = result(timed, memory)
    same = agreement(pair, ids, steps)
    return [{**row, "floor": floor, "share": floor / row["unimm"], "agreement": same}]


def picture(pair: Pair, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A whole picture with its pixels."""
    processor, ids = pair.engine.processor, prompts(pair, batch, PROMPT)
    count = processor.codes_per_image

    def ours() -> list[float]:
        start = time.perf_counter()
        answers = pair.engine.run(requests(pair, ids), Settings(GUIDANCE))
        processor.pixels([answer.codes for answer in answers], pair.dtype)
        return [time.perf_counter() - start]

    def theirs(cache: str, attention: str) -> list[float]:
        start = time.perf_counter()
        codes = their_codes(pair, ids, count, cache, attention)
        with torch.inference_mode():
            pair.theirs.decode_image_tokens(codes)
        return [time.perf_counter() - start]

    turns: dict[str, Callable[[], list[float]]] = {"unimm": ours}
    for cache in CACHES:
        for attention in ATTENTION:
            turns[f"{cache}, {attention}"] = partial(theirs, cache, attention)
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
    timed, memory = alternate(turns, rounds, whole=True)
    first = {name: [run[0] for run in runs] for name, runs in timed.items()}
    rest = {name: [statistics.median(run[1:]) for run in runs] for name, runs in timed.items()}
    return [
        {"part": "first", **result(first, memory)},
        {"part": "further", **result(rest, memory)},
    ]


MEASURES: dict[str, Callable[[Pair, int, int, int], list[dict[str, Any]]]] = {
    "draw": draw,
    "picture": picture,
    "answer": answer,
}


# ---------------------------------------------------------------- the two sides


def our_steps(pair: Pair, ids: Tensor, steps: int) -> list[float]:
    """Seconds of each step but the first few."""
    marks = []
    for _ in pair.engine.stream(requests(pair, ids), Settings(GUIDANCE)):
        marks.append(time.perf_counter())
        if len(marks) > steps:
            break
    return np.diff(marks)[WARM:].tolist()


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
                past_key_values=their_cache(model, cache, room),
            )
    finally:
        vision.num_image_tokens = usual


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
            past_key_values=their_cache(model, cache, ids.shape[1] + steps),
        )
    return np.diff([start, *clock.marks[1:]]).tolist()  # the first is the prompt's


def their_cache(model: Any, kind: str, room: int) -> Any:
    from transformers import DynamicCache, StaticCache

    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=model.config.get_text_config(), max_cache_len=room)


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
        ours = [answer.codes for answer in answers]
        if len(ours[0]) == steps:
            break
    return float((torch.tensor(ours) == theirs).float().mean())


# ---------------------------------------------------------------- models and prompts


def random_pair(size: Size, dtype: torch.dtype) -> Pair:
    """Both models with one set of random weights."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        LlamaConfig,
    )
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig

    torch.manual_seed(0)
    template = Template.after(size.words - 8)  # the word after them stands for patches
    width, layers, heads = size.vision
    config = JanusConfig(
        text_config=LlamaConfig(
            hidden_size=size.dim, num_hidden_layers=size.layers, num_attention_heads=size.heads,
            num_key_value_heads=size.heads, intermediate_size=size.hidden, vocab_size=size.words,
            max_position_embeddings=2048, bos_token_id=template.bos, pad_token_id=template.pad,
            eos_token_id=template.end_of_turn,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=size.side, patch_size=16, projection_dim=size.dim, depth=2,
            num_image_tokens=(size.side // 16) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=size.codes, base_channels=size.vq_channels,
            projection_dim=size.dim, image_token_embed_dim=size.dim, num_hidden_layers=2,
            latent_channels=256,
        ),
        image_token_id=size.words - 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = JanusForConditionalGeneration(config).eval()
    rows = theirs.model.vqmodel.quantize.embedding.weight
    rows.data.copy_(torch.nn.functional.normalize(rows.data, dim=-1))
    return paired(theirs, config.to_dict(), template, size.side, dtype)


def loaded_pair(folder: str, dtype: torch.dtype) -> Pair:
    """Both models from a Hugging Face Janus folder."""
    from transformers import JanusForConditionalGeneration

    theirs = JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    model, processor, _ = load_model(folder, str(dtype).split(".")[1])
    use_ids(theirs, processor.template)
    return Pair(theirs, Engine(model, processor), dtype)


def paired(
    theirs: Any, data: dict[str, Any], template: Template, side: int, dtype: torch.dtype
) -> Pair:
    config, codes = janus.hugging_face_configs(data, "the bench", head_stored=True)
    with torch.device("meta"):
        model, image_tokenizer = UnifiedModel(config), VQTokenizer(codes)
    theirs = theirs.to(dtype)
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        ours |= janus.from_hugging_face(name, tensor.clone())
    prefix = "image_tokenizer."
    drawn = {k.removeprefix(prefix): v.float() for k, v in ours.items() if k.startswith(prefix)}
    image_tokenizer.load_state_dict(drawn, assign=True)
    model.load_state_dict({k: v for k, v in ours.items() if prefix not in k}, assign=True)
    processor = Processor(
        None, image_tokenizer.eval(), template, side, (side // 16) ** 2, side,
        config.decoder.max_positions,
    )  # fmt: skip
    use_ids(theirs, template)
    return Pair(theirs, Engine(model, processor), dtype)


def use_ids(theirs: Any, template: Template) -> None:
    """Tell transformers' loop the special tokens of ours."""
    config = theirs.generation_config
    config.bos_token_id, config.pad_token_id = template.bos, template.pad
    config.eos_token_id = template.end_of_turn
    config.generation_kwargs = {"boi_token_id": template.begin_image}
    config.top_k = None


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


# ---------------------------------------------------------------- clocks and floors


def alternate(
    turns: dict[str, Callable[[], list[float]]], rounds: int, whole: bool = False
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Each turn once a round, after one round that is not counted.

    Returns medians of the runs (or the runs, `whole`), and the peak memory of each turn beyond
    what was held before it, in bytes (0 where the system does not tell).
    """
    timed: dict[str, list[Any]] = {name: [] for name in turns}
    memory = dict.fromkeys(turns, 0)
    for k in range(rounds + 1):
        for name, turn in turns.items():
            before = start_peak()
            run = turn()
            memory[name] = max(memory[name], peak() - before if before else 0)
            if k:
                timed[name].append(run if whole else statistics.median(run))
    return timed, memory


def result(timed: dict[str, list[float]], memory: dict[str, int]) -> dict[str, Any]:
    """Medians in milliseconds, and the ratio to the best of transformers' variants."""
    medians = {name: statistics.median(runs) * 1e3 for name, runs in timed.items()}
    ours = medians.pop("unimm")
    best = min(medians, key=medians.__getitem__)
    return {
        "unimm": ours,
        "transformers": medians,
        "best": best,
        "ratio": medians[best] / ours,
        "spread": [min(timed["unimm"]) * 1e3, max(timed["unimm"]) * 1e3],
        "memory": {"unimm": memory["unimm"], "transformers": memory[best]},
    }


def step_parameters(model: UnifiedModel) -> list[Tensor]:
    """What a step of drawing reads."""
    kept = [p for n, p in model.decoder.named_parameters() if not n.startswith("embed_tokens")]
    head = model.image_head if model.config.pathway == "decoupled" else model.text_head
    return [*kept, *head.parameters()]


def step_bytes(pair: Pair, batch: int, slots: int) -> int:
    """Weights, and keys and values of `slots` slots in 2 * batch rows."""
    c = pair.engine.model.config.decoder
    cached = 2 * batch * slots * 2 * c.layers * c.kv_heads * c.head_dim
    size = torch.finfo(pair.dtype).bits // 8
    return cached * size + sum(
        p.numel() * p.element_size() for p in step_parameters(pair.engine.model)
    )


def bandwidth(size: int) -> float:
    """Bytes a second at which so many bytes are read again and again (in cache, if they fit)."""
    data = torch.ones(size // 4)
    return size / best_of(data.sum)


def flops(dtype: torch.dtype) -> float:
    """Operations a second of a large product."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / best_of(lambda: a @ b)


def best_of(work: Callable[[], Any], times: int = 7) -> float:
    """Least seconds of several runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def start_peak() -> int:
    """Bytes held now, with the peak set back to them; 0 where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def machine() -> dict[str, Any]:
    import transformers

    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


# ---------------------------------------------------------------- a table and a chart


def table(found: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{'':34}{'unimm':>10}{'transformers':>14}{'ratio':>8}  floor  at its best"]
    for row in found["rows"]:
        floor = f"{row['share']:6.0%}" if "share" in row else f"{'':6}"
        lines.append(
            f"{label(row):34}{row['unimm']:8.2f}ms{row['transformers'][row['best']]:12.2f}ms"
            f"{row['ratio']:7.2f}x {floor}  {row['best']}"
        )
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
