"""The compiled kernels of swish_relu, smooth_relu and dyrelu: functions of `sparta_kernels.backends.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends import native
from sparta_kernels.backends.layout import Output, as_rows, in_order_of, is_planar


def _scratch(size: int, like: Tensor) -> Tensor:
    """Bytes for a kernel. On the stream's own allocator: nobody else is given them before it has run."""
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def swish_relu_forward(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    x = in_order_of(x, y)
    native._native.swish_relu_forward(y.numel(), native.DTYPES[y.dtype], x.data_ptr(), y.data_ptr(), native._place(y))
    return y


def swish_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gx = torch.empty_like(x)
    grad, x = in_order_of(grad, gx), in_order_of(x, gx)
    native._native.swish_relu_backward(
        gx.numel(), native.DTYPES[gx.dtype], grad.data_ptr(), x.data_ptr(), gx.data_ptr(), native._place(gx)
    )
    return gx


def smooth_relu_forward(x: Tensor, b: Tensor) -> Tensor:
    y = torch.empty_like(x)
    x = in_order_of(x, y)
    native._native.smooth_relu_forward(
        y.numel(), native.DTYPES[y.dtype], x.data_ptr(), y.data_ptr(), native._small(b), native._place(y)
    )
    return y


def smooth_relu_backward(grad: Tensor, x: Tensor, b: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    gx = torch.empty_like(x)
    grad, x = in_order_of(grad, gx), in_order_of(x, gx)
    gb = torch.empty_like(b) if wanted[1] else None
    elements, dtype, place = x.numel(), native.DTYPES[x.dtype], native._place(x)
    sums = _scratch(native._native.smooth_relu_backward_scratch(elements, dtype, place), x)
    native._native.smooth_relu_backward(
        elements,
        dtype,
        grad.data_ptr(),
        x.data_ptr(),
        gx.data_ptr() if wanted[0] else 0,
        native._small(b),
        native._small(gb),
        sums.data_ptr(),
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
    native._native.dyrelu_forward(
        _lines_shape(x, slopes),
        planar,
        native.DTYPES[x.dtype],
        native._matrices(read),
        native._matrices(y.rows),
        native._small(slopes),
        native._small(intercepts),
        native._place(x),
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
    shape, dtype, place = _lines_shape(x, slopes), native.DTYPES[x.dtype], native._place(x)
    sums = _scratch(native._native.dyrelu_backward_scratch(shape, planar, dtype, place), x)
    native._native.dyrelu_backward(
        shape,
        planar,
        dtype,
        native._matrices(grad_read),
        native._matrices(read),
        (0, 0, 0) if gx is None else native._matrices(gx.rows),
        native._small(slopes),
        native._small(intercepts),
        native._small(gslopes),
        native._small(gintercepts),
        sums.data_ptr(),
        place,
    )
    return None if gx is None else gx.finish(), gslopes, gintercepts
