"""Several sources as one stream of samples, in exact proportions.

Which source gives the n-th sample follows from the weights alone (the source that is furthest
behind its share), so a run that resumes, or runs on several ranks, sees the same stream.
"""

import math
import queue
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Origin = tuple[str, int | str]  # a source, and the index there or the row itself in short
TRIES, STRIDE = 20, 10_000_019  # a broken row's place is taken by the one STRIDE further on


class Mixture:
    """Draws samples from named sources.

    sources: name -> object with `[i]`, or a `Stream`. weights: name -> share (any sum).
    prepare(item, rng): what turns an item into a sample, with a generator that depends on
    (seed, position in the stream) alone. A row that raises ValueError or OSError is left out and
    told to note(name, reason); a source of which more than `most_broken` is, stops the run.
    workers: threads that read and prepare samples (a `Stream` is read by one), which changes none.
    """

    def __init__(
        self,
        sources: dict[str, Any],
        weights: dict[str, float],
        seed: int = 0,
        prepare: Callable[[Any, np.random.Generator], Any] | None = None,
        note: Callable[[str, str], None] | None = None,
        most_broken: float = 0.05,
        workers: int = 1,
    ):
        active = [name for name in sources if weights[name] > 0]
        if not active or min(weights.values()) < 0:
            raise ValueError("a mixture needs at least one positive weight and no negative one")
        total = sum(weights[name] for name in active)
        self.shares = {name: weights[name] / total for name in active}
        self.taken = dict.fromkeys(active, 0)
        self.position = 0
        self.sources, self.seed, self.prepare = sources, seed, prepare
        self.note, self.most_broken = note, most_broken
        self.seen, self.broken = dict.fromkeys(active, 0), dict.fromkeys(active, 0)
        self.pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self.lock = threading.Lock()  # of the two counters, and of `note`

    def next_name(self) -> tuple[str, int]:
        """The source of the next sample and its index there; moves the cursor on."""
        self.position += 1
        name = max(self.shares, key=lambda n: self.shares[n] * self.position - self.taken[n])
        self.taken[name] += 1
        return name, self.taken[name] - 1

    def skip(self, samples: int) -> None:
        """Go to where an undisturbed run is after so many samples; nothing is read."""
        for _ in range(samples):
            self.next_name()

    def take(self, count: int, rank: int = 0, ranks: int = 1) -> list[Any]:
        """This rank's part of the next `count` samples of the global stream."""
        return [sample for _, sample in self.draw(count, rank, ranks)]

    def draw(self, count: int, rank: int = 0, ranks: int = 1) -> list[tuple[Origin, Any]]:
        """As `take`, each sample with its source and the row there, or its index."""
        mine = []
        for offset in range(count):
            position = self.position
            name, index = self.next_name()
            if offset * ranks // count == rank:  # a run of them, in which all sources are
                mine.append((name, index, position))
        if self.pool is None:
            return [self._sample(*place) for place in mine]
        streams = self._streams()
        made = {k: self._sample(*place) for k, place in enumerate(mine) if place[0] in streams}
        rest = [k for k in range(len(mine)) if k not in made]
        samples = self.pool.map(lambda k: self._sample(*mine[k]), rest)
        made |= zip(rest, samples, strict=True)
        return [made[k] for k in range(len(mine))]

    def state(self) -> dict[str, Any]:
        """The cursor, JSON-able: a mixture that is given it with `restore` goes on from there."""
        counters = {"taken": self.taken, "seen": self.seen, "broken": self.broken}
        streams = {name: self.sources[name].state() for name in self._streams()}
        counts = {name: dict(count) for name, count in counters.items()}
        return {"position": self.position, **counts, "streams": streams, "sizes": self._sizes()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there; a source that has other rows than then is named on stderr."""
        for name, size in self._sizes().items():
            if (before := state.get("sizes", {}).get(name, size)) != size:
                print(
                    f"the data have changed: {name!r} has {size} rows, and had {before} before the "
                    "stop; the run goes on, but not as if it had never stopped",
                    file=sys.stderr,
                )
        self.position = state["position"]
        self.taken, self.seen, self.broken = (
            dict(state[name]) for name in ("taken", "seen", "broken")
        )
        for name in self._streams():
            self.sources[name].restore(state["streams"][name])

    def _sizes(self) -> dict[str, int]:
        """Of the sources that have one."""
        return {n: len(self.sources[n]) for n in self.taken if hasattr(self.sources[n], "__len__")}

    def _streams(self) -> list[str]:
        """The sources that are read in one direction, and know where they stand."""
        return [name for name in self.taken if hasattr(self.sources[name], "restore")]

    def _sample(self, name: str, index: int, position: int) -> tuple[Origin, Any]:
        for attempt in range(TRIES):
            with self.lock:
                self.seen[name] += 1
            try:
                place = index + attempt * STRIDE
                item = self.sources[name][place]
                if self.prepare is not None:
                    item = self.prepare(item, np.random.default_rng((self.seed, position)))
                named = getattr(self.sources[name], "named", None)
                return (name, named(place) if named else place), item
            except (ValueError, OSError) as error:
                reason = " ".join(str(error).split())
                with self.lock:
                    self.broken[name] += 1
                    if self.note is not None:
                        self.note(name, reason)
                if self.broken[name] > self.most_broken * max(100, self.seen[name]):
                    break
        raise ValueError(
            f"{self.broken[name]} of {self.seen[name]} samples of the source {name!r} are broken; "
            f"the last one: {reason} (most_broken={self.most_broken} is the share that may be)"
        )


def prefetch(make: Callable[[], Any], count: int, depth: int = 3) -> Generator[Any, None, None]:
    """`count` results of `make()`, made ahead in a thread, in order; its errors are raised here.

    Close it if it is not used up: a thread at work in torch must not meet the end of the process.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work() -> None:
        for _ in range(count):
            entry: tuple[Any, BaseException | None]
            try:
                entry = (make(), None)
            except BaseException as error:
                entry = (None, error)
            while not stop.is_set():
                try:
                    ready.put(entry, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or entry[1] is not None:
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(count):
            result, error = ready.get()
            if error is not None:
                raise error
            yield result
    finally:
        stop.set()
        thread.join()


def pieces(
    items: Sequence[Any], count: int, size: Callable[[Any], int] | None = None
) -> list[Sequence[Any]]:
    """`items` cut into at most `count` runs: of equal length (to within one), or, with `size`, in
    such places that padding each run to its largest item costs least (items in order of size),
    and among those in the most even ones: a run is what has to fit into memory.
    """
    if size is None:
        edges = [round(i * len(items) / count) for i in range(count + 1)]
        return [items[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]
    sizes = [size(item) for item in items]
    # cheapest[b]: slots of the first b items, their squares by run, and where runs end; once a run
    cheapest = [(0.0 if b == 0 else math.inf, 0, [0]) for b in range(len(items) + 1)]
    for _ in range(count):
        cheapest = [
            min(
                (cost + slots, squares + slots**2, [*edges, b] if b > a else edges)
                for a, (cost, squares, edges) in enumerate(cheapest[: b + 1])
                for slots in [(b - a) * sizes[b - 1] if b > a else 0]
            )
            for b in range(len(items) + 1)
        ]
    edges = cheapest[-1][2]
    return [items[a:b] for a, b in zip(edges, edges[1:], strict=False)]
