"""swish_relu and smooth_relu, one element at a time: x (and gy) are read once, y (or gx) is written once."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import bound, inlined, read, relu, sigmoid, sum_over, write

_NORMAL = tl.constexpr(1.17549435e-38)  # the smallest number of float32 that is
_LARGEST = tl.constexpr(1.7976931348623157e308)  # of float64


@inlined
def log1p(t, ACC: tl.constexpr):
    """log(1 + t) for t >= 0, whether t is small, and where it is (t - log(1 + t)) / t^2: Log1p in csrc/activation.h."""
    if ACC == tl.float64:  # noqa: SIM300
        t = tl.where(t > _LARGEST, _LARGEST, t)
        total = 1.0 + t
        value = tl.log(total) + (t - (total - 1.0)) / total  # what 1 + t has lost to rounding, in first order
        near = t < 0.41421356
        series = 0.5 - t * (1.0 / 3 - t * (0.25 - t * (0.2 - t * (1.0 / 6 - t / 7))))
        curve = tl.where(t < 1e-3, series, (t - value) / tl.where(t < 1e-3, 1.0, t * t))
    else:
        total = 1.0 + t
        near = total < 1.41421354
        # 1 + t = 2^exponent * (1 + rest), sqrt(1/2) <= 1 + rest < sqrt(2)
        pattern = total.to(tl.int32, bitcast=True)
        exponent = (pattern - 0x3F3504F3) >> 23
        rest = tl.where(near, t, (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0)
        curve = rest * 7.777992184e-02 - 1.277729396e-01
        curve = curve * rest + 1.311403547e-01
        curve = curve * rest - 1.419615143e-01
        curve = curve * rest + 1.662709430e-01
        curve = curve * rest - 2.000163606e-01
        curve = curve * rest + 2.500077867e-01
        curve = curve * rest - 3.333332536e-01
        curve = curve * rest + 4.999999764e-01
        value = exponent.to(tl.float32) * 0.693147181 + (rest - rest * rest * curve)
    return value, near, curve


@inlined
def parameter(b, ACC: tl.constexpr):
    """beta, 1 / beta, and what the sum of gb's terms is multiplied by: SmoothReluParameter in csrc/activation.h."""
    value = read(b, None, ACC)
    beta = value * value
    inverse = tl.where(beta < _NORMAL, 0.0, 1.0 / beta)
    return beta, inverse, tl.where(tl.abs(value) < _NORMAL, 0.0, 2.0 / value)


@triton.jit
def swish_relu_forward(x, y, elements, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements. The tensors lie in the same order without gaps."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    mask = None if EVEN else element < elements - first
    value = read(x + first + element, mask, ACC)
    phi, _ = sigmoid(value, 1.0, ACC)
    write(y + first + element, relu(value) * phi, mask)


@triton.jit
def swish_relu_backward(gy, x, gx, elements, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of gx = gy * phi * (1 + x * (1 - phi)) where x > 0, else 0."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    mask = None if EVEN else element < elements - first
    value = read(x + first + element, mask, ACC)
    grad = read(gy + first + element, mask, ACC)
    phi, complement = sigmoid(value, 1.0, ACC)
    write(gx + first + element, tl.where(value <= 0, 0.0, grad * (phi * (1.0 + value * complement))), mask)


@triton.jit
def smooth_relu_forward(x, b, y, elements, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements. b has one element."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = tl.arange(0, BLOCK)
    mask = None if EVEN else element < elements - first
    value = read(x + first + element, mask, ACC)
    beta, inverse, _ = parameter(b, ACC)
    t = relu(value) * beta
    log, near, curve = log1p(t, ACC)
    curved = tl.where(near, value * t * curve, value - log * inverse)
    write(y + first + element, tl.where(value <= 0, 0.0, curved), mask)


@triton.jit
def smooth_relu_backward(gy, x, b, gx, sums, elements, stretches, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """`stretches` times BLOCK elements; gx, sums: None where not wanted. sums has a part of gb from every program."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    element = tl.arange(0, BLOCK)
    beta, inverse, scale = parameter(b, ACC)
    total = tl.full([BLOCK], 0.0, ACC)
    start = tl.program_id(0).to(tl.int64) * stretches * BLOCK
    for stretch in range(0, bound(stretches)):
        first = start + stretch * BLOCK
        mask = None if EVEN else element < elements - first
        value = read(x + first + element, mask, ACC)
        grad = read(gy + first + element, mask, ACC)
        t = relu(value) * beta
        log, near, curve = log1p(t, ACC)
        whole = 1.0 / (1.0 + t)
        slope = tl.where(near, t * whole, 1.0 - whole)  # t / (1 + t)
        if gx is not None:
            write(gx + first + element, tl.where(value <= 0, 0.0, grad * slope), mask)
        if sums is not None:
            term = tl.where(near, value * t * (whole - curve), (log - slope) * inverse)
            total += tl.where(value <= 0, 0.0, grad * term)
    if sums is not None:
        write(sums + tl.program_id(0), sum_over(total, 0) * scale, None)
