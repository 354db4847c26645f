"""Activations by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from .checks import check_count
from .sparta import Sparta


def _relu(channels: int) -> nn.Module:
    return nn.ReLU()


_ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": _relu,
    "sparta": Sparta,
    "sparta-static": partial(Sparta, dynamic=False),
}

ACTIVATIONS = tuple(_ACTIVATIONS)
"""The names that `make_activation` knows."""


def make_activation(name: str, channels: int) -> nn.Module:
    """The activation called `name` for feature maps ``(N, channels, H, W)``.

    "relu"; "sparta"; "sparta-static" is SPARTA with one learned Conv5 instead of a predicted one (the papers'
    "SPARTA-w/o-DPNet").

    Raises:
        ValueError: no activation has this name.
        TypeError, ValueError: channels is not a positive integer.
    """
    check_count("make_activation", "channels", channels)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"make_activation: name must be one of {known}, got {name!r}")
    return _ACTIVATIONS[name](channels)
