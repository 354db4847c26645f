"""Argument checks of the attack and the packages built on it. Each error names the argument and what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from itertools import chain, pairwise

import torch
from torch import Tensor, nn


def real(
    where: str, name: str, value: object, allowed: str, *, low: float, high: float, open_low: bool = False
) -> float:
    """`value` as a float in [low, high] ((low, high] with `open_low`), or TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: {name} must be a number, {allowed}, got {value!r}")
    number = float(value)
    # Written so that NaN fails it.
    inside = (low < number if open_low else low <= number) and number <= high and math.isfinite(number)
    if not inside:
        raise ValueError(f"{where}: {name} must be {allowed}, got {value!r}")
    return number


def integer(where: str, name: str, value: object, *, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; TypeError or ValueError otherwise."""
    allowed = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
    if isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be {allowed}, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{where}: {name} must be {allowed}, got {value!r}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{where}: {name} must be {allowed}, got {value!r}")
    return number


def pixels(where: str, name: str, value: object) -> float:
    """A perturbation size in pixel units: 0 <= value <= 1 (above 1 it was surely meant as value/255)."""
    return real(where, name, value, "between 0 and 1 (pixel units, such as 16/255)", low=0.0, high=1.0)


def step(where: str, name: str, value: object) -> float:
    """A step in pixel units: finite and positive."""
    allowed = "finite and above 0 (pixel units, such as 1/255)"
    return real(where, name, value, allowed, low=0.0, high=math.inf, open_low=True)


def seed(where: str, value: object) -> int:
    """A seed of 63 bits: the key of the counter-based generator, as far as a signed integer carries it."""
    return integer(where, "seed", value, low=0, high=2**63 - 1)


def choice(where: str, name: str, value: object, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of the names in `allowed`; ValueError otherwise."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def flag(where: str, name: str, value: object) -> bool:
    """`value` if it is True or False; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}")
    return value


def images(where: str, value: object) -> Tensor:
    """Images (N, C, H, W), float32 or float64, every pixel in [0, 1]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: images must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        lower = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(value.dtype)
        hint = f" (a lower precision of the gradients alone: precision={lower!r})" if lower else ""
        raise TypeError(f"{where}: images must be float32 or float64 in [0, 1], got {value.dtype}{hint}")
    if value.ndim != 4 or 0 in value.shape[1:]:
        raise ValueError(f"{where}: images must have shape (N, C, H, W) with C, H, W >= 1, got {tuple(value.shape)}")
    if value.numel():
        low, high = (bound.item() for bound in value.detach().aminmax())
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ValueError(f"{where}: images must lie in [0, 1] without NaN, got values from {low:g} to {high:g}")
    return value.detach()


def integers(where: str, name: str, value: object, like: Tensor) -> Tensor:
    """One integer for each image of `like`, on its device, as a new int64 tensor (N,)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{where}: {name} must have an integer dtype, got {value.dtype}")
    if value.shape != like.shape[:1]:
        raise ValueError(f"{where}: {name} must have shape (N,) = ({like.shape[0]},), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{where}: {name} must be on the images' device {like.device}, got {value.device}")
    return value.detach().to(torch.int64, copy=True)


def distributions(where: str, name: str, value: Tensor, like: Tensor) -> Tensor:
    """A row of probabilities for each image of `like`, (N, classes), as a copy: at least 0, with a sum of 1."""
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: {name} must be integers, or probabilities in float32 or float64, got {value.dtype}")
    if value.ndim != 2 or value.shape[0] != like.shape[0]:
        raise ValueError(f"{where}: {name} must have shape (N, classes) = ({len(like)}, ...), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{where}: {name} must be on the images' device {like.device}, got {value.device}")
    value = value.detach().clone()
    if not bool(((value >= 0).all(1) & ((value.sum(1) - 1).abs() <= 1e-3)).all()):  # NaN fails both
        raise ValueError(f"{where}: {name} must be probabilities: each at least 0, with a sum of 1 for each image")
    return value


def within(where: str, name: str, value: Tensor, classes: int) -> None:
    """Refuse classes outside 0..classes-1."""
    low, high = (int(bound) for bound in value.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{where}: {name} must lie in 0..{classes - 1}, the model's {classes} classes, got {low}..{high}"
        )


def iterates(where: str, value: object, steps: int) -> tuple[int, ...]:
    """`report_at` as an ascending tuple; None means `steps`, and those of 10, 30, 50 below it."""
    if value is None:
        return tuple(sorted({k for k in (10, 30, 50) if k < steps} | {steps}))
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{where}: report_at must be a sequence of integers in 0..{steps}, got {value!r}")
    chosen = tuple(integer(where, "each of report_at", k, low=0, high=steps) for k in value)
    if not chosen or any(a >= b for a, b in pairwise(chosen)):
        raise ValueError(f"{where}: report_at must name one iterate or more, each after the one before, got {chosen}")
    return chosen


def logits(where: str, value: object, count: int) -> Tensor:
    """Check a model's result for `count` images: floating-point (count, classes) with 2 classes or more."""
    if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != count or value.shape[1] < 2:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: model must return logits of shape (N, classes) = ({count}, 2 or more), got {got}")
    if not value.is_floating_point():
        raise ValueError(f"{where}: model must return floating point logits, got {value.dtype}")
    return value


def device(where: str, value: object) -> torch.device:
    """The device called `value`, if this machine has it: the CPU or a CUDA device."""
    allowed = f"{where}: device must be cpu, cuda or cuda:N"
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{allowed}, got {value!r}")
    try:
        found = torch.device(value)
    except RuntimeError:
        raise ValueError(f"{allowed}, got {value!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{allowed}, got {value!r}")
    count = torch.cuda.device_count()
    if (found.index or 0) >= (1 if found.type == "cpu" else count):
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        why = "" if count else f": torch {torch.__version__} finds no GPU here"
        raise ValueError(f"{where}: device must be {there}{why}, got {value!r}")
    return found


def callback(where: str, name: str, value: object) -> None:
    """Refuse what is neither callable nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"{where}: {name} must be callable or None, got {value!r}")


def model(where: str, value: object, like: object) -> nn.Module:
    """A module all in eval mode with its parameters, or some of them, on the images' device."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(value).__name__}")
    for name, module in value.named_modules():
        if module.training:
            part = f"{name!r} ({type(module).__name__})" if name else type(module).__name__
            raise ValueError(f"{where}: model must be in eval mode (call model.eval()), got {part} in training mode")
    on = device_of(value)
    if isinstance(like, Tensor) and on is not None and like.device != on:
        raise ValueError(f"{where}: images must be on the model's device {on}, got {like.device}")
    return value


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter, or else buffer, where the images must be; None if it has neither."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device
