"""The decode step in C++ (kernel.cpp): built at first use, kept, and done without where it fails.

What it computes is what the modules compute, in float32; without a compiler, on another processor
than the host's, or with UNIMM_KERNEL=0, the same work is done by torch, with the same tokens.
"""

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimm.model.decoder import KVCache
from unimm.model.int8 import Int8Linear
from unimm.model.unified import UnifiedModel

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = "-std=c++17 -O3 -march=native -ffast-math -mprefer-vector-width=512 -fopenmp -fPIC".split()
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
LANES = 16  # inner widths must be multiples of it

log = logging.getLogger(__name__)


class Weight(ctypes.Structure):
    _fields_ = [
        ("w", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("kind", c_int64), ("rows", c_int64), ("cols", c_int64),
    ]  # fmt: skip


PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("norm1", "norm2", "q_norm", "k_norm")
LAYER: list[Any] = [(name, Weight) for name in PRODUCTS] + [(name, c_void_p) for name in NORMS]


class Layer(ctypes.Structure):
    _fields_ = LAYER


class Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER(Layer)), ("norm", c_void_p), ("frequency", c_void_p),
        ("count", c_int64), ("dim", c_int64), ("heads", c_int64), ("kv_heads", c_int64),
        ("width", c_int64), ("hidden", c_int64), ("eps", c_float),
    ]  # fmt: skip


class Drawing(ctypes.Structure):
    _fields_ = [
        ("table", Weight), ("first", Weight), ("last", Weight),
        ("guidance", c_float), ("temperature", c_float),
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [("k", c_void_p), ("v", c_void_p), ("kind", c_int64), ("capacity", c_int64)]


class Kernel:
    """A decoder's weights as the compiled code sees them: pointers, so they are kept once.

    It holds for as long as the parameters stay where they are; see `signature`.
    """

    def __init__(self, model: UnifiedModel, library: ctypes.CDLL):
        decoder, c = model.decoder, model.decoder.config
        self.library, self.threads = library, torch.get_num_threads()
        self._kept: list[Tensor] = []  # what the pointers point to
        self._scratch = torch.empty(0)
        self._caches: tuple[int, Cache, list] | None = None
        self._weights: dict[int, Weight] = {}
        layers = (Layer * c.layers)()
        block: Any
        for layer, block in zip(layers, decoder.layers, strict=True):
            for name in PRODUCTS:
                setattr(layer, name, self._weight(_part(block, name)))
            attention = block.self_attn
            norms = [block.input_layernorm, block.post_attention_layernorm]
            norms += [attention.q_norm, attention.k_norm]
            for name, norm in zip(NORMS, norms, strict=True):
                setattr(layer, name, None if norm is None else self._floats(norm.weight))
        vectors = (self._floats(decoder.norm.weight), self._floats(decoder._frequencies))
        sizes = (c.layers, c.dim, c.heads, c.kv_heads, c.head_dim, c.hidden)
        self.model = Model(layers, *vectors, *sizes, c.norm_eps)

    def step(self, x: Tensor, row: Tensor, slot: Tensor, cache: KVCache) -> Tensor:
        """x (M, D), each at slot[m] of cache row row[m] (int64) -> normed hidden (M, D), float32.

        The cache's lengths are the caller's to advance.
        """
        x = x.to(torch.float32, copy=True).contiguous()
        seen = self._cache(cache)
        model = ctypes.byref(self.model)
        size = self.library.scratch_size(model, len(x), cache.capacity)
        where = (x.data_ptr(), row.data_ptr(), slot.data_ptr(), self._room(size))
        self.library.step(model, ctypes.byref(seen), len(x), *where, self.threads)
        return x

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, row: Tensor, slot: Tensor, cache: KVCache
    ) -> Tensor:
        """Attention of one layer for M slots: q (M, H, E), k and v (M, K, E) -> (M, H E).

        Norms of heads and rotary positions are applied here; k and v are written to the cache.
        """
        dtype = q.dtype
        q, k, v = (part.float().contiguous() for part in (q, k, v))
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2])
        seen, model = self._cache(cache), ctypes.byref(self.model)
        size = len(q) * (q.shape[2] + q.shape[1] * cache.capacity)
        tensors = (row, slot, q, k, v, out)
        where = [t.data_ptr() for t in tensors] + [self._room(size)]
        self.library.attend(model, ctypes.byref(seen), layer, len(q), *where, self.threads)
        return out.to(dtype)

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x (M, in) -> (M, out), float32, by a linear layer of the model."""
        weight, x = self._known(layer), x.float().contiguous()
        out = torch.empty(len(x), weight.rows)
        where = (x.data_ptr(), out.data_ptr(), self._room(x.numel()))
        self.library.linear(ctypes.byref(weight), len(x), *where, self.threads)
        return out

    def head(self, first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        """x (M, in) -> (M, out), float32, by two linear layers of the model and GELU between."""
        a, b, x = self._known(first), self._known(last), x.float().contiguous()
        out = torch.empty(len(x), b.rows)
        room = self._room(len(x) * (a.rows + max(a.cols, b.cols)))
        ends = (x.data_ptr(), out.data_ptr(), room, self.threads)
        self.library.head(ctypes.byref(a), ctypes.byref(b), len(x), *ends)
        return out

    def choose(
        self, logits: Tensor, other: Tensor | None, guidance: float, temperature: float,
        seed: int, position: int,
    ) -> int:  # fmt: skip
        """What `sampling.choose` gives for one row (K,) of float32 logits, without filters."""
        found = c_int64()
        rest = None if other is None else other.data_ptr()
        self.library.choose(
            logits.data_ptr(), rest, guidance, len(logits), temperature, seed, position,
            self._room(len(logits)), ctypes.byref(found),
        )  # fmt: skip
        return found.value

    def draw(
        self, how: Drawing, cache: KVCache, tries: list[list[int]], rows: list[list[int]],
        seeds: list[int], places: list[int], left: list[int], passes: int,
    ) -> tuple[list[list[int]], list[list[int]], Tensor]:  # fmt: skip
        """The next codes of N pictures under way, guesses of those that follow them, and by how
        much each row of the cache is longer then, (R,).

        tries: N windows of one size, each the last code and guesses of those that follow. rows: of
        each picture, its own and that of its unguided prompt; together all of the cache. places: of
        the first codes that are chosen. left: codes to come. Ends early with the first picture. The
        cache's lengths are the caller's to advance, by the codes chosen.
        """
        lines = [[own[0] for own in rows], [own[-1] for own in rows], seeds, places, left]
        numbers, guess = torch.tensor(lines), torch.tensor(tries)
        count, window = guess.shape
        room, made = passes * window, torch.zeros(count, dtype=torch.int64)
        chosen = torch.empty(count, room, dtype=torch.int64)
        length, slots = cache.length.clone(), cache.rows * window
        model, head, inner = ctypes.byref(self.model), how.last.rows, how.first.rows
        size = self.library.scratch_size(model, slots, cache.capacity)
        size = max(size, slots * (inner + max(inner, how.first.cols)), count * window * head)
        scratch = self._room(size + slots * (self.model.dim + head))
        self.library.draw(
            model, ctypes.byref(self._cache(cache)), ctypes.byref(how), cache.rows,
            length.data_ptr(), count, window, passes, numbers.data_ptr(), guess.data_ptr(),
            made.data_ptr(), chosen.data_ptr(), room, scratch, self.threads,
        )  # fmt: skip
        codes = [line[:n] for line, n in zip(chosen.tolist(), made.tolist(), strict=True)]
        return codes, guess[:, 1:].tolist(), length - cache.length

    def drawing(
        self, table: Tensor, first: nn.Module, last: nn.Module, guidance: float, temperature: float
    ) -> Drawing:
        """What `draw` wants to know: a code's vector (codes, D), the head, how codes are chosen."""
        self._kept.append(table)
        codes = Weight(table.data_ptr(), None, None, KINDS[table.dtype], *table.shape)
        return Drawing(codes, self._known(first), self._known(last), guidance, temperature)

    def _known(self, layer: nn.Module) -> Weight:
        if id(layer) not in self._weights:
            self._weights[id(layer)] = self._weight(layer)
        return self._weights[id(layer)]

    def _weight(self, layer: Any) -> Weight:
        rows, cols = layer.weight.shape
        scale = self._floats(layer.scale) if isinstance(layer, Int8Linear) else None
        bias = None if layer.bias is None else self._floats(layer.bias)
        weight = layer.weight.detach()
        self._kept.append(weight)  # so that the memory stays, should the model let go of it
        return Weight(weight.data_ptr(), scale, bias, KINDS[weight.dtype], rows, cols)

    def _floats(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _cache(self, cache: KVCache) -> Cache:
        if self._caches is None or self._caches[0] != id(cache.k):
            count = len(cache.k)
            k = (c_void_p * count)(*[layer.data_ptr() for layer in cache.k])
            v = (c_void_p * count)(*[layer.data_ptr() for layer in cache.v])
            kind = KINDS[cache.k[0].dtype]
            made = Cache(ctypes.addressof(k), ctypes.addressof(v), kind, cache.capacity)
            self._caches = (id(cache.k), made, [k, v, cache.k])
        return self._caches[1]

    def _room(self, floats: int) -> int:
        if len(self._scratch) < floats:
            self._scratch = torch.empty(floats)
        return self._scratch.data_ptr()


def make_kernel(model: UnifiedModel) -> Kernel | None:
    """The kernel of a model; None where it has none (its device, dtype or sizes, no compiler)."""
    weights = [_part(block, name) for block in model.decoder.layers for name in PRODUCTS]
    heads = [m for m in (getattr(model, "image_head", None),) if m is not None]
    weights += [model.text_head, *(part for head in heads for part in (head.proj, head.out))]
    for layer in weights:
        if type(layer) not in (nn.Linear, Int8Linear):
            return None
        w = layer.weight
        plain = type(w) in (nn.Parameter, Tensor) and w.device.type == "cpu" and w.is_contiguous()
        if not plain or w.dtype not in KINDS or w.shape[1] % LANES:
            return None
    c = model.decoder.config
    if model.decoder.embed_tokens.weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if c.head_dim % 2 or (library := load_library()) is None:
        return None
    return Kernel(model, library)


def free_threads() -> int:
    """As many threads as torch has; one where others keep the cores busy, as a team would wait."""
    cores = os.cpu_count() or 1
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > cores + 0.5
    return 1 if busy else torch.get_num_threads()


def signature(model: nn.Module) -> tuple:
    """Changes where a parameter is replaced, moved, or written to."""
    return tuple(_state(tensor) for tensor in _tensors(model))


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel.cpp, from the cache or built now; None, with one log line, without."""
    if os.environ.get("UNIMM_KERNEL") == "0":
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines() or [""]
        log.warning("no C++ kernel, torch alone computes (slower): %s", lines[0][:200])
        return None
    pointers = [c_void_p] * 8
    library.scratch_size.restype = c_int64
    library.scratch_size.argtypes = [c_void_p, c_int64, c_int64]
    library.step.argtypes = [c_void_p, c_void_p, c_int64, *pointers[:4], c_int]
    library.attend.argtypes = [c_void_p, c_void_p, c_int64, c_int64, *pointers[:7], c_int]
    library.linear.argtypes = [c_void_p, c_int64, *pointers[:3], c_int]
    library.head.argtypes = [c_void_p, c_void_p, c_int64, *pointers[:3], c_int]
    library.draw.argtypes = [
        *pointers[:3], c_int64, c_void_p, *[c_int64] * 3, *pointers[:4], c_int64, c_void_p, c_int,
    ]  # fmt: skip
    library.choose.argtypes = [
        c_void_p, c_void_p, c_float, c_int64, c_float, c_int64, c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    return library


def build() -> Path:
    """Compile kernel.cpp for this processor, once for each version of it; the library's path."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    named = [compiler, *FLAGS, _processor(), SOURCE.read_text()]
    digest = hashlib.sha256("\0".join(named).encode()).hexdigest()[:16]
    folder = Path(cpp_extension.get_default_build_root()) / "unimm"
    library = folder / f"kernel-{digest}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "kernel.o"
        made = built.with_suffix(".so")
        # Two steps: linked with -ffast-math, it would change the arithmetic of the whole process.
        for words in ([*FLAGS, "-c", str(SOURCE), "-o", str(built)],
                      ["-shared", "-fopenmp", str(built), "-o", str(made)]):  # fmt: skip
            subprocess.run([compiler, *words], check=True, capture_output=True, text=True)
        os.replace(made, library)
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _part(block: Any, name: str) -> Any:
    parent = block.mlp if name.startswith(("gate", "up", "down")) else block.self_attn
    return getattr(parent, name)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (t for t in module._parameters.values() if t is not None)
        yield from (t for t in module._buffers.values() if t is not None)


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
