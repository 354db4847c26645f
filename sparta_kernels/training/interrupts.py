"""Ctrl-C that waits for what must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[Sized]:
    """Hold back Ctrl-C (SIGINT) until the end of the block. A block that ends in an error raises that alone.

    Yields what has been held back so far.
    """
    before = signal.getsignal(signal.SIGINT)
    held: list[tuple[int, FrameType | None]] = []
    # Signals reach the main thread alone; and a handler that is not Python's could not be put back.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield held
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(*held[0])
