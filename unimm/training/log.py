"""What a run says while it goes on: log.jsonl, a progress bar or plain lines, TensorBoard."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unimm.config import Run
from unimm.data.mixture import Origin
from unimm.training.parallel import Team
from unimm.training.state import write_text


class Log:
    """Means over `log_every` steps and over all ranks.

    A metric is a number (mean over losses) or a pair (sum, count), pooled; "samples" is a pair of
    lists, (sum, count) by sample of the batch, pooled by source as `SOURCE_nats`. `state` is what
    a checkpoint has to keep so that a mean over steps before and after it comes out as it should.
    Lines of log.jsonl after step `start` are of a run that was stopped, and go.
    """

    def __init__(self, out: Path, run: Run, start: int, team: Team, state: dict | None = None):
        self.path, self.every, self.team = out / "log.jsonl", run.log_every, team
        state = state if state and team.main else {"sums": {}, "steps": 0}
        self.sums: dict[str, list[float]] = state["sums"]
        self.steps: int = state["steps"]
        self.total, self.by_source = run.steps, len(run.data) > 1
        self.slots = 0
        self._restart(start)
        self.board: Any = None
        if team.main:
            out.mkdir(parents=True, exist_ok=True)
            forget(self.path, start)
            self.board = open_board(out / "tensorboard", start) if run.tensorboard else None
        self.bar = tqdm(
            total=run.steps, initial=start, desc=out.name, disable=None if team.main else True
        )

    def timed(self, call: Callable[[], Any]) -> Any:
        """`call()`, and its share of the time as "waiting"."""
        begin = time.perf_counter()
        result = call()
        self.waited += time.perf_counter() - begin
        return result

    def add(
        self, name: str, loss: float | None, metrics: dict[str, Any], origins: Sequence[Origin] = ()
    ) -> None:
        if loss is not None:
            self._pool(f"{name}_loss", loss, 0.0)
        for key, value in metrics.items():
            if key == "samples":
                for (source, _), total, count in zip(origins, *value, strict=True):
                    if self.by_source and count:
                        self._pool(f"{source}_nats", total, count)
                continue
            total, count = value if isinstance(value, tuple) else (float(value), 1.0)
            self._pool(key, float(total), float(count))

    def state(self) -> dict[str, Any]:
        """All ranks together: what the main process has to keep."""
        self._collect()
        return {"sums": self.sums, "steps": self.steps}

    def step_done(self, step: int, slots: int) -> None:
        """`slots`: how many this rank has trained on."""
        self.bar.update(1)
        self.steps, self.slots = self.steps + 1, self.slots + slots
        if step % self.every and step != self.total:
            return
        slots = int(self.team.gather([self.slots])[:, 0].sum())
        self._collect()
        steps, seconds = step - self.last_step, time.perf_counter() - self.clock
        means = {key: total / (count or self.steps) for key, (total, count) in self.sums.items()}
        means |= {"seconds_a_step": seconds / steps, "waiting": self.waited / seconds}
        means |= {"tokens_a_second": slots / seconds} if slots else {}
        self.write(step, means, left=(self.total - step) * seconds / steps)
        self.sums, self.steps = {}, 0
        self._restart(step)

    def write(self, step: int, metrics: dict[str, float], left: float | None = None) -> None:
        """`left`: seconds to the end."""
        if not metrics or not self.team.main:
            return
        rounded = {key: float(f"{value:.7g}") for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.board is not None:
            for key, value in rounded.items():
                self.board.add_scalar(key, value, step)
        line = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        if self.bar.disable:
            rest = "" if left is None else f"  left {tqdm.format_interval(left)}"
            print(f"{self.path.parent.name} {step}/{self.total}  {line}{rest}", flush=True)
        else:
            speed = metrics.get("tokens_a_second")
            self.bar.set_postfix_str((f"{speed:.0f} tokens/s  " if speed else "") + line[:120])

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def _restart(self, step: int) -> None:
        self.last_step, self.clock, self.waited, self.slots = step, time.perf_counter(), 0.0, 0

    def _collect(self) -> None:
        """Add the other ranks' sums to the main process's, and begin theirs anew."""
        everyone = self.team.gather_objects(self.sums)
        self.sums = {}
        if self.team.main:
            for sums in everyone:
                for key, (total, count) in sums.items():
                    self._pool(key, total, count)

    def _pool(self, key: str, total: float, count: float) -> None:
        pair = self.sums.setdefault(key, [0.0, 0.0])
        pair[0] += total
        pair[1] += count


def forget(path: Path, step: int) -> None:
    """Take the lines after `step` out of a log, and what a kill left of a line."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    if path.exists():
        write_text(path, "".join(kept))


def open_board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard=True needs it: pip install unimm[tensorboard]") from None
    return SummaryWriter(str(folder), purge_step=start + 1)
