"""Data that is read in one direction: every row once a pass, and from anywhere as if never left."""

import gzip
import http.server
import io
import json
import tarfile
import threading
import zipfile
from functools import partial
from http.client import IncompleteRead
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unimm.data import readers, streams
from unimm.data.mixture import Mixture
from unimm.data.stores import VALIDATION
from unimm.data.streams import Stream

RUN = SimpleNamespace(seed=3)
SIZES = (5, 1, 8, 0, 6)  # of shards
ROWS = [(s, k) for s, size in enumerate(SIZES) for k in range(size)]


def shard(s):
    for k in range(SIZES[s]):
        yield {"broken": "row 3 of shard 2"} if (s, k) == (2, 3) else (s, k)


def stream(block=4, held=None, shards=(0, 1, 2, 3, 4), seed=3):
    return Stream(
        seed, [partial(shard, s) for s in shards], lambda row, rng: (row, rng.random()), held, block
    )


def take(rows, count):
    """The next rows; a broken one is None."""
    found = []
    for i in range(count):
        try:
            found.append(rows[i])
        except ValueError as error:
            assert "row 3 of shard 2" in str(error)
            found.append(None)
    return found


def of(found):
    return [(2, 3) if pair is None else pair[0] for pair in found]


@pytest.mark.parametrize("block", [1, 4, 100])
def test_every_row_comes_once_a_pass_in_an_order_of_its_own(block):
    found = of(take(stream(block), 60))
    assert sorted(found) == sorted(ROWS * 3)
    if block == 1:  # nothing is mixed but the order of shards
        for turn in range(3):
            here = found[20 * turn : 20 * turn + 20]
            assert all(here.index(row) + 1 == here.index((row[0], row[1] + 1))
                       for row in here if (row[0], row[1] + 1) in here)  # fmt: skip
        assert len({tuple(found[k : k + 20]) for k in (0, 20, 40)}) == 3
    else:
        assert found != of(take(stream(1), 60)) != of(take(stream(1, seed=4), 60))
    again = take(stream(block), 60)
    assert again == take(stream(block), 60) and of(again) == found


@pytest.mark.parametrize("block", [1, 4, 7, 100])
def test_a_stream_goes_on_from_anywhere(block):
    whole = take(stream(block), 70)
    rows = stream(block)
    for taken in range(50):
        told = json.loads(json.dumps(rows.state()))
        other = stream(block)
        other.restore(told)
        assert take(other, 20) == whole[taken : taken + 20], taken
        assert other.state() != told
        take(rows, 1)


@pytest.mark.parametrize("ranks, shards", [(2, 5), (3, 5), (3, 2)])
def test_ranks_share_the_rows(ranks, shards, monkeypatch):
    monkeypatch.setattr(streams.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(streams.dist, "get_world_size", lambda: ranks)
    every, places = [], []
    for rank in range(ranks):
        monkeypatch.setattr(streams.dist, "get_rank", lambda rank=rank: rank)
        rows, mine = stream(2, shards=range(shards)), []
        while True:  # to the end of the first pass
            here = of(take(rows, 1))
            if rows.begin[0]:
                break
            mine += here
        every += mine
        places.append(rows.state())
    whole = [row for row in ROWS if row[0] < shards]
    assert sorted(every) == sorted(whole)
    monkeypatch.setattr(streams.dist, "is_initialized", lambda: False)
    alone = stream(2, shards=range(shards))
    alone.restore(places[0])  # of another number of ranks: the next pass, whole
    assert sorted(of(take(alone, len(whole)))) == sorted(whole)
    assert alone.begin[0] == places[0]["begin"][0] + 1


def test_what_is_held_out_is_never_trained_on():
    rows = stream(held=lambda row: row[1] == 0)
    assert {row for row in of(take(rows, 60))} == {row for row in ROWS if row[1] != 0}
    assert len(rows.kept) == 4 and of(take(SimpleRows(rows), 4)) == rows.kept
    read = []
    free = Stream(3, [lambda: iter(read.append(0) or [1])], lambda row, rng: row)
    assert free.kept == [] and not read  # nothing is read to find that nothing is held out
    none = stream(held=lambda row: True, shards=(0, 1))
    with pytest.raises(ValueError, match="2 shards hold no sample to train on"):
        none[0]
    with pytest.raises(ValueError, match="a block of a stream has 1 row or more"):
        stream(0)


class SimpleRows:
    """Indices from VALIDATION on."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, i):
        return self.rows[VALIDATION + i]


def test_what_a_shard_cannot_give_is_told_and_asked_for_again(monkeypatch):
    """A line that drops once is taken up where it dropped; one that stays dead ends the shard."""
    monkeypatch.setattr(streams, "PAUSES", (0.0, 0.0))
    failures = {"left": 0}

    def fragile(s):
        for k in range(5):
            if (s, k) == (1, 3) and failures["left"]:
                failures["left"] -= 1
                raise (ConnectionError, IncompleteRead)[failures["left"] % 2](b"line dropped")
            yield (s, k)

    def read():
        rows, found, wrong = (
            Stream(3, [partial(fragile, s) for s in range(3)], lambda r, g: r),
            [],
            [],
        )
        while True:
            try:
                row = rows[0]
            except ValueError as error:
                wrong.append(str(error))
                continue
            if rows.begin[0]:
                return found, wrong
            found.append(row)

    whole = sorted((s, k) for s in range(3) for k in range(5))
    failures["left"] = 2
    found, wrong = read()
    assert sorted(found) == whole and not wrong
    failures["left"] = 3
    found, wrong = read()
    assert sorted(found) == [row for row in whole if row not in ((1, 3), (1, 4))]
    assert len(wrong) == 1 and "after 3 rows of a shard" in wrong[0] and "dropped" in wrong[0]


def test_other_shards_or_fewer_rows_after_a_stop():
    rows = stream(4)
    take(rows, 9)
    state = rows.state()
    other = stream(4, shards=(0, 1, 2, 4))
    other.restore(state)
    assert other.next == [1, 0, 0] and sorted(of(take(other, 20))) == sorted(ROWS)
    short = stream(100)
    take(short, 19)
    state = short.state()
    short.shards = [partial(islice, range(3), 2) for _ in SIZES]
    with pytest.raises(ValueError, match="fewer rows than before"):
        short.restore(state)


def test_every_rank_meets_every_source():
    """However regular the order of sources is: their streams are divided among the ranks."""
    for ranks in (2, 3, 4):
        every = [
            Mixture({"a": range(10**9), "b": range(10**9)}, {"a": 1, "b": 1}).draw(12, r, ranks)
            for r in range(ranks)
        ]
        for mine in every:
            assert {name for (name, _), _ in mine} == {"a", "b"} and len(mine) == 12 // ranks
        whole = Mixture({"a": range(10**9), "b": range(10**9)}, {"a": 1, "b": 1}).draw(12)
        assert [pair for mine in every for pair in mine] == whole


def test_a_mixture_with_a_stream_goes_on(tmp_path):
    def mixture():
        sources = {"numbers": range(10**10), "rows": stream()}
        return Mixture(sources, {"numbers": 1, "rows": 2}, most_broken=0.9)

    whole = mixture().draw(60)
    begun = mixture()
    assert begun.draw(23) == whole[:23]
    told = json.loads(json.dumps(begun.state()))
    other = mixture()
    other.restore(told)
    assert other.draw(37) == whole[23:]


# -------------------------------------------------------------------------------- tar shards


def sample_bytes(k):
    buffer = io.BytesIO()
    levels = np.random.default_rng(k).integers(0, 255, (12, 10, 3), np.uint8)
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path):
    """Three shards of four samples: t-00.tar to t-02.tar."""
    for s in range(3):
        with tarfile.open(tmp_path / f"t-{s:02d}.tar", "w") as tar:
            for k in range(4 * s, 4 * s + 4):
                for ending, data in (("png", sample_bytes(k)), ("txt", f"number {k}".encode())):
                    info = tarfile.TarInfo(f"{k:05d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return tmp_path


def told(rows, count, first=0):
    """Text -> levels of the picture, of samples `first` and on."""
    found = {}
    for i in range(first, first + count):
        said, shown = rows[i]["messages"][::-1]
        picture = next(part["image"] for part in shown["content"] if "image" in part)
        found[said["content"][0]["text"]] = np.asarray(picture)
    return found


def check_samples(found):
    assert found.keys() == {f"number {k}" for k in range(12)}
    for k in range(12):
        expected = np.asarray(Image.open(io.BytesIO(sample_bytes(k))))
        assert (found[f"number {k}"] == expected).all()


def test_tar_shards_are_streamed_from_files_and_addresses(tars, monkeypatch):
    read = partial(readers.webdataset, RUN, task="describe", stream=True, block=5)
    check_samples(told(read(f"{tars}/t-*.tar"), 12))
    check_samples(
        told(readers.own(RUN, f"{tars}/t-{{00..02}}.tar", task="describe", stream=True), 12)
    )
    for s in range(3):
        with gzip.open(tars / f"t-{s:02d}.tar.gz", "wb") as file:
            file.write((tars / f"t-{s:02d}.tar").read_bytes())
    check_samples(told(read(f"{tars}/t-*.tar.gz"), 12))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tars))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/t-{{00..02}}.tar"
        check_samples(told(read(place), 12))
        monkeypatch.setattr(streams, "PAUSES", ())
        missing = read(f"http://127.0.0.1:{server.server_port}/t-{{07..07}}.tar")
        with pytest.raises(ValueError, match="t-07.tar cannot be read.*404"):
            missing[0]
        server.shutdown()


def test_a_line_that_drops_is_taken_up_where_it_dropped(tars, monkeypatch):
    """The first answers end after half of their bytes, within a sample."""
    monkeypatch.setattr(streams, "PAUSES", (0.0, 0.0))
    data, asked = (tars / "t-00.tar").read_bytes(), []

    class Dropping(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if len(asked) > 2 else data[: len(data) // 2])

        def log_message(self, *args):
            pass

    whole = list(streams.rows_of(partial(streams.tar_stream, str(tars / "t-00.tar"))))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dropping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/t-00.tar"
        found = list(streams.rows_of(partial(streams.tar_stream, address)))
        server.shutdown()
    assert len(asked) == 3 and len(found) == len(whole) > 2
    for a, b in zip(found, whole, strict=True):
        assert {k: v.data for k, v in a.items()} == {k: v.data for k, v in b.items()}


def test_shards_of_one_name_in_several_folders_are_several(tars):
    """Codes go by the name, so that a picture must not have that of another."""
    for k in range(2):
        (tars / f"part{k}").mkdir()
        (tars / f"t-{k:02d}.tar").rename(tars / f"part{k}/0.tar")
    path = f"{tars}/part*/0.tar"
    listed = dict(readers.list_pictures(path))  # what reads the bytes, by the name
    opened = {picture.name: picture for picture in readers.list_pictures(path)}
    assert {name.split(":")[0] for name in listed} == {"part0/0.tar", "part1/0.tar"}
    assert len(listed) == 8
    for stream in (False, True):
        rows = readers.webdataset(RUN, path, task="describe", stream=stream)
        found = told(rows, 8)
        assert found.keys() == {f"number {k}" for k in range(8)}
        row = rows.last if stream else rows.rows[0]
        assert row["png"].name in listed
        assert listed[row["png"].name]() == row["png"].read()
        assert (np.asarray(opened[row["png"].name].image()) == np.asarray(row["png"].image())).all()
    assert list(readers.shards_of("https://x.org/d/s-{0..1}.tar").values()) == [
        "s-0.tar",
        "s-1.tar",
    ]
    assert readers.shards_of(f"{tars}/t-02.tar") == {f"{tars}/t-02.tar": "t-02.tar"}


def test_streamed_and_indexed_shards_hold_out_the_same(tars):
    one, two = (
        readers.webdataset(RUN, f"{tars}/t-*.tar", "describe", keep=0.4, stream=s)
        for s in (False, True)
    )
    assert 0 < len(one.kept) == len(two.kept) < 12
    kept, same = ({row["txt"].read() for row in rows.kept} for rows in (one, two))
    assert kept == same
    trained = told(two, 2 * (12 - len(kept)))
    assert not {words.encode() for words in trained} & kept and len(trained) == 12 - len(kept)


def test_a_shard_that_breaks_off_gives_what_it_has(tars):
    whole = (tars / "t-01.tar").read_bytes()
    (tars / "t-01.tar").write_bytes(whole[: whole.rindex(b"IDAT") + 30])
    (tars / "t-02.tar").write_bytes(b"no tar file at all" * 100)
    rows = readers.webdataset(RUN, f"{tars}/t-*.tar", task="describe", stream=True)
    found, wrong = {}, []
    for _ in range(40):
        try:
            found |= told(rows, 1)
        except ValueError as error:
            wrong.append(str(error))
    assert found.keys() == {f"number {k}" for k in range(7)}  # not 7, which is cut short
    assert {next(n for n in ("t-01", "t-02") if n in line) for line in wrong} == {"t-01", "t-02"}
    assert all("cannot be read as a tar file" in line for line in wrong)


@pytest.mark.parametrize("what", ["header", "cut in a header", "no end"])
def test_damage_between_samples_is_no_end(tars, what):
    """tarfile alone takes a header that is none for the end of the file."""
    shard = tars / "t-01.tar"
    whole = shard.read_bytes()
    place = whole.index(b"00006.png")
    damaged = {
        "header": whole[:place] + b"\xff" * 512 + whole[place + 512 :],
        "cut in a header": whole[: place + 100],
        "no end": whole[:place],
    }[what]
    shard.write_bytes(damaged)
    found, wrong = {}, []
    rows = readers.webdataset(RUN, str(shard), task="describe", stream=True)
    for _ in range(6):
        try:
            found |= told(rows, 1)
        except ValueError as error:
            wrong.append(str(error))
    assert found.keys() == {"number 4", "number 5"}
    assert len(wrong) == 2 and all("t-01.tar cannot be read" in line for line in wrong)
    if what != "no end":  # which is all that is there
        with pytest.raises(ValueError, match="t-01.tar (cannot be read|is cut short)"):
            readers.webdataset(RUN, str(shard))


def test_links_in_a_shard_are_passed_over(tars):
    path = tars / "t-00.tar"
    files = list(streams.tar_stream(str(path)))
    with tarfile.open(path, "w") as tar:
        for k, row in enumerate(files):
            for ending, place in row.items():
                info = tarfile.TarInfo(f"{k:05d}.{ending}")
                info.size = place.size
                tar.addfile(info, io.BytesIO(place.data))
            link = tarfile.TarInfo(f"{k:05d}.link")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            tar.addfile(link)
    for stream in (False, True):
        rows = readers.webdataset(RUN, f"{tars}/t-*.tar", task="describe", stream=stream)
        check_samples(told(rows, 12))


def test_what_can_only_be_streamed_says_so(tars):
    for path in (f"{tars}/t-00.tar.gz", "https://somewhere/t-00.tar?download=true"):
        (tars / "t-00.tar.gz").write_bytes(b"")
        with pytest.raises(ValueError, match="can only be streamed: stream=True"):
            readers.own(RUN, path)


def test_stream_is_for_what_can_be_streamed(tars):
    (tars / "i.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="stream is for tar shards"):
        readers.own(RUN, f"{tars}/i.jsonl", stream=True)


# ------------------------------------------------------------------------------------ datasets


def test_the_datasets_library_loaded_and_streamed(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": sample_bytes(k), "path": None} for k in range(12)]
            + [{"bytes": b"no picture", "path": None}],
            "text": [f"number {k}" for k in range(12)] + ["broken"],
        },
        features,
    )
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for s in range(3):
        data.shard(3, s).to_parquet(tmp_path / f"files/train-{s}.parquet")
    for folder in ("saved", "files"):
        for stream in (False, True):
            rows = readers.huggingface(
                RUN, str(tmp_path / folder), task="describe", stream=stream, block=5
            )
            found, wrong = {}, []
            for i in range(13):
                try:
                    found |= told(rows, 1, i)
                except ValueError as error:
                    wrong.append(str(error))
            check_samples(found)
            assert len(wrong) == 1 and "cannot be read as an image" in wrong[0]
    assert "broken" in wrong[0]
    assert len(rows.shards) == 3  # a file each
    rows = readers.huggingface(RUN, str(tmp_path / "files"), keep=0.3, stream=True)
    assert 0 < len(rows.kept) < 12
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for k in range(12):
            archive.writestr(f"{k}.png", sample_bytes(k))
        lines = [{"file_name": f"{k}.png", "text": f"number {k}"} for k in range(12)]
        archive.writestr("metadata.jsonl", "\n".join(map(json.dumps, lines)))
    (tmp_path / "zipped").mkdir()
    (tmp_path / "pictures.zip").rename(tmp_path / "zipped/train.zip")
    for stream in (False, True):
        check_samples(
            told(readers.huggingface(RUN, f"{tmp_path}/zipped", task="describe", stream=stream), 12)
        )
    kept = []
    for stream in (False, True):
        rows = readers.huggingface(
            RUN, f"{tmp_path}/saved", task="describe", keep=0.4, keep_by="text", stream=stream
        )
        words = [row["text"] if stream else data["text"][row] for row in rows.kept]
        kept.append(set(words))
    assert kept[0] == kept[1] and 0 < len(kept[0]) < 12
