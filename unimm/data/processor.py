"""Messages become slots here: the template, the image transforms and the unguided prompt.

An image in a user turn is seen (patches), one in an assistant turn is drawn (codes); `"view"` on
the image says otherwise. Of a shown image with `"redrawn"`, which of its codes, the picture that
answers keeps all others; of a drawn one those alone are learned. Training and inference both come
through `Processor.encode`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unimm.cpu import multiplies_bfloat16
from unimm.data.images import open_image
from unimm.model.image_tokenizer import ImageTokenizer
from unimm.model.unified import CODE, PATCH, TEXT, Batch, SeenImage

PICTURES = (str, Path, Image.Image, np.ndarray)  # what an image may be given as
Message = dict[str, Any]
Pieces = tuple[int | str, ...]  # ids, and text to tokenize


@dataclass(frozen=True)
class Template:
    """Ids of the special tokens: no words of the text tokenizer, so that no text holds them.

    A template may instead be *worded* (Janus's is): `user` and `assistant` are then ids and text in
    order, and the last four fields say what else it writes around the turns.
    """

    bos: int
    pad: int
    user: int | Pieces
    assistant: int | Pieces
    end_of_turn: int  # worded: of the assistant's
    begin_image: int
    end_image: int
    system: str = ""  # before the first turn, where the answer is not drawn
    user_end: str = ""
    answer_start: str = ""  # before the words of an assistant turn
    beside_image: str = ""  # between an image and its neighbours in a turn

    def __post_init__(self) -> None:
        for name in ("user", "assistant"):  # lists, where they come from JSON
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, int) else tuple(value))

    @property
    def worded(self) -> bool:
        return isinstance(self.user, tuple)

    @classmethod
    def after(cls, words: int) -> "Template":
        """The native template: the seven ids behind `words` text ids."""
        return cls(*range(words, words + 7))


class TooLong(ValueError):
    """A conversation is longer than the context of the model."""


VIEWS = {"patches", "codes", "redrawn"}  # the last: of each code, whether it is drawn anew
BOTH = ["patches", "codes"]  # how a picture that is to be edited is shown
MARKED = ["codes", "redrawn"]  # the same, where some of its codes are kept


@dataclass
class Sample:
    """One conversation as slots; arrays of length T.

    `user_text` marks the slots that the unguided prompt replaces by pad. `images` are the seen
    pictures with the slots that their patches fill. `kept`: of the picture to be drawn, the codes
    that are given, int64 (codes,), and -1 where it is drawn.
    """

    ids: np.ndarray  # int64
    kind: np.ndarray  # int64
    score: np.ndarray  # float32
    user_text: np.ndarray  # bool
    images: list[SeenImage] = field(default_factory=list)
    draws: bool = False  # the last assistant turn holds, or begins, a drawn image
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def drawn_on(self, codes: np.ndarray) -> "Sample":
        """The sample with codes (k,) behind its last slot, as a drawing goes on."""
        more = len(codes)
        return replace(
            self,
            ids=np.concatenate([self.ids, codes]),
            kind=np.concatenate([self.kind, np.full(more, CODE)]),
            score=np.pad(self.score, (0, more)),
            user_text=np.pad(self.user_text, (0, more)),
        )


class Processor:
    """Turns messages into samples and samples into batches.

    tokenizer: a `tokenizers.Tokenizer` for text. image_tokenizer: makes the codes of drawn images.
    seen_size: side of a seen picture in pixels; seen_tokens: patches that it gives (0: the model
    has no encoder and sees codes). drawn_size: side of a drawn picture. min_side: least pixels of
    the short side of a seen picture, before padding (14 in Janus).
    """

    gridded = False  # whether a drawn picture holds tokens between its codes (see before_code)

    def __init__(
        self,
        tokenizer: Any,
        image_tokenizer: ImageTokenizer | None,
        template: Template,
        seen_size: int,
        seen_tokens: int,
        drawn_size: int,
        max_length: int,
        min_side: int = 1,
    ):
        self.tokenizer, self.image_tokenizer, self.template = tokenizer, image_tokenizer, template
        self.seen_size, self.seen_tokens = seen_size, seen_tokens
        self.drawn_size, self.max_length = drawn_size, max_length
        self.min_side = min_side
        if template.worded:  # its special tokens are words of the tokenizer: no user may write them
            tokenizer.encode_special_tokens = True

    def settings(self) -> dict[str, Any]:
        """What is saved with a model, besides the tokenizers."""
        names = ["seen_size", "seen_tokens", "drawn_size", "max_length"]
        names += ["min_side"] if self.min_side != 1 else []
        template = {name: value for name, value in asdict(self.template).items() if value != ""}
        return {"template": template, **{name: getattr(self, name) for name in names}}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the codes of a drawn picture."""
        if self.image_tokenizer is None:
            raise ValueError("this model has no image tokenizer, so it cannot draw")
        return self.image_tokenizer.grid(self.drawn_size, self.drawn_size)

    @property
    def codes_per_image(self) -> int:
        rows, columns = self.grid
        return rows * columns

    def encode(self, messages: Sequence[Message], answer: str | None = None) -> Sample:
        """One conversation -> one sample.

        answer: None for a finished conversation (training). "text" opens an assistant turn for the
        model to fill, "image" opens one that begins with begin-of-image.
        Raises ValueError for malformed messages and for a conversation longer than the context.
        """
        t = self.template
        turns = [checked(message) for message in messages]
        if not turns:
            raise ValueError("a conversation has one message or more")
        prompt = t.worded and answer is not None  # then earlier answers are hidden words too
        slots = Slots()
        slots.text([t.bos])
        if t.system and not (answer == "image" or (answer is None and draws(*turns[-1]))):
            slots.text(self.words(t.system), user=True)
        for index, (role, content) in enumerate(turns):
            mine = role == "assistant"
            head, body, tail = self._turn(mine, content)
            slots.text(head, user=t.worded)
            for part in body:
                if isinstance(part, str | int):
                    ids = self.words(part) if isinstance(part, str) else [part]
                    slots.text(ids, scored=mine, user=prompt or not mine)
                else:
                    last = index == len(turns) - 1
                    self._image(slots, part, scored=mine, talked_about=mine and not last)
            slots.draws = draws(role, content)
            slots.text(tail, scored=mine, user=prompt)
        if answer is not None:
            slots.text(self._head(mine=True), user=t.worded)
            slots.draws = answer == "image"
        if answer == "image":
            slots.text([t.begin_image])
        return self._fitting(slots.sample())

    def before_code(self, k: int) -> list[int]:
        """Text ids that must stand before code k of a drawn picture, as its grid wants it.

        k = 0: after begin-of-image; k = `codes_per_image`: before end-of-image. None here.
        """
        return []

    def _fitting(self, sample: Sample) -> Sample:
        if len(sample) > self.max_length:
            raise TooLong(
                f"the conversation takes {len(sample)} slots, and the context of this model has "
                f"{self.max_length}: shorten the text or send fewer images"
            )
        return sample

    def words(self, text: str) -> list[int]:
        """Text ids of `text`."""
        clean = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text
        return self.tokenizer.encode(clean, add_special_tokens=False).ids

    def is_word(self, ids: np.ndarray) -> np.ndarray:
        """Which ids an answer in words may hold: those of text, and no special token."""
        if not self.template.worded:
            return ids < self.template.bos
        added = self.tokenizer.get_added_tokens_decoder()
        special = [i for i, token in added.items() if token.special]
        return (ids < self.tokenizer.get_vocab_size()) & ~np.isin(ids, special)

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`; ids that are no words are left out."""
        words = self.template.bos
        known = ids if self.template.worded else [i for i in ids if i < words]
        return self.tokenizer.decode(list(known), skip_special_tokens=True).strip()

    def unguided(self, sample: Sample) -> Sample:
        """The prompt without its words: user text becomes pad, at the same length and positions.

        In a worded template all the prompt is the user's but its first and last slot and what
        belongs to images; padding is not masked (Janus).
        """
        return replace(sample, ids=np.where(sample.user_text, self.template.pad, sample.ids))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Right-padded rows; padding is never scored and, being on the right, never attended to."""
        length = max(map(len, samples))
        shape = (len(samples), length)
        ids = np.full(shape, self.template.pad, dtype=np.int64)
        kind = np.zeros(shape, dtype=np.int64)
        score = np.zeros(shape, dtype=np.float32)
        images = []
        for row, s in enumerate(samples):
            ids[row, : len(s)], kind[row, : len(s)], score[row, : len(s)] = s.ids, s.kind, s.score
            images += [SeenImage(i.pixels, row, i.start, i.count) for i in s.images]
        positions = torch.arange(length).expand(shape)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(kind),
            positions,
            torch.from_numpy(score),
            images,
        )

    def seen_pixels(self, image: Any) -> torch.Tensor:
        """(3, s, s) in [-1, 1]: the long side to s, padded to a square with grey (Janus-Pro).

        The short side is rounded, as transformers does; DeepSeek's own code truncates it, so that
        one row or column of pixels can differ.
        """
        picture = open_image(image)
        side = self.seen_size
        scale = side / max(picture.size)
        size = tuple(max(self.min_side, round(edge * scale)) for edge in picture.size)
        if size != (side, side):
            square = Image.new("RGB", (side, side), (127, 127, 127))
            corner = ((side - size[0]) // 2, (side - size[1]) // 2)
            square.paste(resized(picture, size), corner)
            picture = square
        return to_unit(np.asarray(resized(picture, (side, side))))

    def drawn_pixels(self, image: Any) -> torch.Tensor:
        """(3, s, s) in [-1, 1]: the short side to s, cropped to the centre (Janus-Pro)."""
        return to_unit(np.asarray(cropped(open_image(image), self.drawn_size)))

    def codes(self, image: Any) -> np.ndarray:
        """The codes of a picture as drawn, (gh * gw,) int64."""
        if self.image_tokenizer is None:
            raise ValueError("this model has no image tokenizer, so it cannot take drawn images")
        weight = next(self.image_tokenizer.parameters())
        pixels = self.drawn_pixels(image)[None].to(weight.device, weight.dtype)
        with torch.inference_mode():
            return self.image_tokenizer.encode(pixels)[0].cpu().numpy()

    def pixels(
        self, codes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Codes of complete pictures -> float32 (N, 3, H, W) in [-1, 1], on the CPU.

        dtype: of the convolutions, whatever that of the weights (bfloat16 is faster; a CPU that
        does not multiply it takes eight times as long, and float32 is used there). In float32 on a
        CPU pictures are decoded one by one: convolutions over a batch round otherwise, which can
        change the last bit of a pixel.
        """
        if self.image_tokenizer is None:
            raise ValueError("this model has no image tokenizer, so it cannot draw")
        device = next(self.image_tokenizer.parameters()).device
        half = dtype != torch.float32 and (device.type != "cpu" or multiplies_bfloat16())
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=half):
            ids = torch.tensor(codes, device=device)
            at_once = len(ids) if half or device.type != "cpu" else 1
            drawn = [self.image_tokenizer.decode(part, self.grid) for part in ids.split(at_once)]
        return torch.cat(drawn).float().cpu()

    def _head(self, mine: bool) -> list[int]:
        """The ids that open a turn."""
        opening = self.template.assistant if mine else self.template.user
        pieces = opening if isinstance(opening, tuple) else (opening,)
        return [i for p in pieces for i in (self.words(p) if isinstance(p, str) else (p,))]

    def _turn(self, mine: bool, content: list[Message]) -> tuple[list[int], list[Any], list[int]]:
        """A turn: the ids that open it; ids, texts and images in order; the ids that close it.

        In a worded template neighbouring texts are one, as its tokenizer would see them.
        """
        t = self.template
        parts = [part["text"] if part["type"] == "text" else part for part in content]
        if not t.worded:
            return self._head(mine), parts, [t.end_of_turn]
        spoken = bool(parts) and isinstance(parts[0], str)
        pieces: list[Any] = [t.answer_start] if mine and spoken else []
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            if isinstance(part, str):
                part = part.lstrip() if k == 0 else part
                part = part.rstrip() if last else part
                pieces.append(" " + part if k and isinstance(parts[k - 1], str) else part)
            else:
                pieces += [t.beside_image, part] if k else [part]
                pieces += [] if last else [t.beside_image]
        if mine:
            return self._head(mine), _joined(pieces), [t.end_of_turn]
        assert isinstance(t.user, tuple)
        return [], _joined([*t.user, *pieces, t.user_end]), []

    def _image(self, slots: "Slots", part: Message, scored: bool, talked_about: bool) -> None:
        """An image part. A drawn image that a later turn talks about is shown both ways."""
        t = self.template
        default = ["codes"] if scored or not self.seen_tokens else ["patches"]
        if talked_about and self.seen_tokens:
            default = ["codes", "patches"]
        view = [way for way in part.get("view") or default if way != "patches" or self.seen_tokens]
        for way in view or ["codes"]:
            if way == "redrawn":
                redrawn = self._redrawn(part, self.codes_per_image)
                marks = np.where(True if redrawn is None else redrawn, t.begin_image, t.pad)
                slots.text(marks.tolist())
                continue
            slots.text([t.begin_image], scored=scored and way == "codes")
            if way == "codes":
                codes = part.get("codes")
                codes = self.codes(part["image"]) if codes is None else self.checked_codes(codes)
                slots.codes(codes, scored, self._redrawn(part, len(codes)))
            else:
                image = part["image"] if "image" in part else self._decoded(part["codes"])
                slots.patches(self.seen_pixels(image), self.seen_tokens)
            slots.text([t.end_image], scored=scored and way == "codes")

    def _redrawn(self, part: Message, count: int) -> np.ndarray | None:
        """Which codes of a picture are drawn, bool (count,); None: it does not say."""
        if part.get("redrawn") is None:
            return None
        redrawn = np.asarray(part["redrawn"], dtype=bool)
        if redrawn.shape != (count,):
            raise ValueError(f"redrawn says of each of {count} codes whether it is drawn")
        return redrawn

    def checked_codes(self, codes: Sequence[int]) -> np.ndarray:
        """The codes of a picture, (gh * gw,) int64; ValueError for others than there are."""
        given = np.asarray(codes)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ValueError(f"codes are a list of whole numbers, not {str(codes)[:80]!r}")
        if self.image_tokenizer is not None:
            if len(given) != self.codes_per_image:
                raise ValueError(f"a picture has {self.codes_per_image} codes, not {len(given)}")
            most = self.image_tokenizer.config.codebook_size
            if given.min() < 0 or given.max() >= most:
                raise ValueError(f"codes are 0 to {most - 1}, not {given.min()} to {given.max()}")
        return given.astype(np.int64)

    def _decoded(self, codes: Sequence[int]) -> Image.Image:
        return to_picture(self.pixels([self.checked_codes(codes).tolist()])[0])


class Slots:
    """A sample while it is being written."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kind: list[int] = []
        self.score: list[float] = []
        self.user: list[bool] = []
        self.images: list[SeenImage] = []
        self.draws = False
        self.kept: np.ndarray | None = None

    def text(self, ids: Sequence[int], scored: bool = False, user: bool = False) -> None:
        self._add(ids, TEXT, scored, user)

    def codes(self, codes: np.ndarray, scored: bool, redrawn: np.ndarray | None = None) -> None:
        """Codes (K,), drawn (`scored`) or shown, of which only those `redrawn` are to be drawn."""
        self._add([int(code) for code in codes], CODE, scored)
        self.kept = None if scored or redrawn is None else np.where(redrawn, -1, codes)
        if scored and redrawn is not None:
            self.score[-len(codes) :] = redrawn.astype(float).tolist()

    def patches(self, pixels: torch.Tensor, count: int) -> None:
        self.images.append(SeenImage(pixels, 0, len(self.ids), count))
        self._add([0] * count, PATCH)

    def sample(self) -> Sample:
        return Sample(
            np.array(self.ids, dtype=np.int64),
            np.array(self.kind, dtype=np.int64),
            np.array(self.score, dtype=np.float32),
            np.array(self.user, dtype=bool),
            self.images,
            self.draws,
            self.kept if self.draws else None,
        )

    def _add(self, ids: Sequence[int], kind: int, scored: bool = False, user: bool = False) -> None:
        self.ids += ids
        self.kind += [kind] * len(ids)
        self.score += [float(scored)] * len(ids)
        self.user += [user] * len(ids)


def user(*content: Any) -> Message:
    """A user message: strings are text; anything else is an image."""
    return _message("user", content)


def assistant(*content: Any) -> Message:
    """An assistant message: strings are text; anything else is an image."""
    return _message("assistant", content)


def to_unit(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float (3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a PIL image."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _message(role: str, content: Sequence[Any]) -> Message:
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif isinstance(part, dict):
            parts.append({"type": "image", **part})
        else:
            parts.append({"type": "image", "image": part})
    return {"role": role, "content": parts}


def checked(message: Message) -> tuple[str, list[dict[str, Any]]]:
    """Role and content parts of a message; a ValueError says what is wrong with it."""
    if not isinstance(message, dict):
        raise ValueError(f"a message has a role and a content, and this is {str(message)[:80]!r}")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise ValueError(f"a message's role is 'user' or 'assistant', not {role!r}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError("a message's content is a string or a list of text and image parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        needed = {"text": ("text",), "image": ("image", "codes")}.get(str(kind))
        if needed is None or not any(name in part for name in needed):
            raise ValueError(
                "a content part is {'type': 'text', 'text': ...} or "
                f"{{'type': 'image', 'image': ...}}, not {str(part)[:80]!r}"
            )
        if kind == "text" and not isinstance(part["text"], str):
            raise ValueError(f"the text of a part is a string, not {part['text']!r}")
        if "image" in part and not isinstance(part["image"], PICTURES):
            raise ValueError(f"an image is a path, a picture or an array, not {part['image']!r}")
        view = part.get("view") or []
        if not isinstance(view, list | tuple) or not {*map(str, view)} <= VIEWS:
            raise ValueError(f"an image's view holds {', '.join(sorted(VIEWS))}, not {view!r}")
    return role, list(content)


def draws(role: str, content: list[dict[str, Any]]) -> bool:
    """Whether a turn holds a drawn image."""
    return role == "assistant" and any(part["type"] == "image" for part in content)


def _joined(pieces: list[Any]) -> list[Any]:
    """The pieces with neighbouring strings made one, and empty ones left out."""
    joined: list[Any] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def cropped(picture: Image.Image, side: int) -> Image.Image:
    """The short side to `side`, then the square in the centre."""
    if picture.size == (side, side):
        return picture
    scale = side / min(picture.size)
    size = tuple(max(side, round(edge * scale)) for edge in picture.size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cut = (left / scale, top / scale, (left + side) / scale, (top + side) / scale)
    return picture.resize((side, side), Image.Resampling.BICUBIC, box=_within(cut, picture))


def resized(picture: Image.Image, size: tuple[int, ...]) -> Image.Image:
    if picture.size == tuple(size):
        return picture
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _within(box: tuple[float, ...], picture: Image.Image) -> tuple[float, float, float, float]:
    width, height = picture.size
    left, top, right, bottom = box
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


def load_tokenizer(path: str | Path) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json; ValueError, naming it, where it is broken."""
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise ValueError(f"{path} is missing, so there is no text tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} cannot be read as a text tokenizer: {error}") from None
