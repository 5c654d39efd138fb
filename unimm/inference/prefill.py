"""Prompts into a cache, each shared stretch once: equal prompts, and prompts that begin alike.

Every slot has a key; two samples whose keys begin alike share that stretch (N samples of a prompt,
questions about one picture, a chat one turn later), whatever they are made of.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unimm.data.processor import Processor, Sample
from unimm.inference.products import ManyRows
from unimm.inference.stepper import Stepper
from unimm.model.decoder import KVCache
from unimm.model.unified import SeenImage

SHARED = 16  # slots from which a common beginning is worth a pass of its own


class Prompts:
    """Prefills samples. `kept`: the keys and the row of a conversation that may go on."""

    def __init__(self, stepper: Stepper, processor: Processor):
        self.stepper, self.model, self.processor = stepper, stepper.model, processor
        self.kept: tuple[np.ndarray, KVCache] | None = None
        self.computed = 0  # slots that went through the decoder, padding not counted

    def fill(self, samples: Sequence[Sample], capacity: int) -> tuple[KVCache, Tensor]:
        """A cache of `capacity` with a row for each sample, and its last hidden state (N, D)."""
        keys = [slot_keys(sample) for sample in samples]
        first: dict[bytes, int] = {}
        same = [first.setdefault(key.tobytes(), i) for i, key in enumerate(keys)]
        unique = sorted(set(same))
        cache = self.model.decoder.new_cache(len(samples), capacity)
        width = self.model.config.decoder.dim
        weight = self.model.decoder.norm.weight
        hidden = torch.empty(len(samples), width, dtype=weight.dtype, device=weight.device)
        alone, groups = [], []
        for group, shared in grouped([keys[i] for i in unique]):
            members = [unique[i] for i in group]
            if self.kept is not None and (n := common(self.kept[0], keys[members[0]])) > shared:
                members, rest = members[:1], members[1:]
                self._continue(
                    [samples[members[0]]], members, [n], [0], self.kept[1], cache, hidden
                )
                alone += rest
            elif len(members) > 1:
                groups.append((members, shared))
            else:
                alone += members
        if groups:
            heads = [piece(samples[members[0]], 0, shared) for members, shared in groups]
            common_rows = self.model.decoder.new_cache(len(heads), max(map(len, heads)))
            self._run(heads, common_rows)
            where = [(i, g, shared) for g, (members, shared) in enumerate(groups) for i in members]
            rows, sources, starts = (list(column) for column in zip(*where, strict=True))
            self._continue(
                [samples[i] for i in rows], rows, starts, sources, common_rows, cache, hidden
            )
        if alone:
            self._continue(
                [samples[i] for i in alone], alone, [0] * len(alone), [], None, cache, hidden
            )
        twice = [i for i in range(len(samples)) if same[i] != i]
        if twice:
            place(cache, twice, cache, [same[i] for i in twice])
            hidden[twice] = hidden[[same[i] for i in twice]]
        return cache, hidden

    def _continue(
        self,
        samples: list[Sample],
        rows: list[int],
        starts: list[int],
        sources: list[int],
        begun: KVCache | None,
        cache: KVCache,
        hidden: Tensor,
    ) -> None:
        """Samples whose first `starts` slots are in rows `sources` of `begun`: the rest of them."""
        longest = max(map(len, samples))
        tails = [piece(s, start, len(s)) for s, start in zip(samples, starts, strict=True)]
        room = max(longest, max(starts) + max(map(len, tails)))  # padding is written too
        work = self.model.decoder.new_cache(len(samples), room)
        if begun is not None:
            place(work, range(len(samples)), begun, sources, torch.tensor(starts))
        last = self._run(tails, work)
        place(cache, rows, work, range(len(rows)))
        hidden[rows] = last

    def _run(self, samples: list[Sample], cache: KVCache) -> Tensor:
        """Samples behind what the rows of `cache` hold -> the last hidden states (N, D)."""
        device = cache.length.device
        batch = self.processor.collate(samples).to(device)
        lengths = torch.tensor([len(s) for s in samples], device=device)
        even = len({len(s) for s in samples}) == 1
        with ManyRows():
            hidden = self.stepper.fill(self.model.embed(batch), cache, last=even)
        cache.advance(lengths)
        self.computed += int(lengths.sum())
        return hidden[torch.arange(len(samples), device=device), -1 if even else lengths - 1]


def slot_keys(sample: Sample) -> np.ndarray:
    """One int64 a slot, equal where what enters the decoder there is equal, (T,)."""
    keys = sample.ids + (sample.kind.astype(np.int64) << 40)
    for image in sample.images:
        pixels = image.pixels.detach().cpu().contiguous().numpy().tobytes()
        digest = hashlib.blake2b(pixels, digest_size=6).digest()
        patches = np.arange(image.count, dtype=np.int64)
        keys[image.start : image.start + image.count] = -int.from_bytes(digest, "big") - patches
    return keys


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many slots two samples begin with alike, at least one of the second left over."""
    size = min(len(a), len(b) - 1)
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def grouped(keys: Sequence[np.ndarray]) -> list[tuple[list[int], int]]:
    """Groups of samples that begin alike, each with the length of the common beginning."""
    order = sorted(range(len(keys)), key=lambda i: keys[i].tolist())
    groups: list[tuple[list[int], int]] = []
    for i in order:
        if groups:
            members, shared = groups[-1]
            n = min(common(keys[members[0]], keys[i]), common(keys[i], keys[members[0]]))
            if n >= max(SHARED, shared // 2):
                groups[-1] = ([*members, i], min(shared, n) if len(members) > 1 else n)
                continue
        groups.append(([i], 0))
    return groups


def piece(sample: Sample, start: int, end: int) -> Sample:
    """Slots start … end - 1 of a sample; no picture may lie across the cut."""
    images = [
        SeenImage(image.pixels, image.row, image.start - start, image.count)
        for image in sample.images
        if start <= image.start < end
    ]
    assert all(image.start + image.count <= end - start for image in images)
    cut = slice(start, end)
    parts = {name: getattr(sample, name)[cut] for name in ("ids", "kind", "score", "user_text")}
    return replace(sample, **parts, images=images)


def place(
    target: KVCache,
    rows: Sequence[int],
    source: KVCache,
    sources: Sequence[int],
    lengths: Tensor | None = None,
) -> None:
    """Copy rows `sources` of a cache to `rows` of another; `lengths`: only so many slots."""
    device = target.length.device
    to = torch.tensor(list(rows), device=device)
    of = torch.tensor(list(sources), device=device)
    counts = source.length[of] if lengths is None else lengths.to(device)
    longest = int(counts.max()) if len(counts) else 0
    for name in ("k", "v"):
        for ours, theirs in zip(getattr(target, name), getattr(source, name), strict=True):
            ours[to, :, :longest] = theirs[of, :, :longest]
    target.length = target.length.index_copy(0, to, counts)
    target.advance(torch.zeros_like(target.length))
