"""What is in the sources of a run, and what is wrong with them, before anything is trained."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from unimm.config import Run, Source
from unimm.data.images import open_image
from unimm.data.processor import Message
from unimm.data.readers import own
from unimm.data.stores import VALIDATION
from unimm.training.next_token import learnable, next_token, open_init

CELL, COLUMNS, SHOWN = 160, 6, 36  # the contact sheet: side of a cell, cells


def run_on(path: str) -> Run:
    """What train/finetune.py would train the bundled model on, as far as its data go."""
    data = {"mine": Source(own, options={"path": path, "keep": 0.1})}
    nothing = ((".*", None),)
    return Run(next_token, nothing, data, steps=0, batch_size=1, init="scenes")


def check_data(run: Run, most: int, sheet: Path | None = None) -> tuple[str, bool]:
    """Encode up to `most` samples of every source: a report in lines of text, and whether no source
    has a larger share of broken rows than `run.most_broken`.

    `sheet`: where a picture of the first samples goes.
    """
    _, processor, _ = open_init(run)
    lines: list[str] = []
    sound = True
    cells: list[tuple[Image.Image | None, str]] = []
    for name, source in run.data.items():
        rows = source.make(run, **source.options)
        total = len(rows) if hasattr(rows, "__len__") else None
        count = most if total is None else min(most, total)
        lengths: list[int] = []
        wrong: Counter[str] = Counter()
        kept = len(getattr(rows, "kept", ()))
        places = [*range(count), *(VALIDATION + i for i in range(min(kept, most)))]
        for i in places:
            try:
                talk = conversation(rows[i])
                lengths.append(len(learnable(processor, talk)))
                if len(cells) < SHOWN:
                    cells += list(_shown(talk))[: SHOWN - len(cells)]
            except (ValueError, OSError) as error:
                wrong[" ".join(str(error).split())] += 1
        size = "any number of rows" if total is None else f"{total} rows, {kept} held out"
        bad = sum(wrong.values())
        lines.append(f"{name}: {size}; {len(places) - bad} of {len(places)} looked at are good")
        if bad > run.most_broken * len(places):
            sound = False
            lines.append(f"  so many broken ones stop a run (most_broken={run.most_broken})")
        if lengths:
            spread = np.percentile(lengths, (0, 50, 100)).astype(int)
            lines.append(f"  slots: {spread[0]} to {spread[2]}, median {spread[1]}")
        lines += [f"  {times} x {reason}" for reason, times in wrong.most_common(10)]
    if sheet is not None and cells:
        contact_sheet(cells).save(sheet)
    return "\n".join(lines), sound


def conversation(row: Any) -> list[Message]:
    """What is shown of a row: its messages, or of a preference the chosen answer to the prompt."""
    if isinstance(row, dict) and "messages" in row:
        return row["messages"]
    if isinstance(row, dict) and "chosen" in row:
        return [*row["prompt"], *row["chosen"]]
    raise ValueError("the rows of this source are no conversations")


def contact_sheet(cells: list[tuple[Image.Image | None, str]]) -> Image.Image:
    """Pictures with their words below, side by side."""
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * CELL, rows * (CELL + 40)), "white")
    pen = ImageDraw.Draw(page)
    for k, (picture, words) in enumerate(cells):
        left, top = k % COLUMNS * CELL, k // COLUMNS * (CELL + 40)
        if picture is not None:
            scale = (CELL - 8) / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            page.paste(picture.resize((width, height)), (left + 4, top + 4))
        for line in range(2):
            pen.text((left + 4, top + CELL + 18 * line), words[line * 25 : line * 25 + 25], "black")
    return page


def _shown(talk: list[Message]) -> Iterator[tuple[Image.Image | None, str]]:
    """The pictures of a conversation, each with the words of the conversation."""
    parts: list[dict[str, Any]] = []
    for message in talk:
        content = message["content"]
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    words = " / ".join(part["text"] for part in parts if part["type"] == "text")
    pictures: list[Any] = [part["image"] for part in parts if "image" in part]
    for picture in pictures or [None]:
        yield (None if picture is None else open_image(picture)), words
