"""How the benchmarks measure, and what they say about where they ran.

Candidates take turns inside one loop, so that whatever else the machine does meets them all. Each call gets
buffers that have left the caches, and the last outputs stay alive, so that the allocator has only cold memory
to give.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import platform
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
from origin import commit

from sparta_kernels import build_info
from sparta_kernels.report import cpu_name

# Under glibc's defaults large buffers go back to the kernel when freed, and every new one is paid for in page
# faults. These settings (see mallopt(3)) keep them: no mmap for single allocations, no trimming of the heap.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
ALLOCATORS = {
    "keep": "freed memory is kept by the process",
    "default": "glibc's defaults: large buffers return to the kernel and are paged in anew",
}

_USUAL_CACHE = 32 * 2**20
_CACHES = 3  # the inputs fill the last-level cache so many times over; the outputs as often again
_MOST_INPUTS = 2048
_TOLD = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "MKL_", "SPARTA_")


@dataclass(frozen=True)
class Times:
    """What one candidate took, in seconds a call, and what else there is to say of its calls, by name."""

    p20: float
    median: float
    p80: float
    samples: int
    more: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds, as the JSON files hold them."""
        milliseconds = {f"{name}_ms": 1e3 * getattr(self, name) for name in ("p20", "median", "p80")}
        return {**milliseconds, "samples": self.samples, **self.more}


def summary(seconds: Sequence[float], **more: Any) -> Times:
    """The quantiles of single measurements."""
    p20, median, p80 = (float(q) for q in numpy.quantile(seconds, [0.2, 0.5, 0.8]))
    return Times(p20, median, p80, len(seconds), more)


def interleave(
    candidates: Mapping[str, Callable[[int], object]],
    *,
    inputs: int,
    seconds: float,
    rounds: int = 10,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Time candidates in turns.

    Args:
        candidates: functions of the number of the input to take; one call is the timed region. What they
            return stays alive for `inputs` rounds.
        inputs: how many different inputs there are; the next call, whoever's it is, takes the next.
        seconds: time to spend, after the warm-up.
        rounds: calls of each candidate to make at least.
        synchronize: waits for a device, inside the timed region.
    """
    order = random.Random(0)
    names = list(candidates)
    alive: deque[object] = deque(maxlen=inputs * len(names))
    times: dict[str, list[int]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    turns = itertools.count()
    warm_up = inputs + 2  # rounds: until outputs come from memory that earlier ones have left
    gc.collect()
    gc.disable()
    try:
        for number in itertools.count(-warm_up):
            if number == 0:
                end = time.monotonic() + seconds
            elif number >= rounds and time.monotonic() > end:
                break
            order.shuffle(names)  # nobody always meets the cache as one certain other leaves it
            for name in names:
                call, index = candidates[name], next(turns) % inputs
                faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = time.perf_counter_ns()
                output = call(index)
                if synchronize is not None:
                    synchronize()
                spent = time.perf_counter_ns() - start
                faulted = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
                alive.append(output)  # and the oldest goes, outside the timed region
                del output
                if number >= 0:
                    times[name].append(spent)
                    faults[name].append(faulted)
    finally:
        gc.enable()
    return {
        name: summary([1e-9 * spent for spent in times[name]], page_faults=float(numpy.median(faults[name])))
        for name in candidates
    }


class OtherLoad:
    """A context manager: `share` of this process's CPUs that others had meanwhile, None if unknown."""

    share: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = time.monotonic(), _busy_seconds(), sum(os.times()[:2])
        return self

    def __exit__(self, *_: object) -> None:
        started, all_before, own_before = self._start
        all_now, own_now = _busy_seconds(), sum(os.times()[:2])
        if all_before is not None and all_now is not None:
            capacity = (time.monotonic() - started) * len(os.sched_getaffinity(0))
            others = (all_now - all_before) - (own_now - own_before)
            self.share = min(1.0, max(0.0, others / capacity))


def _busy_seconds() -> float | None:
    """CPU time that all processes, the kernel and a hypervisor have had on this process's CPUs."""
    names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, (idle, iowait), irq, softirq, steal
        ticks = sum(int(line[i]) for line in lines if line and line[0] in names for i in (1, 2, 3, 6, 7, 8))
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers, at least one."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def inputs_needed(size: int, room: int | None = None) -> int:
    """How many inputs of `size` bytes to rotate, so that they exceed `room`: several times the last-level cache."""
    room = _CACHES * last_level_cache() if room is None else room
    return min(max(2, -(-room // size)), _MOST_INPUTS)


def last_level_cache() -> int:
    """Bytes of last-level cache of this process's CPUs; 32 MB where the system does not say."""
    found: dict[int, dict[str, int]] = {}
    for cpu in os.sched_getaffinity(0):
        for cache in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                names = ("type", "level", "shared_cpu_list", "size")
                kind, level, shared, size = ((cache / name).read_text().strip() for name in names)
                if kind != "Instruction":
                    found.setdefault(int(level), {})[shared] = int(size.removesuffix("K")) * 1024
            except (OSError, ValueError):
                continue
    return sum(found[max(found)].values()) if found else _USUAL_CACHE


def available_memory() -> int | None:
    """Bytes that a program can still have, where the system says."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def use_allocator(name: str) -> None:
    """Start this program again if its environment does not yet tell glibc to allocate so (`ALLOCATORS`)."""
    if name == "keep" and any(os.environ.get(key) != value for key, value in KEEP_PAGES.items()):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_PAGES})


def provenance(command: str, arguments: list[str], device: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Who measured what where: command, date, commit, machine, versions, settings of the environment.

    `device` describes the device that computes, where that is not the CPU.
    """
    cpu = {
        "type": "cpu",
        "name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": os.getloadavg()[0],
    }
    return {
        "command": " ".join([command, *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": cpu if device is None else {**device, "host": cpu},
        "build": build_info(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_TOLD)},
    }
