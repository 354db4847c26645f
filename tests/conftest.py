"""Settings and fixtures that the tests share: hypothesis profiles, the backends, outputs under guard."""

from __future__ import annotations

import gc
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

# Threads that wait leave the core to other processes. Read when torch is imported, also by what the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter; it has to know before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it starts processes that each import torch
os.environ["COLUMNS"] = "140"  # a terminal of a known width, which breaks no line that tests read

# A shell that starts the tests in its background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import cases
import emulator
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from sparta_kernels import backends, data
from sparta_kernels.backends import extension, layout

# `backend` below sets the instruction set once for all the examples of a test: they may well share it.
_shared = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("quick", max_examples=25, derandomize=True, **_shared)
settings.register_profile("thorough", max_examples=1000, **_shared)
# For tests/mutants.py: that a test fails is enough, in which smallest case does not matter.
settings.register_profile("mutants", settings.get_profile("quick"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
EMULATED = "emulated-cuda"  # the CUDA kernels, run by tests/emulator


class Computed(NamedTuple):
    """A backend, as the tests compare it with the reference."""

    backend: str
    isa: str | None = None  # of the native kernels on a CPU; or EMULATED
    device: str = "cpu"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.isa, self.device if self.device != "cpu" else None)))


BACKENDS = [Computed("native", isa) for isa in extension.kernels.supported_isas()]
if emulator.unavailable() is None:
    BACKENDS.append(Computed("native", EMULATED))
BACKENDS += [Computed(name, None, "cpu") for name in ("triton",) if "cpu" in backends.DEVICES.get(name, ())]
if torch.cuda.is_available():
    BACKENDS += [Computed(name, None, "cuda") for name, devices in backends.DEVICES.items() if "cuda" in devices]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of a backend on a GPU is one of those that need a GPU.

    Of those that Triton's interpreter computes, coverage is that of each test's first case: tracing doubles their time.
    """
    covers, covered = config.pluginmanager.hasplugin("_cov"), set()
    for item in items:
        computed = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if not isinstance(computed, Computed):
            continue
        if computed.device == "cuda":
            item.add_marker(pytest.mark.gpu)
        elif computed.backend == "triton":
            test = item.path, getattr(item, "originalname", item.name)
            if covers and test in covered:
                item.add_marker("no_cover")
            covered.add(test)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.hookimpl(trylast=True)  # the report has been sent by then
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After an access that is not allowed nothing on the GPU works any more in this process: end it.

    Else it would take over, and fail, what the others have still to do. pytest-xdist starts another one.
    """
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@contextmanager
def _in_force(computed: Computed) -> Iterator[str]:
    """The backend's name, with its instruction set in force and its device the default one."""
    if computed.isa == EMULATED:
        with emulator.emulated_native():
            yield computed.backend
        return
    before = extension.kernels.isa()
    extension.kernels.set_isa(computed.isa or before)
    try:
        with torch.device(computed.device) if computed.device != "cpu" else nullcontext():
            yield computed.backend
    finally:
        extension.kernels.set_isa(before)


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, by the name that the argument ``backend`` takes; new tensors lie on the device that it is for."""
    with _in_force(request.param) as name:
        yield name


@pytest.fixture(params=[computed for computed in BACKENDS if computed.isa not in (None, EMULATED)], ids=str)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, but the compiled CPU kernels alone."""
    with _in_force(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """No test leaves another backend, instruction set or number of threads behind, or begins with another seed."""
    torch.manual_seed(0)
    requested, isa, threads = backends._requested, extension.kernels.isa(), torch.get_num_threads()
    yield
    assert backends._requested == requested, "the test left another backend"
    assert extension.kernels.isa() == isa, "the test left another instruction set"
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _garbage_is_young() -> None:
    """Garbage is looked for among what a module's tests make: to search all that was there takes half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A module's tests have one thread: more only cost time on what is small, the more so where cores are shared."""
    with cases.one_thread():
        yield


class _Modules(dict[str, ModuleType]):
    def __missing__(self, name: str) -> ModuleType:
        self[name] = importlib.import_module(name)
        return self[name]


@pytest.fixture(scope="module")
def modules() -> Iterator[Mapping[str, ModuleType]]:
    """The modules of benchmarks/ by name, imported as its programs import each other."""
    sys.path.insert(0, str(BENCHMARKS))
    yield _Modules()
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 40 images of a data set: enough for a loop, and fast."""
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args: tuple(part[:40] for part in load(*args)))


class GuardedTorch:
    """torch, for one module, whose new memory is NaN and lies between two guards.

    A kernel that skips an element leaves a NaN in it; one that writes beside its output hurts a guard.
    """

    GUARD = 64  # elements on either side: a register of the widest instruction set, four times
    VALUE = 123.0  # fits in a byte

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, model: Tensor, **options: Any) -> Tensor:
        return self._guarded(torch.empty_like(model, **options))

    def empty(self, *size: Any, **options: Any) -> Tensor:
        return self._guarded(torch.empty(*size, **options))

    def _guarded(self, plain: Tensor) -> Tensor:
        room = plain.numel() + 2 * self.GUARD
        buffer = torch.full((room,), self.VALUE, dtype=plain.dtype, device=plain.device)
        # All bits set is a NaN too: scratch memory is bytes here, and numbers to a kernel.
        buffer[self.GUARD : self.GUARD + plain.numel()] = torch.nan if plain.is_floating_point() else 255
        self._buffers.append(buffer)
        return buffer.as_strided(plain.shape, plain.stride(), self.GUARD)

    def check(self) -> None:
        for buffer in self._buffers:
            expected = torch.tensor(self.VALUE, dtype=buffer.dtype, device=buffer.device)
            assert (buffer[: self.GUARD] == expected).all(), "written in front of an output"
            assert (buffer[-self.GUARD :] == expected).all(), "written behind an output"


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, backend: str) -> Callable[[], None]:
    """Outputs are NaN until they are written, and stand under guard; call it to see whether one is hurt."""
    guarded_torch = GuardedTorch()
    backends.module(backend)
    names = layout.__name__, f"{backends.__name__}.{backend}"  # a backend's functions stand in several modules
    for name, module in list(sys.modules.items()):
        if name.startswith(names) and hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", guarded_torch)
    return guarded_torch.check


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def large_zeros() -> Callable[..., Tensor]:
    """Zeros that cost no memory until they are written: calloc's pages are all one page of zeros.

    Skips the test where there is no room for `outputs` real tensors of that size.
    """

    def make(*shape: int, dtype: torch.dtype, outputs: int, channels_last: bool = False) -> Tensor:
        size = math.prod(shape)
        needed = outputs * size * dtype.itemsize + 2**30
        if _available_bytes() < needed:
            pytest.skip(f"needs {needed / 2**30:.1f} GiB of free memory")
        zeros = torch.from_numpy(np.zeros(size * dtype.itemsize, dtype=np.uint8)).view(dtype)
        if channels_last:
            n, c, h, w = shape
            return zeros.view(n, h, w, c).permute(0, 3, 1, 2)
        return zeros.view(shape)

    return make
