"""The compiled kernels, C++ and CUDA: torch tensors in, addresses and strides down to C++.

Tensors arrive checked (`sparta_kernels.ops`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends.layout import Output, Rows, as_rows, bits_of, gapless, in_order_of, in_strides, is_planar

try:
    from sparta_kernels import _native
except ImportError as error:
    raise ImportError(
        "sparta_kernels is not installed correctly: its compiled module sparta_kernels._native could not be loaded "
        f"({error}). Install the package with `pip install .` from its source folder, and run from another folder"
    ) from error

DEVICES = ("cpu", "cuda") if _native.cuda_info()["built"] else ("cpu",)

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ABSENT = (0, 0)


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Where a kernel runs: CPU threads, and the CUDA device (-1: the CPU) and its stream."""
    if tensor.device.type == "cpu":
        return torch.get_num_threads(), -1, 0
    device = tensor.device.index
    return 1, device, torch._C._cuda_getCurrentRawStream(device)


def _small(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor."""
    return _ABSENT if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype])


def _matrices(rows: Rows) -> tuple[int, int, int]:
    return rows.tensor.data_ptr(), rows.sample_stride, rows.row_stride


def gate_forward(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int) -> Tensor:
    planar = is_planar(x.shape, x.stride())
    read = as_rows(x, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    y = Output(x, planar)
    _native.gate_forward(
        (*x.shape, share),
        planar,
        _DTYPES[x.dtype],
        _matrices(read),
        _matrices(y.rows),
        _small(spatial),
        _small(channel),
        _small(kernel),
        _place(x),
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    planar = is_planar(x.shape, x.stride())
    read, gy_read = as_rows(x, planar), as_rows(gy, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    gx = Output(x, planar) if wanted[0] else None
    gspatial = torch.empty_like(spatial) if wanted[1] else None
    gchannel = torch.empty_like(channel) if wanted[2] else None
    gkernel = torch.empty_like(kernel) if kernel is not None and wanted[3] else None
    shape, place = (*x.shape, share), _place(x)
    scratch = _native.gate_backward_scratch(shape, planar, _DTYPES[x.dtype], place)
    # On the stream's own allocator: what the kernels still need after this function is not given to anyone else.
    sums = torch.empty(scratch, dtype=torch.uint8, device=x.device) if scratch else None
    _native.gate_backward(
        shape,
        planar,
        _DTYPES[x.dtype],
        _matrices(read),
        _matrices(gy_read),
        (0, 0, 0) if gx is None else _matrices(gx.rows),
        _small(spatial),
        _small(channel),
        _small(kernel),
        _small(gspatial),
        _small(gchannel),
        _small(gkernel),
        0 if sums is None else sums.data_ptr(),
        place,
    )
    return None if gx is None else gx.finish(), gspatial, gchannel, gkernel


def conv_forward(spatial: Tensor, kernel: Tensor) -> Tensor:
    samples, _, height, width = spatial.shape
    spatial, kernel = spatial.contiguous(), kernel.contiguous()
    output = torch.empty_like(spatial)
    _native.conv_forward(
        (samples, height, width, kernel.shape[-1]),
        _small(spatial),
        _small(kernel),
        _small(output),
        _place(spatial),
    )
    return output


def conv_backward(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    samples, _, height, width = spatial.shape
    grad_output, spatial, kernel = grad_output.contiguous(), spatial.contiguous(), kernel.contiguous()
    grad_spatial = torch.empty_like(spatial) if wanted[0] else None
    grad_kernel = torch.empty_like(kernel) if wanted[1] else None
    _native.conv_backward(
        (samples, height, width, kernel.shape[-1]),
        _small(grad_output),
        _small(spatial),
        _small(kernel),
        _small(grad_spatial),
        _small(grad_kernel),
        _place(spatial),
    )
    return grad_spatial, grad_kernel


def pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, signed_step: float, eps: float, lower: float, upper: float
) -> None:
    with gapless(adv) as target:
        grad, clean = in_order_of(grad, target), in_order_of(clean, target)
        _native.pgd_step(
            target.numel(),
            _DTYPES[adv.dtype],
            target.data_ptr(),
            grad.data_ptr(),
            clean.data_ptr(),
            signed_step,
            eps,
            lower,
            upper,
            _place(adv),
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
        _native.pgd_start(
            tuple(target.shape),
            tuple(target.stride()),
            _DTYPES[adv.dtype],
            target.data_ptr(),
            clean.data_ptr(),
            indices.data_ptr(),
            seed,
            restart,
            eps,
            lower,
            upper,
            _place(adv),
        )


def _relu(a: Tensor, b: Tensor | None, y: Tensor, keep: bool) -> Tensor | None:
    """Write y, which has no gaps."""
    a, b = in_order_of(a, y), None if b is None else in_order_of(b, y)
    bits = bits_of(y) if keep else None
    _native.relu_forward(
        y.numel(),
        _DTYPES[y.dtype],
        a.data_ptr(),
        0 if b is None else b.data_ptr(),
        y.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        _place(y),
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
    _native.relu_backward(
        gx.numel(),
        _DTYPES[gx.dtype],
        grad.data_ptr(),
        0 if grad2 is None else grad2.data_ptr(),
        bits.data_ptr(),
        gx.data_ptr(),
        _place(gx),
    )
    return gx
