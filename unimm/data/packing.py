"""Several samples in one row: which ones, and the row that they make.

Attention stays within a sample (`Batch.segment`) and positions begin anew, so a packed sample has
the loss that it has alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from unimm.data.processor import Processor, Sample
from unimm.model.unified import Batch, SeenImage


def pack(sizes: Sequence[int], slots: int) -> list[list[int]]:
    """Indices of the items in each row: the longest first, each into the first row with room.

    An item longer than `slots` has a row of its own.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        row = next((r for r, room in enumerate(free) if room >= sizes[k]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max(slots, sizes[k]))
        rows[row].append(k)
        free[row] -= sizes[k]
    return rows


def collate_packed(rows: Sequence[Sequence[Sample]], processor: Processor) -> Batch:
    """One batch of packed rows; its samples, in order, are those of the first row, the second, …"""
    batch = processor.collate([joined(row) for row in rows])
    segment, positions = torch.full_like(batch.ids, -1), torch.zeros_like(batch.ids)
    for r, row in enumerate(rows):
        start = 0
        for k, sample in enumerate(row):
            end = start + len(sample)
            segment[r, start:end] = k
            positions[r, start:end] = torch.arange(len(sample))
            start = end
    return dataclasses.replace(batch, segment=segment, positions=positions)


def joined(samples: Sequence[Sample]) -> Sample:
    """Samples one behind the other; the first slot of each is not predicted, as in a row alone."""
    starts = np.cumsum([0, *map(len, samples)])
    score = np.concatenate([sample.score for sample in samples])
    score[starts[:-1]] = 0
    return Sample(
        np.concatenate([sample.ids for sample in samples]),
        np.concatenate([sample.kind for sample in samples]),
        score,
        np.concatenate([sample.user_text for sample in samples]),
        [
            SeenImage(image.pixels, 0, int(start) + image.start, image.count)
            for start, sample in zip(starts, samples, strict=False)
            for image in sample.images
        ],
    )
