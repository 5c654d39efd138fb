"""The one generation loop: words and pictures, one slot at a time, through one cache.

Both guidance branches are rows of one batch; prompts of different lengths are padded on the right
and masked by the cache; of the two heads only the one that is needed is evaluated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unimm.data.processor import Processor, Sample
from unimm.inference.sampling import Settings, choose, guide
from unimm.model.unified import CODE, TEXT, UnifiedModel

MAX_IMAGES = 4  # pictures that one free answer may hold


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
    """Runs requests on a model. One object a model; holds no state between calls."""

    def __init__(self, model: UnifiedModel, processor: Processor):
        self.model, self.processor = model.eval(), processor
        t = processor.template
        allowed = torch.from_numpy(processor.is_word(np.arange(model.config.decoder.vocab_size)))
        allowed[t.end_of_turn] = True
        self._never = {"text": ~allowed}
        self._never["any"] = ~allowed.index_fill(0, torch.tensor([t.begin_image]), True)

    def run(self, requests: Sequence[Request], settings: Settings) -> list[Answer]:
        """All requests to their end."""
        last: list[Answer] = []
        for answers in self.stream(requests, settings):
            last = answers
        return last

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request], settings: Settings) -> Iterator[list[Answer]]:
        """Yields the answers (the same objects, growing) after every slot.

        Raises ValueError where a prompt leaves no room in the context for its answer.
        """
        rows = _Rows(self, requests, settings)
        hidden = rows.prefill()  # (R, D): the last slot of each row
        while not rows.done:
            ids, kinds = rows.next_slots(hidden)
            yield rows.answers
            if not rows.done:
                hidden = rows.advance(ids, kinds)


class _Rows:
    """The requests of one call while they run: N requests, R = N or 2 N rows with guidance."""

    def __init__(self, engine: Engine, requests: Sequence[Request], settings: Settings):
        self.model, self.processor, self.settings = engine.model, engine.processor, settings
        self.never, self.requests = engine._never, requests
        self.template = engine.processor.template
        self.count = len(requests)
        self.guided = settings.guidance != 1 and any(r.mode != "text" for r in requests)
        self.answers = [Answer() for _ in requests]
        self.drawing = [r.mode == "image" for r in requests]
        self.drawn = [0] * self.count  # codes of the picture under way
        self.pictures = [int(r.mode == "image") for r in requests]
        self.written = [0] * self.count  # text tokens so far
        self.device = self.model.decoder.norm.weight.device
        self.seeds = torch.tensor([r.seed for r in requests], device=self.device)
        draws = any(r.mode != "text" for r in requests)
        self.per_image = self.processor.codes_per_image if draws else 0

    @property
    def done(self) -> bool:
        return all(answer.done for answer in self.answers)

    def prefill(self) -> Tensor:
        samples = [r.sample for r in self.requests]
        if self.guided:
            samples += [self.processor.unguided(s) for s in samples]
        batch = self.processor.collate(samples).to(self.device)
        lengths = torch.tensor([len(s) for s in samples], device=self.device)
        longest = max(len(s) for s in samples)
        context = self.model.config.decoder.max_positions
        needed = longest + (self.per_image if any(self.drawing) else 1)
        if needed > context:
            raise ValueError(
                f"the prompt takes {longest} slots and its answer at least {needed - longest}; "
                f"the context of this model has {context}: shorten the prompt"
            )
        free = any(r.mode == "any" for r in self.requests)
        budget = self.per_image if any(self.drawing) else 0
        if not all(r.mode == "image" for r in self.requests):
            budget += self.settings.max_text + MAX_IMAGES * (self.per_image + 2) * free
        self.cache = self.model.decoder.new_cache(len(samples), min(context, longest + budget))
        hidden = self.model.decoder(self.model.embed(batch), batch.positions, cache=self.cache)
        self.cache.advance(lengths)
        self.room = self.cache.capacity - longest
        return hidden[torch.arange(len(samples), device=self.device), lengths - 1]

    def next_slots(self, hidden: Tensor) -> tuple[list[int], list[int]]:
        """The next slot of every request (id and kind), noted in its answer."""
        self.room -= 1
        going = [i for i in range(self.count) if not self.answers[i].done]
        drawing = [i for i in going if self.drawing[i] and self.drawn[i] < self.per_image]
        ids, kinds = [0] * self.count, [TEXT] * self.count
        for i, code in zip(drawing, self._codes(hidden, drawing), strict=True):
            ids[i], kinds[i] = code, CODE
            self.answers[i].add(CODE, code, new=self.drawn[i] == 0)
            self.drawn[i] += 1
            if self.requests[i].mode == "image" and self.drawn[i] == self.per_image:
                self.answers[i].done = True
        writing = [i for i in going if not self.drawing[i]]
        for i, word in zip(writing, self._words(hidden, writing), strict=True):
            ids[i] = word
            self._note_word(i, word)
        for i in set(going) - set(drawing) - set(writing):  # a picture is complete
            ids[i], self.drawing[i] = self.template.end_image, False
        return ids, kinds

    def advance(self, ids: list[int], kinds: list[int]) -> Tensor:
        """One step of the decoder for all rows; (R, D)."""
        branches = 2 if self.guided else 1
        shape = (len(ids) * branches, 1)
        slot = torch.tensor(ids * branches, device=self.device).view(shape)
        kind = torch.tensor(kinds * branches, device=self.device).view(shape)
        x = self.model.embed_ids(slot, kind)  # (R, 1, D)
        hidden = self.model.decoder(x, self.cache.length[:, None], cache=self.cache)
        self.cache.advance(1)
        return hidden[:, 0]

    def _codes(self, hidden: Tensor, rows: list[int]) -> list[int]:
        if not rows:
            return []
        s = self.settings
        logits = self.model.logits(self._pick(hidden, rows), CODE).float()
        if self.guided:
            other = self._pick(hidden[self.count :], rows)
            logits = guide(logits, self.model.logits(other, CODE).float(), s.guidance)
        positions = torch.tensor([self.drawn[i] for i in rows], device=self.device)
        seeds = self._pick(self.seeds, rows)
        return choose(logits, seeds, positions, s.temperature, s.top_k, s.top_p).tolist()

    def _words(self, hidden: Tensor, rows: list[int]) -> list[int]:
        if not rows:
            return []
        logits = self.model.logits(self._pick(hidden, rows), TEXT).float()
        never = [self.never["any" if self._may_draw(i) else "text"].to(self.device) for i in rows]
        logits = logits.masked_fill(torch.stack(never), -torch.inf)
        positions = torch.tensor([self.written[i] for i in rows], device=self.device)
        seeds = self._pick(self.seeds, rows)
        return choose(logits, seeds, positions, self.settings.text_temperature, stream=1).tolist()

    def _note_word(self, i: int, word: int) -> None:
        answer = self.answers[i]
        if word == self.template.begin_image:
            self.drawing[i], self.drawn[i] = True, 0
            self.pictures[i] += 1
        elif word == self.template.end_of_turn:
            answer.done = True
        else:
            answer.add(TEXT, word)
        self.written[i] += 1
        if self.written[i] >= self.settings.max_text or self.room <= 0:
            answer.done = answer.done or not self.drawing[i]

    def _may_draw(self, i: int) -> bool:
        """Whether request i may begin a picture now: allowed, and with room for all its codes."""
        fits = self.room > self.per_image + 1
        return self.requests[i].mode == "any" and self.pictures[i] < MAX_IMAGES and fits

    def _pick(self, values: Tensor, rows: list[int]) -> Tensor:
        """The given rows of a (R, …) tensor, without a copy where that is the first N."""
        return values[: self.count] if len(rows) == self.count else values[rows]
