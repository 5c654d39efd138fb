"""The training loop: freezing, rates, accumulation, mixture, resume. A linear model is enough."""

import dataclasses
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from unimm.config import Run, Source, load_recipe, override, run_main
from unimm.data.mixture import Mixture, pieces, prefetch
from unimm.training.parallel import settled
from unimm.training.state import plain_state
from unimm.training.trainer import Parts, make_optimizers, rate_factor, train

KEPT: dict = {}  # the model of the last run; how many steps are left before it is stopped


class Stop(Exception):
    pass


class Numbers:
    def __init__(self, offset=0):
        self.offset = offset

    def __getitem__(self, i):
        return np.random.default_rng((self.offset, i)).normal(size=4).astype(np.float32)


def numbers(run, offset=0):
    return Numbers(offset)


def setup(run):
    torch.manual_seed(0)
    drop = nn.Dropout(run.options.get("dropout", 0.0))
    model = nn.Sequential(nn.Linear(4, 8), drop, nn.Linear(8, 1))
    KEPT["model"] = model

    def save(folder):
        from safetensors.torch import save_file

        save_file(plain_state(model), folder / "model.safetensors")

    return Parts(model, lambda items: torch.tensor(np.stack(items)), None, save)


def square(model, batch, total, run):
    """Rows count by their first number: normalising by rows would be wrong."""
    KEPT["left"] = KEPT.get("left", 10**9) - 1
    if KEPT["left"] < 0:
        raise Stop
    weight = (batch[:, :1] > 0).float() + 0.1
    loss = (weight * (model(batch) - batch.sum(1, keepdim=True)) ** 2).sum() / total
    yield "main", loss, {"rows": (float(len(batch)), 1.0)}


def weight_of(batch, run):
    return float(((batch[:, 0] > 0).float() + 0.1).sum())


def run_for(out, **changes):
    base = Run(
        step=square, train=((r".*", 1e-2),), data={"a": Source(numbers, 1.0)}, steps=12,
        batch_size=8, out=str(out), setup=setup, count=weight_of, precision="float32",
        log_every=1, save_every=4, preview_every=0,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_leaves_a_record(tmp_path):
    train(run_for(tmp_path / "a", steps=60))
    log = log_of(tmp_path / "a")
    assert np.mean([x["main_loss"] for x in log[-10:]]) < 0.7 * log[0]["main_loss"]
    record = json.loads((tmp_path / "a/run.json").read_text())
    assert record["step"].endswith(":square") and record["data"]["a"]["weight"] == 1.0
    assert (tmp_path / "a/done").exists() and not list((tmp_path / "a").glob("checkpoint-*"))


def test_accumulation_is_the_same_run(tmp_path):
    train(run_for(tmp_path / "whole"))
    train(run_for(tmp_path / "cut", accumulate=3))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-6), name
    first = [log_of(tmp_path / name)[0]["main_loss"] for name in ("whole", "cut")]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


@pytest.mark.parametrize("known, half", [({"amx_bf16": True}, True), ({"avx512_f": True}, False)])
def test_precision_is_what_the_machine_does_faster(tmp_path, monkeypatch, known, half):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    seen = []

    def watched(model, batch, total, run):
        seen.append((run.precision, model(batch).dtype))
        yield from square(model, batch, total, run)

    train(run_for(tmp_path / "a", steps=1, step=watched, precision="auto"))
    # accelerate's model gives float32 back; `square` is inside the same autocast
    assert seen == [("bf16" if half else "float32", torch.float32)]
    kept = json.loads((tmp_path / "a/run.json").read_text())["precision"]
    assert kept == seen[0][0]
    train(run_for(tmp_path / "a", steps=1, step=watched, precision="auto"))  # finished, as it is
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not half})
    assert settled(run_for(tmp_path / "a", precision="auto")).precision == kept  # as it began
    assert len(seen) == 1
    run = run_for(tmp_path / "b", precision="bf16")
    assert settled(run) is run
    with pytest.raises(ValueError, match="'auto', 'bf16' or 'float32', not 'half'"):
        train(run_for(tmp_path / "c", precision="half"))


@pytest.mark.parametrize(
    "word, said",
    [("log_every=0", "log_every is 1 or"), ("workers=0", "workers is 1 or"),
     ("packing=-7", "packing is 0 or more"),
     ("warmup=-1", "warmup is 0"), ("save_every=-1", "save_every is 0"),
     ("lora=true", "type int"), ("packing=True", "type int"), ("compile=1", "type bool")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(tmp_path, word, said):
    with pytest.raises(ValueError, match=said):
        train(override(run_for(tmp_path / "a"), [word]))
    assert not (tmp_path / "a").exists()


def test_weights_that_are_no_numbers_are_no_checkpoint(tmp_path):
    """The gradient of the first step is sound and the rate is not; the second step sees it."""
    with pytest.raises(ValueError, match="not finite"):
        train(run_for(tmp_path / "a", train=((r".*", 1e39),), save_every=0))
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_workers_are_faster_and_change_nothing():
    class Slow:
        def __getitem__(self, i):
            time.sleep(0.01)
            if i % 7 == 3:
                raise ValueError(f"row {i}")
            return i

    class InOrder:
        given = 0

        def __getitem__(self, i):
            self.given += 1
            return -self.given

        def state(self):
            return {}

        restore = state

    drawn, times = [], []
    for workers in (1, 8):
        told = []
        sources = {"rows": Slow(), "stream": InOrder()}
        mixture = Mixture(
            sources, {"rows": 3, "stream": 1}, 5, lambda item, rng: (item, rng.random()),
            lambda name, reason, told=told: told.append(reason), most_broken=0.9, workers=workers,
        )  # fmt: skip
        begin = time.perf_counter()
        found = [mixture.draw(40, 0, 2), mixture.draw(40, 1, 2)]
        times.append(time.perf_counter() - begin)
        drawn.append((found, mixture.seen, mixture.broken, sorted(told)))
    assert drawn[0] == drawn[1] and drawn[0][2]["rows"] > 3
    assert times[1] < 0.6 * times[0]


def test_data_that_have_changed_are_named(tmp_path, capsys):
    class Counted(Numbers):
        count = 30

        def __len__(self):
            return self.count

    run = run_for(tmp_path / "a", data={"rows": Source(lambda run: Counted(0), 1.0)})
    for size, said in ((30, False), (10, True)):
        Counted.count = size
        KEPT["left"] = 5
        with pytest.raises(Stop):
            train(run)
        assert ("'rows' has 10 rows, and had 30" in capsys.readouterr().err) is said
    KEPT.pop("left")


def test_a_stopped_run_goes_on_as_if_nothing_happened(tmp_path):
    options = dict(schedule="cosine", warmup=3, options={"dropout": 0.3})
    train(run_for(tmp_path / "whole", **options))
    run = run_for(tmp_path / "cut", **options)
    KEPT["left"] = 6
    with pytest.raises(Stop):
        train(run)
    KEPT["left"] = 10**9
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-4"]
    train(run)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_none_stops_the_run_and_names_the_batch(tmp_path, where):
    """The sixth step of twelve; 8 numbers a step in two pieces, of two sources by turns."""

    def bad(model, batch, total, run):
        KEPT["left"] = KEPT.get("left", 10**9) - 1
        ((name, loss, metrics),) = square(model, batch, total, run)
        if KEPT["left"] == 0 and where == "loss":
            loss = loss * float("nan")
        if KEPT["left"] == 0 and where == "gradient":  # of a root at zero
            loss = loss + (loss - loss.detach()).abs().sqrt()
        yield name, loss, metrics

    data = {"a": Source(numbers, 1.0), "b": Source(numbers, 1.0, {"offset": 5})}
    bad.__module__, bad.__qualname__ = square.__module__, square.__qualname__
    out, how = tmp_path / "bad", {"data": data, "accumulate": 2, "log_every": 2}
    with pytest.raises(ValueError, match="in step 6 ") as error:
        KEPT["left"] = 2 * 12  # two pieces a step, each counted twice
        train(run_for(out, step=bad, **how))
    if where == "loss":
        assert "a 22, 23; b 22, 23" in str(error.value)
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert len(log_of(out)) == 2
    KEPT["left"] = 10**9
    train(run_for(out, **how))
    train(run_for(tmp_path / "good", **how))
    a, b = weights(out), weights(tmp_path / "good")
    assert all(torch.equal(a[name], b[name]) and a[name].isfinite().all() for name in a)
    both = (out, tmp_path / "good")
    losses = [[entry["main_loss"] for entry in log_of(folder)] for folder in both]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_statistics_that_have_met_a_nan_are_not_kept(tmp_path):
    """The forward has moved them when the loss is known; the run goes on with another rate."""

    def with_statistics(run):
        parts = setup(run)
        model = nn.Sequential(nn.BatchNorm1d(4), *parts.model)
        KEPT["model"] = model
        return dataclasses.replace(parts, model=model, save=None)

    def bad(model, batch, total, run):
        seen.append(1)
        yield from square(model, batch * (float("nan") if len(seen) == 7 else 1), total, run)

    bad.__module__, bad.__qualname__ = square.__module__, square.__qualname__
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"in step 7 .*lower rates \(train=\.\.\.\)"):
        train(run_for(tmp_path, step=bad, setup=with_statistics))
    assert not KEPT["model"][0].running_mean.isfinite().all()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    with pytest.raises(ValueError, match="schedule"):
        train(run_for(tmp_path, setup=with_statistics, schedule="cosine"))
    lower = {"train": ((r".*", 1e-3),), "clip": 0.5}
    train(run_for(tmp_path, setup=with_statistics, **lower))
    assert KEPT["model"][0].running_mean.isfinite().all() and (tmp_path / "done").exists()
    with pytest.raises(ValueError, match="clip"):
        train(run_for(tmp_path, setup=with_statistics, train=((r".*", 1e-3),)))


def test_rows_left_out_are_counted_in_the_log(tmp_path):
    class Some(Numbers):
        def __getitem__(self, i):
            if i in (9, 10, 33):
                raise ValueError("torn")
            return super().__getitem__(i)

    def some(run):
        return Some()

    train(run_for(tmp_path, data={"a": Source(some, 1.0)}, log_every=4))
    assert [entry.get("a_broken", 0) * 4 for entry in log_of(tmp_path)] == [2, 1, 0]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    from unimm.training.parallel import Team
    from unimm.training.state import save_checkpoint

    run = run_for(tmp_path)
    team, model = Team(run), setup(run).model
    optimizers = make_optimizers(model, run)
    for _ in range(2):
        save_checkpoint(tmp_path, model, optimizers, {"step": 4}, team)
        written = (tmp_path / "checkpoint-4/state.json").stat().st_mtime_ns
        again = (tmp_path / "checkpoint-4").stat().st_ino
    save_checkpoint(tmp_path, model, optimizers, {"step": 4}, team)
    assert (tmp_path / "checkpoint-4/state.json").stat().st_mtime_ns == written
    assert (tmp_path / "checkpoint-4").stat().st_ino == again
    (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"torn")
    save_checkpoint(tmp_path, model, optimizers, {"step": 4}, team)
    assert (tmp_path / "checkpoint-4/state.json").stat().st_mtime_ns != written


def test_frozen_parameters_do_not_move_and_rates_are_in_order(tmp_path):
    rates = ((r"0\.bias", 5e-1), (r"0\..*", None), (r".*", 1e-3))
    train(run_for(tmp_path / "a", train=rates, steps=3))
    after = dict(KEPT["model"].named_parameters())
    torch.manual_seed(0)
    before = dict(nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 1)).named_parameters())
    moved = {n: float((after[n] - before[n]).abs().max().detach()) for n in after}
    assert moved["0.weight"] == 0
    assert moved["0.bias"] > 0.1 > moved["2.weight"] > 0


def test_no_match_is_an_error():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no parameter"):
        make_optimizers(model, run_for("x", train=((r"nothing", 1.0),)))


def test_rate_factor():
    run = run_for("x", steps=110, warmup=10, schedule="cosine")
    assert rate_factor(run, 0) == pytest.approx(0.1)
    assert rate_factor(run, 10) == 1 and rate_factor(run, 60) == pytest.approx(0.5)
    assert rate_factor(run, 109) < 0.001
    assert rate_factor(dataclasses.replace(run, schedule="constant"), 109) == 1
    with pytest.raises(ValueError):
        rate_factor(dataclasses.replace(run, schedule="odd"), 50)


def test_the_mixture_is_exact_and_can_skip():
    names = {"a": 1.0, "b": 3.0, "c": 0.5, "off": 0.0}
    sources = {name: [(name, i) for i in range(5000)] for name in names}
    stream = Mixture(sources, names).take(4500)
    for name, weight in names.items():
        mine = [i for n, i in stream if n == name]
        assert len(mine) == 1000 * weight and mine == list(range(len(mine)))
    for start in range(0, 4491, 90):  # every stretch has its share, within one
        part = [n for n, _ in stream[start : start + 9]]
        assert 1 <= part.count("a") <= 3 and 5 <= part.count("b") <= 7
    later = Mixture(sources, names)
    later.skip(1234)
    assert later.take(50) == stream[1234:1284]
    halves = [Mixture(sources, names).take(100, rank, 2) for rank in (0, 1)]
    assert [x for half in halves for x in half] == stream[:100]


def test_prepare_gets_a_generator_of_its_position():
    def note(item, rng):
        return float(rng.random())

    a = Mixture({"a": range(100)}, {"a": 1}, 7, note).take(10)
    b = Mixture({"a": range(100)}, {"a": 1}, 7, note)
    b.skip(4)
    assert b.take(6) == a[4:] and len(set(a)) == 10
    assert Mixture({"a": range(100)}, {"a": 1}, 8, note).take(10) != a


def test_prefetch_keeps_order_and_raises():
    values = iter(range(5))
    assert list(prefetch(lambda: next(values), 5)) == [0, 1, 2, 3, 4]

    def broken():
        raise ValueError("a broken row")

    with pytest.raises(ValueError, match="broken row"):
        list(prefetch(broken, 3))
    before = threading.active_count()
    ahead = prefetch(lambda: time.sleep(0.05), 100)
    next(ahead)
    assert threading.active_count() == before + 1
    ahead.close()  # leaves no thread behind, which would meet the end of the process at work
    assert threading.active_count() == before


def test_pieces_are_cut_where_padding_costs_least():
    assert [len(p) for p in pieces(list(range(8)), 3)] == [3, 2, 3]
    sizes = [80, 80, 82, 84, 90, 90, 91, 240, 250]
    cut = pieces(sizes, 3, lambda size: size)
    assert [list(p) for p in cut] == [[80, 80, 82, 84], [90, 90, 91], [240, 250]]
    assert [list(p) for p in pieces([7, 7], 3, lambda size: size)] == [[7], [7]]
    assert [len(p) for p in pieces([9] * 64, 4, lambda size: size)] == [16] * 4  # fits into memory
    rng = np.random.default_rng(0)
    sizes = sorted(rng.integers(1, 100, 9).tolist())
    least = min(
        sum(len(p) * max(p) for p in (sizes[:a], sizes[a:b], sizes[b:]) if p)
        for a in range(10)
        for b in range(a, 10)
    )
    assert sum(len(p) * max(p) for p in pieces(sizes, 3, lambda size: size)) == least


def test_overrides():
    run = run_for("x")
    changed = override(run, ["data.a.weight=2", "steps=5", "data.a.options={'offset': 3}"])
    assert changed.data["a"].weight == 2.0 and changed.steps == 5
    assert changed.data["a"].options == {"offset": 3} and run.steps == 12
    whole = dataclasses.replace(run, data={"a": dataclasses.replace(run.data["a"], weight=3)})
    assert override(whole, ["data.a.weight=1.5"]).data["a"].weight == 1.5  # 3 is a float too
    for wrong, message in (
        ("stps=5", "unknown key"),
        ("data.b.weight=1", "unknown key"),
        ("steps=many", "expected a value"),
        ("steps", "key=value"),
        ("step=x", "recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            override(run, [wrong])


def test_run_main_checks_its_keys():
    def main(size="small", count=3):
        return size, count

    assert run_main(main, ["count=4"]) == ("small", 4)
    with pytest.raises(ValueError, match="choose from size, count"):
        run_main(main, ["siez=quick"])


def test_recipes_are_found_or_refused(tmp_path):
    with pytest.raises(ValueError, match="no such recipe"):
        load_recipe(tmp_path / "none.py")
    text = tmp_path / "recipe.py"
    text.write_text("x = 3\n")
    assert load_recipe(text).x == 3


def muon_setup(run):
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.head = nn.Linear(4, 1)
    whole = nn.Module()
    whole.decoder = model
    whole.forward = lambda x: model.head(model.layers[1](torch.tanh(model.layers[0](x))))
    KEPT["model"] = whole

    def save(folder):
        from safetensors.torch import save_file

        save_file(plain_state(whole), folder / "model.safetensors")

    return Parts(whole, lambda items: torch.tensor(np.stack(items)), None, save)


def test_muon_takes_the_matrices_of_layers_and_resumes(tmp_path):
    run = run_for(tmp_path / "whole", setup=muon_setup, optimizer="muon", steps=40)
    run = dataclasses.replace(run, train=((r".*", 5e-2),))
    model = muon_setup(run).model
    optimizers = make_optimizers(model, run)
    taken = {
        name: {id(p) for group in o.param_groups for p in group["params"]}
        for name, o in optimizers.items()
    }
    layers = model.decoder.layers
    assert taken["main_matrices"] == {id(layers[0].weight), id(layers[1].weight)}
    assert len(taken["main"]) == 4  # biases and the head
    train(run)
    losses = [entry["main_loss"] for entry in log_of(tmp_path / "whole")]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    KEPT["left"] = 6
    with pytest.raises(Stop):
        train(dataclasses.replace(run, out=str(tmp_path / "cut")))
    KEPT["left"] = 10**9
    train(dataclasses.replace(run, out=str(tmp_path / "cut")))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="optimizer is"):
        make_optimizers(model, run_for("x", optimizer="sgd"))


def test_tensorboard_has_what_the_log_has(tmp_path, monkeypatch):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(run_for(tmp_path / "a", tensorboard=True))
    found = board.EventAccumulator(str(tmp_path / "a/tensorboard")).Reload()
    events = [(event.step, event.value) for event in found.Scalars("main_loss")]
    wanted = [(entry["step"], entry["main_loss"]) for entry in log_of(tmp_path / "a")]
    assert events == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in wanted]


def test_without_tensorboard_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install unimm\[tensorboard\]"):
        train(run_for(tmp_path / "a", tensorboard=True))
