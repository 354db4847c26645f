"""Progress of a training run on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console

from ..report import duration, progress_bars
from .history import Batch, Epoch
from .settings import Settings

_SECONDS_BETWEEN_LINES = 10


class TrainingProgress:
    """A bar over all batches, and a line for each completed epoch. Pass its methods to `train`.

    If the console is not a terminal, it prints a line now and then instead of the bar.

    Args:
        console: where to draw.
        settings: of the run.

    Attributes:
        last: the last completed step, None before the first.
        epochs: number of epochs completed while it watched.
    """

    def __init__(self, console: Console, settings: Settings) -> None:
        self._settings = settings
        self._kind = "clean" if settings.attack == "none" else "robust"
        self._console = console
        self._bars = progress_bars(console)
        self._task = self._bars.add_task("training", total=None, state="")
        self._first: tuple[float, int] | None = None  # when the first step was done, and its place in the run
        self._epoch_start: tuple[int, float] = (0, 0.0)  # the epoch under way, and when its first step was done
        self._epoch_images = 0  # since then
        self._speed = ""
        self._last_line = time.monotonic()
        self.last: Batch | None = None
        self.epochs = 0

    def __enter__(self) -> TrainingProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def batch(self, batch: Batch) -> None:
        """Show a completed step."""
        now = time.monotonic()
        self.last = batch
        epochs, done = self._settings.epochs, (batch.epoch - 1) * batch.batches + batch.number
        total = epochs * batch.batches
        if self._first is None:  # after a resume this is not step 1
            self._first = (now, done)
        if self._epoch_start[0] != batch.epoch:  # what is between epochs is no training
            self._epoch_start, self._epoch_images = (batch.epoch, now), 0
        else:
            self._epoch_images += batch.images
            self._speed = f"  {_speed(self._epoch_images / max(now - self._epoch_start[1], 1e-9))}"
        began, before = self._first
        left = f"  ETA {duration((now - began) / (done - before) * (total - done))}" if done > before else ""
        state = f"loss {batch.loss:.3f}  {self._kind} error {batch.error:.1%}{self._speed}{left}"
        where = f"epoch {batch.epoch}/{epochs}"
        self._bars.update(self._task, total=total, completed=done, description=where, state=state)
        if not self._console.is_terminal and now > self._last_line + _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print(f"{where}, step {batch.number}/{batch.batches}  {state}")

    def epoch(self, epoch: Epoch) -> None:
        """Show a completed and stored epoch."""
        self.epochs += 1
        tested = "" if epoch.robust_error is None else f"robust test error {epoch.robust_error:.1%}  "
        number = f"{epoch.epoch:{len(str(self._settings.epochs))}d}"
        self._print(
            f"epoch {number}  loss {epoch.loss:.3f}  {self._kind} training error {epoch.error:.1%}  "
            f"{tested}clean test error {epoch.clean_error:.1%}  {_speed(epoch.images_per_second)}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 9.5 else 2}f} images/s"
