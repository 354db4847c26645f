"""The project's CUDA kernels on the CPU, for tests.

csrc/cuda is compiled as plain C++, with cuda_runtime.h of this folder in place of NVIDIA's, and run by a scheduler that
obeys what a device promises and nothing more:

- threads of a block run one at a time, in an order that can be chosen, and give way only at barriers and shuffles;
  warps do not proceed in step, and copies to shared memory arrive at once or not before they are waited for. A kernel
  whose results differ between orders has a race.
- shared memory is NaN at the start of every block, and nothing may be written beside its variables.
- a barrier or shuffle that not everybody reaches raises an error with the kernel, the block, the thread and the line.
- a launch that a device would refuse is refused, and a test can ask for the next one to fail.
- sanitized.py does all that with every access checked.

Not seen: the instructions under `#if defined(__CUDA_ARCH__)`, registers and launch bounds, what blocks see of each
other's writes while they run, speed.

    with emulated_native() as cuda:
        sparta_gate(x, spatial, channel, backend="native")  # CPU tensors, CUDA kernels
        assert cuda.last_launch().block[0] == 256

Environment variables: those of build.py, and
    SPARTA_EMULATOR_ORDER  the order where a test chooses none: 0 ascending, 1 descending, else a shuffled one's seed
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from emulator import build

ASCENDING, DESCENDING = 0, 1  # orders; any other number is the seed of a shuffled one
ORDER = int(os.environ.get("SPARTA_EMULATOR_ORDER", ASCENDING))
OUT_OF_RESOURCES = 701  # a CUDA error


class Launch(NamedTuple):
    """The last launch that was not refused: the how manieth it was, and what it asked for."""

    number: int
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
        found = (ctypes.c_int64 * 10)()
        self.library.emulator_last_launch(found)
        number, gx, gy, gz, bx, by, bz, *rest = found
        return Launch(number, (gx, gy, gz), (bx, by, bz), *rest)


def unavailable() -> str | None:
    """Why the emulator cannot be built here; None where it can."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        return f"the emulator does not know how to switch stacks on {platform.machine()}"
    if not shutil.which(build.COMPILER):
        return f"the emulator needs a C++ compiler ({build.COMPILER})"
    return None if find_spec("pybind11") else "the emulator needs pybind11"


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
    from sparta_kernels.backends import extension

    module, emulator = load()
    kept = extension.kernels, extension.place
    extension.kernels, extension.place = module, lambda tensor: (1, 0, 0)
    try:
        yield emulator
    finally:
        extension.kernels, extension.place = kept
