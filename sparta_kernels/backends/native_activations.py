"""The compiled kernels of swish_relu, smooth_relu and dyrelu: functions of `sparta_kernels.backends.native`."""

from __future__ import annotations

from torch import Tensor

from sparta_kernels import reference  # until the kernels are here


def swish_relu_forward(x: Tensor) -> Tensor:
    return reference.swish_relu(x)


def swish_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return reference.swish_relu_backward(grad, x)


def smooth_relu_forward(x: Tensor, b: Tensor) -> Tensor:
    return reference.smooth_relu(x, b)


def smooth_relu_backward(grad: Tensor, x: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    return reference.smooth_relu_backward(grad, x, b)


def dyrelu_forward(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    return reference.dyrelu(x, slopes, intercepts)


def dyrelu_backward(
    grad: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return reference.dyrelu_backward(grad, x, slopes, intercepts)
