"""What the kernels share: reading and writing, and the scalar arithmetic, as in csrc/activation.h."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Part of the kernels that call it. For the interpreter that is a Python function as it stands: one of the interpreter's
# own would look for what it has to patch at every call.
inlined = (lambda function: function) if INTERPRETED else triton.jit

_LOGIT_SCALE = tl.constexpr(-1.44269504088896340736)  # -log2(e)
_LARGE = tl.constexpr(2.0**126)


@inlined
def bound(value):
    """The bound of a loop that is not known when the kernel is compiled."""
    if INTERPRETED:
        return value.handle.data.item()  # Python's range takes integers, not the interpreter's arrays of one
    return value


# ---- memory ------------------------------------------------------------------------------------------------


@inlined
def read(pointer, mask, ACC: tl.constexpr):
    """Values in the type that is computed in; 0 where the mask (None: there is none) is false."""
    value = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0.0)
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion loses subnormal numbers.
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(ACC)


@inlined
def write(pointer, value, mask):
    """Rounded to the type that is stored, to the nearest and ties to even."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion cuts off.
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        value = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


# ---- arithmetic --------------------------------------------------------------------------------------------


@inlined
def sum_over(value, axis: tl.constexpr):
    """tl.sum, and for the interpreter what that calls, for the same reason as `inlined`."""
    if INTERPRETED:
        return tl.reduce(value, axis, tl.standard._sum_combine)
    return tl.sum(value, axis)


@inlined
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # a NaN passes, as it does in torch; compiled, tl.maximum may drop it


@inlined
def sigmoid(row, col, ACC: tl.constexpr):
    """phi = sigmoid(row * col), and 1 - phi."""
    power = tl.exp2((row * _LOGIT_SCALE) * col)
    phi = 1.0 / (1.0 + power)
    if ACC == tl.float64:  # noqa: SIM300
        return phi, 1.0 - phi  # as torch computes it
    # Of a difference little is left where phi is near 1. Bounded, so that inf * 0 does not make a NaN of a gradient
    # that is 0 anyway; a NaN passes.
    return phi, tl.where(power > _LARGE, _LARGE, power) * phi


@inlined
def clamp(value, lower, upper):
    """As torch.clamp: a NaN passes, and the lower bound is applied first."""
    value = tl.where(value < lower, lower, value)
    return tl.where(value > upper, upper, value)
