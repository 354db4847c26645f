"""Progress of a training run on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from .history import Batch, Epoch
from .settings import Settings


class TrainingProgress:
    """A bar over all batches, and a line for each epoch that is done. Give its methods to `train`.

    Args:
        console: where to draw.
        settings: of the run.

    Attributes:
        epochs: how many it has seen done.
    """

    def __init__(self, console: Console, settings: Settings) -> None:
        self._settings = settings
        self._kind = "clean error" if settings.attack == "none" else "robust error"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[state]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=None, state="")
        self._first: tuple[float, int] | None = None  # when the first step was done, and its images
        self._seen = 0
        self.epochs = 0

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def batch(self, batch: Batch) -> None:
        """A step is done."""
        task = self._progress.tasks[0]
        position = (batch.epoch - 1) * batch.batches + batch.number
        if task.total is None:  # the first step, which after a resume is not step 1
            self._progress.update(self._task, total=self._settings.epochs * batch.batches)
        self._seen += batch.images
        if self._first is None:
            self._first = (time.perf_counter(), batch.images)
        since, skipped = self._first
        rate = (self._seen - skipped) / max(time.perf_counter() - since, 1e-9)
        self._progress.update(
            self._task,
            completed=position,
            description=f"epoch {batch.epoch}/{self._settings.epochs}",
            state=f"loss {batch.loss:.3f}  {self._kind} {batch.error:.1%}  {rate:.0f} images/s",
        )

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is done and stored."""
        self.epochs += 1
        self._progress.console.print(
            f"epoch {epoch.epoch:2d}  loss {epoch.loss:.3f}  {self._kind} {epoch.error:.1%}  "
            f"clean test error {epoch.clean_error:.1%}  {epoch.images_per_second:.0f} images/s",
            highlight=False,
        )
