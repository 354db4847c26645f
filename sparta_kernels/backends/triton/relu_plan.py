"""add_relu's launches, and its functions: those of `sparta_kernels.backends.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends.layout import bits_of, in_order_of, in_strides
from sparta_kernels.backends.triton import relu
from sparta_kernels.backends.triton.launch import Launch, ceil_div, run


def _rows(itemsize: int) -> int:
    """Of eight elements, in a program: with 4 warps 32 bytes a thread of each tensor."""
    return 512 // itemsize


def _launch(kernel: object, tensors: tuple[Tensor | None, ...], written: Tensor) -> list[Launch]:
    elements, rows = written.numel(), _rows(written.itemsize)
    if elements == 0:
        return []
    arguments = (*tensors, elements, elements % (8 * rows) == 0, rows)
    return [Launch(kernel, ceil_div(elements, 8 * rows), arguments)]


def plan_relu_forward(a: Tensor, b: Tensor | None, y: Tensor, keep: bool) -> tuple[list[Launch], Tensor | None]:
    """The launches that write y, which has no gaps and may be a; and the bits."""
    bits = bits_of(y) if keep else None
    other = None if b is None else in_order_of(b, y)
    return _launch(relu.relu_forward, (in_order_of(a, y), other, y, bits), y), bits


def relu_forward(a: Tensor, b: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(a)
    launches, bits = plan_relu_forward(a, b, y, keep)
    run(launches, a.device)
    return y, bits


def relu_forward_(a: Tensor, b: Tensor | None, keep: bool) -> Tensor | None:
    launches, bits = plan_relu_forward(a, b, a, keep)
    run(launches, a.device)
    return bits


def plan_relu_backward(
    grad: Tensor, grad2: Tensor | None, bits: Tensor, stride: tuple[int, ...]
) -> tuple[list[Launch], Tensor]:
    grad = in_strides(grad, stride)
    other = None if grad2 is None else in_strides(grad2, stride)
    gx = torch.empty_like(grad)
    return _launch(relu.relu_backward, (grad, other, bits, gx), gx), gx


def relu_backward(grad: Tensor, grad2: Tensor | None, bits: Tensor, stride: tuple[int, ...]) -> Tensor:
    launches, gx = plan_relu_backward(grad, grad2, bits, stride)
    run(launches, grad.device)
    return gx
