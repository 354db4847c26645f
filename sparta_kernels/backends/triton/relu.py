"""relu(a + b) in one pass each way, with one bit an element kept in between, as in csrc/cuda/relu.cu.

A program's tensors are tiles of eight columns, so that a row has one byte of bits.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import read, sum_over, write


@triton.jit
def relu_forward(a, b, y, bits, elements, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """8 * ROWS elements. The tensors lie in the same order without gaps; y may be a. b, bits: None where absent."""
    ACC: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    row, col = tl.arange(0, ROWS), tl.arange(0, 8)
    element = row[:, None] * 8 + col[None, :]
    mask = None if EVEN else element < elements - first
    value = read(a + first + element, mask, ACC)
    if b is not None:
        value += read(b + first + element, mask, ACC)
    stops = value <= 0  # not a NaN
    write(y + first + element, tl.where(stops, 0.0, value).to(ACC), mask)
    if bits is not None:
        passing = tl.where(stops, 0, 1)
        if not EVEN:
            passing = tl.where(mask, passing, 0)
        byte = sum_over(passing << col[None, :], 1)
        tl.store(bits + first // 8 + row, byte.to(tl.uint8), mask=None if EVEN else row * 8 < elements - first)


@triton.jit
def relu_backward(grad, grad2, bits, gx, elements, EVEN: tl.constexpr, ROWS: tl.constexpr):
    """8 * ROWS elements of gx = grad + grad2 where the bit is set, else 0. grad2: None where absent."""
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    row, col = tl.arange(0, ROWS), tl.arange(0, 8)
    element = row[:, None] * 8 + col[None, :]
    mask = None if EVEN else element < elements - first
    value = read(grad + first + element, mask, ACC)
    if grad2 is not None:
        value += read(grad2 + first + element, mask, ACC)
    if EVEN:
        byte = tl.load(bits + first // 8 + row)
    else:
        byte = tl.load(bits + first // 8 + row, mask=row * 8 < elements - first, other=0)
    passing = (byte.to(tl.int32)[:, None] >> col[None, :]) & 1
    write(gx + first + element, tl.where(passing != 0, value, 0.0).to(ACC), mask)
