"""dynamic_conv's launches, and its functions: those of `sparta_kernels.backends.native`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends.triton import conv
from sparta_kernels.backends.triton.launch import (
    Launch,
    ceil_div,
    check_pixels,
    conv_tiling,
    power_above,
    run,
    work_types,
)


def _correlate(source: Tensor, kernel: Tensor, output: Tensor, flipped: bool) -> Launch:
    samples, _, height, width = source.shape
    check_pixels("dynamic_conv", "spatial", height * width)
    size = kernel.shape[-1]
    tiling = conv_tiling(height * width, size, source.itemsize)
    blocks = ceil_div(height * width, tiling.pixels)
    arguments = (source, kernel, output, height, width, blocks, size, flipped, tiling.taps, tiling.pixels)
    return Launch(conv.conv_correlate, samples * blocks, arguments, tiling.warps, tiling.registers)


def plan_conv_forward(spatial: Tensor, kernel: Tensor) -> tuple[list[Launch], Tensor]:
    spatial, kernel = spatial.contiguous(), kernel.contiguous()
    output = torch.empty_like(spatial)
    return [] if spatial.numel() == 0 else [_correlate(spatial, kernel, output, False)], output


def conv_forward(spatial: Tensor, kernel: Tensor) -> Tensor:
    launches, output = plan_conv_forward(spatial, kernel)
    run(launches, spatial.device)
    return output


def plan_conv_backward(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool]
) -> tuple[list[Launch], tuple[Tensor | None, Tensor | None]]:
    grad_output, spatial, kernel = grad_output.contiguous(), spatial.contiguous(), kernel.contiguous()
    grad_spatial = torch.empty_like(spatial) if wanted[0] else None
    grad_kernel = torch.empty_like(kernel) if wanted[1] else None
    if spatial.numel() == 0:
        if grad_kernel is not None:
            grad_kernel.zero_()  # the sum over nothing
        return [], (grad_spatial, grad_kernel)
    launches = []
    if grad_spatial is not None:
        launches.append(_correlate(grad_output, kernel, grad_spatial, True))
    if grad_kernel is not None:
        samples, _, height, width = spatial.shape
        check_pixels("dynamic_conv", "spatial", height * width)
        size = kernel.shape[-1]
        taps = size * size
        rows_in_part = max(1, 16384 // width)
        parts = ceil_div(height, rows_in_part)
        sums = grad_kernel
        work, triton_work = work_types(spatial.dtype)
        if parts > 1:
            sums = torch.empty((samples, parts, taps), dtype=work, device=spatial.device)
        tiling = conv_tiling(min(height, rows_in_part) * width, size, spatial.itemsize)
        tap_blocks = ceil_div(taps, tiling.taps)
        arguments = (grad_output, spatial, sums, height, width, parts, rows_in_part, tap_blocks)
        constants = (size, tiling.taps, tiling.pixels)
        programs = samples * parts * tap_blocks
        options = (tiling.warps, tiling.registers)
        launches.append(Launch(conv.conv_grad_kernel, programs, arguments + constants, *options))
        if parts > 1:
            finish = (sums, grad_kernel, taps, parts, power_above(taps), min(16, power_above(parts)), triton_work)
            launches.append(Launch(conv.conv_finish, samples, finish))
    return launches, (grad_spatial, grad_kernel)


def conv_backward(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    launches, grads = plan_conv_backward(grad_output, spatial, kernel, wanted)
    run(launches, spatial.device)
    return grads
