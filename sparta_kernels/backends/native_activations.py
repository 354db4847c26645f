"""The compiled kernels of swish_relu, smooth_relu and dyrelu: functions of `sparta_kernels.backends.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends import extension
from sparta_kernels.backends.extension import DTYPES, address, matrices, small
from sparta_kernels.backends.layout import Output, as_rows, in_order_of, is_planar, scratch


def swish_relu_forward(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    x = in_order_of(x, y)
    extension.kernels.swish_relu_forward(y.numel(), DTYPES[y.dtype], x.data_ptr(), y.data_ptr(), extension.place(y))
    return y


def swish_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gx = torch.empty_like(x)
    grad, x = in_order_of(grad, gx), in_order_of(x, gx)
    extension.kernels.swish_relu_backward(
        gx.numel(), DTYPES[gx.dtype], grad.data_ptr(), x.data_ptr(), gx.data_ptr(), extension.place(gx)
    )
    return gx


def smooth_relu_forward(x: Tensor, b: Tensor) -> Tensor:
    y = torch.empty_like(x)
    x = in_order_of(x, y)
    extension.kernels.smooth_relu_forward(
        y.numel(), DTYPES[y.dtype], x.data_ptr(), y.data_ptr(), small(b), extension.place(y)
    )
    return y


def smooth_relu_backward(grad: Tensor, x: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    gx = torch.empty_like(x)
    grad, x = in_order_of(grad, gx), in_order_of(x, gx)
    gb = torch.empty_like(b) if wanted[1] else None
    elements, dtype, place = x.numel(), DTYPES[x.dtype], extension.place(x)
    sums = scratch(extension.scratch_size("smooth_relu_backward", place, elements, dtype), x)
    extension.kernels.smooth_relu_backward(
        elements,
        dtype,
        grad.data_ptr(),
        x.data_ptr(),
        gx.data_ptr() if wanted[0] else 0,
        small(b),
        small(gb),
        address(sums),
        place,
    )
    return gx if wanted[0] else None, gb


def _lines_shape(x: Tensor, slopes: Tensor) -> tuple[int, int, int, int]:
    samples, channels, height, width = x.shape
    return samples, channels, height * width, slopes.shape[2]


def dyrelu_forward(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    planar = is_planar(x.shape, x.stride())
    read = as_rows(x, planar)
    slopes, intercepts = slopes.contiguous(), intercepts.contiguous()
    y = Output(x, planar)
    extension.kernels.dyrelu_forward(
        _lines_shape(x, slopes),
        planar,
        DTYPES[x.dtype],
        matrices(read),
        matrices(y.rows),
        small(slopes),
        small(intercepts),
        extension.place(x),
    )
    return y.finish()


def dyrelu_backward(
    grad: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    planar = is_planar(x.shape, x.stride())
    read, grad_read = as_rows(x, planar), as_rows(grad, planar)
    slopes, intercepts = slopes.contiguous(), intercepts.contiguous()
    gx = Output(x, planar) if wanted[0] else None
    gslopes = torch.empty_like(slopes) if wanted[1] else None
    gintercepts = torch.empty_like(intercepts) if wanted[2] else None
    shape, dtype, place = _lines_shape(x, slopes), DTYPES[x.dtype], extension.place(x)
    images = matrices(grad_read), matrices(read), matrices(None if gx is None else gx.rows)
    sums = scratch(extension.scratch_size("dyrelu_backward", place, shape, planar, dtype, *images), x)
    extension.kernels.dyrelu_backward(
        shape,
        planar,
        dtype,
        *images,
        small(slopes),
        small(intercepts),
        small(gslopes),
        small(gintercepts),
        address(sums),
        place,
    )
    return None if gx is None else gx.finish(), gslopes, gintercepts
