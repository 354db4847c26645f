"""Where a network calls ReLU, recorded while it runs, and which of its modules are blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .dyrelu import DyReLU
from .feature_denoising import FeatureDenoising
from .modes import in_eval_mode
from .sparta import Sparta
from .squeeze_excite import SqueezeExcite
from .traced_forward import RELU_FUNCTIONS, original_type

_OURS = (DyReLU, FeatureDenoising, Sparta, SqueezeExcite)  # their own ReLUs are part of what they are
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class ReluCall:
    """A ReLU in a module's code.

    Attributes:
        owner: the module whose forward calls it.
        number: which one of the owner's it is, counted from 1 in the order of execution.
        module: the `torch.nn.ReLU` that is called; None where it is a function.
        inputs: what it was called with, the first time for each number of channels.
    """

    owner: nn.Module
    number: int
    module: nn.Module | None
    inputs: dict[int, Tensor] = field(default_factory=dict)


class _Recorder(TorchFunctionMode):
    """Records every call of ReLU, and the module whose forward made it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[nn.Module, int], ReluCall] = {}
        self._running: list[tuple[nn.Module, list[ReluCall]]] = []  # modules, and what this forward has called so far

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RELU_FUNCTIONS and self._running and type(self._running[-1][0]) is not nn.ReLU:
            self._record(None, args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    def _record(self, module: nn.Module | None, x: object) -> None:
        owner, called = self._running[-1]
        if isinstance(owner, _OURS) or not isinstance(x, Tensor):
            return
        call = self.calls.setdefault((owner, len(called) + 1), ReluCall(owner, len(called) + 1, module))
        called.append(call)
        call.inputs.setdefault(x.shape[1] if x.dim() > 1 else 0, x)

    @contextmanager
    def recording(self) -> Iterator[None]:
        def enter(module: nn.Module, args: Any) -> None:
            if type(module) is nn.ReLU and self._running and args:
                self._record(module, args[0])
            self._running.append((module, []))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def observe(model: nn.Module, images: Tensor) -> tuple[list[ReluCall], Any]:
    """The ReLUs that the model calls, in the order of first calls, and the model's output."""
    recorder = _Recorder()
    with recorder.recording():
        output = run(model, images)
    return list(recorder.calls.values()), output


def run(model: nn.Module, images: Tensor) -> Any:
    """The model's output in eval mode, without a gradient, and reproducible."""
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.no_grad(), in_eval_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return model(images)


def groups(model: nn.Module) -> list[list[nn.Module]]:
    """The groups of blocks of a network, in the order of registration.

    A group is a Sequential, ModuleList or ModuleDict whose parts with parameters, its blocks, are all of one class that
    is not torch's. Groups inside blocks do not count, unless the outer group has only one block, which is then a
    wrapped network.
    """
    if isinstance(model, _CONTAINERS):
        parts = [part for part in model.children() if next(part.parameters(), None) is not None]
        kinds = {original_type(part) for part in parts}
        if len(kinds) == 1 and not isinstance(parts[0], _CONTAINERS) and not _is_torchs(kinds.pop()):
            inside = groups(parts[0]) if len(parts) == 1 else []
            return inside or [parts]
    return [group for part in model.children() for group in groups(part)]


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"
