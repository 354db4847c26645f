"""dyrelu's launches, and its functions: those of `sparta_kernels.backends.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends.layout import Output, as_rows, is_planar
from sparta_kernels.backends.triton import dyrelu
from sparta_kernels.backends.triton.launch import (
    WARP,
    Launch,
    ceil_div,
    check_pixels,
    power_above,
    power_below,
    run,
    work_types,
)
from sparta_kernels.backends.triton.sums import plan_sums

_WARPS = 4
_REGISTERS = 255  # all that there are: left alone, ptxas spills a few for an occupancy that is not needed
_TILES = 32  # of a part, at most


def _tile(channels: int, pixels: int, elements: int, planar: bool) -> tuple[int, int]:
    """Channels and pixels of a tile of so many elements a thread: along the row as far as it goes."""
    room = elements * _WARPS * WARP
    if planar:
        wide = min(power_above(pixels), room)
        return min(power_above(channels), room // wide), wide
    wide = min(power_above(channels), 128)
    return wide, min(power_above(pixels), room // wide)


def plan_dyrelu_forward(x: Tensor, slopes: Tensor, intercepts: Tensor) -> tuple[list[Launch], Output]:
    planar = is_planar(x.shape, x.stride())
    read, y = as_rows(x, planar), Output(x, planar)
    if x.numel() == 0:
        return [], y
    samples, channels, height, width = x.shape
    pixels = height * width
    check_pixels("dyrelu", "x", pixels)
    # Each of a thread's elements may be another channel's, whose coefficients then take 128 registers at most.
    elements = power_below(256 // (slopes.shape[2] * max(4, x.itemsize)))
    tile = _tile(channels, pixels, min(32 // x.itemsize, elements), planar)
    channel_tiles, pixel_tiles = ceil_div(channels, tile[0]), ceil_div(pixels, tile[1])
    arguments = (
        read.tensor,
        slopes.contiguous(),
        intercepts.contiguous(),
        y.rows.tensor,
        channels,
        pixels,
        read.sample_stride,
        read.row_stride,
        y.rows.sample_stride,
        y.rows.row_stride,
        channel_tiles,
        pixel_tiles,
        planar,
        channels % tile[0] == 0 and pixels % tile[1] == 0,
        slopes.shape[2],
        *tile,
    )
    return [Launch(dyrelu.dyrelu_forward, samples * channel_tiles * pixel_tiles, arguments, _WARPS, _REGISTERS)], y


def dyrelu_forward(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    launches, y = plan_dyrelu_forward(x, slopes, intercepts)
    run(launches, x.device)
    return y.finish()


def plan_dyrelu_backward(
    gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor, wanted: list[bool]
) -> tuple[list[Launch], tuple[Output | None, Tensor | None, Tensor | None]]:
    planar = is_planar(x.shape, x.stride())
    read, gy_read = as_rows(x, planar), as_rows(gy, planar)
    slopes, intercepts = slopes.contiguous(), intercepts.contiguous()
    gx = Output(x, planar) if wanted[0] else None
    gslopes = torch.empty_like(slopes) if wanted[1] else None
    gintercepts = torch.empty_like(intercepts) if wanted[2] else None
    if x.numel() == 0:
        for grad in (gslopes, gintercepts):
            if grad is not None:
                grad.zero_()  # a sum over nothing
        return [], (gx, gslopes, gintercepts)
    if not any(wanted):
        return [], (gx, gslopes, gintercepts)
    samples, channels, height, width = x.shape
    pixels, lines = height * width, slopes.shape[2]
    check_pixels("dyrelu", "x", pixels)
    # A thread has two sums a line for each of its elements, in 64 registers at most.
    tile = _tile(channels, pixels, min(8, power_below(128 // (lines * max(4, x.itemsize)))), planar)
    channel_tiles = ceil_div(channels, tile[0])
    parts = ceil_div(ceil_div(pixels, tile[1]), _TILES)
    pixels_in_part = ceil_div(ceil_div(pixels, parts), tile[1]) * tile[1]
    sums = [gslopes, gintercepts]  # with one part its sums are the gradients themselves
    if parts > 1:
        size, work = (samples, parts, channels, lines), work_types(x.dtype)[0]
        sums = [None if grad is None else torch.empty(size, dtype=work, device=x.device) for grad in sums]
    arguments = (
        gy_read.tensor,
        read.tensor,
        slopes,
        intercepts,
        None if gx is None else gx.rows.tensor,
        *sums,
        channels,
        pixels,
        gy_read.sample_stride,
        gy_read.row_stride,
        read.sample_stride,
        read.row_stride,
        0 if gx is None else gx.rows.sample_stride,
        0 if gx is None else gx.rows.row_stride,
        channel_tiles,
        parts,
        pixels_in_part,
        planar,
        channels % tile[0] == 0 and pixels % tile[1] == 0,
        lines,
        *tile,
    )
    launches = [Launch(dyrelu.dyrelu_backward, samples * channel_tiles * parts, arguments, _WARPS, _REGISTERS)]
    for part, grad in zip(sums, (gslopes, gintercepts), strict=True):
        if part is not None and grad is not None and parts > 1:
            launches.append(plan_sums(part, grad))
    return launches, (gx, gslopes, gintercepts)


def dyrelu_backward(
    gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    launches, (gx, gslopes, gintercepts) = plan_dyrelu_backward(gy, x, slopes, intercepts, wanted)
    run(launches, x.device)
    return None if gx is None else gx.finish(), gslopes, gintercepts
