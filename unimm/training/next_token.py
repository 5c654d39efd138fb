"""Training of the unified model: the next-token step, and what a run of it sets up."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from unimm.checkpoints.adapters import (
    add_adapters,
    merge_adapters,
    merge_stored,
    save_adapters,
)
from unimm.checkpoints.load import load_model, locate_base
from unimm.checkpoints.native import save_model
from unimm.checkpoints.parts import assemble_parts
from unimm.config import Begin, Run
from unimm.data.packing import collate_packed
from unimm.data.processor import Processor, Sample
from unimm.model.int8 import quantize_decoder
from unimm.model.unified import TEXT, Batch, UnifiedModel
from unimm.training.previews import HeldOut, held_out_nats, held_out_rows, show
from unimm.training.trainer import Parts, rate_of


def next_token(model: Any, batch: Batch, total: float, run: Run) -> Iterator[tuple]:
    """Cross-entropy of every scored slot, weighted by kind, over the global batch."""
    output = model(batch, run.kind_weights, total)
    metrics: dict[str, Any] = {f"{kind}_nats": pair for kind, pair in output.nats.items()}
    sample, samples = batch.samples()
    slots = batch.score.new_zeros(samples)
    slots.index_add_(0, sample[:, 1:].flatten(), (batch.score[:, 1:] > 0).to(slots).flatten())
    metrics["samples"] = (-output.log_probs.detach()).tolist(), slots.tolist()
    yield "main", output.loss, metrics


def scored_weight(batch: Batch, run: Run) -> float:
    """What the loss of `next_token` is divided by."""
    return batch.weight(run.kind_weights)


def setup_unified(run: Run) -> Parts:
    """A model from the folder `run.init`; items are message dicts.

    options: `prompts`, `previews` and `guidance` of the previews (see `previews.show`),
    `code_rows_only` (the shared pathway's stage 1).
    """
    return unified_parts(run, *open_init(run))


def open_init(run: Run) -> tuple[UnifiedModel, Processor, dict[str, Any]]:
    """Model, processor and sampling defaults of `run.init`, in float32.

    That is a model folder of any format, a Hub id, the parts of a `Begin` (put together here, and
    not written), or "scenes": the bundled model. `options.sampling` changes the defaults, which
    are saved with the model.
    """
    if not run.init:
        raise ValueError("this run starts from a model folder: init=DIR")
    if isinstance(run.init, Begin):
        found = assemble_parts(run.init, torch.float32)
    else:
        found = load_model(locate_base(run.init))
    return *found[:2], {**found[2], **run.options.get("sampling", {})}


def unified_parts(
    run: Run, model: UnifiedModel, processor: Processor, sampling: dict[str, Any]
) -> Parts:
    """What every run of a unified model has: compiled layers, previews, a model folder at the end.

    Samples may lose their prompt (`run.drop_prompt`); with `run.lora` adapters learn, on what
    `run.lora_base` says.
    """
    if run.options.get("code_rows_only"):
        model.train_code_rows_only()
    if run.lora:
        if isinstance(run.train, dict):
            raise ValueError("lora is for runs with one list of rates")
        rates = run.train
        add_adapters(model, run.lora, learns=lambda name: rate_of(name, rates) is not None)
    if run.lora_base not in ("float", "int8") or (run.lora_base == "int8" and not run.lora):
        raise ValueError("lora_base is 'float' or 'int8', and int8 needs adapters: lora=16")
    if run.lora_base == "int8":
        quantize_decoder(model)
    for layer in model.decoder.layers:
        layer.recompute = run.recompute  # type: ignore[assignment]
        if run.compile and has_compiler():
            layer.compile(dynamic=True)

    def prepare(item: dict[str, Any], rng: np.random.Generator) -> Sample:
        return drop_prompt(learnable(processor, item["messages"]), processor, run.drop_prompt, rng)

    held_out: list[HeldOut] = []  # read once

    def preview(folder: Path, step: int) -> dict[str, float]:
        rows = held_out[0] if held_out else held_out_rows(run, processor)
        held_out[:] = [rows]
        with torch.compiler.set_stance("force_eager"):
            shown = show(run, model, processor, rows, folder, step)
            return shown | held_out_nats(run, model, processor, rows)

    def save(folder: Path) -> None:
        if run.lora and not run.lora_merge:
            there = isinstance(run.init, str | Path) and Path(run.init).exists()
            base = str(Path(run.init).resolve()) if there else run.init
            return save_adapters(folder, model, base)
        if run.lora_base == "int8":  # into the float weights that these came from
            whole = open_init(run)[0]
            with TemporaryDirectory() as apart:
                save_adapters(Path(apart), model, "")
                merge_stored(Path(apart), whole)
            return save_model(folder, whole, processor, sampling)
        if run.lora:
            merge_adapters(model)
        save_model(folder, model, processor, sampling)

    return Parts(
        model,
        processor.collate,
        preview,
        save,
        prepare,
        len,
        pack=lambda rows: collate_packed(rows, processor),
    )


def learnable(processor: Processor, messages: list[Any]) -> Sample:
    """The sample of a conversation; ValueError where nothing in it is scored."""
    sample = processor.encode(messages)
    if not sample.score.any():
        raise ValueError("there is nothing to learn: no assistant's turn")
    return sample


def has_compiler() -> bool:
    """Whether torch.compile can work here: on a CPU it needs a C++ compiler."""
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return not on_cpu or any(map(shutil.which, ("c++", "g++", "clang++")))


def drop_prompt(
    sample: Sample, processor: Processor, share: float, rng: np.random.Generator
) -> Sample:
    """The sample, or for a `share` of drawing samples the sample with the unguided prompt.

    Words that answer a question nobody can read any more are then not scored.
    """
    if not sample.draws or rng.random() >= share:
        return sample
    words = (sample.kind == TEXT) & processor.is_word(sample.ids)
    score = np.where(words, 0, sample.score).astype(np.float32)
    return processor.unguided(dataclasses.replace(sample, score=score))
