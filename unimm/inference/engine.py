"""The one generation loop: words and pictures, one slot at a time, through one cache.

Requests of any length, kind and settings share a step; both guidance branches are rows of it, and
a request that is finished leaves its rows. Of the two heads only the one that is needed is
evaluated. With a window, a step tries several codes of each picture: the noise of a code is a
function of (seed, place, code), so a guess that comes out as guessed is what one code at a time
would have given (coupled Jacobi decoding, arXiv 2410.01699 without its randomness), to the bit by
the kernel's products, and up to the rounding of a product of more rows by torch's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimm.data.processor import Processor, Sample
from unimm.inference.graphs import Drawer, Step
from unimm.inference.prefill import Prompts, place, slot_keys
from unimm.inference.sampling import Settings, choose
from unimm.inference.stepper import Stepper
from unimm.memory import keep_freed
from unimm.model.decoder import KVCache
from unimm.model.unified import CODE, TEXT, UnifiedModel

MAX_IMAGES = 4  # pictures that one free answer may hold
AT_ONCE = 8  # codes that are fetched together from a device; for `run`, steps by one call


@dataclass
class Request:
    """A prompt that ends where the answer begins.

    mode: "image" draws one picture (the prompt ends with begin-of-image), "text" writes words,
    "any" leaves the choice to the model. seed: of this request alone.
    """

    sample: Sample
    mode: str
    seed: int = 0


@dataclass
class Answer:
    """What a request got so far: runs of text ids and of codes, in order."""

    parts: list[tuple[int, list[int]]] = field(default_factory=list)  # (TEXT or CODE, ids)
    done: bool = False

    @property
    def codes(self) -> list[int]:
        """The codes of the last picture."""
        return next((ids for kind, ids in reversed(self.parts) if kind == CODE), [])

    @property
    def text(self) -> list[int]:
        return [i for kind, ids in self.parts if kind == TEXT for i in ids]

    def add(self, kind: int, token: int, new: bool = False) -> None:
        if new or not self.parts or self.parts[-1][0] != kind:
            self.parts.append((kind, []))
        self.parts[-1][1].append(token)


class Engine:
    """Runs requests on a model: a call at a time (`run`, `stream`) or as they come (`add`, `step`).

    What a request gets depends on its seed alone, not on what else is under way. `window`: codes
    of each picture that one step may try (exact parallel decoding); None: `Stepper.window`.

    static: whether a call for pictures alone goes through steps of fixed shape (graphs.py); None:
    on a GPU. compiler: what these steps are compiled with, such as torch.compile; None: nothing.
    """

    static: bool | None = None
    compiler: Callable[[Step], Step] | None = None

    def __init__(self, model: UnifiedModel, processor: Processor, window: int | None = None):
        if window is not None and window < 1:
            raise ValueError("window must be 1 or more")
        keep_freed()
        self.model, self.processor, self.window = model.eval(), processor, window
        t = processor.template
        allowed = torch.from_numpy(processor.is_word(np.arange(model.config.decoder.vocab_size)))
        allowed[t.end_of_turn] = True
        self._never = {"text": ~allowed}
        self._never["any"] = ~allowed.index_fill(0, torch.tensor([t.begin_image]), True)
        self._stepper = Stepper(model)
        self._prompts = Prompts(self._stepper, processor)
        self._drawer = Drawer(self._stepper)
        self._pool: _Pool | None = None
        self._count = 0

    def run(self, requests: Sequence[Request], settings: Settings) -> list[Answer]:
        """All requests to their end."""
        last: list[Answer] = []
        fixed = self._fixed(requests, settings)
        whole = self._pictures(requests, settings)
        for answers in whole if fixed else self._slots(requests, settings, AT_ONCE):
            last = answers
        return last

    def stream(self, requests: Sequence[Request], settings: Settings) -> Iterator[list[Answer]]:
        """Yields the answers (the same objects, growing) after every step.

        Raises ValueError where a prompt leaves no room in the context for its answer.
        """
        if self._fixed(requests, settings):
            yield from self._pictures(requests, settings, AT_ONCE)
        else:
            yield from self._slots(requests, settings, 1)

    def add(self, request: Request, settings: Settings) -> int:
        """Queue a request; the next `step` takes it in. Returns its id.

        Raises ValueError where its prompt leaves no room in the context for its answer.
        """
        self._pool = self._pool or _Pool(self)
        self._count += 1
        self._pool.waiting.append((self._count, _Job(self, request, settings)))
        return self._count

    @torch.inference_mode()
    def step(self) -> dict[int, Answer]:
        """One slot more, or several codes, for every request under way: their answers by id, the
        finished ones too."""
        return {} if self._pool is None else self._pool.step()

    @torch.inference_mode()
    def cancel(self, request: int) -> None:
        """Forget a request, queued or under way; an id that is not there is no error."""
        if self._pool is not None:
            self._pool.drop([request])

    def _fixed(self, requests: Sequence[Request], settings: Settings) -> bool:
        """Whether a call goes through steps of fixed shape: for pictures alone, without filters."""
        device = self._stepper.device.type
        if not (device == "cuda" if self.static is None else self.static):
            return False
        plain = not settings.top_k and settings.top_p == 1 and self.window in (None, 1)
        alone = not self.processor.gridded and not torch.is_autocast_enabled(device)
        plain = plain and all(r.sample.kept is None for r in requests)
        return plain and alone and {r.mode for r in requests} == {"image"}

    @torch.inference_mode()
    def _pictures(
        self, requests: Sequence[Request], settings: Settings, every: int | None = None
    ) -> Iterator[list[Answer]]:
        """`stream` by steps of fixed shape: the host fetches `every` so many codes, or all."""
        jobs = [_Job(self, request, settings) for request in requests]
        samples, count = [request.sample for request in requests], len(jobs[0].plan)
        samples += [job.bare for job in jobs if job.bare is not None]
        self._refresh()
        filled = self._prompts.fill(samples, max(map(len, samples)))
        new = self._drawer.draw(
            *filled, [r.seed for r in requests], count, settings, every or count, self.compiler
        )
        del filled  # what it holds is in the drawer's cache after the first code
        for fetched in new:
            for codes in zip(*fetched, strict=True):  # one of every picture
                for job, code in zip(jobs, codes, strict=True):
                    job.add_slot(code)
                yield [job.answer for job in jobs]

    @torch.inference_mode()
    def _slots(
        self, requests: Sequence[Request], settings: Settings, every: int
    ) -> Iterator[list[Answer]]:
        """`stream`, of at most `every` slots a step."""
        pool = _Pool(self, every)
        jobs = [_Job(self, request, settings) for request in requests]
        pool.waiting += list(enumerate(jobs))
        while pool.busy:
            pool.step()
            yield [job.answer for job in jobs]

    def _refresh(self) -> None:
        """Make the weights ready; what was computed with others is forgotten."""
        if self._stepper.refresh():
            self._prompts.kept = self._drawer.kept = None


class _Job:
    """A request under way: what it has got, and what it may still get."""

    def __init__(self, engine: Engine, request: Request, settings: Settings):
        if engine.processor.gridded and request.mode == "any":
            request = replace(request, mode="text")  # it draws where it is told to
        self.request, self.settings, self.answer = request, settings, Answer()
        self.drawing = request.mode == "image"
        self.drawn = self.at = 0  # codes of the picture under way; slots of it
        self.pictures = int(self.drawing)
        self.written = 0  # text tokens so far
        self.rows: list[int] = []  # of the cache: the prompt's, and the unguided prompt's
        self.draft: list[int] = []  # guesses of the slots `at` and on
        self.fed: list[tuple[int, int]] = []  # ids and kinds that followed the prompt
        self.template = engine.processor.template
        self.plan = planned(engine.processor) if request.mode != "text" else []
        self.sample, kept = request.sample, request.sample.kept
        self.end = len(self.plan)  # slots from here on are not drawn but kept
        if self.drawing and kept is not None and (kept < 0).any():
            first, last = (int(at) for at in np.flatnonzero(kept < 0)[[0, -1]])
            self.end = self.plan.index(last) + 1
            if not engine.processor.gridded:
                for code in kept[:first].tolist():  # they are read with the prompt
                    self.answer.add(CODE, code)
                self.sample, self.drawn, self.at = self.sample.drawn_on(kept[:first]), first, first
        self.guided = settings.guidance != 1 and request.mode != "text"
        self.bare = engine.processor.unguided(self.sample) if self.guided else None
        length, context = len(self.sample), engine.model.config.decoder.max_positions
        length = max(length, 0 if self.bare is None else len(self.bare))
        least = self.left() if self.drawing else 1
        if length + least > context:
            raise ValueError(
                f"the prompt takes {length} slots and its answer at least {least}; "
                f"the context of this model has {context}: shorten the prompt"
            )
        budget = self.left() if self.drawing else settings.max_text
        budget += MAX_IMAGES * (len(self.plan) + 2) * (request.mode == "any")
        self.limit = min(context, length + budget)  # slots of its rows
        self.room = self.limit - length

    def left(self) -> int:
        """Slots of the picture under way that are to come; 0 while words are written."""
        return self.end - self.at if self.drawing else 0

    def known(self, at: int) -> tuple[int, int] | None:
        """The token and kind of a slot of the picture that is not drawn but kept, or no code."""
        place, kept = self.plan[at], self.request.sample.kept
        if place < 0:
            return -1 - place, TEXT
        return None if kept is None or kept[place] < 0 else (int(kept[place]), CODE)

    def given(self) -> int:
        """How many slots that come next are known."""
        ahead = range(self.at, self.at + self.left())
        return next((k for k, at in enumerate(ahead) if self.known(at) is None), len(ahead))

    def tries(self, last: tuple[int, int], window: int) -> tuple[list[int], list[int]]:
        """Tokens and kinds of a window: the last one chosen, and what is known or guessed next."""
        ids, kinds = [last[0]], [last[1]]
        guess = last[0] if last[1] == CODE else 0
        for k in range(window - 1):
            found = self.known(self.at + k)
            token, kind = found or (self.draft[k] if k < len(self.draft) else guess, CODE)
            guess = token if kind == CODE else guess
            ids.append(token)
            kinds.append(kind)
        return ids, kinds

    def may_draw(self) -> bool:
        """Whether it may begin a picture now: allowed, and with room for all its codes."""
        fits = self.room > len(self.plan) + 1
        return self.request.mode == "any" and self.pictures < MAX_IMAGES and fits

    def add_slot(self, token: int) -> tuple[int, int]:
        """The next slot of the picture: a code, or what must stand between codes."""
        place, self.at = self.plan[self.at], self.at + 1
        if place < 0:
            return self._follow(token, TEXT)
        self.answer.add(CODE, token, new=self.drawn == 0)
        self.drawn += 1
        if self.request.mode == "image" and self.at == self.end:
            kept = self.request.sample.kept
            for given in () if kept is None else kept[place + 1 :].tolist():
                self.answer.add(CODE, given)
            self.answer.done = True
        return self._follow(token, CODE)

    def end_image(self) -> tuple[int, int]:
        self.drawing = False
        return self._follow(self.template.end_image, TEXT)

    def add_word(self, word: int, settings: Settings) -> tuple[int, int]:
        slot = self._follow(word, TEXT)
        if word == self.template.begin_image:
            self.drawing, self.drawn, self.at = True, 0, 0
            self.pictures += 1
        elif word == self.template.end_of_turn:
            self.answer.done = True
        else:
            self.answer.add(TEXT, word)
        self.written += 1
        if self.written >= settings.max_text or self.room <= 0:
            self.answer.done = self.answer.done or not self.drawing
        return slot

    def _follow(self, token: int, kind: int) -> tuple[int, int]:
        self.room -= 1
        self.fed.append((token, kind))
        return token, kind


def planned(processor: Processor) -> list[int]:
    """The slots of a picture that is drawn: places of codes, and -1 - word for what is between."""
    slots = [0]
    for k in range(1, processor.codes_per_image):
        slots += [*(-1 - token for token in processor.before_code(k)), k]
    return slots


class _Pool:
    """Jobs that share steps. Their rows are the first of one cache, without gaps."""

    def __init__(self, engine: Engine, at_once: int = 1):
        self.engine, self.stepper, self.at_once = engine, engine._stepper, at_once
        self.jobs: dict[int, _Job] = {}
        self.waiting: list[tuple[int, _Job]] = []
        self.cache: KVCache | None = None
        self.next: dict[int, tuple[int, int]] = {}  # by job: the slot that goes in next, and kind

    @property
    def busy(self) -> bool:
        return bool(self.jobs or self.waiting)

    def step(self) -> dict[int, Answer]:
        """Advance what is under way, take in what waits, and choose a slot (or more) for each."""
        hidden: dict[int, list[Tensor]] = {}  # by job and branch: (window, D)
        if not self.jobs:
            self.engine._refresh()
        elif not self._draw(window := self._window()):
            hidden = self._advance(window)
        if self.waiting:
            hidden |= self._admit()
        answers = {name: job.answer for name, job in self.jobs.items()}
        self._choose(hidden)
        done = [name for name, job in self.jobs.items() if job.answer.done]
        self._keep(done)
        self.drop(done)
        return answers

    def drop(self, names: Sequence[int]) -> None:
        """Forget jobs; rows from the end move into the places of theirs."""
        self.waiting = [(name, job) for name, job in self.waiting if name not in names]
        gone = {row for name in names if name in self.jobs for row in self.jobs[name].rows}
        for name in names:
            self.jobs.pop(name, None)
            self.next.pop(name, None)
        if not gone or self.cache is None:
            return
        kept = [row for row in range(self.cache.rows) if row not in gone]
        holes = sorted(row for row in gone if row < len(kept))
        movers = [row for row in kept if row >= len(kept)]
        moved = dict(zip(movers, holes, strict=True))
        if moved:
            place(self.cache, holes, self.cache, movers)
        for job in self.jobs.values():
            job.rows = [moved.get(row, row) for row in job.rows]
        self.cache = first_rows(self.cache, len(kept))

    def _window(self) -> int:
        """How many slots of each job to try: one, unless all draw; all that are known at least."""
        assert self.cache is not None
        if self.waiting:  # their rows join the cache before it is known which of a window count
            return 1
        jobs = list(self.jobs.values())
        window = self.engine.window or self.stepper.window(self.cache.rows)
        window = max(window, 1 + min(job.given() for job in jobs))
        return max(1, min(window, *(job.left() for job in jobs)))

    def _draw(self, window: int) -> bool:
        """Whether all jobs do nothing but draw, and the kernel has drawn for them."""
        jobs = list(self.jobs.values())
        s, guided = jobs[0].settings, jobs[0].guided
        alike = all(job.settings == s and job.guided == guided for job in jobs)
        if not alike or s.top_k or s.top_p < 1 or self.cache is None:
            return False
        free = all(job.left() and job.request.sample.kept is None for job in jobs)
        free = free and not self.engine.processor.gridded
        if not free or any(kind != CODE for _, kind in self.next.values()):
            return False
        found = self.stepper.draw(
            self.cache, [job.tries(self.next[name], window)[0] for name, job in self.jobs.items()],
            [job.rows for job in jobs], [job.request.seed for job in jobs],
            [job.drawn for job in jobs], [job.left() for job in jobs],
            s.guidance, s.temperature, self.at_once,
        )  # fmt: skip
        if found is None:
            return False
        for name, codes, draft in zip(self.jobs, *found, strict=True):
            self.jobs[name].draft = draft
            for code in codes:
                self.next[name] = self.jobs[name].add_slot(code)
        return True

    def _admit(self) -> dict[int, list[Tensor]]:
        """Prefill what waits. Its last hidden states by job, (1, D) a branch."""
        names, jobs = [n for n, _ in self.waiting], [job for _, job in self.waiting]
        self.waiting = []
        samples = [job.sample for job in jobs]
        guided = [job for job in jobs if job.bare is not None]
        samples += [job.bare for job in guided if job.bare is not None]
        limit = max(job.limit for job in jobs)
        begin = 0 if self.cache is None else self.cache.rows
        if self.cache is not None and begin:
            limit = max(limit, self.cache.capacity)
        filled, last = self.engine._prompts.fill(samples, limit)
        if self.cache is None or not begin:
            self.cache = filled
        else:
            self.cache = joined(self.cache, filled)
        for k, job in enumerate(jobs):
            job.rows = [begin + k]
        for k, job in enumerate(guided):
            job.rows.append(begin + len(jobs) + k)
        self.jobs.update(zip(names, jobs, strict=True))
        return {
            name: [last[row - begin, None] for row in job.rows]
            for name, job in zip(names, jobs, strict=True)
        }

    def _advance(self, window: int) -> dict[int, list[Tensor]]:
        """The chosen slots, and guesses behind them, through the decoder: (window, D) a branch."""
        assert self.cache is not None
        ids, kinds = [0] * self.cache.rows * window, [TEXT] * self.cache.rows * window
        for name, job in self.jobs.items():
            tried, of = job.tries(self.next[name], window)
            job.draft = tried[1:]
            for row in job.rows:
                ids[row * window : (row + 1) * window] = tried
                kinds[row * window : (row + 1) * window] = of
        device = self.stepper.device
        x = self.stepper.embed(torch.tensor(ids, device=device), kinds)  # (R * window, D)
        hidden = self.stepper.forward(x, self.cache, window).view(-1, window, x.shape[-1])
        if window == 1:
            self.cache.advance(1)
        return {name: [hidden[row] for row in job.rows] for name, job in self.jobs.items()}

    def _choose(self, hidden: dict[int, list[Tensor]]) -> None:
        """The next slots of every job: words and codes of all with the same settings together."""
        drawing: dict[Any, list[int]] = {}
        writing: dict[Any, list[int]] = {}
        for name in hidden:
            job = self.jobs[name]
            if not job.drawing:
                writing.setdefault(job.settings, []).append(name)
            elif job.left():
                drawing.setdefault(job.settings, []).append(name)
            else:
                self.next[name] = job.end_image()
        accepted: dict[int, int] = {}
        for settings, names in drawing.items():
            for name, slots in zip(names, self._slots(names, hidden, settings), strict=True):
                accepted[name] = self._accept(name, slots)
        for settings, names in writing.items():
            for name, word in zip(names, self._words(names, hidden, settings), strict=True):
                self.next[name] = self.jobs[name].add_word(word, settings)
        self._settle(hidden, accepted)

    def _accept(self, name: int, slots: list[int]) -> int:
        """Slots found by a window: those whose predecessors were guessed right count."""
        job, right = self.jobs[name], 1
        while right < len(slots) and job.draft[right - 1] == slots[right - 1]:
            right += 1
        for token in slots[:right]:
            self.next[name] = job.add_slot(token)
        job.draft = slots[right:]
        return right

    def _settle(self, hidden: dict[int, list[Tensor]], accepted: dict[int, int]) -> None:
        """After a window, each row of the cache keeps the slots that were right."""
        if self.cache is None or not any(len(h[0]) > 1 for h in hidden.values()):
            return
        counts = torch.zeros(self.cache.rows, dtype=torch.int64)
        for name, branches in hidden.items():
            if len(branches[0]) > 1:
                counts[self.jobs[name].rows] = accepted[name]
        self.cache.advance(counts.to(self.cache.length.device))

    def _slots(
        self, names: list[int], hidden: dict[int, list[Tensor]], s: Settings
    ) -> list[list[int]]:
        """What follows each slot of a window, of jobs with settings `s`: known, or chosen codes."""
        jobs = [self.jobs[name] for name in names]
        known = [
            [job.known(job.at + k) for k in range(len(hidden[name][0]))]
            for name, job in zip(names, jobs, strict=True)
        ]
        free = [[k for k, slot in enumerate(line) if slot is None] for line in known]
        guided = jobs[0].guided
        branches = [
            hidden[name][branch][own]
            for branch in range(1 + guided)
            for name, own in zip(names, free, strict=True)
        ]
        chosen: list[int] = []
        if any(free):
            logits = self.stepper.logits(torch.cat(branches), CODE)  # (M [* 2], K)
            ours, other = logits.chunk(2) if guided else (logits, None)
            each = [(job, k) for job, own in zip(jobs, free, strict=True) for k in own]
            seeds = [job.request.seed for job, _ in each]
            places = [job.plan[job.at + k] for job, k in each]
            chosen = self.stepper.choose(
                ours, other, s.guidance, seeds, places, s.temperature, s.top_k, s.top_p
            )
        codes = iter(chosen)
        return [[next(codes) if slot is None else slot[0] for slot in line] for line in known]

    def _words(self, names: list[int], hidden: dict[int, list[Tensor]], s: Settings) -> list[int]:
        jobs = [self.jobs[name] for name in names]
        logits = self.stepper.logits(torch.cat([hidden[name][0] for name in names]), TEXT)
        device = logits.device
        never = [self.engine._never["any" if job.may_draw() else "text"] for job in jobs]
        logits = logits.masked_fill(torch.stack(never).to(device), -torch.inf)
        seeds = torch.tensor([job.request.seed for job in jobs], device=device)
        places = torch.tensor([job.written for job in jobs], device=device)
        return choose(logits, seeds, places, s.text_temperature, stream=1).tolist()

    def _keep(self, done: list[int]) -> None:
        """Of a conversation on its own that may go on, keep its row for the next turn."""
        if len(self.jobs) != 1 or self.cache is None:
            return
        for name in done:
            job = self.jobs[name]
            if job.request.mode == "any" and not self.waiting:
                fed = np.array([i + (kind << 40) for i, kind in job.fed], dtype=np.int64)
                keys = np.concatenate([slot_keys(job.request.sample), fed])
                length = int(self.cache.length[job.rows[0]])
                row = self.engine.model.decoder.new_cache(1, length)
                place(row, [0], self.cache, job.rows[:1])
                self.engine._prompts.kept = keys[:length], row


def first_rows(cache: KVCache, count: int) -> KVCache:
    """The first rows of a cache, in the same memory."""
    view = KVCache.__new__(KVCache)
    view.k, view.v = [k[:count] for k in cache.k], [v[:count] for v in cache.v]
    view.capacity, view.length = cache.capacity, cache.length[:count]
    view._measure()
    view._slots = None
    return view


def joined(a: KVCache, b: KVCache) -> KVCache:
    """A new cache with the rows of both, as roomy as the roomier."""
    both = KVCache.__new__(KVCache)
    both.capacity = max(a.capacity, b.capacity)
    shape = (a.rows + b.rows, a.k[0].shape[1], both.capacity, a.k[0].shape[3])
    both.k = [k.new_zeros(shape) for k in a.k]
    both.v = [v.new_zeros(shape) for v in a.v]
    both.length = a.length.new_zeros(shape[0])
    both._slots = None
    place(both, range(a.rows), a, range(a.rows))
    place(both, range(a.rows, shape[0]), b, range(b.rows))
    return both
