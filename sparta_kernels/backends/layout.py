"""How a tensor's memory layout is described to kernels, and which tensors have to be copied first.

A gate kernel sees an image batch (N, C, H, W) as one matrix per sample with contiguous rows: rows are channels and
columns pixels (planar, NCHW), or rows are pixels and columns channels (channels_last).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """An image batch whose rows are contiguous, and the strides between samples and between rows, in elements."""

    tensor: Tensor
    sample_stride: int
    row_stride: int


@lru_cache(maxsize=256)  # a network asks for few layouts, again and again
def row_strides(shape: torch.Size, stride: tuple[int, ...], planar: bool) -> tuple[int, int] | None:
    """Sample stride and row stride of an image batch whose rows are contiguous; None if they are not.

    Strides of extents below 2 are meaningless and ignored; an empty batch has no rows.
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
def is_planar(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether rows are channels. If both are possible (one pixel, or one channel), the longer rows are taken."""
    one_pixel = shape[2] * shape[3] == 1
    pixels_in_rows = row_strides(shape, stride, False) is not None
    return not pixels_in_rows if one_pixel else row_strides(shape, stride, True) is not None or not pixels_in_rows


def as_rows(image: Tensor, planar: bool) -> Rows:
    """The image, or a copy of it, with its rows described. The copy lives as long as the description."""
    strides = row_strides(image.shape, image.stride(), planar)
    if strides is None:
        image = image.contiguous(memory_format=torch.contiguous_format if planar else torch.channels_last)
        strides = row_strides(image.shape, image.stride(), planar)
        assert strides is not None
    return Rows(image, *strides)


class Output:
    """A new tensor with the strides of torch's elementwise results, and the rows by which a kernel writes it."""

    def __init__(self, like: Tensor, planar: bool) -> None:
        self.tensor = torch.empty_like(like)
        self.rows = as_rows(self.tensor, planar)

    def finish(self) -> Tensor:
        if self.rows.tensor is not self.tensor:  # an order of axes that the kernels do not write
            self.tensor.copy_(self.rows.tensor)
        return self.tensor


def in_order_of(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, or a copy of it, with the strides of the gapless `model`."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model).copy_(tensor)


@contextmanager
def gapless(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor`, to be written in place, or a gapless copy that is written back at the end."""
    whole = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    target = tensor if whole else tensor.contiguous()
    yield target
    if target is not tensor:
        tensor.copy_(target)


def in_strides(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`tensor`, or a copy of it, with those strides, which leave no gaps."""
    if tensor.stride() == stride:
        return tensor
    return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


def is_gapless(tensor: Tensor) -> bool:
    """Whether every address between the tensor's first and last is that of one element."""
    return tensor.is_contiguous() or _is_gapless(tensor.shape, tensor.stride())


@lru_cache(maxsize=256)
def _is_gapless(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, extent in sorted((step, extent) for step, extent in zip(stride, shape, strict=True) if extent != 1):
        if step != expected:
            return False
        expected *= extent
    return True


def scratch(size: int, like: Tensor) -> Tensor | None:
    """`size` bytes for kernels that are queued on the current stream; None for none.

    The caller may drop them before the kernels have run: the caching allocator reuses memory in the stream's order.
    """
    return torch.empty(size, dtype=torch.uint8, device=like.device) if size else None


def bits_of(tensor: Tensor) -> Tensor:
    """New memory for one bit per element."""
    return torch.empty((tensor.numel() + 7) // 8, dtype=torch.uint8, device=tensor.device)
