"""How the benchmarks measure on a GPU: by the device's own clock, many calls in one CUDA graph.

A call of a few microseconds is launched more slowly than it runs. In a graph the launches are made before, so that
the time between two events around it is the device's own. Each call in it takes the next of a ring of inputs that
exceeds L2 several times, and writes to memory that none of the ring's other calls writes to.
"""

from __future__ import annotations

import gc
import itertools
import random
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from timing import Times, summary

from sparta_kernels.attack.capture import capture

_CACHES = 4  # the ring of inputs fills L2 so many times over; what is written as often again
_USUAL_L2 = 64 * 2**20
_WARM_UP = 3  # calls: what is compiled, loaded or tuned at a first call is done after them
_CALLS = 32  # in a graph, at least: the time between two graphs' ends is shared among them
_LONGEST = 0.02  # seconds that a graph of more than one round of the ring may take
_HOST_CALLS = 30
_QUEUED = 10  # launches before the host waits again: fewer than the queue holds, or launching would wait itself


class Device(Protocol):
    """What measuring needs of a device that works through a queue."""

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """Something that does the same work again, launched as one."""

    def mark(self) -> Any:
        """A place in the queue."""

    def seconds(self, start: Any, end: Any) -> float:
        """The device's time between two marks that it has passed."""

    def synchronize(self) -> None:
        """Wait until the queue is empty."""


class Cuda:
    """The current CUDA device, and a stream on which everything is measured: the default one cannot be captured.

    Use as a context manager: within it the stream is the current one.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self._current = torch.cuda.stream(self.stream)

    def __enter__(self) -> Cuda:
        self._current.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.synchronize()
        self._current.__exit__(*error)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        return capture(work, self.stream)[0].replay

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return 1e-3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def describe() -> dict[str, Any]:
    """The current CUDA device, for a results file."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability()
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{major}.{minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": l2_size(),
        "state": _state(),
    }


def _state() -> dict[str, str] | None:
    """Driver, clocks, temperature and power as nvidia-smi tells them, None where it does not."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
    command = ["nvidia-smi", f"--id={torch.cuda.current_device()}", f"--query-gpu={','.join(fields)}"]
    try:
        told = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in told.split(",")), strict=False))


def l2_size() -> int:
    """Bytes of the current device's L2 cache."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or _USUAL_L2


def ring_bytes() -> int:
    """What the inputs that are rotated must come to."""
    return _CACHES * l2_size()


def interleave(
    device: Device,
    candidates: Mapping[str, Callable[[int], object]],
    *,
    inputs: int,
    seconds: float,
    rounds: int = 7,
    calls: int = _CALLS,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Times]:
    """Time candidates in turns: the device's time of a call.

    Args:
        device: where they run.
        candidates: functions of the number of the input to take, that do not wait for the device.
        inputs: how many different inputs there are; a graph's calls take one after the other.
        seconds: time to spend, after everything is captured.
        rounds: times to replay each candidate's graph at least.
        calls: how many calls a graph has at least, unless they take very long.
        clock: tells the time, in seconds.

    Returns:
        For each candidate the times of a call, with "captured": False where no graph could be made of it (then its
        calls are launched one by one, and "reason" says why) and "host_us": the host's time to launch one without
        a graph.
    """
    works: dict[str, tuple[Callable[[], object], int]] = {}
    notes: dict[str, dict[str, Any]] = {}
    gc.collect()
    gc.disable()  # a graph that is destroyed while another is captured breaks the capture
    try:
        for name, call in candidates.items():
            host, each = _launch(device, call, inputs)
            number = _calls(inputs, each, calls)
            notes[name] = {"host_us": 1e6 * host, "calls": number}
            works[name] = _captured(device, call, inputs, number, notes[name]), number
        return _replay(device, works, notes, seconds, rounds, clock)
    finally:
        gc.enable()


def _launch(device: Device, call: Callable[[int], object], inputs: int) -> tuple[float, float]:
    """Seconds that the host takes to launch a call, and those from one call to the next, launched one by one."""
    for number in range(_WARM_UP):
        call(number % inputs)
    device.synchronize()
    host = []
    start = time.perf_counter()
    for number in range(_HOST_CALLS):
        before = time.perf_counter()
        call(number % inputs)
        host.append(time.perf_counter() - before)
        if number % _QUEUED == _QUEUED - 1:
            device.synchronize()
    return summary(host).median, (time.perf_counter() - start) / _HOST_CALLS


def _calls(inputs: int, each: float, least: int) -> int:
    """How many calls a graph has: whole rounds of the ring."""
    wanted = min(least, int(_LONGEST / each))
    return inputs * max(1, -(-wanted // inputs))


def _captured(
    device: Device, call: Callable[[int], object], inputs: int, number: int, note: dict[str, Any]
) -> Callable[[], object]:
    def work() -> None:
        alive: deque[object] = deque(maxlen=inputs)  # so that a round's calls do not write to the same memory
        for turn in range(number):
            alive.append(call(turn % inputs))

    try:
        replay = device.capture(work)
        device.synchronize()
    except Exception as error:  # whatever the candidate does that cannot be captured: it is measured all the same
        device.synchronize()
        note |= {"captured": False, "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        return work
    note["captured"] = True
    return replay


def _replay(
    device: Device,
    works: Mapping[str, tuple[Callable[[], object], int]],
    notes: Mapping[str, dict[str, Any]],
    seconds: float,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Times]:
    order = random.Random(0)
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = 0.0
    for turn in itertools.count(-1):  # the first round warms up
        if turn == 0:
            end = clock() + seconds
        elif turn >= rounds and clock() > end:
            break
        order.shuffle(names)
        works[names[0]][0]()  # keeps the device busy while the rest is queued, so that it waits for nobody
        marks = []
        for name in names:
            start = device.mark()
            works[name][0]()
            marks.append((name, start, device.mark()))
        device.synchronize()
        if turn >= 0:
            for name, start, stop in marks:
                times[name].append(device.seconds(start, stop) / works[name][1])
    return {name: summary(times[name], **notes[name]) for name in works}


def ceilings(
    device: Device, place: str = "cuda", size: int = 2**28, side: int = 8192, seconds: float = 0.2
) -> dict[str, float]:
    """What no kernel goes beyond.

    Args:
        device: where to measure.
        place: the device of the tensors.
        size: bytes of what is copied.
        side: rows and columns of the matrices that are multiplied.
        seconds: time to spend on each.

    Returns:
        copy_gb_per_s: a large copy's rate, bytes read and written.
        matmul_tflops: a large bfloat16 matrix product's rate, of normally distributed numbers: zeros take less power.
        empty_launch_us: an empty launch's time.
    """
    pairs = [(torch.zeros(size // 4, device=place), torch.zeros(size // 4, device=place)) for _ in range(2)]
    one = torch.zeros(1, device=place)
    copies = {"copy": lambda index: pairs[index][0].copy_(pairs[index][1])}
    copy = interleave(device, copies, inputs=2, seconds=seconds, calls=8)["copy"]
    empty = interleave(device, {"empty": lambda index: one.add_(1)}, inputs=1, seconds=seconds, calls=500)["empty"]
    generator = torch.Generator(place).manual_seed(0)
    factors = torch.randn(2, side, side, device=place, generator=generator).to(torch.bfloat16)
    product = torch.empty_like(factors[0])
    products = {"product": lambda index: torch.mm(factors[0], factors[1], out=product)}
    matmul = interleave(device, products, inputs=1, seconds=seconds, calls=8)["product"]
    return {
        "copy_gb_per_s": 2 * size / copy.median / 1e9,
        "matmul_tflops": 2 * side**3 / matmul.median / 1e12,
        "empty_launch_us": 1e6 * empty.median,
    }
