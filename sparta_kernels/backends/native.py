"""The compiled kernels, C++ and CUDA: takes torch tensors, passes addresses and strides.

Tensors arrive checked (`sparta_kernels.ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends import extension
from sparta_kernels.backends.extension import DTYPES, address, matrices, small
from sparta_kernels.backends.layout import (
    Output,
    as_rows,
    bits_of,
    gapless,
    in_order_of,
    in_strides,
    is_planar,
    scratch,
)
from sparta_kernels.backends.native_activations import (  # noqa: F401
    dyrelu_backward,
    dyrelu_forward,
    smooth_relu_backward,
    smooth_relu_forward,
    swish_relu_backward,
    swish_relu_forward,
)
from sparta_kernels.backends.native_attention import (  # noqa: F401
    attention_backward_,
    attention_forward,
    attention_unfit,
    pack_attention,
)

DEVICES = ("cpu", "cuda") if extension.kernels.with_cuda else ("cpu",)


def gate_forward(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int) -> Tensor:
    planar = is_planar(x.shape, x.stride())
    read = as_rows(x, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    y = Output(x, planar)
    extension.kernels.gate_forward(
        (*x.shape, share),
        planar,
        DTYPES[x.dtype],
        matrices(read),
        matrices(y.rows),
        small(spatial),
        small(channel),
        small(kernel),
        extension.place(x),
    )
    return y.finish()


def gate_backward(
    gy: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None,
    share: int,
    wanted: list[bool],
    gy2: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """With `gy2`, which is for the CPU and for all gradients, those for gy + gy2."""
    planar = is_planar(x.shape, x.stride())
    read, gy_read = as_rows(x, planar), as_rows(gy, planar)
    gy2_read = None if gy2 is None else as_rows(gy2, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    gx = Output(x, planar) if wanted[0] else None
    gspatial = torch.empty_like(spatial) if wanted[1] else None
    gchannel = torch.empty_like(channel) if wanted[2] else None
    gkernel = torch.empty_like(kernel) if kernel is not None and wanted[3] else None
    shape, dtype, place = (*x.shape, share), DTYPES[x.dtype], extension.place(x)
    images = matrices(read), matrices(gy_read), matrices(None if gx is None else gx.rows)
    sums = scratch(extension.scratch_size("gate_backward", place, shape, planar, dtype, *images), x)
    extension.kernels.gate_backward(
        shape,
        planar,
        dtype,
        *images,
        matrices(gy2_read),
        small(spatial),
        small(channel),
        small(kernel),
        small(gspatial),
        small(gchannel),
        small(gkernel),
        address(sums),
        place,
    )
    return None if gx is None else gx.finish(), gspatial, gchannel, gkernel


def conv_forward(spatial: Tensor, kernel: Tensor) -> Tensor:
    samples, _, height, width = spatial.shape
    spatial, kernel = spatial.contiguous(), kernel.contiguous()
    output = torch.empty_like(spatial)
    extension.kernels.conv_forward(
        (samples, height, width, kernel.shape[-1]),
        small(spatial),
        small(kernel),
        small(output),
        extension.place(spatial),
    )
    return output


def conv_backward(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    samples, _, height, width = spatial.shape
    grad_output, spatial, kernel = grad_output.contiguous(), spatial.contiguous(), kernel.contiguous()
    grad_spatial = torch.empty_like(spatial) if wanted[0] else None
    grad_kernel = torch.empty_like(kernel) if wanted[1] else None
    extension.kernels.conv_backward(
        (samples, height, width, kernel.shape[-1]),
        small(grad_output),
        small(spatial),
        small(kernel),
        small(grad_spatial),
        small(grad_kernel),
        extension.place(spatial),
    )
    return grad_spatial, grad_kernel


def pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, signed_step: float, eps: float, lower: float, upper: float
) -> None:
    with gapless(adv) as target:
        grad, clean = in_order_of(grad, target), in_order_of(clean, target)
        extension.kernels.pgd_step(
            target.numel(),
            DTYPES[adv.dtype],
            target.data_ptr(),
            grad.data_ptr(),
            clean.data_ptr(),
            signed_step,
            eps,
            lower,
            upper,
            extension.place(adv),
        )


def pgd_start(
    adv: Tensor,
    clean: Tensor,
    indices: Tensor,
    eps: float,
    seed: int,
    restart: int,
    lower: float,
    upper: float,
) -> None:
    with gapless(adv) as target:
        clean, indices = in_order_of(clean, target), indices.contiguous()
        extension.kernels.pgd_start(
            tuple(target.shape),
            tuple(target.stride()),
            DTYPES[adv.dtype],
            target.data_ptr(),
            clean.data_ptr(),
            indices.data_ptr(),
            seed,
            restart,
            eps,
            lower,
            upper,
            extension.place(adv),
        )


def _relu(a: Tensor, b: Tensor | None, y: Tensor, keep: bool) -> Tensor | None:
    """Write y, which has no gaps."""
    a, b = in_order_of(a, y), None if b is None else in_order_of(b, y)
    bits = bits_of(y) if keep else None
    extension.kernels.relu_forward(
        y.numel(),
        DTYPES[y.dtype],
        a.data_ptr(),
        address(b),
        y.data_ptr(),
        address(bits),
        extension.place(y),
    )
    return bits


def relu_forward(a: Tensor, b: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(a)
    return y, _relu(a, b, y, keep)


def relu_forward_(a: Tensor, b: Tensor | None, keep: bool) -> Tensor | None:
    return _relu(a, b, a, keep)


def relu_backward(grad: Tensor, grad2: Tensor | None, bits: Tensor, stride: tuple[int, ...]) -> Tensor:
    grad = in_strides(grad, stride)
    grad2 = None if grad2 is None else in_strides(grad2, stride)
    gx = torch.empty_like(grad)
    extension.kernels.relu_backward(
        gx.numel(),
        DTYPES[gx.dtype],
        grad.data_ptr(),
        address(grad2),
        bits.data_ptr(),
        gx.data_ptr(),
        extension.place(gx),
    )
    return gx
