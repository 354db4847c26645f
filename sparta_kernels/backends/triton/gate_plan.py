"""The gate's launches, and its functions: those of `sparta_kernels.backends.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends.layout import Output, as_rows, is_planar
from sparta_kernels.backends.triton import gate
from sparta_kernels.backends.triton.launch import (
    Launch,
    ceil_div,
    check_pixels,
    gate_backward_tiling,
    gate_forward_tiling,
    power_above,
    run,
    work_types,
)

Sums = tuple[Tensor | None, Tensor | None, Tensor | None]  # gradients: gspatial, gchannel, gkernel


def plan_gate_forward(
    x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int
) -> tuple[list[Launch], Output]:
    planar = is_planar(x.shape, x.stride())
    read, y = as_rows(x, planar), Output(x, planar)
    samples, channels, height, width = x.shape
    if x.numel() == 0:
        return [], y
    rows, cols = (channels, height * width) if planar else (height * width, channels)
    tiling = gate_forward_tiling(samples, rows, cols, x.itemsize)
    row_tiles, col_tiles = ceil_div(rows, tiling.rows), ceil_div(cols, tiling.cols)
    arguments = (
        read.tensor,
        spatial.contiguous(),
        channel.contiguous(),
        None if kernel is None else kernel.contiguous(),
        y.rows.tensor,
        samples,
        rows,
        cols,
        spatial.shape[2] * spatial.shape[3],
        width,
        spatial.shape[3],
        share,
        read.sample_stride,
        read.row_stride,
        y.rows.sample_stride,
        y.rows.row_stride,
        row_tiles,
        col_tiles,
        planar,
        share > 1,
        samples % tiling.samples == 0 and rows % tiling.rows == 0 and cols % tiling.cols == 0,
        tiling.samples,
        tiling.rows,
        tiling.cols,
    )
    programs = ceil_div(samples, tiling.samples) * row_tiles * col_tiles
    return [Launch(gate.gate_forward, programs, arguments, tiling.warps)], y


def gate_forward(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int) -> Tensor:
    launches, y = plan_gate_forward(x, spatial, channel, kernel, share)
    run(launches, x.device)
    return y.finish()


def plan_gate_backward(
    gy: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None,
    share: int,
    wanted: list[bool],
) -> tuple[list[Launch], Output | None, Sums]:
    planar = is_planar(x.shape, x.stride())
    read, gy_read = as_rows(x, planar), as_rows(gy, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    gx = Output(x, planar) if wanted[0] else None
    gspatial = torch.empty_like(spatial) if wanted[1] else None
    gchannel = torch.empty_like(channel) if wanted[2] else None
    gkernel = torch.empty_like(kernel) if kernel is not None and wanted[3] else None
    grads = gspatial, gchannel, gkernel
    if x.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()  # a sum over nothing
        return [], gx, grads
    if gx is None and gspatial is None and gchannel is None and gkernel is None:
        return [], gx, grads

    samples, channels, height, width = x.shape
    cells_high, cells_wide = spatial.shape[2:]
    rows, cols = (channels, height * width) if planar else (height * width, channels)
    row_strides = {cols, gy_read.row_stride, read.row_stride, cols if gx is None else gx.rows.row_stride}
    dense = len(row_strides) == 1
    tiling = gate_backward_tiling(samples, rows, cols, x.itemsize, planar, dense and share == 1)
    parts = tiling.row_parts * tiling.col_parts
    pixel_parts, channel_parts = tiling.row_parts, tiling.col_parts
    if not planar:
        pixel_parts, channel_parts = channel_parts, pixel_parts
    # What is divided no further is written where it belongs, the rest into a part of its own.
    whole_pixels = pixel_parts == 1 and share == 1
    pixel_sums, channel_sums, kernel_sums = gspatial, gchannel, gkernel
    work, triton_work = work_types(x.dtype)
    if gspatial is not None and not whole_pixels:
        pixel_sums = torch.empty((samples, pixel_parts, height * width), dtype=work, device=x.device)
    if gchannel is not None and channel_parts > 1:
        channel_sums = torch.empty((samples, channel_parts, channels), dtype=work, device=x.device)
    if gkernel is not None and parts > 1:
        kernel_sums = torch.empty((samples, parts), dtype=work, device=x.device)
    arguments = (
        gy_read.tensor,
        read.tensor,
        spatial,
        channel,
        kernel,
        None if gx is None else gx.rows.tensor,
        pixel_sums,
        channel_sums,
        kernel_sums,
        samples,
        rows,
        cols,
        cells_high * cells_wide,
        width,
        cells_wide,
        share,
        gy_read.sample_stride,
        gy_read.row_stride,
        read.sample_stride,
        read.row_stride,
        0 if gx is None else gx.rows.sample_stride,
        0 if gx is None else gx.rows.row_stride,
        tiling.row_parts,
        tiling.col_parts,
        tiling.rows_in_part,
        planar,
        share > 1,
        whole_pixels,
        tiling.even,
        tiling.samples,
        tiling.rows,
        tiling.cols,
        tiling.fold,
        cols if dense else 0,
    )
    programs = ceil_div(samples, tiling.samples) * parts
    launches = [Launch(gate.gate_backward, programs, arguments, tiling.warps, tiling.registers)]

    left = [
        None if sums is grad else grad
        for sums, grad in zip((pixel_sums, channel_sums, kernel_sums), grads, strict=True)
    ]
    if any(grad is not None for grad in left):
        check_pixels("sparta_gate", "x", height * width)
        cell_height, cell_width = min(share, height), min(share, width)
        terms = min(1024, power_above(cell_height * cell_width * pixel_parts))
        cell_blocks = 0 if left[0] is None else ceil_div(cells_high * cells_wide, 1024 // terms)
        channel_blocks = 0 if left[1] is None else ceil_div(channels, 64)
        finish = (
            pixel_sums,
            channel_sums,
            kernel_sums,
            kernel,
            *left,
            channels,
            height,
            width,
            cells_high * cells_wide,
            cells_wide,
            share,
            cell_height,
            cell_width,
            pixel_parts,
            channel_parts,
            parts,
            cell_blocks,
            channel_blocks,
            1024 // terms,
            terms,
            64,
            min(16, power_above(parts)),
            triton_work,
        )
        launches.append(Launch(gate.gate_finish, samples * (cell_blocks + channel_blocks + 1), finish))
    return launches, gx, grads


def gate_backward(
    gy: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None,
    share: int,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    launches, gx, grads = plan_gate_backward(gy, x, spatial, channel, kernel, share, wanted)
    run(launches, x.device)
    return None if gx is None else gx.finish(), *grads
