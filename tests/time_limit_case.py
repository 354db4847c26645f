"""Limits that depend on what a command has done, and not on how fast the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def time_is_up_once(monkeypatch: pytest.MonkeyPatch, condition: Callable[[], bool]) -> None:
    """Whoever waits for a process under a limit finds it reached once the condition holds, if not before."""

    class Process(subprocess.Popen):
        told = False

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None or self.told:
                return super().wait(timeout)
            self.told, end = True, time.monotonic() + timeout
            while self.poll() is None:
                if condition() or time.monotonic() > end:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.01)
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Process)


def written(path: Path) -> bytes:
    """What is in a file so far."""
    return path.read_bytes() if path.exists() else b""
