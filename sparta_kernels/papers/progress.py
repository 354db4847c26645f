"""Progress of a reproduction: which run of how many, and the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console

from .. import data, evaluation, training
from ..report import duration, progress_bars
from .experiments import Need, Run
from .runs import Runs

_SECONDS_BETWEEN_LINES = 30


class RunsProgress:
    """A bar over all runs; if the console is not a terminal, a line for each run, and now and then.

    Args:
        console: where to draw.
        runs, wanted: the work to do, as for `run.work`.
    """

    def __init__(self, console: Console, runs: Runs, wanted: Mapping[Run, Need]) -> None:
        self._runs = runs
        left = {run: need for run, need in wanted.items() if not runs.state(run, need).done}
        self._count, self._number, self._need = len(left), 0, Need.TRAINED
        self._run: Run | None = None
        self._cost = {run: self._left(run, need) for run, need in left.items()}
        self._total, self._done = sum(map(sum, self._cost.values())), 0.0
        self._start, self._last_line, self._epochs = time.monotonic(), 0.0, 0
        self._bars = progress_bars(console)
        self._task = self._bars.add_task("", total=max(self._total, 1e-9), state="")

    def __enter__(self) -> RunsProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def run(self, run: Run, need: Need) -> None:
        """This run's turn."""
        if self._run is not None:
            self._done += sum(self._cost[self._run])
        self._run, self._need = run, need
        self._number += 1
        self._epochs = self._runs.epochs_done(run)
        self._last_line = 0.0
        self._tell(0.0, "starts" if not self._epochs else f"goes on after epoch {self._epochs}")

    def batch(self, batch: training.Batch) -> None:
        """A step of its training is done."""
        run = self._run
        assert run is not None
        done = (batch.epoch - 1 + batch.number / batch.batches - self._epochs) / max(1, run.epochs - self._epochs)
        kind = "clean" if run.network.training == "standard" else "robust"
        state = f"epoch {batch.epoch}/{run.epochs}, loss {batch.loss:.3f}, {kind} error {batch.error:.1%}"
        self._tell(self._cost[run][0] * done, state)

    def evaluated(self, progress: evaluation.Progress) -> None:
        """A pass of its evaluation is done."""
        assert self._run is not None
        training_cost, evaluation_cost = self._cost[self._run]
        share = progress.done / max(progress.total, 1)
        kind = "attacked" if self._need is Need.ATTACKED else "tested"
        self._tell(training_cost + evaluation_cost * share, f"{kind}: {share:.0%}")

    def _left(self, run: Run, need: Need) -> tuple[float, float]:
        """The remaining cost of training and evaluation, in passes of a 32x32 image both ways through a ResNet-18."""
        settings, state = json.loads(run.arguments), self._runs.state(run, need)
        dataset = data.describe(run.data)
        pixels = dataset.shape[1] ** 2 / 32**2
        unit = pixels * {"resnet18": 1.0, "resnet34": 2.1}[run.network.model]
        steps = settings.get("attack_steps", 0)
        attack = self._runs.plan.report_at[-1] if need is Need.ATTACKED else 1
        tested = 0 if need is Need.TRAINED else (self._runs.plan.images or dataset.test_images) * attack
        return unit * (run.epochs - state.epochs) * dataset.train_images * (steps + 1.0), unit * tested

    def _tell(self, done: float, state: str) -> None:
        assert self._run is not None
        completed = self._done + done
        seconds = time.monotonic() - self._start
        eta = ""
        if completed > 0.01 * self._total:
            eta = f", ETA {duration(seconds * (self._total - completed) / completed)}"
        name = f"run {self._number}/{self._count} {self._run.name}"
        self._bars.update(self._task, completed=completed, description=name, state=state + eta)
        if self._bars.disable and time.monotonic() > self._last_line + _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._bars.console.print(f"{name}: {state}{eta}", soft_wrap=True, highlight=False)
