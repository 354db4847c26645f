"""A process of its own for what is measured beside ours, with a heap of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PATIENCE = 5.0  # seconds


class WrongResult(AssertionError):
    """A candidate does not compute what it should."""


class OtherProcessFailed(RuntimeError):
    """What went wrong in the other process, in its words."""


class OtherProcess:
    """The object ``make(*arguments)`` in a process of its own; calls wait for its answer."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of that object's method of this name.

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


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some of the libraries talk
    bench = make(*arguments)
    while True:
        try:
            name, given = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", getattr(bench, name)(*given))
        except WrongResult as error:
            answer = ("wrong", str(error))
        except Exception as error:
            traceback.print_exc()
            answer = ("error", f"{type(error).__name__}: {error}")
        connection.send(answer)
