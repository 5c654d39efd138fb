"""The training rows of `unimm bench`: forward and backward over the same samples, by turns.

They come packed as the trainer packs them, and padded, a sample a row; transformers' Janus (its
language model and text head) takes padded rows with a mask, and tells packed samples by their
positions. All have float32 weights (bfloat16 is by autocast), no dropout and no compiler, and must
agree in the loss and in a gradient.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unimm.data.packing import collate_packed, pack
from unimm.data.processor import Sample
from unimm.evaluation.bench_clock import alternate, flops, result
from unimm.evaluation.bench_pair import ATTENTION, PROMPT, Pair
from unimm.model.unified import TEXT, Batch

SAMPLES = 8
WATCHED = "layers.0.self_attn.v_proj.weight"  # its gradient shows who attends to whom
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative, of the loss
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}  # of its difference's norm


class Pass:
    """A forward and backward that tells its seconds; keeps the loss and `watched`'s gradient."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, watched: Tensor, forward: Callable[[], Tensor]
    ):
        self.model, self.dtype, self.watched, self.forward = model, dtype, watched, forward
        self.loss, self.gradient = float("nan"), torch.empty(0)

    def __call__(self) -> list[float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.forward()
        loss.backward()
        seconds = time.perf_counter() - start
        assert self.watched.grad is not None
        self.loss, self.gradient = float(loss.detach()), self.watched.grad
        self.model.zero_grad(set_to_none=True)
        return [seconds]


def train(pair: Pair, batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Rows "packed" and "padded" of `SAMPLES` samples: ours against transformers' best.

    Packed, that is the best of its packed and padded ways; `over_padded` is how ours does against
    padded rows alone. Tokens are those of the samples, without padding; ratios of memory are ours
    to the other. Raises ValueError where the ways disagree.
    """
    processor = pair.engine.processor
    samples = make_samples(pair)
    sizes = [len(sample) for sample in samples]
    rows = pack(sizes, max(sizes))
    batches = {
        "packed": collate_packed([[samples[k] for k in row] for row in rows], processor),
        "padded": processor.collate(samples),
    }
    passes = {part: our_pass(pair, slots) for part, slots in batches.items()}
    theirs: dict[str, list[str]] = {"packed": [], "padded": []}
    for part, slots in batches.items():
        for attention in ATTENTION:
            name = f"{part}, {attention}"
            theirs[part].append(name)
            passes[name] = their_pass(pair, slots, sizes if part == "padded" else None, attention)
    timed, memory = alternate(dict(passes), rounds)
    same = agreement(passes, pair.dtype)
    products = 6 * sum(sizes) * count_weights(pair)  # 2 forward, 4 backward
    floor = products / flops(pair.dtype) * 1e3

    def compare(part: str, ways: list[str]) -> dict[str, Any]:
        names = {"unimm": part, **{way: way for way in ways}}
        return result(
            {name: timed[way] for name, way in names.items()},
            {name: memory[way] for name, way in names.items()},
        )

    found = []
    for part, ways in (
        ("packed", theirs["packed"] + theirs["padded"]),
        ("padded", theirs["padded"]),
    ):
        row = compare(part, ways)
        speeds = {"unimm": row["unimm"], "transformers": row["transformers"][row["best"]]}
        found.append(
            {
                "part": part,
                "batch": len(samples),
                **row,
                "floor": floor,
                "share": floor / row["unimm"],
                "tokens": sum(sizes),
                "slots": batches[part].ids.numel(),
                "tokens_per_second": {k: sum(sizes) / v * 1e3 for k, v in speeds.items()},
                "memory_ratio": ratio(row["memory"]),
                **same,
            }
        )
    found[0]["over_padded"] = {
        name: {"ratio": row["ratio"], "memory_ratio": ratio(row["memory"])}
        for name, ways in (("unimm", ["padded"]), ("transformers", theirs["padded"]))
        for row in [compare("packed", ways)]
    }
    return found


def make_samples(pair: Pair) -> list[Sample]:
    """Random words, from a tenth of a picture with its prompt to the whole of it in slots."""
    longest = pair.engine.processor.codes_per_image + PROMPT
    rng = np.random.default_rng(2)
    found = []
    for size in rng.integers(longest // 10, longest + 1, SAMPLES):
        ids = rng.integers(10, pair.template.bos, size)
        ids[0] = pair.template.bos
        score = np.ones(size, dtype=np.float32)
        score[0] = 0  # nothing is before it
        kind = np.full(size, TEXT, dtype=np.int64)
        found.append(Sample(ids, kind, score, np.zeros(size, dtype=bool)))
    return found


def our_pass(pair: Pair, batch: Batch) -> Pass:
    model = pair.engine.model
    watched = model.decoder.get_parameter(WATCHED)
    return Pass(model, pair.dtype, watched, lambda: model(batch).loss)


def their_pass(pair: Pair, batch: Batch, sizes: list[int] | None, attention: str) -> Pass:
    """sizes: slots of the sample in each row of a padded batch; None: the batch is packed."""
    model = pair.theirs
    inputs = {"input_ids": batch.ids, "labels": batch.ids.masked_fill(batch.score == 0, -100)}
    if sizes is None:
        inputs["position_ids"] = batch.positions
    else:
        slots = torch.arange(batch.ids.shape[1])
        inputs["attention_mask"] = (slots < torch.tensor(sizes)[:, None]).long()

    def loss() -> Tensor:
        model.set_attn_implementation(attention)
        return model(**inputs, use_cache=False).loss

    watched = model.model.language_model.get_parameter(WATCHED)
    return Pass(model, pair.dtype, watched, loss)


def agreement(passes: dict[str, Pass], dtype: torch.dtype) -> dict[str, Any]:
    """The losses, and how far loss and gradient are from transformers', relative, at most.

    Raises ValueError beyond `TOLERANCE`: times of models that differ are no comparison.
    """
    theirs = passes[f"padded, {ATTENTION[0]}"]
    losses = {name: one.loss for name, one in passes.items()}
    apart = {
        "loss": max(abs(loss / theirs.loss - 1) for loss in losses.values()),
        "gradient": max(
            float((one.gradient - theirs.gradient).norm() / theirs.gradient.norm())
            for one in passes.values()
        ),
    }
    limits = {"loss": TOLERANCE[dtype], "gradient": GRADIENT_TOLERANCE[dtype]}
    if not all(apart[name] <= limits[name] for name in limits):  # NaN is beyond, too
        raise ValueError(
            f"unimm and transformers do not train alike: losses {losses}, relative differences "
            f"{apart}; nothing can be said of their speed"
        )
    return {"losses": losses, "apart": apart}


def count_weights(pair: Pair) -> int:
    """Of the products that a text slot goes through."""
    model = pair.engine.model
    kept = [p for n, p in model.decoder.named_parameters() if not n.startswith("embed_tokens")]
    return sum(p.numel() for p in [*kept, *model.text_head.parameters()])


def ratio(memory: dict[str, int]) -> float | None:
    """Ours to the other's; None where memory was not measured."""
    return memory["unimm"] / memory["transformers"] if memory["transformers"] else None
