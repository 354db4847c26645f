"""dyrelu: of every element the largest of K lines, whose coefficients belong to its sample and channel.

A sample is a matrix of rows and columns, as in gate.py. A tile has CHANNELS channels and PIXELS pixels, in the order in
which they lie: its channels' coefficients are read once, and its sums are along the pixels.
"""
# mypy: ignore-errors
# ruff: noqa: B007, RUF005, RUF059  (compiled, a tuple cannot be unpacked into another, nor one name have two types)

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import bound, inlined, read, sum_over, write


@inlined
def lines_of(slopes, intercepts, first, mask, LINES: tl.constexpr, ACC: tl.constexpr):
    """The coefficients of a tile's channels: LINES slopes and as many intercepts. `first`: where a channel's begin."""
    slope = ()
    intercept = ()
    for k in tl.static_range(LINES):
        slope = slope + (read(slopes + first + k, mask, ACC),)
        intercept = intercept + (read(intercepts + first + k, mask, ACC),)
    return slope, intercept


@inlined
def largest(x, slope, intercept, LINES: tl.constexpr):
    """The largest line's value and slope, and which it is: the first NaN, or the first of the largest."""
    value = slope[0] * x + intercept[0]
    steepness = slope[0] + tl.zeros_like(x)
    index = tl.zeros_like(value).to(tl.int32)
    for k in tl.static_range(1, LINES):
        other = slope[k] * x + intercept[k]
        stays = (other <= value) | (value != value)
        value = tl.where(stays, value, other)
        steepness = tl.where(stays, steepness, slope[k])
        index = tl.where(stays, index, k)
    return value, steepness, index


@inlined
def tile_of(PLANAR: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """The channels and the pixels of a tile, from 0, each along its own axis; 64 bits wide where strides count them."""
    if PLANAR:
        channel = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
        pixel = tl.arange(0, PIXELS)[None, :]
    else:
        channel = tl.arange(0, CHANNELS)[None, :]
        pixel = tl.arange(0, PIXELS)[:, None].to(tl.int64)
    return channel, pixel


@inlined
def offset(channel, pixel, row_stride, PLANAR: tl.constexpr):
    """Where an element of a sample lies."""
    return channel * row_stride + pixel if PLANAR else pixel * row_stride + channel


@triton.jit
def dyrelu_forward(
    x,
    slopes,
    intercepts,
    y,
    channels,
    pixels,
    x_sample,
    x_row,
    y_sample,
    y_row,
    channel_tiles,
    pixel_tiles,
    PLANAR: tl.constexpr,
    EVEN: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """A tile of a sample. EVEN: no tile reaches beyond its sample."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first_pixel = (tl.program_id(0) % pixel_tiles).to(tl.int64) * PIXELS
    first_channel = (tl.program_id(0) // pixel_tiles % channel_tiles).to(tl.int64) * CHANNELS
    n = (tl.program_id(0) // (pixel_tiles * channel_tiles)).to(tl.int64)
    c, p = tile_of(PLANAR, CHANNELS, PIXELS)
    in_channels = None if EVEN else c < channels - first_channel
    mask = None if EVEN else in_channels & (p < pixels - first_pixel)
    x += n * x_sample + offset(first_channel, first_pixel, x_row, PLANAR)
    y += n * y_sample + offset(first_channel, first_pixel, y_row, PLANAR)

    value = read(x + offset(c, p, x_row, PLANAR), mask, ACC)
    first = (n * channels + first_channel + c) * LINES
    slope, intercept = lines_of(slopes, intercepts, first, in_channels, LINES, ACC)
    best, _, _ = largest(value, slope, intercept, LINES)
    write(y + offset(c, p, y_row, PLANAR), best, mask)


@triton.jit
def dyrelu_backward(
    gy,
    x,
    slopes,
    intercepts,
    gx,
    slope_sums,
    intercept_sums,
    channels,
    pixels,
    gy_sample,
    gy_row,
    x_sample,
    x_row,
    gx_sample,
    gx_row,
    channel_tiles,
    parts,
    pixels_in_part,
    PLANAR: tl.constexpr,
    EVEN: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One part of a sample's pixels, tile by tile, of CHANNELS channels.

    gx, slope_sums and intercept_sums are None where they are not wanted. The sums are (N, parts, C, K). EVEN: no tile
    reaches beyond its part.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    AXIS: tl.constexpr = 1 if PLANAR else 0
    part = (tl.program_id(0) % parts).to(tl.int64)
    first_channel = (tl.program_id(0) // parts % channel_tiles).to(tl.int64) * CHANNELS
    n = (tl.program_id(0) // (parts * channel_tiles)).to(tl.int64)
    c, p = tile_of(PLANAR, CHANNELS, PIXELS)
    in_channels = None if EVEN else c < channels - first_channel
    first = (n * channels + first_channel + c) * LINES
    slope, intercept = lines_of(slopes, intercepts, first, in_channels, LINES, ACC)

    gy += n * gy_sample
    x += n * x_sample
    if gx is not None:
        gx += n * gx_sample
    slope_sum = ()
    intercept_sum = ()
    for k in tl.static_range(LINES):
        slope_sum = slope_sum + (tl.zeros_like(c + p).to(ACC),)
        intercept_sum = intercept_sum + (tl.zeros_like(c + p).to(ACC),)
    end = tl.minimum((part + 1) * pixels_in_part, pixels)
    for start in range(bound(part * pixels_in_part), bound(end), PIXELS):
        mask = None if EVEN else in_channels & (p < end - start)
        value = read(x + offset(first_channel, start, x_row, PLANAR) + offset(c, p, x_row, PLANAR), mask, ACC)
        grad = read(gy + offset(first_channel, start, gy_row, PLANAR) + offset(c, p, gy_row, PLANAR), mask, ACC)
        best, steepness, index = largest(value, slope, intercept, LINES)
        if gx is not None:
            to = gx + offset(first_channel, start, gx_row, PLANAR) + offset(c, p, gx_row, PLANAR)
            write(to, grad * steepness, mask)
        slopes_now = ()
        intercepts_now = ()
        for k in tl.static_range(LINES):
            slopes_now = slopes_now + (slope_sum[k] + tl.where(index == k, grad * value, 0.0),)
            intercepts_now = intercepts_now + (intercept_sum[k] + tl.where(index == k, grad, 0.0),)
        slope_sum = slopes_now
        intercept_sum = intercepts_now

    at = ((n * parts + part) * channels + first_channel + c) * LINES
    for k in tl.static_range(LINES):
        if slope_sums is not None:
            write(slope_sums + at + k, tl.expand_dims(sum_over(slope_sum[k], AXIS), AXIS), in_channels)
        if intercept_sums is not None:
            write(intercept_sums + at + k, tl.expand_dims(sum_over(intercept_sum[k], AXIS), AXIS), in_channels)
