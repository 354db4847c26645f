"""Ctrl-C and the signals that schedulers send instead, and blocks that these must not interrupt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# SLURM, Kubernetes, systemd and `kill` send SIGTERM, a terminal that is closed SIGHUP.
_OF_SCHEDULERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Held:
    """Deferred signals; ``len()`` is their number."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self._signals: list[tuple[int, FrameType | None]] = []

    def hold(self, number: int, frame: FrameType | None) -> None:
        """A signal handler that only records the signal."""
        self._signals.append((number, frame))

    def __len__(self) -> int:
        return len(self._signals)

    def deliver(self) -> None:
        """Call the handler that the first of them would have had; usually it raises KeyboardInterrupt."""
        if self._signals:
            number, frame = self._signals[0]
            self.handlers[number](number, frame)


@contextmanager
def uninterrupted() -> Iterator[Held]:
    """Defer Ctrl-C (SIGINT), and the signals that `as_ctrl_c` treats like it, until the end of the block.

    A block that ends in an error raises that alone. Yields the signals deferred so far.
    """
    held = Held()
    if threading.current_thread() is threading.main_thread():  # no other can set handlers, or gets signals
        for number in (signal.SIGINT, *_OF_SCHEDULERS):
            handler = signal.getsignal(number)
            if callable(handler):  # not the system's own, nor one that is not Python's and could not be put back
                held.handlers[number] = handler
    for number in held.handlers:
        signal.signal(number, held.hold)
    try:
        yield held
    finally:
        for number, handler in held.handlers.items():
            signal.signal(number, handler)
    held.deliver()


@contextmanager
def as_ctrl_c() -> Iterator[list[int]]:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt in the block, as Ctrl-C does; an ignored one stays ignored.

    Yields the numbers of the signals that arrived.
    """
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    taken = _OF_SCHEDULERS if threading.current_thread() is threading.main_thread() else ()
    taken = tuple(number for number in taken if signal.getsignal(number) == signal.SIG_DFL)
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
