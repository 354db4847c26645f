"""Where an iteration of our attack spends its time, by torch's profiler: a pass of its own, not part of the timings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attack_candidates import Bench, Entry
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sparta_kernels.nn.frozen_sparta import FrozenSparta

STEPS = 4
PARTS = {
    "convolutions": "of the backbone, both ways",
    "relu": "the backbone's fused relu(a + b), both ways",
    "gate": "SPARTA's gate and dynamic convolution, both ways",
    "attention": "SPARTA's attention network, both ways: its convolutions, ReLUs and means",
    "batch_norm": "BatchNorms that could not be folded",
    "element_wise": "ReLUs, additions, casts and copies that are not fused",
    "step": "the attack's step",
    "other": "pooling, the last layer, the loss, and the rest",
}
_RANGE = "attack.py: attention"
# By the beginning of the operation's name, the first that fits.
_NAMES = {
    "sparta_kernels::_pgd": "step",
    "sparta_kernels::_gate": "gate",
    "sparta_kernels::_conv": "gate",
    "sparta_kernels::": "relu",
    "AddRelu": "relu",
    "_FrozenConvolution": "convolutions",
    "aten::addmm": "other",
    "aten::native_batch_norm": "batch_norm",
    "aten::cudnn_batch_norm": "batch_norm",
    "aten::_batch_norm": "batch_norm",
    "aten::batch_norm": "batch_norm",
    "aten::conv": "convolutions",
    "aten::_conv": "convolutions",
    "aten::mkldnn_conv": "convolutions",
    "aten::cudnn_conv": "convolutions",
    "aten::thnn_conv": "convolutions",
    "aten::_slow_conv": "convolutions",
    **dict.fromkeys(
        (
            *("aten::relu", "aten::threshold", "aten::clamp", "aten::add", "aten::mul", "aten::copy_", "aten::clone"),
            *("aten::to", "aten::_to_copy", "aten::contiguous", "aten::sigmoid", "aten::sub", "aten::sign"),
        ),
        "element_wise",
    ),
}


def breakdown(bench: Bench, entry: Entry) -> dict[str, Any]:
    """Profile a few iterations of an entry of ours, by the engine eager.

    Returns:
        ms: milliseconds an iteration for each of `PARTS`: of the device's kernels on a GPU, of operations on a CPU.
        operations: the operations that took the most, each with its part and its milliseconds an iteration.
    """
    entry = entry._replace(candidate="ours-eager")
    on_gpu = bench.device.type == "cuda"
    bench.attack_once(entry, STEPS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _marked(bench.prepared(entry)), profile(activities=activities) as seen:
        bench.attack_once(entry, STEPS)
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CPU]
    parts: Counter[str] = Counter()
    operations: Counter[tuple[str, str]] = Counter()
    attention = {event.sequence_nr for event in events if event.sequence_nr >= 0 and _inside(event)}
    for event in events:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent <= 0 or event.name == _RANGE:
            continue
        part = _part(event, attention)
        parts[part] += spent
        operations[part, event.name] += spent
    scale = 1e-3 / STEPS
    top = [{"part": part, "operation": name, "ms": scale * spent} for (part, name), spent in operations.most_common(12)]
    return {"ms": {part: scale * parts[part] for part in PARTS}, "operations": top}


def _part(event: Any, attention: set[int]) -> str:
    own = _named(event.name)
    if own in ("gate", "step"):
        return own
    ancestor = event
    while ancestor is not None:
        named = _named(ancestor.name)
        if ancestor.name == _RANGE or (_is_backward(ancestor) and ancestor.sequence_nr in attention):
            return "attention"
        if own == "other" and named in ("gate", "relu", "convolutions", "batch_norm", "step"):
            own = named  # what an operation does inside belongs to it
        ancestor = ancestor.cpu_parent
    return own


def _inside(event: Any) -> bool:
    """Whether this is the forward pass of an operation of the attention network."""
    if _named(event.name) == "gate":
        return False
    while event is not None:
        if event.name == _RANGE:
            return True
        event = event.cpu_parent
    return False


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _named(name: str) -> str:
    return next((part for start, part in _NAMES.items() if name.startswith(start)), "other")


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """The forward passes of SPARTA's frozen form are marked in the profile."""
    handles, running = [], []

    def enter(*_: object) -> None:
        running.append(record_function(_RANGE))
        running[-1].__enter__()

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    for module in model.modules():
        if isinstance(module, FrozenSparta):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
