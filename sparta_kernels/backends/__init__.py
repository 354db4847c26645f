"""How an operation is computed, and the one function that chooses.

A backend is a module with one function per operation, all of the same names and signatures. ``reference`` is not in
the table: it is the plain PyTorch of `sparta_kernels.reference`, and runs everywhere.
"""

from __future__ import annotations

from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

from sparta_kernels.backends import native

NAMES = ("auto", "reference", "native", "triton")

MODULES: dict[str, ModuleType] = {"native": native}

_requested = "auto"


class Choice(NamedTuple):
    """A backend's name and the reason why it was taken."""

    backend: str
    reason: str


class use_backend:
    """Choose how operations are computed, from here on or for a ``with`` block.

        sparta_kernels.use_backend("reference")          # until the next call
        with sparta_kernels.use_backend("native"): ...   # and back again after it

    The choice holds for the whole process. A backward pass uses the backend that its forward pass used.

    Args:
        name: "auto" (the fastest that can run), "reference" (plain PyTorch), "native" (C++) or "triton".

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
    """The backend for tensors on `device`: the one asked for, or the fastest that can run there.

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
    if name == "auto":
        if kind in native.DEVICES:
            return Choice("native", f"compiled kernels for {kind} are built in")
        return Choice("reference", f"this build has no kernels for {kind}")
    if name != "reference" and kind not in MODULES[name].DEVICES and kind != "meta":
        able = ", ".join(["reference", *(n for n, module in MODULES.items() if kind in module.DEVICES)])
        raise ValueError(f"{argument} {name!r} has no kernels for {kind} tensors; available there: {able}")
    return Choice(name, "asked for")


def _check_name(name: str, argument: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a string, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}; got {name!r}")
    if name not in ("auto", "reference", *MODULES):
        raise ValueError(
            f"{argument} {name!r} is not part of this build; available: auto, reference, {', '.join(MODULES)}"
        )
