"""Activations by name, with options."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..ops.checks import check_number
from .checks import check_count
from .dyrelu import DyReLU
from .feature_denoising import FeatureDenoising
from .maxout import MaxOut
from .pointwise import SmoothReLU, SwishReLU
from .sparta import Sparta
from .squeeze_excite import SqueezeExcite

_OPTION = re.compile(r"(\w+)=([A-Za-z0-9.+-]+)")
_WORDS = {"true": True, "false": False}


def _relu(channels: int) -> nn.Module:
    return nn.ReLU()


def _leaky_relu(channels: int, *, negative_slope: float = 0.01) -> nn.Module:
    check_number("leaky-relu", "negative_slope", negative_slope)
    return nn.LeakyReLU(negative_slope)


def _prelu(channels: int, *, channelwise: bool = False, init: float = 0.25) -> nn.Module:
    if not isinstance(channelwise, bool):
        raise TypeError(f"prelu: channelwise must be true or false, got {channelwise!r}")
    check_number("prelu", "init", init)
    return nn.PReLU(channels if channelwise else 1, init)


def _elu(channels: int, *, alpha: float = 1.0) -> nn.Module:
    check_number("elu", "alpha", alpha)
    return nn.ELU(alpha)


def _gelu(channels: int, *, approximate: str = "none") -> nn.Module:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be none or tanh, got {approximate}")
    return nn.GELU(approximate)


def _swish(channels: int) -> nn.Module:
    return nn.SiLU()


def _swish_relu(channels: int) -> nn.Module:
    return SwishReLU()


def _smooth_relu(channels: int, *, b: float = 20.0) -> nn.Module:
    return SmoothReLU(b=b)


def _sparta_static(channels: int, *, hidden: int | None = None, kernel_size: int = 1, share: int = 1) -> nn.Module:
    return Sparta(channels, hidden=hidden, kernel_size=kernel_size, dynamic=False, share=share)


_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "relu": _relu,
    "leaky-relu": _leaky_relu,
    "prelu": _prelu,
    "elu": _elu,
    "gelu": _gelu,
    "swish": _swish,
    "swish-relu": _swish_relu,
    "smooth-relu": _smooth_relu,
    "dyrelu": DyReLU,
    "feature-denoising": FeatureDenoising,
    "maxout": MaxOut,
    "se": SqueezeExcite,
    "sparta": Sparta,
    "sparta-static": _sparta_static,
}

ACTIVATIONS = tuple(_ACTIVATIONS)
"""The names that `make_activation` knows."""


def make_activation(activation: str, channels: int) -> nn.Module:
    """Make the activation that a string describes, for feature maps ``(N, channels, H, W)``.

    The string is a name, or a name with options: ``"sparta"``, ``"sparta:share=2"``,
    ``"prelu:channelwise=true,init=0.1"``. Options are those of the module; values are numbers, true, false, or a word.

    =================  ==============================  ===========================================================
    name               options                         module
    =================  ==============================  ===========================================================
    relu                                               `torch.nn.ReLU`
    leaky-relu         negative_slope                  `torch.nn.LeakyReLU`
    prelu              channelwise, init               `torch.nn.PReLU`, by default one slope for all channels
    elu                alpha                           `torch.nn.ELU`
    gelu               approximate (none, tanh)        `torch.nn.GELU`
    swish                                              `torch.nn.SiLU`: x * sigmoid(x)
    swish-relu                                         `SwishReLU`: relu(x) * sigmoid(x)
    smooth-relu        b                               `SmoothReLU`
    dyrelu             k, reduction                    `DyReLU`
    feature-denoising  hidden                          `FeatureDenoising`
    maxout             k                               `MaxOut`
    se                 reduction                       `SqueezeExcite`
    sparta             hidden, kernel_size, dynamic,   `Sparta`
                       share
    sparta-static      hidden, kernel_size, share      `Sparta` with dynamic=False: one learned Conv5 instead of a
                                                       predicted one (the papers' "SPARTA-w/o-DPNet")
    =================  ==============================  ===========================================================

    The papers' "SmReLU" in Table 6 (v2), ResNet-18 under adversarial training, has the numbers of "swish" in Table 5:
    30.38, 68.65 and 76.21 %. The numbers do not tell which of the two was run, so both are here.

    Raises:
        TypeError: activation is not a string, or channels not an integer.
        ValueError: the string does not follow the grammar, or no activation has this name, these options or values;
            channels is not positive.
    """
    check_count("make_activation", "channels", channels)
    name, options = parse_activation(activation)
    try:
        return _ACTIVATIONS[name](channels, **options)
    except (TypeError, ValueError) as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise ValueError(
            f"make_activation: activation must have values that fit its options, got {activation!r}: {reason}"
        ) from error


def parse_activation(activation: str) -> tuple[str, dict[str, Any]]:
    """The name and the options, with their values, of an activation's string; see `make_activation`.

    Raises:
        TypeError: activation is not a string.
        ValueError: it does not follow the grammar, or no activation has this name or these options.
    """
    where = "make_activation: activation must"
    if not isinstance(activation, str):
        raise TypeError(f"{where} be a string, got {type(activation).__name__}")
    name, colon, rest = activation.partition(":")
    if name not in _ACTIVATIONS:
        raise ValueError(f"{where} be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    allowed = _options_of(name)
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        match = _OPTION.fullmatch(part)
        if match is None:
            raise ValueError(f'{where} be "name" or "name:option=value,option=value", got {activation!r}')
        option = match[1]
        if option not in allowed:
            known = f"have options out of {', '.join(allowed)}" if allowed else "have no options"
            raise ValueError(f"{where} {known} where its name is {name!r}, got {activation!r}")
        if option in options:
            raise ValueError(f"{where} name the option {option} once, got {activation!r}")
        options[option] = _value(match[2])
    return name, options


def _options_of(name: str) -> tuple[str, ...]:
    parameters = inspect.signature(_ACTIVATIONS[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _value(text: str) -> bool | int | float | str:
    """What the text says: true, false, a number, or else the word that it is."""
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text
