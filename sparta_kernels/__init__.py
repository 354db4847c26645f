"""SPARTA at the price of ReLU: fused kernels, autograd operations, and projected gradient descent for robust CNNs."""

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
