"""add_relu: ``relu(a + b)``, one pass each way, with one bit per element saved for its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from sparta_kernels import backends, reference
from sparta_kernels.backends.layout import is_gapless
from sparta_kernels.ops.checks import check_shape, check_tensor
from sparta_kernels.ops.library import eager, fill, register


def _forward(a: Tensor, b: Tensor | None, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    y, bits = backends.module_for(backend, "relu_forward", a).relu_forward(a, b, keep)
    return y, fill(bits, a)


def _forward_fake(a: Tensor, b: Tensor | None, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), _bits_fake(a, keep)


def _bits_fake(a: Tensor, keep: bool) -> Tensor:
    return a.new_empty((a.numel() + 7) // 8, dtype=torch.uint8) if keep else a.new_empty(0)


def _forward_(a: Tensor, b: Tensor | None, keep: bool, backend: str) -> Tensor:
    if not a.is_inference():
        increment_version(a)  # so that autograd notices a write into what it saved
    return fill(backends.module_for(backend, "relu_forward", a).relu_forward_(a, b, keep), a)


def _forward_in_place_fake(a: Tensor, b: Tensor | None, keep: bool, backend: str) -> Tensor:
    return _bits_fake(a, keep)


def _backward(grad: Tensor, grad2: Tensor | None, bits: Tensor, stride: Sequence[int], backend: str) -> Tensor:
    return backends.module_for(backend, "relu_backward", grad).relu_backward(grad, grad2, bits, tuple(stride))


def _backward_fake(grad: Tensor, grad2: Tensor | None, bits: Tensor, stride: Sequence[int], backend: str) -> Tensor:
    return grad.new_empty_strided(grad.shape, stride)


# bits: uint8, (ceil(numel / 8),), or empty unless `keep`. Bit i % 8 of byte i / 8 is that of element i in the order of
# y's memory, which has no gaps; `stride` is y's.
register("_relu_forward(Tensor a, Tensor? b, bool keep, str backend) -> (Tensor, Tensor)", _forward, _forward_fake)
register("_relu_forward_(Tensor(a!) a, Tensor? b, bool keep, str backend) -> Tensor", _forward_, _forward_in_place_fake)
register(
    "_relu_backward(Tensor grad, Tensor? grad2, Tensor bits, SymInt[] stride, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
_raw_forward = torch.ops.sparta_kernels._relu_forward.default
_raw_forward_ = torch.ops.sparta_kernels._relu_forward_.default
_raw_backward = torch.ops.sparta_kernels._relu_backward.default


class AddReluBackward(Function):
    """The gradient as a function of the incoming gradients. It is linear in them, so it is its own derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, grad2: Tensor | None, bits: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.options = options
        return _raw_backward(grad, grad2, bits, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        found = AddReluBackward.apply(grad, None, bits, ctx.options)
        return *(found if need else None for need in ctx.needs_input_grad[:2]), None, None


class AddRelu(Function):
    """Returns y once, or twice for two consumers, whose gradients arrive separately and are added here."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, inplace: bool, twice: bool, backend: str) -> Any:
        if inplace:
            bits = _raw_forward_(a, b, True, backend)
            ctx.mark_dirty(a)
            y = a
        else:
            y, bits = _raw_forward(a, b, True, backend)
        ctx.save_for_backward(bits)
        ctx.set_materialize_grads(False)
        ctx.options = y.stride(), backend
        return (y, y[...]) if twice else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad2: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if grad is None:
            grad, grad2 = grad2, None
        if grad is None:
            return None, None, None, None, None
        (bits,) = ctx.saved_tensors
        # `AddReluBackward` makes the gradient differentiable again, which it never has to be in compiled code.
        if torch.compiler.is_compiling() or (eager() and not torch.is_grad_enabled()):
            found = _raw_backward(grad, grad2, bits, *ctx.options)
        else:
            found = AddReluBackward.apply(grad, grad2, bits, ctx.options)
        wanted_a, wanted_b = ctx.needs_input_grad[:2]
        return found if wanted_a else None, found if wanted_b else None, None, None, None


def _check(operation: str, a: Tensor, b: Tensor | None, inplace: bool) -> None:
    check_tensor(operation, "a", a)
    if b is not None:
        check_tensor(operation, "b", b, a)
        if b.dtype != a.dtype:
            raise TypeError(f"{operation}: b must have a's dtype {a.dtype}, got {b.dtype}")
        if b.shape != a.shape:
            check_shape(operation, "b", b, "of a", tuple(a.shape))
    if not isinstance(inplace, bool):
        raise TypeError(f"{operation}: inplace must be a bool, got {type(inplace).__name__}")


def _check_written(operation: str, a: Tensor, b: Tensor | None, twice: bool, wanted: bool) -> None:
    """Check, before anything is written, that y may be written over a; `wanted`: whether a gradient is."""
    if not is_gapless(a):
        raise ValueError(
            f"{operation}: a must lie in memory without gaps where inplace is True, got strides {a.stride()}"
        )
    alias = b is not None and torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]
    ahead = a.storage_offset() - b.storage_offset() if alias and b is not None else 0
    if ahead != 0 and -a.numel() < ahead < a.numel():
        raise ValueError(f"{operation}: b must not overlap with a where inplace is True, but may be the same memory")
    if not wanted:
        return
    base = a._base if a._is_view() else a
    if base is not None and base.is_leaf and base.requires_grad:
        what = "a leaf" if base is a else "a view of a leaf"
        raise ValueError(f"{operation}: a must not be {what} that requires a gradient where inplace is True")
    if twice and base is not a:
        raise ValueError(f"{operation}: a must not be a view where inplace is True: autograd takes one result for that")


def _apply(operation: str, a: Tensor, b: Tensor | None, inplace: bool, twice: bool, backend: str | None) -> Any:
    _check(operation, a, b, inplace)
    chosen = backends.choose(a.device, backend, f"{operation}: backend").backend
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    wanted = torch.is_grad_enabled() and (a.requires_grad or (b is not None and b.requires_grad))
    if inplace and not (compiling or transformed):
        _check_written(operation, a, b, twice, wanted)
    # torch.func differentiates and batches the plain form by itself.
    if chosen == "reference" or transformed:
        y = (a if b is None else a.add_(b)).relu_() if inplace else reference.add_relu(a, b)
        return (y, y[...]) if twice else y
    inplace = inplace and not compiling
    # Under forward-mode AD the Function raises an error, since it has no jvp; a raw operation would drop the tangent
    # silently.
    if wanted or torch.autograd.forward_ad._current_level >= 0:
        return AddRelu.apply(a, b, inplace, twice, chosen)
    if inplace:
        _raw_forward_(a, b, False, chosen)
        y = a
    else:
        y = _raw_forward(a, b, False, chosen)[0]
    return (y, y[...]) if twice else y


def add_relu(a: Tensor, b: Tensor | None = None, *, inplace: bool = False, backend: str | None = None) -> Tensor:
    """``relu(a + b)``, or ``relu(a)``, in one pass that saves one bit per element for its gradient.

    Values and gradients are PyTorch's, bit for bit: the sum is rounded to the dtype (the 16-bit ones are computed in
    float32), the derivative at 0 is 0, ``relu(nan)`` is nan and lets the gradient through.

    Args:
        a: any shape; float64, float32, bfloat16 or float16. Tensors without gaps in memory are read without a
            copy, others are copied first.
        b: shape and dtype of a; copied first if its strides differ from a's.
        inplace: True to let y overwrite a, whose values are then lost. Compiled code may keep them.
        backend: overrides `use_backend` for this call.

    Returns:
        y with the shape, dtype and memory format of a. Differentiable, in eager mode any number of times.
        Under torch.func's transforms plain PyTorch computes it.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device or ``backend`` does not fit; or ``inplace`` is True, and a is a leaf that requires a
            gradient (or a view of one), has gaps, or overlaps with b. a is then unchanged.
    """
    return _apply("add_relu", a, b, inplace, False, backend)


def add_relu_fork(
    a: Tensor, b: Tensor | None = None, *, inplace: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`add_relu` for two consumers: their gradients are added and masked in one pass.

    Args and errors: those of `add_relu`; with ``inplace`` a must not be a view either where a gradient is wanted.

    Returns:
        y twice, in the same memory: write into neither. One of the two may stay unused.
    """
    return _apply("add_relu_fork", a, b, inplace, True, backend)
