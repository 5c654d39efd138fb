"""Pictures alone, on a GPU: a code is one launch of a CUDA graph, and the host waits for none.

All that changes from code to code lies in buffers of fixed shape on the device, so that every step
is the same work and can be recorded: the decoder over the whole of a static cache (slots that a
row has not filled are masked), guidance, noise, choice, and what the next step starts from.
Without a graph the same step gives the same codes, one operation at a time.
"""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm.inference.sampling import Settings, choose, guide
from unimm.inference.stepper import Stepper
from unimm.model.decoder import KVCache
from unimm.model.unified import CODE

ROUND = 64  # capacities are multiples of it: prompts of about one length share a graph
WARM = 2  # steps before a capture: libraries set themselves up, which no graph may hold

Step = Callable[[], object]

log = logging.getLogger(__name__)

# Shapes: N pictures, R rows (N, or 2 N with the unguided prompts behind), S slots of the cache,
# D dim, H heads, K kv heads, E head dim.


class Drawer:
    """Draws the pictures of a call. The loop of the last call stays for one that is like it."""

    def __init__(self, stepper: Stepper):
        self.stepper = stepper
        self.kept: tuple[tuple, Loop] | None = None

    def draw(
        self, filled: KVCache, hidden: Tensor, seeds: list[int], count: int, settings: Settings,
        every: int, compiler: Callable[[Step], Step] | None = None,
    ) -> Iterator[list[list[int]]]:  # fmt: skip
        """Prefilled rows R and their last hidden states (R, D) -> `count` codes of N pictures.

        Yields N lists of at most `every` new codes; only then does the host wait for the device.
        """
        capacity = math.ceil((filled.longest + count - 1) / ROUND) * ROUND
        shape = (filled.rows, len(seeds), count, capacity)
        key = (self.stepper.signature, shape, settings, compiler)
        kept, self.kept = self.kept, None  # while it is in use, a call in between has its own
        if kept is None or kept[0] != key:
            kept = None  # its memory is free before that of the next is taken
            kept = key, Loop(self.stepper, shape, settings, compiler)
        loop = kept[1]
        try:
            loop.begin(filled, hidden, seeds)
            del filled, hidden
            for start in range(0, count, every):
                end = min(start + every, count)
                for _ in range(max(start, 1), end):
                    loop.launch()
                yield loop.codes[:, start:end].tolist()
        finally:
            self.kept = kept


class Loop:
    """Buffers on the device, and the step that leads from one code of every picture to the next."""

    def __init__(
        self,
        stepper: Stepper,
        shape: tuple[int, int, int, int],
        settings: Settings,
        compiler: Callable[[Step], Step] | None = None,
    ):
        self.model, self.settings, device = stepper.model, settings, stepper.device
        rows, pictures, count, capacity = shape
        c = self.model.decoder.config
        sizes = (c.layers, rows, c.kv_heads, c.head_dim, capacity)
        self.cache = StaticCache(*sizes, stepper.dtype, device)
        self.embed = stepper.code_embedding()
        self.slots = torch.arange(capacity, device=device)
        numbers = partial(torch.zeros, dtype=torch.int64, device=device)
        self.seeds = numbers(pictures)
        self.place = numbers(1)  # of the code that is chosen next
        self.codes = numbers(pictures, count + WARM)  # a warm-up writes too
        self.ids = numbers(rows)  # the codes that go in next
        self.launch = captured(self.step if compiler is None else compiler(self.step), device)

    def begin(self, filled: KVCache, hidden: Tensor, seeds: list[int]) -> None:
        """Take in prefilled rows, and choose the first codes by their hidden states (R, D)."""
        self.cache.load(filled)
        self.seeds.copy_(torch.tensor(seeds))
        self.place.zero_()
        self.choose(hidden)

    def step(self) -> None:
        """The codes just chosen go through the decoder, and the next ones are chosen."""
        self.choose(self.forward())

    def forward(self) -> Tensor:
        """ids (R,), each behind its row's slots -> normed hidden states (R, D)."""
        decoder = self.model.decoder
        x = self.embed(self.ids)[:, None]  # (R, 1, D)
        at = self.cache.length[:, None]  # (R, 1)
        beyond = self.slots > at[:, None, None]  # (R, 1, 1, S)
        mask = x.new_zeros(beyond.shape).masked_fill(beyond, -math.inf)
        cos, sin = decoder.rope(at, x.dtype)
        for layer in decoder.layers:
            x = layer(x, cos, sin, partial(attend, mask=mask), self.cache)
        self.cache.length.add_(1)
        return decoder.norm(x)[:, 0]

    def choose(self, hidden: Tensor) -> None:
        """Hidden states (R, D) -> a code of every picture, into `codes` and `ids`."""
        pictures = len(self.seeds)
        logits = self.model.logits(hidden, CODE).float()  # (R, codes)
        if len(logits) > pictures:
            logits = guide(logits[:pictures], logits[pictures:], self.settings.guidance)
        places = self.place.expand(pictures)
        chosen = choose(logits, self.seeds, places, self.settings.temperature)  # (N,)
        self.codes.scatter_(1, places[:, None], chosen[:, None])
        self.ids.view(-1, pictures).copy_(chosen)  # both branches
        self.place.add_(1)


class StaticCache(KVCache):
    """A KVCache whose lengths the device alone knows: its shapes and addresses never change."""

    def load(self, filled: KVCache) -> None:
        """Begin with the rows of another cache; what is left of earlier ones lies behind them."""
        pairs = zip(self.k + self.v, filled.k + filled.v, strict=True)
        for ours, theirs in pairs:
            ours[:, :, : filled.longest] = theirs[:, :, : filled.longest]
        self.length.copy_(filled.length)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (R, K, 1, E) behind each row's length; returns all slots (R, K, S, E)."""
        where = self.length[:, None, None, None].expand_as(k)
        return self.k[layer].scatter_(2, where, k), self.v[layer].scatter_(2, where, v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (R, H, 1, E), k and v (R, K, S, E), mask (R, 1, 1, S) added to the scores -> (R, H, 1, E).

    The H / K queries of a key head stand where queries of one head would: no key is repeated, and
    SDPA's fused kernels, which take a mask but no groups, serve grouped queries too.
    """
    groups = q.reshape(*k.shape[:2], -1, q.shape[-1])  # (R, K, H / K, E)
    return F.scaled_dot_product_attention(groups, k, v, attn_mask=mask).reshape(q.shape)


def captured(step: Step, device: torch.device) -> Step:
    """What does the work of `step`: on a GPU by one launch, if it can be captured; else itself."""
    if device.type != "cuda":
        return step
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
        try:  # "thread_local": other threads may go on using the device
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or [""]
            log.warning("no CUDA graph, the steps are launched singly (slower): %s", lines[0][:200])
            return step
        finally:
            before.wait_stream(stream)
    return graph.replay
