"""The compiled kernels: torch tensors in, addresses and strides down to C++.

Tensors arrive checked (`sparta_kernels.ops`). What is decided here is how a tensor's memory is described to the
kernels, and what must be copied first because it cannot be described.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

try:
    from sparta_kernels import _native
except ImportError as error:
    raise ImportError(
        "sparta_kernels is not installed correctly: its compiled module sparta_kernels._native could not be loaded "
        f"({error}). Install the package with `pip install .` from its source folder, and run from another folder"
    ) from error

DEVICES = ("cpu",)

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ABSENT = (0, 0)


def _small(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor."""
    return _ABSENT if tensor is None else (tensor.data_ptr(), _DTYPES[tensor.dtype])


@lru_cache(maxsize=256)  # a network asks for few layouts, again and again
def _rows(shape: torch.Size, stride: tuple[int, ...], planar: bool) -> tuple[int, int] | None:
    """Sample stride and row stride of an image batch whose rows are contiguous, or None where they are not.

    A row is a channel's pixels (planar) or a pixel's channels. Strides of extents below 2 say nothing, and are not
    looked at; an empty batch has no rows to lie anywhere.
    """
    samples, channels, height, width = shape
    if samples * channels * height * width == 0:
        return 0, 0
    sample_stride, channel_stride, height_stride, width_stride = stride
    if width == 1:
        pixel_stride = height_stride
    elif height == 1 or height_stride == width * width_stride:
        pixel_stride = width_stride
    else:
        return None
    if planar:
        return (sample_stride, channel_stride) if pixel_stride == 1 or height * width == 1 else None
    return (sample_stride, pixel_stride) if channel_stride == 1 or channels == 1 else None


@lru_cache(maxsize=256)
def _is_planar(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether rows are channels. Where both would do (one pixel, or one channel) the longer rows are taken."""
    one_pixel = shape[2] * shape[3] == 1
    pixels_in_rows = _rows(shape, stride, False) is not None
    return not pixels_in_rows if one_pixel else _rows(shape, stride, True) is not None or not pixels_in_rows


def _as_rows(image: Tensor, planar: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """The image, or a copy of it, and its description (address, sample stride, row stride)."""
    strides = _rows(image.shape, image.stride(), planar)
    if strides is None:
        image = image.contiguous(memory_format=torch.contiguous_format if planar else torch.channels_last)
        strides = _rows(image.shape, image.stride(), planar)
        assert strides is not None
    return image, (image.data_ptr(), *strides)


class _Output:
    """A new tensor with the strides that torch gives to elementwise results, and a place for a kernel to write it."""

    def __init__(self, like: Tensor, planar: bool) -> None:
        self.tensor = torch.empty_like(like)
        self._written, self.rows = _as_rows(self.tensor, planar)

    def finish(self) -> Tensor:
        if self._written is not self.tensor:  # an order of axes that the kernels do not write
            self.tensor.copy_(self._written)
        return self.tensor


def _gate_shape(x: Tensor, share: int) -> tuple[int, int, int, int, int]:
    samples, channels, height, width = x.shape
    return samples, channels, height, width, share


def gate_forward(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int) -> Tensor:
    planar = _is_planar(x.shape, x.stride())
    x_read, x_rows = _as_rows(x, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    y = _Output(x, planar)
    _native.gate_forward(
        _gate_shape(x_read, share),
        planar,
        _DTYPES[x.dtype],
        x_rows,
        y.rows,
        _small(spatial),
        _small(channel),
        _small(kernel),
        torch.get_num_threads(),
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
    planar = _is_planar(x.shape, x.stride())
    x_read, x_rows = _as_rows(x, planar)
    gy_read, gy_rows = _as_rows(gy, planar)  # noqa: RUF059 - where it is a copy, it must outlive the call
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    gx = _Output(x, planar) if wanted[0] else None
    gspatial = torch.empty_like(spatial) if wanted[1] else None
    gchannel = torch.empty_like(channel) if wanted[2] else None
    gkernel = torch.empty_like(kernel) if kernel is not None and wanted[3] else None
    _native.gate_backward(
        _gate_shape(x_read, share),
        planar,
        _DTYPES[x.dtype],
        x_rows,
        gy_rows,
        (0, 0, 0) if gx is None else gx.rows,
        _small(spatial),
        _small(channel),
        _small(kernel),
        _small(gspatial),
        _small(gchannel),
        _small(gkernel),
        torch.get_num_threads(),
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
        torch.get_num_threads(),
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
        torch.get_num_threads(),
    )
    return grad_spatial, grad_kernel


def _in_order_of(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, or a copy of it, with the strides of the gapless `model`."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model).copy_(tensor)


def _gapless(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, signed_step: float, eps: float, lower: float, upper: float
) -> None:
    target = adv if _gapless(adv) else adv.contiguous()
    grad, clean = _in_order_of(grad, target), _in_order_of(clean, target)
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
        torch.get_num_threads(),
    )
    if target is not adv:
        adv.copy_(target)


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
    target = adv if _gapless(adv) else adv.contiguous()
    clean, indices = _in_order_of(clean, target), indices.contiguous()
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
        torch.get_num_threads(),
    )
    if target is not adv:
        adv.copy_(target)
