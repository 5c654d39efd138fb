"""Your own data as samples: what people keep pictures and texts in, turned into messages.

Each reader is a function `make(run, path=..., ...)` for a recipe's `Source`; its result gives
sample i for any i >= 0, in an order drawn anew for every pass. A picture stays a path until its
sample is encoded. `keep` holds a share of the rows out of training: indices from VALIDATION on
give those.
"""

import csv
import glob
import hashlib
import io
import json
import os
import re
import string
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from unimm.data.codes import CodeShards, Picture, made_by
from unimm.data.images import open_image
from unimm.data.processor import assistant, cropped, user
from unimm.data.sources import ASK_CAPTION
from unimm.data.stores import VALIDATION
from unimm.data.streams import Stream, TarSample, in_short, made, tar_samples, tar_stream

Row = dict[str, Any]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
TASKS = ("draw", "describe", "both")


@dataclass
class Rows:
    """Rows and what makes a sample of one. `kept` are held out of training."""

    rows: list[Any]
    make: Callable[[Any, np.random.Generator], Any]
    seed: int
    kept: list[Any]
    orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # the last one used

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        rows, turn, k = self._find(i)
        return made(rows[k], self.make, np.random.default_rng((self.seed, 22, turn, k)))

    def named(self, i: int) -> str:
        """Row i, in short."""
        rows, _, k = self._find(i)
        return in_short(rows[k])

    def _find(self, i: int) -> tuple[list[Any], int, int]:
        """Where sample i is: rows, which pass over them, and which of them."""
        rows, i = (self.rows, i) if i < VALIDATION else (self.kept, i - VALIDATION)
        turn, place = divmod(i, len(rows))
        order = self.orders.get((turn, len(rows)))
        if order is None:
            order = np.random.default_rng((self.seed, 21, turn)).permutation(len(rows))
            self.orders = {(turn, len(rows)): order}
        return rows, turn, int(order[place])


def divided(
    run: Any,
    rows: list[Any],
    make: Callable[[Any, np.random.Generator], Any],
    keep: float,
    key: Callable[[Any], Any],
    what: str | Path,
) -> Rows:
    """`rows` in two: a share of `keep` is held out, all rows of equal `key` together.

    Where `key` gives several (the pictures of a row), rows that have one in common go together.
    """
    held = list(map(held_out(keep, linked(rows, key) if keep else key), rows))
    if keep and not any(held):
        print(f"{what}: nothing is held out, as its rows are few, or linked", file=sys.stderr)
    train = [row for row, out in zip(rows, held, strict=True) if not out]
    if not train:
        raise ValueError(f"{what} holds no sample to train on")
    return Rows(train, make, run.seed, [row for row, out in zip(rows, held, strict=True) if out])


def linked(rows: list[Any], key: Callable[[Any], Any]) -> Callable[[Any], str]:
    """`key`, or where it gives tuples the least of all that are linked to them by rows."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (up := above.setdefault(name, name)) != name:
            above[name] = above[up]
            name = above[name]
        return name

    for row in rows:
        try:
            names = key(row)
        except (KeyError, TypeError, AttributeError):
            continue  # a broken row
        if not isinstance(names, tuple):
            return key
        tops = sorted(map(top, names))
        above.update(dict.fromkeys(tops, tops[0]))

    return lambda row: top(key(row)[0])


def held_out(keep: float, key: Callable[[Any], str]) -> Callable[[Any], bool]:
    """Which rows are held out: a share of `keep` of the values of `key`."""
    if not 0 <= keep < 1:
        raise ValueError(f"keep is the share of rows held out, 0 or more and below 1, not {keep}")

    def out(row: Any) -> bool:
        try:
            return _unit(key(row)) < keep
        except (KeyError, TypeError, AttributeError):
            return False  # a broken row, which is named when it is asked for

    return out


def own(
    run: Any,
    path: str,
    image: str = "file",
    text: str = "text",
    task: str = "both",
    keep: float = 0.0,
    keep_by: str = "",
    codes: str = "",
    stream: bool = False,
    block: int = 1000,
) -> Rows | Stream:
    """What is at `path`, by its looks: a folder, tar shards, messages, questions, or an index.

    image, text and keep_by are for an index, see `captions`; stream and block for tar shards, see
    `webdataset`; task for all that has captions, and codes too: a folder of code shards, whose
    codes drawn pictures get without being decoded.
    """
    if not path:
        raise ValueError(
            "say where the data is: data.mine.path=INDEX.jsonl (or a folder, or *.tar)"
        )
    of_index = {"image": image != "file", "text": text != "text", "keep_by": bool(keep_by)}
    if urlsplit(path).path.endswith((".tar", ".tar.gz", ".tgz")):
        refuse(of_index, "tar shards")
        return webdataset(run, path, task, keep, codes, stream, block)
    if stream:
        raise ValueError("stream is for tar shards (*.tar), and for readers.huggingface")
    if Path(path).is_dir():
        refuse(of_index, "a folder")
        return folder(run, path, task, keep, codes)
    if path.endswith(".jsonl"):
        first = next((row for row in read_jsonl(path) if "broken" not in row), {})
        of_captions = {**of_index, "task": task != "both", "codes": bool(codes)}
        if "messages" in first:
            refuse(of_captions, "messages")
            return messages(run, path, keep)
        if "question" in first and "answer" in first:
            refuse(of_captions, "questions")
            return vqa(run, path, keep=keep)
    return captions(run, path, image, text, task, keep, keep_by, codes)


def refuse(given: dict[str, bool], what: str) -> None:
    """ValueError for options that were given and say nothing of such data."""
    for name in (name for name, there in given.items() if there):
        raise ValueError(f"{name} is not an option of {what}: it is of an index with captions")


def messages(run: Any, path: str, keep: float = 0.0) -> Rows:
    """JSONL of {"messages": [...]}; paths of pictures are relative to the file."""
    folder = Path(path).parent

    def make(row: Row, rng: np.random.Generator) -> dict[str, Any]:
        if not isinstance(row.get("messages"), list):
            raise ValueError('a row is {"messages": [...]}')
        return {"messages": [_placed(message, folder) for message in row["messages"]]}

    return divided(run, read_jsonl(path), make, keep, _pictures_of, path)


def captions(
    run: Any,
    path: str,
    image: str = "file",
    text: str = "text",
    task: str = "both",
    keep: float = 0.0,
    keep_by: str = "",
    codes: str = "",
) -> Rows:
    """An index of pictures with texts: .jsonl, .csv or .parquet.

    image: the column of the path, relative to the index. text: a column (one of a list is taken at
    random), or a form of several, "a {style} picture of {name}". task: "draw", "describe" or, one
    of the two at random, "both". keep_by: a column whose values are held out whole (by default
    rows are).
    """
    folder, rows = Path(path).parent, read_table(path)
    if not rows:
        raise ValueError(f"{path} holds no row")
    form = parsed_form(text)
    in_form = [column for _, column in form if column]
    needed = [image, *in_form, *filter(None, [keep_by])]
    columns = {str(name): None for row in rows if "broken" not in row for name in row}
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}, only {', '.join(columns)}")
    known = open_codes(run, codes)

    def make(row: Row, rng: np.random.Generator) -> dict[str, Any]:
        picture = picture_of(row, image, folder)
        name = picture.name
        if None in row:  # as csv has it
            raise ValueError(f"{name}: there are more cells than columns")
        said = {}
        for column in in_form:
            value = row[column]
            value = value[rng.integers(len(value))] if isinstance(value, list) and value else value
            if not is_text(value):
                raise ValueError(f"{name}: {column} is no text, but {value!r}")
            said[column] = str(value)
        words = "".join(before + said.get(column, "") for before, column in form)
        inside = isinstance(row[image], dict) and row[image].get("bytes") is not None
        opened = picture.image() if inside else folder / name
        return pictured(coded(opened, picture, known), words, task, rng)

    if known is not None:
        known.check(picture_of(row, image, folder).name for row in rows if image in row)
    return divided(run, rows, make, keep, lambda row: str(row[keep_by or image]), path)


def picture_of(row: Row, image: str, folder: Path) -> Picture:
    """The picture of a row: a path, or {"path", "bytes"} as `datasets` writes it."""
    shown = row[image]
    if not isinstance(shown, dict):
        return Picture(str(shown), partial(bytes_of, folder / str(shown)))
    name, stored = str(shown.get("path") or in_short(row)), shown.get("bytes")
    if stored is None:
        return Picture(name, partial(bytes_of, folder / name))
    return Picture(f"{name}#{zlib.crc32(stored):08x}", lambda: stored)  # such paths are often alike


def bytes_of(path: Path) -> bytes:
    """ValueError where there is no such picture."""
    if not path.is_file():
        raise ValueError(f"no such image: {path}")
    return path.read_bytes()


def folder(run: Any, path: str, task: str = "both", keep: float = 0.0, codes: str = "") -> Rows:
    """A folder (with those below it) of pictures, each beside a .txt or a .json of its name.

    A .json holds {"text": ...} or {"messages": [...]}.
    """
    if not Path(path).is_dir():
        raise ValueError(f"no such folder: {path}")
    pictures, known = pictures_below(path), open_codes(run, codes)

    def make(picture: Path, rng: np.random.Generator) -> dict[str, Any]:
        words, record = picture.with_suffix(".txt"), picture.with_suffix(".json")
        shown = coded(picture, Picture(named(picture), partial(bytes_of, picture)), known)
        if words.exists():
            return pictured(shown, decoded(words.read_bytes(), words), task, rng)
        if not record.exists():
            raise ValueError(f"{picture} has no text: neither {words.name} nor {record.name}")
        row = json.loads(record.read_text(encoding="utf-8"))
        if "messages" in row:
            return {"messages": [_placed(m, picture.parent) for m in row["messages"]]}
        return pictured(shown, row["text"], task, rng)

    def named(picture: Path) -> str:
        return picture.relative_to(path).as_posix()

    if known is not None:
        known.check(map(named, pictures))
    return divided(run, pictures, make, keep, lambda p: named(p.with_suffix("")), path)


def coco(run: Any, path: str, images: str, task: str = "describe", keep: float = 0.0) -> Rows:
    """COCO captions: `path` is captions_*.json, `images` the folder of the pictures."""
    data = read_json(path)
    if not isinstance(data, dict) or not {"images", "annotations"} <= data.keys():
        raise ValueError(f"{path} is none of COCO's files of captions")
    files = {record["id"]: record["file_name"] for record in data["images"]}

    def make(row: Row, rng: np.random.Generator) -> dict[str, Any]:
        return pictured(Path(images) / files[row["image_id"]], row["caption"], task, rng)

    return divided(run, data["annotations"], make, keep, lambda r: str(r["image_id"]), path)


def vqa(run: Any, path: str, images: str = "", annotations: str = "", keep: float = 0.0) -> Rows:
    """Questions about pictures, with answers.

    Either JSONL rows {"file", "question", "answer"} relative to `images` (or the file), or COCO
    VQA's two files: `path` the questions, `annotations` the answers, and `images` a folder of
    pictures that are called COCO_<folder>_<id in 12 digits>.jpg.
    """
    root = Path(images) if images else Path(path).parent
    if annotations:
        answers = {r["question_id"]: r for r in read_json(annotations)["annotations"]}
        rows = [
            {
                "file": f"COCO_{root.name}_{r['image_id']:012d}.jpg",
                "question": r["question"],
                "answer": answers[r["question_id"]]["multiple_choice_answer"],
            }
            for r in read_json(path)["questions"]
            if r["question_id"] in answers
        ]
    else:
        rows = read_jsonl(path)

    def make(row: Row, rng: np.random.Generator) -> dict[str, Any]:
        for part in ("question", "answer"):
            if not isinstance(row[part], str | int | float):
                raise ValueError(f"{row['file']}: the {part} is {row[part]!r}")
        shown = user({"image": str(root / row["file"])}, str(row["question"]))
        return {"messages": [shown, assistant(str(row["answer"]))]}

    return divided(run, rows, make, keep, lambda row: str(row["file"]), path)


def llava(run: Any, path: str, images: str, keep: float = 0.0) -> Rows:
    """LLaVA's instruction JSON: {"image", "conversations": [{"from": "human"|"gpt", "value"}]}."""

    def make(row: Row, rng: np.random.Generator) -> dict[str, Any]:
        names, talk = images_of(row), []
        said = [turn["value"] for turn in row["conversations"]]
        if len(names) == 1:  # which may be named in several turns, or in none
            said[0] = said[0] if "<image>" in "".join(said) else f"<image>{said[0]}"
            names *= "".join(said).count("<image>")
        shown = iter(names)
        for turn, value in zip(row["conversations"], said, strict=True):
            before, *behind = value.split("<image>")
            parts: list[Any] = [before.strip()]
            for words in behind:
                if (name := next(shown, None)) is None:
                    raise ValueError(f"{in_short(row)}: there are more <image> than pictures")
                parts += [{"image": str(Path(images) / name)}, words.strip()]
            talk.append({"human": user, "gpt": assistant}[turn["from"]](*filter(None, parts)))
        if next(shown, None) is not None:
            raise ValueError(f"{in_short(row)}: there are more pictures than <image>")
        return {"messages": talk}

    def images_of(row: Row) -> list[str]:
        named = row.get("image") or []
        return named if isinstance(named, list) else [named]

    def key(row: Row) -> tuple[str, ...]:
        return tuple(map(str, images_of(row))) or (str(row),)

    return divided(run, read_json(path), make, keep, key, path)


def webdataset(
    run: Any,
    path: str,
    task: str = "both",
    keep: float = 0.0,
    codes: str = "",
    stream: bool = False,
    block: int = 1000,
) -> Rows | Stream:
    """WebDataset tar shards: pictures with a .txt or .json each.

    `path` is a glob, or numbered names in WebDataset's way ("data-{000..127}.tar"). The shards are
    read in place: one pass over their headers, then a sample at a time. With `stream` they are
    read from front to back, each rank its own, mixed in blocks of `block` rows; they may then be
    compressed, or http(s) addresses.
    """
    known, shards = open_codes(run, codes), shards_of(path)

    def make(row: TarSample, rng: np.random.Generator) -> dict[str, Any]:
        name = next((n for n in row if f".{n}" in PICTURES), None)
        if name is None or not ("txt" in row or "json" in row):
            raise ValueError(f"{key(row)}: a sample has a picture and a .txt or .json")
        picture = coded(row[name], Picture(row[name].name, row[name].read), known)
        if isinstance(picture, dict) and task == "draw":
            picture = {"codes": picture["codes"]}  # and the picture stays in its shard
        else:
            opened = row[name].image()
            picture = {**picture, "image": opened} if isinstance(picture, dict) else opened
        if "txt" in row:
            return pictured(picture, decoded(row["txt"].read(), key(row)), task, rng)
        record = json.loads(row["json"].read())
        return pictured(picture, record.get("text") or record["caption"], task, rng)

    def key(row: TarSample) -> str:
        return next(iter(row.values())).name.replace(":", " ")

    if stream:
        opened = [partial(tar_stream, shard, name) for shard, name in shards.items()]
        return Stream(run.seed, opened, make, held_out(keep, key) if keep else None, block)
    rows = [row for shard, name in shards.items() for row in tar_samples(shard, name)]
    if known is not None:
        known.check(place.name for row in rows for n, place in row.items() if f".{n}" in PICTURES)
    return divided(run, rows, make, keep, key, path)


def huggingface(
    run: Any,
    path: str,
    split: str = "train",
    image: str = "image",
    text: str = "text",
    task: str = "both",
    keep: float = 0.0,
    keep_by: str = "",
    name: str = "",
    stream: bool = False,
    block: int = 1000,
) -> Rows | Stream:
    """A data set of the `datasets` library: a Hub id, a folder of files that it can read, or a
    folder that `save_to_disk` wrote.

    name: its configuration. keep_by: a column whose values are held out whole; by default rows are
    by their number, and of a stream by their picture. With `stream` nothing is loaded ahead: see
    `webdataset`.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("this source needs the datasets library: pip install datasets") from None
    saved = any((Path(path) / f).exists() for f in ("state.json", "dataset_dict.json"))
    if saved:
        data = datasets.load_from_disk(path)
        data = data[split] if isinstance(data, dict) else data
        data = data.to_iterable_dataset(min(64, len(data))) if stream else data
    else:
        data = datasets.load_dataset(path, name or None, split=split, streaming=stream)
    if isinstance((data.features or {}).get(image), datasets.Image):  # opened one by one, in `make`
        data = data.cast_column(image, datasets.Image(decode=False))

    def make(row: Row, rng: np.random.Generator) -> dict[str, Any]:
        picture = row[image]
        if isinstance(picture, dict) and picture.get("bytes"):
            picture = open_image(io.BytesIO(picture["bytes"]), name=in_short(row))
        elif isinstance(picture, dict):  # where it lies, which may be in an archive
            picture = open_image(datasets.Image().decode_example(picture))
        return pictured(picture, row[text], task, rng)

    def key(row: Row) -> str:
        shown = row[keep_by or image]
        return str((shown.get("bytes") or shown.get("path")) if isinstance(shown, dict) else shown)

    if stream:
        count = data.num_shards
        shards: list[Any] = [partial(data.shard, count, k) for k in range(count)]
        return Stream(run.seed, shards, make, held_out(keep, key) if keep else None, block)
    values = data[keep_by] if keep_by else range(len(data))
    by_number = lambda k, rng: make(data[k], rng)  # noqa: E731
    return divided(run, list(range(len(data))), by_number, keep, lambda k: str(values[k]), path)


def pictures(run: Any, path: str, image: str = "file", keep: float = 0.1) -> Rows:
    """For an image tokenizer: the pictures of a folder, an index or tar shards, uint8 (s, s, 3).

    s is the run's `options.image_size`. Where nothing is held out, validation sees what training
    does.
    """

    def make(picture: Picture, rng: np.random.Generator) -> Any:
        return np.asarray(cropped(picture.image(), run.options["image_size"]))

    rows = divided(run, list_pictures(path, image), make, keep, lambda p: p.name, path)
    rows.kept = rows.kept or rows.rows
    return rows


# ---------------------------------------------------------------------------- parts of readers


def list_pictures(path: str, image: str = "file") -> list[Picture]:
    """All pictures of a folder, an index or tar shards, each name once.

    Raises ValueError where there is none.
    """
    found: list[Picture] = []
    if Path(path).is_dir():
        for below in pictures_below(path):
            found.append(Picture(below.relative_to(path).as_posix(), partial(bytes_of, below)))
    elif path.endswith(".tar"):
        shards = shards_of(path).items()
        for row in (row for shard, name in shards for row in tar_samples(shard, name)):
            places = (row[n] for n in row if f".{n}" in PICTURES)
            found += [Picture(place.name, place.read) for place in places]
    else:
        for row in read_table(path):
            if image in row:
                found.append(picture_of(row, image, Path(path).parent))
    if not found:
        raise ValueError(f"{path} holds no picture (of an index, image=COLUMN names the column)")
    return list({picture.name: picture for picture in found}.values())


def open_codes(run: Any, folder: str) -> CodeShards | None:
    """The code shards in `folder`: of the image tokenizer that the run begins with."""
    if not folder:
        return None
    init = getattr(run, "init", "")
    maker = made_by(init) if isinstance(init, str | Path) else ""  # of parts it has no name
    return CodeShards(folder, maker if init else None)


def coded(shown: Any, picture: Picture, known: CodeShards | None) -> Any:
    """A picture as it is shown, with its codes where they are known."""
    if known is None or picture.name not in known:
        return shown
    image = str(shown) if isinstance(shown, Path) else shown
    return {"image": image, "codes": known.of(picture)}


def pictures_below(path: str) -> list[Path]:
    return sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in PICTURES)


def shards_of(path: str) -> dict[str, str]:
    """The tar shards of a glob, or of numbered names ("data-{000..127}.tar"), and what each is
    called: its path below the folder that all are in."""
    found = listed_shards(path)
    folders = [shard.split("/")[:-1] for shard in found]
    common = len(os.path.commonprefix(folders))
    return {shard: "/".join(shard.split("/")[common:]) for shard in found}


def listed_shards(path: str) -> list[str]:
    numbers = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if numbers:
        before, first, last, after = numbers.groups()
        width = len(first)
        return [f"{before}{k:0{width}d}{after}" for k in range(int(first), int(last) + 1)]
    found = [path] if "://" in path else sorted(glob.glob(path))
    if not found:
        raise ValueError(f"no shard matches {path}")
    return found


def parsed_form(text: str) -> list[tuple[str, str]]:
    """A column, or "a {style} picture of {name}": each text with the column behind it, or ""."""
    if "{" not in text:
        return [("", text)]
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r} is no form of columns in braces: {error}") from None
    if any(column == "" or how or mark for _, column, how, mark in parts):
        raise ValueError(f"{text!r}: braces hold the name of a column, and nothing else")
    return [(before, column or "") for before, column, _, _ in parts]


def is_text(value: Any) -> bool:
    """Words or a number, and not what stands for nothing."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value == value


def pictured(picture: Any, text: str, task: str, rng: np.random.Generator) -> dict[str, Any]:
    """A picture and its text as a conversation: to draw it, or to describe it."""
    if task not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}, not {task!r}")
    if not is_text(text):
        raise ValueError(f"{picture} has no text, but {text!r}")
    text = " ".join(str(text).split())
    if not text:
        raise ValueError(f"{picture} has an empty text")
    part = picture if isinstance(picture, dict) else {"image": picture}
    if isinstance(part.get("image"), Path):
        part = {**part, "image": str(part["image"])}
    if task == "draw" or (task == "both" and rng.random() < 0.5):
        return {"messages": [user(text), assistant(part)]}
    ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
    return {"messages": [user(part, ask), assistant(text)]}


def decoded(text: bytes, where: Any) -> str:
    """UTF-8, with or without a mark of it."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error}") from None


def read_table(path: str) -> list[Row]:
    """Rows of a .jsonl, .csv or .parquet file."""
    ending = Path(path).suffix.lower()
    if ending == ".csv":
        csv.field_size_limit(2**31 - 1)
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as CSV in UTF-8: {error}") from None
    if ending == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError(
                f"{path}: reading Parquet needs pyarrow: pip install pyarrow"
            ) from None
        return parquet.read_table(path).to_pylist()
    return read_jsonl(path)


def read_jsonl(path: str) -> list[Row]:
    """JSON objects, one a line. A broken line is a row that cannot be made into a sample."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(decoded(line, f"line {number}"))
                except (json.JSONDecodeError, RecursionError) as error:
                    row = {"broken": f"line {number} is not JSON: {error}"}
                except ValueError as error:
                    row = {"broken": str(error)}
                rows.append(row if isinstance(row, dict) else {"broken": f"line {number}: {row!r}"})
    return rows


def read_json(path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _placed(message: Row, folder: Path) -> Row:
    """The message with the paths of its pictures relative to `folder`."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = [
        {**part, "image": str(folder / part["image"])}
        if isinstance(part, dict) and isinstance(part.get("image"), str)
        else part
        for part in message["content"]
    ]
    return {**message, "content": content}


def _pictures_of(row: Row) -> tuple[str, ...]:
    """What tells a row of messages from others: its pictures; itself where it has none."""
    parts = [
        part
        for message in row["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    shown = [str(part["image"]) for part in parts if isinstance(part, dict) and "image" in part]
    return tuple(shown) or (json.dumps(row),)


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha1(text.encode("utf-8", "surrogatepass"))  # file names may be any bytes
    return int(digest.hexdigest()[:13], 16) / 16**13
