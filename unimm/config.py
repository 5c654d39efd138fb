"""A training run as data, and the `key=value` words that change one on the command line.

A recipe is a Python file that builds a `Run`; everything a run does can be read from it and
recorded beside its result. An unknown key is an error.
"""

import ast
import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

Rates = tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Source:
    """One named source of samples.

    `make(run, **options)` returns an object whose `[i]` gives sample i for any i >= 0, as a pure
    function of i (so that a resumed run sees what an undisturbed one would have seen).
    """

    make: Callable[..., Any]
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Begin:
    """What a model is begun from: folders or Hub ids of parts (unimm.checkpoints.parts).

    decoder: a language model. vision: a SigLIP, or "" for a model that sees codes. image_tokenizer:
    a folder, or a file in LlamaGen's layout. drawn_size: pixels, 0 for the tokenizer's own.
    """

    decoder: str
    image_tokenizer: str
    vision: str = ""
    drawn_size: int = 0
    guidance: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One training run.

    `train` is an ordered list of (regex, learning rate): the first pattern that matches the whole
    name of a parameter decides, None freezes. Where a step has several losses (a VQ-GAN's
    discriminator), `train` is a dict of such lists by the name of the optimizer.
    """

    step: Callable[..., Any]
    train: Rates | dict[str, Rates]
    data: dict[str, Source]
    steps: int
    batch_size: int
    out: str = ""
    init: Any = ""  # a folder or a Hub id of a model, or a Begin
    setup: Callable[..., Any] | None = None  # None: a unified model from `init`
    count: Callable[..., float] | None = None  # what a loss is divided by; None: batches
    warmup: int = 0
    schedule: str = "constant"  # or "cosine", "linear": to zero at the last step
    optimizer: str = (
        "adamw"  # or "muon": for the matrices of transformer layers, AdamW for the rest
    )
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1  # batch_size is the global batch: it is cut into this many pieces
    precision: str = "auto"  # "bf16" (autocast), "float32", or the faster of them on this machine
    compile: bool = (
        False  # fuse the decoder's layers (torch.compile; needs a C++ compiler on a CPU)
    )
    workers: int = 1  # threads that read and prepare samples ahead
    packing: int = 0  # slots a row into which several samples are packed; 0: a sample a row
    recompute: bool = False  # forward a layer again in the backward, to hold less memory
    shard: bool = False  # FSDP2: each rank holds a part of the weights
    lora: int = 0  # rank of adapters that learn in place of the matrices which `train` names
    lora_base: str = "float"  # or "int8": the decoder's linear layers, frozen, under the adapters
    lora_merge: bool = True  # into the weights at the end; or apart, in files of their own
    mixing: str = (
        "weights"  # or "sqrt": each weight times the root of its source's size (InstructBLIP)
    )
    drop_prompt: float = 0.1  # share of drawing samples that get the unguided prompt
    most_broken: float = 0.05  # a source of which a larger share cannot be read stops the run
    kind_weights: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "code": 1.0})
    seed: int = 0
    log_every: int = 20
    preview_every: int = 500
    save_every: int = 100
    tensorboard: bool = False  # events in OUT/tensorboard
    options: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The run as JSON-able data; functions become `module:name`."""

        def plain(value: Any) -> Any:
            if callable(value):
                return f"{value.__module__}:{value.__qualname__}"
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            if isinstance(value, dict):
                return {str(k): plain(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, Path) else value

        return plain(self)


def load_recipe(path: str | Path) -> ModuleType:
    """Run the recipe file at `path` and return its module. ValueError where there is none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such recipe: {path} (unimm's own are in train/ of its repository)")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python recipe (it should end in .py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def override(run: Run, words: list[str]) -> Run:
    """`run` with every `key=value` applied; `data.captions.weight=2` reaches inside."""
    for key, value in split_words(words).items():
        run = _replace(run, key.split("."), value, key)
    return run


def split_words(words: list[str]) -> dict[str, str]:
    """`["a=1", "b.c=x"]` as a dict of strings."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, not {word!r}")
        pairs[key] = value
    return pairs


def parse_value(text: str, like: Any, key: str) -> Any:
    """`text` as a value of the type that `like` has."""
    if isinstance(like, str):
        return text
    lowered = {"true": "True", "false": "False", "none": "None", "null": "None"}
    try:
        value = ast.literal_eval(lowered.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if like is None:
        return value
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(like, tuple) and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, type(like)) or isinstance(value, bool) != isinstance(like, bool):
        kind = type(like).__name__
        raise ValueError(f"{key}={text}: expected a value of type {kind}, as in {key}={like}")
    return value


def _replace(holder: Any, path: list[str], text: str, key: str) -> Any:
    """`holder` with the value at `path` replaced; dataclasses and dicts are copied on the way."""
    name, rest = path[0], path[1:]
    known = (
        holder
        if isinstance(holder, dict)
        else {
            f.name: getattr(holder, f.name)
            for f in (dataclasses.fields(holder) if dataclasses.is_dataclass(holder) else ())
        }
    )
    if isinstance(holder, Source):  # data.mine.path is short for data.mine.options.path
        options = {**_defaults(holder.make), **holder.options}
        if name in options and name not in known:
            changed = _replace(options, path, text, key)
            return dataclasses.replace(holder, options=changed)
        known = {**options, **known}
    if name not in known:
        choices = ", ".join(sorted(map(str, known))) or "nothing"
        raise ValueError(f"unknown key {key!r}: {name!r} is not one of {choices}")
    old = known[name]
    if type(old) is int and _declared(holder).get(name) is float:  # weight=2 in a recipe
        old = float(old)
    if not rest and isinstance(old, Begin):
        old = ""  # a folder in place of the parts
    if not rest and (callable(old) or dataclasses.is_dataclass(old)):
        raise ValueError(f"{key} cannot be set on the command line: change the recipe")
    new = _replace(old, rest, text, key) if rest else parse_value(text, old, key)
    if isinstance(holder, dict):
        return {**holder, name: new}
    return dataclasses.replace(holder, **{name: new})


def _declared(holder: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    fields = dataclasses.fields(holder) if dataclasses.is_dataclass(holder) else ()
    return {f.name: f.type for f in fields}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that have a default, with it."""
    given = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in given if p.default is not inspect.Parameter.empty}


def run_main(main: Callable[..., Any], words: list[str]) -> Any:
    """Call a recipe's `main(key=default, ...)` with the `key=value` words."""
    defaults = _defaults(main)
    values = {}
    for key, text in split_words(words).items():
        if key not in defaults:
            raise ValueError(f"unknown key {key!r}: choose from {', '.join(defaults)}")
        values[key] = parse_value(text, defaults[key], key)
    return main(**values)
