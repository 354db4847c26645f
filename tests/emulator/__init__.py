"""The project's CUDA kernels on the CPU, for tests.

with emulated_native() as cuda:
    sparta_gate(x, spatial, channel, backend="native")      # CPU tensors, CUDA kernels
    assert cuda.last_launch().block[0] == 256
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from emulator import build

ASCENDING, DESCENDING = 0, 1  # orders; any other number is the seed of a shuffled one
ORDER = int(os.environ.get("SPARTA_EMULATOR_ORDER", ASCENDING))
INVALID_VALUE, INVALID_CONFIGURATION, INVALID_DEVICE, OUT_OF_RESOURCES = 1, 9, 101, 701  # CUDA errors


class Launch(NamedTuple):
    """The last launch: how many there were with it, and what it asked for."""

    count: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int
    device: int
    stream: int


class Emulator:
    """The emulator inside a library that was linked with it."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_set_order(ctypes.c_uint64(ORDER))

    @contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """For a while, run the threads of a block (and the blocks) in another order."""
        self.library.emulator_set_order(ctypes.c_uint64(seed))
        try:
            yield
        finally:
            self.library.emulator_set_order(ctypes.c_uint64(ORDER))

    def fail_next_launch(self, error: int) -> None:
        """The next launch does nothing and gives this error."""
        self.library.emulator_fail_next_launch(error)

    def set_multiprocessors(self, count: int) -> None:
        """How many multiprocessors the devices say that they have."""
        self.library.emulator_set_multiprocessors(count)

    def current_device(self) -> int:
        """The calling thread's."""
        return self.library.emulator_current_device()

    def last_launch(self) -> Launch:
        numbers = (ctypes.c_int64 * 10)()
        self.library.emulator_last_launch(numbers)
        count, *rest = numbers
        return Launch(count, tuple(rest[:3]), tuple(rest[3:6]), *rest[6:])


def unavailable() -> str | None:
    """Why the emulator cannot be built here; None where it can."""
    return None if shutil.which(build.COMPILER) else f"the emulator needs a C++ compiler ({build.COMPILER})"


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType, Emulator]:
    """The module with the emulated kernels, which is built where that was not done yet, and the emulator in it."""
    path = build.emulated_module()
    spec = spec_from_loader("_native", ExtensionFileLoader("_native", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Emulator(path)


@contextmanager
def emulated_native() -> Iterator[Emulator]:
    """The native backend computes CPU tensors with the CUDA kernels, as if they were on device 0, stream 0."""
    from sparta_kernels.backends import native

    module, emulator = load()
    kept = native._native, native._place
    native._native, native._place = module, lambda tensor: (1, 0, 0)
    try:
        yield emulator
    finally:
        native._native, native._place = kept
