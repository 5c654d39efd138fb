"""Drawing on a grid whose rows end with tokens of their own (Emu3's), beside the one engine.

Only codes are chosen; what must stand between them (`Processor.before_code`) goes through the
decoder together with the code before it. All else is the engine's: branches, masks, noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unimm.inference.engine import Answer, Engine, Request
from unimm.inference.sampling import Settings, choose, guide
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
        processor, model = self.processor, self.model
        device = model.decoder.norm.weight.device
        count, guided = len(requests), settings.guidance != 1
        samples = [r.sample for r in requests]
        samples += [processor.unguided(s) for s in samples] if guided else []
        lengths = torch.tensor([len(s) for s in samples], device=device)
        codes = processor.codes_per_image
        needed = (
            int(lengths.max()) + codes + sum(len(processor.before_code(k)) for k in range(codes))
        )
        context = model.config.decoder.max_positions
        if needed > context:
            raise ValueError(
                f"the prompt and its picture take {needed} slots; the context of this model has "
                f"{context}: shorten the prompt"
            )
        cache = model.decoder.new_cache(len(samples), needed)
        batch = processor.collate(samples).to(device)
        hidden = model.decoder(model.embed(batch), batch.positions, cache=cache)  # (R, T, D)
        cache.advance(lengths)
        hidden = hidden[torch.arange(len(samples), device=device), lengths - 1]  # (R, D)
        seeds = torch.tensor([r.seed for r in requests], device=device)
        answers = [Answer() for _ in requests]
        for k in range(codes):
            chosen = self._choose(hidden, count, seeds, k, settings)  # (N,)
            for answer, code in zip(answers, chosen.tolist(), strict=True):
                answer.add(CODE, code)
                answer.done = k == codes - 1
            yield answers
            if k < codes - 1:
                forced = torch.tensor(processor.before_code(k + 1), dtype=torch.int64)
                slots = torch.cat([chosen[:, None], forced.to(device).expand(count, -1)], 1)
                slots = slots.repeat(2 if guided else 1, 1)  # (R, 1 + F)
                kinds = torch.full_like(slots, TEXT)
                kinds[:, 0] = CODE
                at = cache.length[:, None] + torch.arange(slots.shape[1], device=device)
                hidden = model.decoder(model.embed_ids(slots, kinds), at, cache=cache)[:, -1]
                cache.advance(slots.shape[1])

    def _choose(self, hidden: Tensor, count: int, seeds: Tensor, k: int, s: Settings) -> Tensor:
        """Code k of every picture, (N,), from the last hidden states (R, D)."""
        logits = self.model.logits(hidden, CODE).float()
        if len(logits) > count:
            logits = guide(logits[:count], logits[count:], s.guidance)
        positions = torch.full((count,), k, device=hidden.device)
        return choose(logits, seeds, positions, s.temperature, s.top_k, s.top_p)
