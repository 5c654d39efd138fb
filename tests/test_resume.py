"""A run that is killed, stopped, short of disk or given a damaged checkpoint goes on exactly.

As a script: trains a tiny model in processes that are forked and killed at random moments.
"""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from unimm.checkpoints.native import load_model, save_model
from unimm.config import Run, Source
from unimm.data.processor import assistant, user
from unimm.training import state, trainer
from unimm.training.next_token import next_token, scored_weight
from unimm.training.trainer import check_same_run, train

ROOT = Path(__file__).parent.parent
TIMES = {"seconds_a_step", "waiting", "tokens_a_second"}


class Talks:
    """Words, seen and drawn pictures of uneven lengths; sample i is a function of i."""

    def __init__(self, kind):
        self.kind = kind

    def __getitem__(self, i):
        rng = np.random.default_rng((len(self.kind), i))
        if self.kind == "broken" and i % 7 == 3:
            raise ValueError(f"row {i} is broken")
        words = "".join(rng.choice(list("abcdef "), rng.integers(3, 20)))
        picture = rng.integers(0, 255, (16, 16, 3), np.uint8)
        if self.kind == "draw":
            return {"messages": [user(words), assistant({"codes": rng.integers(0, 32, 16)})]}
        if self.kind == "see":
            return {"messages": [user(picture, "what?"), assistant(words)]}
        return {"messages": [user(words), assistant(words[::-1])]}


def talks(run, kind):
    return Talks(kind)


def run_for(root, out, **changes):
    kinds = {"draw": 2.0, "see": 1.0, "broken": 1.0}
    settings = dict(
        step=next_token, count=scored_weight, train=((r"vision\..*", 1e-3), (r".*", 3e-3)),
        data={kind: Source(talks, w, {"kind": kind}) for kind, w in kinds.items()},
        steps=40, batch_size=8, accumulate=2, out=str(Path(root) / out), init=str(root) + "/model",
        precision="float32", schedule="cosine", warmup=3, log_every=3, save_every=2,
        preview_every=20, most_broken=0.3, options={"prompts": ["ab"], "guidance": 2.0},
    )  # fmt: skip
    return Run(**{**settings, **changes})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A kill of the process loses nothing that the system was told to write."""
    monkeypatch.setattr(state, "to_disk", lambda path: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_model(folder / "model", *tiny_model(dropout=0.2))
    train(run_for(folder, "whole"))
    return folder


def same(root, one, two, steps=40):
    """Weights and logs are equal, but for times."""
    a, b = (load_file(root / name / "model.safetensors") for name in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    logs = []
    for name in (one, two):
        lines = [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in TIMES} for line in lines])
    assert logs[0] == logs[1]
    found = [line["step"] for line in logs[0] if "main_loss" in line]
    assert found == [*range(3, steps, 3), steps]


class Stop(Exception):
    pass


def stopped_after(monkeypatch, run, step):
    """Train, and leave by an error when the checkpoint of `step` has been written."""

    def save(out, model, optimizers, progress, team, save=state.save_checkpoint):
        save(out, model, optimizers, progress, team)
        if progress["step"] == step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("unimm.training.trainer.save_checkpoint", save)
        with pytest.raises(Stop):
            train(run)
    return Path(run.out)


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]  # on two cores that do something else too


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kills, packing", [(3, 100), *(pytest.param(20, p, marks=SLOW) for p in (0, 100))]
)
def test_killed_at_random_moments(root, kills, packing):
    """The last line of the script: how often a running process was killed."""
    words = [sys.executable, __file__, str(root), str(kills), str(packing)]
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(words, env=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["killed"] == kills
    names = (f"{how}-{kills}-{packing}" for how in ("undisturbed", "killed"))
    same(root, *names, steps=40 + 4 * kills)


def test_two_runs_do_not_train_in_one_folder(root, monkeypatch):
    run = run_for(root, "one")
    out = Path(run.out)
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1}\n')  # of the other run, which has no checkpoint
    with FileLock(out / ".lock"), pytest.raises(ValueError, match="another run is training in"):
        train(run)
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["log.jsonl"]
    assert (out / "log.jsonl").read_text() == '{"step": 1}\n'

    def remove(folder):
        with pytest.raises(Timeout):  # the other has to wait until all is written
            FileLock(folder / ".lock").acquire(timeout=0)
        (folder / "removed").write_text("")

    monkeypatch.setattr(trainer, "remove_checkpoints", remove)
    assert (train(run) / "done").exists() and (out / "removed").exists()


def test_a_run_that_cannot_begin_leaves_nothing(root):
    run = run_for(root, "nothing", init=str(root / "not there"))
    with pytest.raises((ValueError, OSError)):
        train(run)
    assert not Path(run.out).exists()


def test_the_last_two_checkpoints_are_kept_and_none_in_the_end(root, monkeypatch):
    out = stopped_after(monkeypatch, run_for(root, "kept"), 20)
    assert [path.name for path in state.checkpoints(out)] == ["checkpoint-18", "checkpoint-20"]
    train(run_for(root, "kept"))
    assert not state.checkpoints(out) and not (out / "checkpoint.part").exists()
    same(root, "whole", "kept")


def test_a_checkpoint_appears_whole_and_when_it_is_on_the_disk(root, monkeypatch):
    out, there = root / "appears", []  # what is on the disk already

    def to_disk(path):
        if path == out:
            assert {"state.json", "model.safetensors", "optimizers.safetensors"} <= set(there)
            assert there[-1] == "checkpoint.part"
            there.clear()
        else:
            assert path.parent.name != "checkpoint.part" or path.stat().st_size
            there.append(path.name)
            part = out / "checkpoint.part"
            assert (part / "state.json").exists() and (part / "random.safetensors").exists()

    def save(tensors, path, metadata=None):
        assert path.parent.name == "checkpoint.part"
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(state, "to_disk", to_disk)
        patch.setattr(state, "save_file", save)
        stopped_after(patch, run_for(root, "appears"), 2)
    assert not there and [path.name for path in state.checkpoints(out)] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes(b""),
        lambda f: os.truncate(f / "optimizers.safetensors", 3000),
        lambda f: flip(f / "model.safetensors"),
        lambda f: (f / "state.json").unlink(),
        lambda f: (f / "state.json").write_text('{"step": 20'),
        lambda f: (f / "random.safetensors").unlink(),
    ],
    ids=["empty", "truncated", "one bit", "no state", "half a state", "no randomness"],
)
def test_a_damaged_checkpoint_is_passed_over(root, monkeypatch, capsys, damage, request):
    name = "damaged" + request.node.callspec.id.replace(" ", "-")
    out = stopped_after(monkeypatch, run_for(root, name), 20)
    damage(out / "checkpoint-20")
    train(run_for(root, name))
    assert "checkpoint-20 is damaged and passed over" in capsys.readouterr().err
    same(root, "whole", name)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_one(root, monkeypatch):
    def full(tensors, path, metadata=None, saves=[]):  # noqa: B006
        saves.append(path)
        if len(saves) > 13:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(OSError, match="No space left.*go on from checkpoint-8"):
            train(run_for(root, "full"))
    out = root / "full"
    assert [path.name for path in state.checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]
    assert not (out / "checkpoint.part").exists()
    train(run_for(root, "full"))
    same(root, "whole", "full")


def test_a_real_limit_on_files_is_an_oserror(root, tmp_path):
    """safetensors has an error of its own for what the system says."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_resume import run_for, train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: train(run_for(sys.argv[1], 'limited', preview_every=0))\n"
        "except OSError as error: print('refused:', error)\n"
    )
    words = [sys.executable, "-c", code, str(root), str(ROOT / "tests")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "refused: the checkpoint of step 2 cannot be written" in done.stdout, done.stderr[-2000:]
    assert not state.checkpoints(root / "limited")


def test_sigterm_saves_and_ends_with_status_0(root, monkeypatch):
    count = [0]

    def step(model, batch, total, run):
        count[0] += 1
        if count[0] == 15:  # in the middle of step 8
            os.kill(os.getpid(), signal.SIGTERM)
        yield from next_token(model, batch, total, run)

    step.__module__, step.__qualname__ = next_token.__module__, next_token.__qualname__
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(run_for(root, "term", step=step, save_every=0))
    assert ended.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in state.checkpoints(root / "term")] == ["checkpoint-8"]
    train(run_for(root, "term", save_every=0))
    same(root, "whole", "term")


def test_a_checkpoint_of_the_first_version_is_read(root, monkeypatch):
    """Without checksums, a cursor, sums of the log, and with the randomness of torch alone."""
    out = stopped_after(monkeypatch, run_for(root, "first", log_every=1), 20)
    folder = out / "checkpoint-20"
    (folder / "state.json").write_text(json.dumps({"step": 20}))
    states = load_file(folder / "random.safetensors")
    save_file({"torch": states["torch"]}, folder / "random.safetensors")
    record = json.loads((out / "run.json").read_text())
    for name in ("packing", "recompute", "shard", "tensorboard"):
        del record[name]
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="packing"):
        check_same_run(out, run_for(root, "first", log_every=1, packing=100))
    train(run_for(root, "first", log_every=1))
    a, b = (load_file(root / name / "model.safetensors") for name in ("whole", "first"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_left_of_a_log_line_goes(tmp_path):
    from unimm.training.log import forget

    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "x')
    forget(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def in_a_child(run):
    """Start to train in a process of its own; returns its number."""
    child = os.fork()
    if child == 0:
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            try:
                train(run)
            finally:
                os._exit(0 if (Path(run.out) / "done").exists() else 1)
    return child


def main(root, kills, packing):
    """Train undisturbed, then killed `kills` times; says how many were hit while they ran."""
    import accelerate.utils  # noqa: F401 (once, and not in every child)

    load_model(root / "model")
    name, chance = f"{kills}-{packing}", random.Random(kills + packing)
    how = dict(packing=packing, steps=40 + 4 * kills, save_every=1)
    assert os.waitpid(in_a_child(run_for(root, f"undisturbed-{name}", **how)), 0)[1] == 0
    run, killed = run_for(root, f"killed-{name}", **how), 0
    for k in range(kills):
        child, goal = in_a_child(run), (k + 1) * how["steps"] // (kills + 2)
        while k % 4 and steps_there(run) < goal:  # one kill in four is somewhere in the beginning
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02 if k % 4 else 0.2))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        part = (Path(run.out) / "checkpoint.part").exists()
        print("killed behind", steps_there(run), "while saving" if part else "", flush=True)
    assert os.waitpid(in_a_child(run), 0)[1] == 0
    print(json.dumps({"killed": killed}))


def steps_there(run):
    return max(map(state.step_of, state.checkpoints(Path(run.out))), default=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    state.to_disk = lambda path: None
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
