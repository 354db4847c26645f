"""The launches of swish_relu and smooth_relu, and their functions: those of `sparta_kernels.backends.native`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparta_kernels.backends.layout import in_order_of
from sparta_kernels.backends.triton import pointwise
from sparta_kernels.backends.triton.launch import Launch, ceil_div, run, work_types
from sparta_kernels.backends.triton.sums import plan_sums

_PARTS = 4096  # of a sum, at most


def _block(itemsize: int) -> int:
    """Elements of a program: with 4 warps 32 bytes a thread of each tensor."""
    return 4096 // itemsize


def _launch(kernel: Any, tensors: tuple[Tensor | None, ...], written: Tensor) -> list[Launch]:
    elements, block = written.numel(), _block(written.itemsize)
    if elements == 0:
        return []
    return [Launch(kernel, ceil_div(elements, block), (*tensors, elements, elements % block == 0, block))]


def plan_swish_relu_forward(x: Tensor) -> tuple[list[Launch], Tensor]:
    y = torch.empty_like(x)
    return _launch(pointwise.swish_relu_forward, (in_order_of(x, y), y), y), y


def swish_relu_forward(x: Tensor) -> Tensor:
    launches, y = plan_swish_relu_forward(x)
    run(launches, x.device)
    return y


def plan_swish_relu_backward(gy: Tensor, x: Tensor) -> tuple[list[Launch], Tensor]:
    gx = torch.empty_like(x)
    return _launch(pointwise.swish_relu_backward, (in_order_of(gy, gx), in_order_of(x, gx), gx), gx), gx


def swish_relu_backward(gy: Tensor, x: Tensor) -> Tensor:
    launches, gx = plan_swish_relu_backward(gy, x)
    run(launches, x.device)
    return gx


def plan_smooth_relu_forward(x: Tensor, b: Tensor) -> tuple[list[Launch], Tensor]:
    y = torch.empty_like(x)
    return _launch(pointwise.smooth_relu_forward, (in_order_of(x, y), b, y), y), y


def smooth_relu_forward(x: Tensor, b: Tensor) -> Tensor:
    launches, y = plan_smooth_relu_forward(x, b)
    run(launches, x.device)
    return y


def plan_smooth_relu_backward(
    gy: Tensor, x: Tensor, b: Tensor, wanted: list[bool]
) -> tuple[list[Launch], tuple[Tensor | None, Tensor | None]]:
    like = torch.empty_like(x)
    gx = like if wanted[0] else None
    gb = torch.empty_like(b) if wanted[1] else None
    elements, block = x.numel(), _block(x.itemsize)
    if elements == 0:
        if gb is not None:
            gb.zero_()  # a sum over nothing
        return [], (gx, gb)
    if gx is None and gb is None:
        return [], (gx, gb)
    blocks = ceil_div(elements, block)
    stretches = 1 if gb is None else ceil_div(blocks, _PARTS)
    programs = ceil_div(blocks, stretches)
    sums = None
    if gb is not None:
        sums = torch.empty((1, programs), dtype=work_types(x.dtype)[0], device=x.device)
    arguments = (in_order_of(gy, like), in_order_of(x, like), b, gx, sums, elements, stretches)
    even = elements % (stretches * block) == 0
    launches = [Launch(pointwise.smooth_relu_backward, programs, (*arguments, even, block))]
    if sums is not None and gb is not None:
        launches.append(plan_sums(sums, gb))
    return launches, (gx, gb)


def smooth_relu_backward(gy: Tensor, x: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    launches, grads = plan_smooth_relu_backward(gy, x, b, wanted)
    run(launches, x.device)
    return grads
