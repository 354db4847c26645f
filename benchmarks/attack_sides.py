"""The two processes that take turns on a CPU: ours keeps the memory that it frees, theirs is as their users have it.

In one process the others would find in the heap what ours has left there, and save page faults by it. On a GPU the
memory is torch's own either way, and one process does it all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from attack_candidates import OURS, Bench, Entry, Settings, WrongResult

_PATIENCE = 5.0  # seconds


class OtherProcessFailed(RuntimeError):
    """What went wrong in the other process, in its words."""


class OtherProcess:
    """A `Bench` in a process of its own; calls wait for its answer."""

    def __init__(self, settings: Settings, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, batch), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of the `Bench`'s method of this name.

        Raises:
            WrongResult: as it does there.
            OtherProcessFailed: for any other error there, and if the process has ended.
        """
        try:
            self._connection.send((name, arguments))
            kind, result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_PATIENCE)
            raise OtherProcessFailed(f"the process ended with status {self._process.exitcode}") from None
        if kind == "wrong":
            raise WrongResult(result)
        if kind == "error":
            raise OtherProcessFailed(result)
        return result

    def close(self) -> None:
        """End the process: it does so by itself when nobody asks any more, unless it is at work."""
        self._connection.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, settings: Settings, batch: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some of the libraries talk
    torch.set_num_threads(settings.threads)
    bench = Bench(settings, batch)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", getattr(bench, name)(*arguments))
        except WrongResult as error:
            answer = ("wrong", str(error))
        except Exception as error:
            traceback.print_exc()
            answer = ("error", f"{type(error).__name__}: {error}")
        connection.send(answer)


class Sides:
    """Where each entry runs: ours here, on a CPU the others in a second process."""

    def __init__(self, settings: Settings, batch: int, entries: Iterable[Entry]) -> None:
        self.here = Bench(settings, batch)
        apart = settings.device == "cpu" and any(entry.candidate not in OURS for entry in entries)
        self._there = OtherProcess(settings, batch) if apart else None

    def call(self, name: str, entry: Entry) -> Any:
        """What the method `name` of the entry's `Bench` says of it."""
        if self._there is None or entry.candidate in OURS:
            return getattr(self.here, name)(entry)
        return self._there.call(name, entry)

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        if self._there is not None:
            self._there.close()
