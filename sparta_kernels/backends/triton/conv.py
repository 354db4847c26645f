"""dynamic_conv's kernels: a K x K cross-correlation on one channel, with a kernel of its own for every sample.

The maps are small and one channel wide: what the taps read again is in the first-level cache.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import bound, read, sum_over, write


@triton.jit
def conv_correlate(
    source,
    kernel,
    output,
    height,
    width,
    blocks,
    SIZE: tl.constexpr,
    FLIPPED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output[n,h,w] = sum of kernel[n,i,j] * source[n, h + i - K//2, w + j - K//2]; FLIPPED: minus i and j.

    A program has BLOCK pixels of one sample, and adds up TAPS taps at a time.
    """
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    n = (tl.program_id(0) // blocks).to(tl.int64)
    sample = n * height * width
    inside = pixel < height * width
    h = pixel // width
    w = pixel % width
    total = tl.full([1, BLOCK], 0.0, ACC)
    for first in range(0, SIZE * SIZE, TAPS):
        tap = first + tl.arange(0, TAPS)[:, None]
        down = tap // SIZE - SIZE // 2
        right = tap % SIZE - SIZE // 2
        if FLIPPED:
            down = -down
            right = -right
        known = tap < SIZE * SIZE
        weight = read(kernel + n * (SIZE * SIZE) + tap, known, ACC)
        reached = known & inside & (h + down >= 0) & (h + down < height)
        reached &= (w + right >= 0) & (w + right < width)
        value = read(source + sample + pixel + (down * width + right), reached, ACC)
        term = weight * value  # forward, a tap that is infinite makes NaNs of the zeros around the map
        if FLIPPED:
            term = tl.where(reached, term, 0.0)  # and here there is nothing around it
        total += sum_over(term, 0)[None, :]
    write(output + sample + pixel, total, inside)


@triton.jit
def conv_grad_kernel(
    grad,
    source,
    sums,
    height,
    width,
    parts,
    rows_in_part,
    tap_blocks,
    SIZE: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[n,part,i,j] = sum over the part's rows of grad[n,h,w] * source[n, h + i - K//2, w + j - K//2].

    A program has TAPS taps of one part of one sample, and goes through the part's pixels BLOCK at a time.
    """
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    tap_block = tl.program_id(0) % tap_blocks
    part = (tl.program_id(0) // tap_blocks % parts).to(tl.int64)
    n = (tl.program_id(0) // (tap_blocks * parts)).to(tl.int64)
    tap = tap_block * TAPS + tl.arange(0, TAPS)[:, None]
    down = tap // SIZE - SIZE // 2
    right = tap % SIZE - SIZE // 2
    sample = n * height * width
    first = part * rows_in_part * width
    end = tl.minimum((part + 1) * rows_in_part, height) * width
    total = tl.full([TAPS, BLOCK], 0.0, ACC)
    for start in range(bound(first), bound(end), BLOCK):
        pixel = start + tl.arange(0, BLOCK)[None, :]
        h = pixel // width + down
        w = pixel % width + right
        inside = pixel < end
        reached = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width) & (tap < SIZE * SIZE)
        value = read(source + sample + h * width + w, reached, ACC)
        total += read(grad + sample + pixel, inside, ACC) * value
    write(sums + (n * parts + part) * (SIZE * SIZE) + tap, sum_over(total, 1)[:, None], tap < SIZE * SIZE)


@triton.jit
def conv_finish(sums, grad_kernel, taps, parts, TAPS: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """grad_kernel[n] = the sum of sums[n,part] over the parts, in a fixed order."""
    n = tl.program_id(0).to(tl.int64)
    tap = tl.arange(0, TAPS)[None, :]
    total = tl.full([PARTS, TAPS], 0.0, ACC)
    for first in range(0, bound(parts), PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += read(sums + (n * parts + part) * taps + tap, (part < parts) & (tap < taps), ACC)
    write(grad_kernel + n * taps + tap, sum_over(total, 0)[None, :], tap < taps)
