"""Kernel launches, and the table of tile sizes.

The table is a function of shape, dtype and memory layout, never of the device: how a sum is divided, and so its last
bit, is the same on every GPU. It was designed for 132 multiprocessors. Nothing is tuned at run time. (The attention
network's tiles are in attention_plan.py, and do depend on the device, since devices differ in what spills.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)

WARP = 32  # threads


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    The tensors among its arguments may be on the device "meta", for a launch that is only compiled (`kernel.warmup`).
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]  # by position, constexprs too
    warps: int = 4
    registers: int | None = None  # of a thread, at most
    fused: bool = True  # whether a product and a sum may become one fused operation

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "maxnreg": self.registers, "enable_fp_fusion": self.fused}

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """One after the other, on the device's current stream."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            for launch in launches:
                launch.run()
        return
    with _interpreting() if INTERPRETED else nullcontext():
        for launch in launches:
            launch.run()


_one_at_a_time = Lock()


@contextmanager
def _interpreting() -> Iterator[None]:
    """The interpreter replaces parts of triton.language while it runs; and it is numpy, which warns of inf and NaN."""
    with _one_at_a_time, np.errstate(all="ignore"):
        yield


def work_types(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The type to compute in, for torch and for Triton."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def check_pixels(operation: str, name: str, pixels: int) -> None:
    """Refuse too many pixels: these kernels count a sample's pixels in 32 bits, everything else in 64."""
    if pixels > 2**31 - 2**12:
        raise ValueError(
            f"{operation}: {name} must have at most 2**31 - 2**12 pixels for backend 'triton', got {pixels}"
        )


# ---- the table ---------------------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_above(value: int) -> int:
    """The smallest power of two that is at least `value`, and 1."""
    return 1 << max(0, value - 1).bit_length()


def power_below(value: int) -> int:
    """The largest power of two that is at most `value`, and 1 for less."""
    return 1 << (max(1, value).bit_length() - 1)


def _columns(extent: int, limit: int) -> int:
    """The width of a tile: all columns, else the largest power of two that leaves little of the last tile empty."""
    whole = power_above(extent)
    if whole <= limit:
        return whole
    fitting = (width for width in (limit, limit // 2, limit // 4) if ceil_div(extent, width) * width <= 1.125 * extent)
    return next(fitting, max(1, limit // 4))


def _samples(samples: int, elements: int, tile: int) -> int:
    """How many samples of so few elements share a program of `tile` elements, leaving enough programs to run."""
    return max(1, min(tile // elements, power_below(samples // 16)))


class ForwardTiling(NamedTuple):
    samples: int
    rows: int
    cols: int
    warps: int = 4


@lru_cache(maxsize=256)
def gate_forward_tiling(samples: int, rows: int, cols: int, itemsize: int) -> ForwardTiling:
    """64 bytes a thread in four 16-byte loads: with the 1500 threads that fit, a multiprocessor has 96 kB in flight."""
    tile = 4 * WARP * 64 // itemsize
    width = _columns(cols, min(tile, 1024))
    height = min(power_above(rows), tile // width)
    return ForwardTiling(_samples(samples, height * width, tile), height, width)


class BackwardTiling(NamedTuple):
    samples: int  # of which a program has a part each
    rows: int
    cols: int
    fold: int  # of a tile's rows are a thread's own
    row_parts: int
    col_parts: int
    rows_in_part: int
    warps: int
    even: bool  # no tile reaches beyond its part of a sample, or the last sample
    registers: int | None  # of a thread, at most


@lru_cache(maxsize=256)
def gate_backward_tiling(
    samples: int, rows: int, cols: int, itemsize: int, planar: bool, plain: bool
) -> BackwardTiling:
    """How a sample is divided among programs, and a program's work into tiles.

    A program with a whole sample finishes it without a second kernel. This is done if there are enough samples to fill
    the machine, or too little in them to gain by dividing. Otherwise a sample is divided by pixels, so that gradients
    of pixels are whole, and by channels only if that is not enough or not possible.

    A tile is 64 bytes of x and as many of gy per thread. That takes at most 165 registers on sm_90, so 12 warps, with
    48 kB in flight, fit on a multiprocessor. If masks, strides or cells take registers too (`plain` is false), a tile
    is half of that.
    """
    widest = 512 if itemsize == 8 else 1024  # sums over rows are kept for every column
    wanted = 1 if samples >= 128 or rows * cols <= 16384 else ceil_div(512, samples)
    smallest = 4096  # elements in a part
    if planar and wanted > 1:
        narrowest = max(64, power_above(smallest // rows))
        width = _columns(cols, min(widest, max(narrowest, power_below(cols // wanted))))
    else:
        width = _columns(cols, widest)
    col_parts = ceil_div(cols, width)
    row_parts = max(1, min(ceil_div(wanted, col_parts), rows * min(cols, width) // smallest))
    warps = 4 if samples * row_parts * col_parts >= 512 or rows * width <= 2048 * row_parts else 8
    tilings = (_backward_tiles(samples, rows, cols, itemsize, width, row_parts, warps, size) for size in (64, 32))
    tiling = next(tilings)
    return tiling if plain and tiling.even else next(tilings)


def _backward_tiles(
    samples: int, rows: int, cols: int, itemsize: int, width: int, row_parts: int, warps: int, size: int
) -> BackwardTiling:
    """Tiles of `size` bytes a thread."""
    threads = warps * WARP
    tile = threads * size // itemsize
    rows_in_part = ceil_div(rows, row_parts)
    # A row's factor is loaded by every thread that needs it only where there are fewer rows than threads.
    highest = threads // 2 if width >= 16 else 1024
    height = min(power_above(rows_in_part), max(1, tile // width), highest)
    if height < rows_in_part:
        rows_in_part = ceil_div(rows_in_part, height) * height
        row_parts = ceil_div(rows, rows_in_part)
    col_parts = ceil_div(cols, width)
    together = 1
    if row_parts * col_parts == 1 and height >= rows:
        together = _samples(samples, height * width, min(tile, highest * width))
    at_once = max(1, threads * (16 // itemsize) // width)  # rows that the threads hold with 16 bytes each
    fold = max(1, height // at_once) if together == 1 else 1
    even = rows % rows_in_part == 0 and rows_in_part % height == 0 and cols % width == 0 and samples % together == 0
    # Left alone, ptxas spills a register or two of some tiles for an occupancy that is not needed.
    small = together * height * width <= 16 * threads
    registers = (96 if small else 255) if size == 64 and itemsize < 8 else None
    return BackwardTiling(together, height, width, fold, row_parts, col_parts, rows_in_part, warps, even, registers)


class ConvTiling(NamedTuple):
    taps: int
    pixels: int
    warps: int
    registers: int  # of a thread, at most


def conv_tiling(pixels: int, size: int, itemsize: int) -> ConvTiling:
    """At most 32 products per thread at a time."""
    width = min(512 if itemsize == 8 else 1024, power_above(pixels))  # 16 warps have 128 registers a thread at most
    warps = max(1, width // (2 * WARP))
    # All that there are: left alone, ptxas spills for an occupancy that is not needed.
    return ConvTiling(power_above(size * size) if size <= 3 else 8, width, warps, min(255, 65536 // (WARP * warps)))
