"""Emu3's way to write a conversation (arXiv 2409.18869): pictures of any size, as rows of codes.

A picture is: begin, its size as text ("90*90" codes), the image token, rows of codes that each end
with a row end, the picture's end, end. A chat is "You are a helpful assistant. USER: ...
ASSISTANT:", a turn's pictures before its words, as transformers' Emu3Processor writes it; the
prompt of a drawing is its words alone. Sizes are rounded as transformers rounds them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unimm.data.images import open_image
from unimm.data.processor import (
    Message,
    Processor,
    Sample,
    Slots,
    checked,
    draws,
    resized,
    to_unit,
)


class Emu3Processor(Processor):
    """A Processor for a model of the shared pathway that was trained as Emu3.

    image_token, row_end, picture_end: ids. min_pixels, max_pixels: of a seen picture, whose sides
    become multiples of the tokenizer's stride. negative: the prompt of the unguided branch.
    """

    kind = "emu3"
    gridded = True

    def __init__(
        self,
        *args: Any,
        image_token: int,
        row_end: int,
        picture_end: int,
        min_pixels: int,
        max_pixels: int,
        negative: str = "",
        **sizes: Any,
    ):
        super().__init__(*args, **sizes)
        self.image_token, self.row_end, self.picture_end = image_token, row_end, picture_end
        self.min_pixels, self.max_pixels, self.negative = min_pixels, max_pixels, negative

    def settings(self) -> dict[str, Any]:
        names = ("image_token", "row_end", "picture_end", "min_pixels", "max_pixels", "negative")
        own = {name: getattr(self, name) for name in names}
        return {"kind": self.kind, **super().settings(), **own}

    def encode(self, messages: Sequence[Message], answer: str | None = None) -> Sample:
        turns = [checked(message) for message in messages]
        drawn = answer == "image" or (answer is None and draws(*turns[-1]))
        slots = Slots()
        slots.text([self.template.bos])
        said = self._prompt(turns) if drawn else self._chat(turns, answer)
        for piece, mine in said.parts:
            if isinstance(piece, str):
                slots.text(self.words(piece), scored=mine, user=not mine)
            else:
                self._image(slots, piece, mine, False)
        slots.draws = drawn
        if answer == "image":
            slots.text([self.template.begin_image, *self.before_code(0)])
        elif answer is None and turns[-1][0] == "assistant":
            slots.text([self.template.end_of_turn], scored=True)
        return self._fitting(slots.sample())

    def before_code(self, k: int) -> list[int]:
        rows, columns = self.grid
        if k == 0:
            return self._opening(self.grid)
        ends = [self.row_end] if k % columns == 0 else []
        return ends + ([self.picture_end] if k == rows * columns else [])

    def unguided(self, sample: Sample) -> Sample:
        """The sample with the negative prompt (which may be empty) in place of the user's words."""
        user = sample.user_text
        start = int(user.argmax()) if user.any() else 1
        new = np.array(self.words(self.negative), dtype=np.int64)

        def swapped(values: np.ndarray, fill: Any) -> np.ndarray:
            return np.concatenate([values[:start], fill, values[start:][~user[start:]]])

        none = np.zeros(len(new))
        return Sample(
            swapped(sample.ids, new),
            swapped(sample.kind, none.astype(np.int64)),
            swapped(sample.score, none.astype(np.float32)),
            swapped(user, none == 0),
            draws=sample.draws,
        )

    def seen_pixels(self, image: Any) -> torch.Tensor:
        """(3, h, w) in [-1, 1], scaled to multiples of the stride within the limits of pixels."""
        assert self.image_tokenizer is not None
        picture = open_image(image)
        stride, limits = self.image_tokenizer.config.stride, (self.min_pixels, self.max_pixels)
        height, width = fit(picture.height, picture.width, stride, limits)
        return to_unit(np.asarray(resized(picture, (width, height))))

    def _prompt(self, turns: list[tuple[str, list[Message]]]) -> "_Said":
        """What a drawing is of: words and pictures as they come, without roles."""
        said = _Said()
        for role, content in turns:
            for part in content:
                words = part["type"] == "text"
                said.add(" " * said.speaks + part["text"] if words else part, role != "user")
        return said

    def _chat(self, turns: list[tuple[str, list[Message]]], answer: str | None) -> "_Said":
        said = _Said()
        said.add(self.template.system, False)
        for index, (role, content) in enumerate(turns):
            mine, last = role == "assistant", index == len(turns) - 1 and answer is None
            said.add("ASSISTANT:" if mine else "USER: ", False)
            pictures = [part for part in content if part["type"] == "image"]
            words = [part["text"] for part in content if part["type"] == "text"]
            for part in pictures:
                said.add(part, mine)
            if mine:
                said.add("".join(f" {text}" for text in words), True)
                said.add("" if last else " ", False)
            else:
                said.add("".join(f"{text} " for text in words), False)
        if answer is not None:
            said.add("ASSISTANT:", False)
        return said

    def _image(self, slots: Slots, part: Message, scored: bool, talked_about: bool) -> None:
        """One picture: a drawn one on the model's grid, a seen one on its own."""
        if "codes" in part:
            codes, grid = np.asarray(part["codes"]), self.grid
            if len(codes) != self.codes_per_image:
                raise ValueError(f"a picture has {self.codes_per_image} codes, not {len(codes)}")
        elif scored:
            codes, grid = self.codes(part["image"]), self.grid
        else:
            codes, grid = self._seen(part["image"])
        slots.text([self.template.begin_image, *self._opening(grid)], scored=scored)
        for row in codes.reshape(grid):
            slots.codes(row, scored)
            slots.text([self.row_end], scored=scored)
        slots.text([self.picture_end, self.template.end_image], scored=scored)

    def _seen(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        assert self.image_tokenizer is not None
        pixels = self.seen_pixels(image)[None]
        weight = next(self.image_tokenizer.parameters())
        with torch.inference_mode():
            codes = self.image_tokenizer.encode(pixels.to(weight.device, weight.dtype))
        return codes[0].cpu().numpy(), self.image_tokenizer.grid(*pixels.shape[-2:])

    def _opening(self, grid: tuple[int, int]) -> list[int]:
        """What stands between begin-of-image and the first code."""
        return [*self.words(f"{grid[0]}*{grid[1]}"), self.image_token]


class _Said:
    """Words and pictures in order, with who said them; words of one speaker are one text."""

    def __init__(self) -> None:
        self.parts: list[tuple[str | Message, bool]] = []

    def add(self, part: str | Message, mine: bool) -> None:
        if part and self.parts and isinstance(part, str):
            before, same = self.parts[-1]
            if isinstance(before, str) and same == mine:
                self.parts[-1] = (before + part, mine)
                return
        if part:
            self.parts.append((part, mine))

    @property
    def speaks(self) -> bool:
        """Whether the last part is text."""
        return bool(self.parts) and isinstance(self.parts[-1][0], str)


def fit(height: int, width: int, stride: int, limits: tuple[int, int]) -> tuple[int, int]:
    """The size of a seen picture, near its own: sides are multiples of `stride`, pixels in limits.

    ValueError for a strip of more than 200 to 1.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width} x {height} pixels is too narrow to be seen")
    least, most = limits
    sides = [round(side / stride) * stride for side in (height, width)]
    if sides[0] * sides[1] > most:
        scale = math.sqrt(height * width / most)
        sides = [max(stride, math.floor(s / scale / stride) * stride) for s in (height, width)]
    elif sides[0] * sides[1] < least:
        scale = math.sqrt(least / (height * width))
        sides = [math.ceil(s * scale / stride) * stride for s in (height, width)]
    return sides[0], sides[1]
