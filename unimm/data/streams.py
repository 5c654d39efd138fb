"""Rows that come one after the other: data too large to index, or not on this machine.

A stream is made of shards, each read from its beginning. The order of shards is drawn anew for
every pass and rows are mixed in blocks, so where it stands is told by a few numbers (`state`).
"""

import io
import tarfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from http.client import HTTPException
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from unimm.data.images import open_image
from unimm.data.stores import VALIDATION

KEPT, LOOKED = 256, 10_000  # rows held out that are shown, and rows in which they are looked for
PASSES = 10  # a rank may draw shards without a row, but not for so many passes
PAUSES = (1.0, 4.0)  # seconds before a shard that could not be read is opened again
Shard = Callable[[], Iterable[Any]]  # opened, it gives its rows in order


class Stream:
    """What makes samples of the rows of shards, as `readers.Rows` does of rows in memory.

    `[i]` is this process's next row, whatever i is. With several ranks each reads shards of its
    own, or, where there are fewer shards than ranks, a row in so many of all. Rows that are
    `held(row)` are left out of training (None: no row is); the first of them are given from
    VALIDATION on. A row that is {"broken": reason} raises ValueError; where a shard cannot be read
    any further, that is its last row. block: rows that are mixed with each other.
    """

    def __init__(
        self,
        seed: int,
        shards: Sequence[Shard],
        make: Callable[[Any, np.random.Generator], Any],
        held: Callable[[Any], bool] | None = None,
        block: int = 1000,
    ):
        if block < 1:
            raise ValueError(f"a block of a stream has 1 row or more, not {block}")
        self.seed, self.shards, self.make, self.held, self.size = seed, shards, make, held, block
        there = dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self._kept: list[Any] | None = None
        self.taken = 0  # of this block
        self.last: Any = None
        self._go_to([0, 0, 0], block=-1)

    @property
    def kept(self) -> list[Any]:
        """Rows held out, up to `KEPT` of the first `LOOKED`."""
        if self._kept is None:
            first = islice((row for shard in self.shards for row in rows_of(shard)), LOOKED)
            found = (row for row in first if self._is_held(row)) if self.held else iter(())
            self._kept = list(islice(found, KEPT))
        return self._kept

    def __getitem__(self, i: int) -> Any:
        if i >= VALIDATION:
            k = (i - VALIDATION) % len(self.kept)
            return made(self.kept[k], self.make, np.random.default_rng((self.seed, 26, k)))
        if self.taken == len(self.rows):
            self._next_block()
        k, self.taken = int(self.order[self.taken]), self.taken + 1
        row, self.rows[k] = self.rows[k], None
        self.last = row
        rng = np.random.default_rng((self.seed, 25, self.rank, self.block, k))
        return made(row, self.make, rng)

    def named(self, i: int) -> str:
        """The row that was given last, in short."""
        return in_short(self.last)

    def state(self) -> dict[str, Any]:
        """Where this rank stands, JSON-able."""
        place = {"begin": self.begin, "block": self.block, "taken": self.taken}
        return {**place, "ranks": self.ranks, "shards": len(self.shards)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there; with another number of ranks or shards, with the next pass."""
        if (state["ranks"], state["shards"]) != (self.ranks, len(self.shards)):
            return self._go_to([state["begin"][0] + 1, 0, 0], state["block"])
        self._go_to(state["begin"], max(state["block"], 0) - 1)
        if state["block"] >= 0:
            self._next_block()
            if state["taken"] > len(self.rows):
                raise ValueError("the shards of a stream hold fewer rows than before the stop")
            self.taken = state["taken"]

    def _go_to(self, place: list[int], block: int) -> None:
        """`place`: pass, shard of this rank, row in it, from which the block after `block` is."""
        self.begin, self.next, self.block, self.taken = place, place, block, 0
        self.rows: list[Any] = []
        self.order = np.empty(0, int)
        self.ahead = self._from(*place)

    def _next_block(self) -> None:
        """Read `size` rows, or what is left of this pass."""
        for _ in range(PASSES):
            if found := list(islice(self.ahead, self.size)):
                break
            self._go_to([self.next[0] + 1, 0, 0], self.block)
        else:
            raise ValueError(f"{len(self.shards)} shards hold no sample to train on")
        self.begin, self.block, self.taken = self.next, self.block + 1, 0
        self.rows, self.next = [row for _, row in found], found[-1][0]
        rng = np.random.default_rng((self.seed, 24, self.rank, self.block))
        self.order = rng.permutation(len(self.rows))

    def _from(self, turn: int, first: int, begin: int) -> Iterator[tuple[list[int], Any]]:
        """The rows of a pass from such a place on, each with the place of the one after it."""
        by_shard = len(self.shards) >= self.ranks
        order = np.random.default_rng((self.seed, 23, turn)).permutation(len(self.shards))
        mine = order[self.rank :: self.ranks] if by_shard else order
        for s in range(first, len(mine)):
            for k, row in enumerate(rows_of(self.shards[mine[s]])):
                is_mine = by_shard or k % self.ranks == self.rank
                if (s, k) >= (first, begin) and is_mine and not self._is_held(row):
                    yield [turn, s, k + 1], row

    def _is_held(self, row: Any) -> bool:
        return self.held is not None and not _is_broken(row) and self.held(row)


def made(row: Any, make: Callable[..., Any], rng: np.random.Generator) -> Any:
    """`make(row, rng)`; ValueError for a row that is broken, or not what `make` is for."""
    if _is_broken(row):
        raise ValueError(row["broken"])
    try:
        return make(row, rng)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{in_short(row)}: {error!r}") from None


def rows_of(shard: Shard) -> Iterator[Any]:
    """The rows of a shard; where it breaks off, the last one is {"broken"}.

    What an address or a disk refuses is tried again, from the row that is wanted.
    """
    count = 0
    for pause in (*PAUSES, None):
        try:
            for row in islice(shard(), count, None):
                count += 1
                yield row
            return
        except Exception as error:
            if pause is None or not isinstance(error, OSError | HTTPException):
                yield {"broken": f"after {count} rows of a shard: {' '.join(str(error).split())}"}
                return
            time.sleep(pause)


# -------------------------------------------------------------------------------- tar shards


class Place(NamedTuple):
    """A file in a tar shard: where its bytes lie, or these themselves.

    called: what the shard is called in `name`, by which codes go; its own name if it is "".
    """

    shard: str
    offset: int
    size: int
    data: bytes | None = None
    called: str = ""

    @property
    def name(self) -> str:
        return f"{self.called or self.shard.rpartition('/')[2]}:{self.offset}"

    def __repr__(self) -> str:
        return self.name

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def image(self) -> Any:
        return open_image(io.BytesIO(self.read()), name=self.name)


TarSample = dict[str, Place]  # the files of one sample, by their endings


def tar_samples(shard: str, called: str = "") -> Iterator[TarSample]:
    """The samples of a tar file on this machine; one pass over its headers.

    Raises ValueError for what is no tar file, or is cut short.
    """
    if shard.endswith((".gz", ".tgz")) or "://" in shard:
        raise ValueError(f"{shard} can only be streamed: stream=True")
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, tarinfo=Header) as tar:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            yield from _grouped(_places(tar, shard, size, called))
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as a tar file: {error}") from None


def tar_stream(shard: str, called: str = "") -> Iterator[TarSample]:
    """The samples of a tar file (which may be compressed), or of an http(s) address, with their
    bytes, in one pass and without going back.

    Raises ValueError where it is damaged or breaks off, and OSError where it cannot be read, after
    the samples before that place.
    """
    wrong: list[ValueError] = []

    def files() -> Iterator[tuple[str, Place]]:
        try:
            with (
                closing(_open(shard)) as file,
                tarfile.open(fileobj=file, mode="r|*", tarinfo=WholeHeader) as tar,
            ):
                for member in tar:
                    if member.isfile() and (opened := tar.extractfile(member)) is not None:
                        size, data = member.size, opened.read()
                        yield member.name, Place(shard, member.offset_data, size, data, called)
                    tar.members = []  # type: ignore[attr-defined]  # which it would keep
        except (tarfile.TarError, EOFError, zlib.error) as error:
            wrong.append(ValueError(f"{shard} cannot be read as a tar file: {error}"))
        except (OSError, HTTPException) as error:  # at once: it may be within a sample
            raise OSError(f"{shard} cannot be read: {error!r}") from error

    yield from _grouped(files())
    for error in wrong:
        raise error


class Header(tarfile.TarInfo):
    """A header that is damaged is an error wherever it stands, not the end of the file."""

    bad: tuple[type[Exception], ...] = (
        tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
        tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    )

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tarfile_)
        except cls.bad as error:
            raise tarfile.ReadError(str(error)) from None


class WholeHeader(Header):
    """And there is one that says where the file ends."""

    bad = (*Header.bad, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]


class Download:
    """The bytes of an http(s) address; OSError where they end before they should (the library
    takes a line that drops for the end)."""

    def __init__(self, address: str):
        self.response = urllib.request.urlopen(address, timeout=60)
        length = self.response.headers.get("Content-Length")
        self.left = int(length) if length else None
        self.close = self.response.close

    def read(self, size: int) -> bytes:
        data = self.response.read(size)
        if self.left is not None:
            self.left -= len(data)
            if not data and size and self.left:
                raise OSError(f"the line dropped {self.left} bytes before the end")
        return data


def _open(shard: str) -> Any:
    if shard.startswith(("http://", "https://")):
        return Download(shard)
    return open(shard, "rb")


def _places(
    tar: tarfile.TarFile, shard: str, size: int, called: str
) -> Iterator[tuple[str, Place]]:
    for member in tar:
        if member.isfile():
            if member.offset_data + member.size > size:
                raise ValueError(f"{shard} is cut short within {member.name}")
            yield member.name, Place(shard, member.offset_data, member.size, None, called)


def _grouped(files: Iterable[tuple[str, Place]]) -> Iterator[TarSample]:
    """Files that follow each other and differ in their ending alone are a sample."""
    before, sample = "", TarSample()
    for name, place in files:
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        if f"{folder}/{stem}" != before and sample:
            yield sample
            sample = {}
        before = f"{folder}/{stem}"
        sample[ending.lower()] = place
    if sample:
        yield sample


def in_short(row: Any) -> str:
    """A row in so few words that it is known again."""
    if isinstance(row, dict):
        row = {k: v for k, v in row.items() if isinstance(v, str | int | float | list | Place)}
    return " ".join(str(row)[:120].split())


def _is_broken(row: Any) -> bool:
    return isinstance(row, dict) and "broken" in row
