"""The peak memory of a piece of work, and the memory available."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


class PeakMemory:
    """Measures the peak since its creation: on a GPU of torch's tensors there, else of the process's resident set."""

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
    """Have glibc return memory that earlier work freed, which would otherwise count towards the next peak."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available(device: torch.device) -> int | None:
    """Bytes that could be allocated on `device` now; on a CPU, within the process's control groups.

    None if the system does not tell.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        free = _fields(_SYSTEM)["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return None
    return min([free, *_room_in_groups()])


def _room_in_groups() -> list[int]:
    """Bytes left to each control group that this process is in and that has a limit (version 2, and 1)."""
    rooms = []
    with contextlib.suppress(OSError):
        for line in _GROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top, names = (
                    _GROUPS / "memory",
                    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                )
            else:
                continue
            # In a container the path may be that of the host: then only the top, the container's own, is there.
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    limit, used = (int((folder / name).read_text()) for name in names[:2])  # "max" is no number
                    rooms.append(max(0, limit - used + _fields(folder / "memory.stat")[names[2]]))
                if folder == top:
                    break
    return rooms


def _fields(path: Path) -> dict[str, int]:
    """The numbers in a file of lines such as `MemAvailable:  12 kB`."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}
