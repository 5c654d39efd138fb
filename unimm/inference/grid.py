"""Drawing on a grid whose rows end with tokens of their own (Emu3's), beside the one engine.

Only codes are chosen; what must stand between them (`Processor.before_code`) goes through the
decoder together with the code before it. All else is the engine's: branches, masks, noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from unimm.inference.engine import Answer, Engine, Request
from unimm.inference.sampling import Settings
from unimm.model.unified import CODE, TEXT


class GridEngine(Engine):
    """An Engine for such a model. A request is for a picture or for words: "any" gets words."""

    def _slots(
        self, requests: Sequence[Request], settings: Settings, every: int
    ) -> Iterator[list[Answer]]:
        drawn = {r.mode == "image" for r in requests}
        if drawn == {True}:
            yield from self._draw(requests, settings)
        elif True in drawn:
            raise ValueError("this model draws and writes in calls of their own")
        else:
            words = [replace(r, mode="text") for r in requests]
            yield from super()._slots(words, settings, every)

    @torch.inference_mode()
    def _draw(self, requests: Sequence[Request], settings: Settings) -> Iterator[list[Answer]]:
        processor, stepper = self.processor, self._stepper
        count, guided, codes = len(requests), settings.guidance != 1, processor.codes_per_image
        samples = [r.sample for r in requests]
        samples += [processor.unguided(s) for s in samples] if guided else []
        between = [processor.before_code(k) for k in range(codes)]
        needed = max(map(len, samples)) + codes + sum(map(len, between[1:]))
        if needed > (context := self.model.config.decoder.max_positions):
            raise ValueError(
                f"the prompt and its picture take {needed} slots; the context of this model has "
                f"{context}: shorten the prompt"
            )
        self._refresh()
        cache, hidden = self._prompts.fill(samples, needed)  # hidden: (R, D)
        answers = [Answer() for _ in requests]
        for k in range(codes):
            logits = stepper.logits(hidden, CODE)
            own, other = logits.chunk(2) if guided else (logits, None)
            chosen = stepper.choose(
                own, other, settings.guidance, [r.seed for r in requests], [k] * count,
                settings.temperature, settings.top_k, settings.top_p,
            )  # fmt: skip
            for answer, code in zip(answers, chosen, strict=True):
                answer.add(CODE, code)
                answer.done = k == codes - 1
            yield answers
            if k < codes - 1:
                forced = between[k + 1]
                slots = [[code, *forced] for code in chosen] * (2 if guided else 1)
                window, kinds = 1 + len(forced), ([CODE] + [TEXT] * len(forced)) * len(slots)
                ids = torch.tensor(slots, device=stepper.device).flatten()
                hidden = stepper.forward(stepper.embed(ids, kinds), cache, window)
                hidden = hidden.view(len(slots), window, -1)[:, -1]
                cache.advance(window)
