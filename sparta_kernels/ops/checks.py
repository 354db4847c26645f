"""Checks that the operations share. Each raises before anything is written, naming the argument."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(operation: str, name: str, value: object, like: Tensor | None = None) -> None:
    """A dense floating tensor, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operation}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"{operation}: {name} must have one of the dtypes {allowed}, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{operation}: {name} must be a strided tensor, got {value.layout}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{operation}: {name} must be on {like.device} like the first tensor, got {value.device}")


def check_shape(operation: str, name: str, value: Tensor, meaning: str, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{operation}: {name} must have shape {meaning} = {shape}, got {tuple(value.shape)}")


def check_images(operation: str, name: str, value: Tensor) -> None:
    if value.dim() != 4:
        raise ValueError(f"{operation}: {name} must have shape (N, C, H, W), got {tuple(value.shape)}")


def check_integer(operation: str, name: str, value: object, lowest: int, highest: int) -> None:
    """An int in [lowest, highest]."""
    if isinstance(value, torch.SymInt):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{operation}: {name} must be an int, got {type(value).__name__}")
    if not lowest <= value <= highest:
        raise ValueError(f"{operation}: {name} must be in [{lowest}, {highest}], got {value}")


def check_number(operation: str, name: str, value: object, lowest: float = -math.inf) -> None:
    """A finite number, at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operation}: {name} must be a number, got {type(value).__name__}")
    if not lowest <= value <= sys.float_info.max or value == -math.inf:  # a NaN fails too, and so does a huge int
        bound = "" if lowest == -math.inf else f" and at least {lowest}"
        raise ValueError(f"{operation}: {name} must be finite{bound}, got {value}")


def check_bounds(operation: str, lower: object, upper: object) -> None:
    check_number(operation, "lower", lower)
    check_number(operation, "upper", upper)
    if lower > upper:  # type: ignore[operator]
        raise ValueError(f"{operation}: lower must not exceed upper, got lower={lower} and upper={upper}")
