"""The backends that compute operations, and the choice between them.

A backend is a module with one function per operation; names and signatures are the same in all backends. ``reference``
is not such a module: it is the plain PyTorch of `sparta_kernels.reference`, and runs everywhere.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType

import torch
from torch import Tensor

from sparta_kernels.backends import choices, native
from sparta_kernels.backends.choices import Choice

NAMES = ("auto", "reference", "native", "triton")

# The kinds of device that each backend of this installation has kernels for. Triton's interpreter computes on a CPU
# what its compiler would on a GPU: slowly, to test and to debug, so `auto` never takes it there.
DEVICES: dict[str, tuple[str, ...]] = {"native": native.DEVICES}
if find_spec("triton") is not None:
    DEVICES["triton"] = ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

_requested = "auto"


class use_backend:
    """Choose the backend that computes operations, from now on or for a ``with`` block.

        sparta_kernels.use_backend("reference")          # until the next call
        with sparta_kernels.use_backend("native"): ...   # restored after the block

    The choice holds for the whole process. A backward pass uses the backend that its forward pass used.

    Args:
        name: "auto" (the fastest that can run), "reference" (plain PyTorch), "native" (C++ and CUDA) or "triton".

    Raises:
        TypeError: name is not a string.
        ValueError: name is unknown, or not part of this installation.
    """

    def __init__(self, name: str) -> None:
        global _requested
        _check_name(name, "use_backend: name")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _requested
        _requested = self._previous


def choose(device: torch.device, backend: str | None = None, argument: str = "backend") -> Choice:
    """The backend for tensors on `device`: the one requested, or the best that can run there.

    The answer is "auto" where several can run, and which is faster depends on the operation (`module_for`).

    Args:
        device: where the operation's tensors are.
        backend: a name, or None for what `use_backend` set.
        argument: how to call ``backend`` in an error.

    Raises:
        TypeError, ValueError: the name is unknown, not installed, or unfit for the device. Nothing falls back in
            silence.
    """
    name = _requested if backend is None else backend
    if backend is not None:
        _check_name(name, argument)
    kind = device.type
    able = [name for name, kinds in DEVICES.items() if kind in kinds]
    if name == "auto":
        if not able:
            return Choice("reference", f"this build has no kernels for {kind}")
        if kind == "cpu" or len(able) == 1:
            return Choice(able[0], f"its kernels for {kind} are the only compiled ones here")
        return Choice("auto", "whichever was measured to be faster for the operation, dtype, layout and size")
    if name != "reference" and name not in able and kind != "meta":
        raise ValueError(
            f"{argument} {name!r} has no kernels for {kind} tensors; available there: {', '.join(['reference', *able])}"
        )
    return Choice(name, "asked for")


@lru_cache
def module(name: str) -> ModuleType:
    """A backend's module, imported on first use: Triton alone takes longer to import than everything else."""
    return import_module(f"sparta_kernels.backends.{name}")


def module_for(backend: str, operation: str, tensor: Tensor) -> ModuleType:
    """The module that computes `operation` on `tensor`; `backend` is the result of `choose`."""
    return module(choices.fastest(operation, tensor).backend if backend == "auto" else backend)


def _check_name(name: str, argument: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a string, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}; got {name!r}")
    if name not in ("auto", "reference", *DEVICES):
        raise ValueError(
            f"{argument} {name!r} is not part of this installation; available: auto, reference, {', '.join(DEVICES)}"
        )
