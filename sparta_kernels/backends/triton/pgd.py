"""The attack's kernels. Compiled without FMA contraction, so that images are bit for bit those of PyTorch.

Numbers arrive in 64 bits (a Python float would become 32) and are rounded to the type that is computed in before they
are used, as a tensor operation would.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import clamp, read, write


@triton.jit
def pgd_step(
    adv,
    grad,
    clean,
    signed_step: tl.float64,
    eps: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    elements,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements, in place. The three tensors lie in the same order without gaps."""
    ACC: tl.constexpr = tl.float64 if adv.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    mask = None if EVEN else element < elements - first
    value = read(adv + first + element, mask, ACC)
    slope = read(grad + first + element, mask, ACC)
    start = read(clean + first + element, mask, ACC)
    radius = tl.full([1], eps, ACC)
    sign = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, 0.0)).to(ACC)  # 0 for NaN, as in torch
    moved = value + tl.full([1], signed_step, ACC) * sign
    delta = clamp(moved - start, -radius, radius)
    value = clamp(start + delta, tl.full([1], lower, ACC), tl.full([1], upper, ACC))
    write(adv + first + element, value, mask)


@triton.jit
def pgd_start(
    adv,
    clean,
    indices,
    seed: tl.int64,
    purpose: tl.int64,
    eps: tl.float64,
    lower: tl.float64,
    upper: tl.float64,
    elements,
    pixels,
    width,
    sample_stride,
    channel_stride,
    row_stride,
    col_stride,
    blocks,
    FLAT: tl.constexpr,
    QUADS: tl.constexpr,
):
    """4 * QUADS elements of one image. Philox gives four numbers a call, for four elements in the order of (C, H, W).

    purpose: the counter's second word. FLAT: the elements lie in that order in memory too.
    """
    ACC: tl.constexpr = tl.float64 if adv.dtype.element_ty == tl.float64 else tl.float32
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * QUADS
    quad = (first + tl.arange(0, QUADS)).to(tl.uint32)
    index = tl.load(indices + n)
    zero = quad * 0
    low = zero + index.to(tl.uint32)
    high = zero + (index >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad, zero + purpose.to(tl.uint32), low, high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * QUADS])
    uniform = ((words >> 8).to(tl.float32) * 5.9604644775390625e-8).to(ACC)  # 24 bits: exact, in steps of 2^-24
    noise = (2.0 * uniform - 1.0) * tl.full([1], eps, ACC)

    local = tl.arange(0, 4 * QUADS)
    mask = local < elements - 4 * first
    if FLAT:
        at = n * sample_stride + 4 * first + local
    else:
        element = 4 * first + local
        pixel = element % pixels
        at = n * sample_stride + element // pixels * channel_stride
        at += pixel // width * row_stride + pixel % width * col_stride
    value = clamp(read(clean + at, mask, ACC) + noise, tl.full([1], lower, ACC), tl.full([1], upper, ACC))
    write(adv + at, value, mask)
