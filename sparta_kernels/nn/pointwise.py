"""Elementwise smooth variants of ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..ops import smooth_relu, swish_relu
from ..ops.checks import check_number

fx.wrap("smooth_relu")
fx.wrap("swish_relu")


class SwishReLU(nn.Module):
    """``y = relu(x) * sigmoid(x)``: Swish if x > 0, else 0 (Swish-ReLU in Table 5 of the later SPARTA paper).

    x of any shape -> y, of x's shape, dtype and memory format; see `sparta_kernels.swish_relu`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return swish_relu(x)


class SmoothReLU(nn.Module):
    """``y = x - log(beta * x + 1) / beta`` if x > 0, else 0; ``beta = b * b`` is learned (Xie et al., 2020).

    As in cihangxie/SmoothAdversarialTraining (ResNet/resnet_model.py, ``smoothrelu_fn``), there is one b for all
    channels. It starts at 20, so beta starts at 400. Weight decay acts on b as on any parameter.

    x of any shape -> y, of x's shape, dtype and memory format; see `sparta_kernels.smooth_relu`.

    Args:
        b: initial value of the parameter ``b (1,)``.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(self, *, b: float = 20.0) -> None:
        super().__init__()
        check_number("SmoothReLU", "b", b)
        self.start = b
        self.b = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset b to its initial value."""
        nn.init.constant_(self.b, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return smooth_relu(x, self.b)

    def extra_repr(self) -> str:
        return f"b={self.start}"
