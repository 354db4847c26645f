"""Fused kernels for the SPARTA activation, and a fast PGD attack for training and testing robust networks.

The operations are here. The packages `nn`, `attack`, `data`, `training`, `evaluation`, `report` and `papers` load on
first use. docs/api.md lists all public names.
"""

from typing import TYPE_CHECKING, Any

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sparta_kernels needs PyTorch 2.10 or newer: install it with `pip install torch` "
        "(https://pytorch.org/get-started has the command for your machine)"
    ) from error

from sparta_kernels._version import __version__
from sparta_kernels.backends import use_backend
from sparta_kernels.info import build_info
from sparta_kernels.memory import keep_freed_memory
from sparta_kernels.ops import (
    AttentionWeights,
    dynamic_conv,
    dyrelu,
    pgd_start_,
    pgd_step_,
    smooth_relu,
    sparta_activation,
    sparta_attention,
    sparta_gate,
    swish_relu,
)

if TYPE_CHECKING:
    from sparta_kernels import attack, data, evaluation, nn, papers, report, training  # noqa: F401

__all__ = [
    "AttentionWeights",
    "__version__",
    "build_info",
    "dynamic_conv",
    "dyrelu",
    "keep_freed_memory",
    "pgd_start_",
    "pgd_step_",
    "smooth_relu",
    "sparta_activation",
    "sparta_attention",
    "sparta_gate",
    "swish_relu",
    "use_backend",
]

_PACKAGES = ("attack", "data", "evaluation", "nn", "papers", "report", "training")


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
