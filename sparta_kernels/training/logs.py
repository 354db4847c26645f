"""The logs of a run: a CSV table of its epochs, and TensorBoard events."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from ..data.files import write_atomically
from .history import Batch, Epoch

COLUMNS = tuple(field.name for field in fields(Epoch))


def as_csv(history: Sequence[Epoch]) -> str:
    """A line per epoch under a header, the fields of `Epoch`; what was not measured is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(astuple(epoch) for epoch in history)
    return text.getvalue()


class TrainingLog:
    """Writes a run's tables and events. Pass its methods to `train` (`begin` as `on_store`), and close it at the end.

    A table is rewritten as a whole after every epoch, so it has every epoch once, however often the run was stopped.
    TensorBoard leaves out events of an earlier run, and of steps that were repeated.

    Args:
        tables: CSV files to write.
        folder: for TensorBoard's event files, created if missing; None for none.
        history: the epochs before a resume.

    Raises:
        ImportError: events are asked for, and tensorboard is not installed.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        tables: Sequence[str | os.PathLike[str]],
        folder: str | os.PathLike[str] | None = None,
        history: Sequence[Epoch] = (),
    ) -> None:
        self._tables, self._folder, self._history = tables, folder, list(history)
        self._writer_class = None if folder is None else summary_writer()
        self._events: Any = None
        self._step: int | None = None
        self._untold: list[Epoch] = []
        self._begun = False

    def begin(self) -> None:
        """The run has been stored: write its epochs from before a resume, and empty tables of another run."""
        if not self._begun and (self._history or any(Path(path).exists() for path in self._tables)):
            self._write_tables()
        self._begun = True

    def batch(self, batch: Batch) -> None:
        """Log a completed step."""
        self._step = (batch.epoch - 1) * batch.batches + batch.number
        if self._writer_class is None:
            return
        if self._events is None:
            self._events = self._writer_class(str(self._folder), purge_step=self._step)
            for epoch in self._untold:
                self._tell(epoch, epoch.epoch * batch.batches)
        self._events.add_scalar("batch/loss", batch.loss, self._step)
        self._events.add_scalar("batch/error", batch.error, self._step)

    def epoch(self, epoch: Epoch) -> None:
        """Log a completed and stored epoch."""
        self._history.append(epoch)
        self._write_tables()
        if self._events is not None:
            self._tell(epoch, self._step)
            self._events.flush()
        else:  # after a resume from the end of its steps: how many they were is not known yet
            self._untold.append(epoch)

    def _tell(self, epoch: Epoch, step: int | None) -> None:
        for name, value in zip(COLUMNS, astuple(epoch), strict=True):
            if value is not None:
                self._events.add_scalar(f"epoch/{name}", value, step)

    def close(self) -> None:
        """Write buffered events."""
        if self._events is not None:
            self._events.close()

    def _write_tables(self) -> None:
        content = as_csv(self._history).encode()
        for path in self._tables:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)


def summary_writer() -> Any:
    """TensorBoard's `SummaryWriter`; an ImportError that says what to install where there is none."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # seconds, so only here
    except ImportError as error:
        raise ImportError("TensorBoard events need tensorboard: pip install tensorboard") from error
    return SummaryWriter
