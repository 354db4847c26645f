"""Checks of arguments: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from torch import Tensor


def integer(where: str, name: str, value: object, *, low: int = 1) -> int:
    """`value` if it is an int >= low; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an integer >= {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{where}: {name} must be an integer >= {low}, got {value}")
    return value


def flag(where: str, name: str, value: object) -> bool:
    """`value` if it is True or False; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {value!r}")
    return value


def feature_map(where: str, x: Tensor, channels: int) -> None:
    """Refuse an x that is not a floating (N, channels, H, W) tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must have a floating dtype, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{where}: x must have shape (N, {channels}, H, W), got {tuple(x.shape)}")
