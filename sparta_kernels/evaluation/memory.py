"""The most memory that a stretch of work held at once."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Measures from its making on: on a GPU torch's tensors there, else the process's resident set."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._resettable = False
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        elif sys.platform == "linux":
            _return_free_memory()
            try:
                _CLEAR.write_text("5")  # proc(5): sets the peak resident set size, VmHWM, to the current one
                self._resettable = True
            except OSError:  # a container without a writable /proc: no number rather than a wrong one
                pass

    def bytes(self) -> int | None:
        """The peak so far in bytes, or None where it cannot be measured."""
        if self._cuda is not None:
            return int(torch.cuda.max_memory_allocated(self._cuda))
        if not self._resettable:
            return None
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def _return_free_memory() -> None:
    """Have glibc give back what earlier work freed, or it would count towards the next peak."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
