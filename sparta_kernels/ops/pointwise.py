"""swish_relu and smooth_relu: smooth relatives of ReLU that look at one element at a time, one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels import backends, reference
from sparta_kernels.ops.checks import check_tensor
from sparta_kernels.ops.library import differentiable, fill, one_by_one, register


def _swish_forward(x: Tensor, backend: str) -> Tensor:
    return backends.module_for(backend, "swish_relu_forward", x).swish_relu_forward(x)


def _swish_forward_fake(x: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


def _swish_backward(gy: Tensor, x: Tensor, wanted: list[bool], backend: str) -> Tensor:
    return backends.module_for(backend, "swish_relu_backward", x).swish_relu_backward(gy, x)


def _swish_backward_fake(gy: Tensor, x: Tensor, wanted: list[bool], backend: str) -> Tensor:
    return torch.empty_like(x)


def _smooth_forward(x: Tensor, b: Tensor, backend: str) -> Tensor:
    return backends.module_for(backend, "smooth_relu_forward", x).smooth_relu_forward(x, b)


def _smooth_forward_fake(x: Tensor, b: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


def _smooth_backward(gy: Tensor, x: Tensor, b: Tensor, wanted: list[bool], backend: str) -> tuple[Tensor, ...]:
    module = backends.module_for(backend, "smooth_relu_backward", x)
    return tuple(fill(grad, x) for grad in module.smooth_relu_backward(gy, x, b, wanted))


def _smooth_backward_fake(gy: Tensor, x: Tensor, b: Tensor, wanted: list[bool], backend: str) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) if want else x.new_empty(0) for t, want in zip((x, b), wanted, strict=True))


register("_swish_relu_forward(Tensor x, str backend) -> Tensor", _swish_forward, _swish_forward_fake)
register(
    "_swish_relu_backward(Tensor gy, Tensor x, bool[] wanted, str backend) -> Tensor",
    _swish_backward,
    _swish_backward_fake,
)
register("_smooth_relu_forward(Tensor x, Tensor b, str backend) -> Tensor", _smooth_forward, _smooth_forward_fake)
register(
    "_smooth_relu_backward(Tensor gy, Tensor x, Tensor b, bool[] wanted, str backend) -> (Tensor, Tensor)",
    _smooth_backward,
    _smooth_backward_fake,
)


_swish_relu = differentiable(
    "SwishRelu",
    torch.ops.sparta_kernels._swish_relu_forward.default,
    torch.ops.sparta_kernels._swish_relu_backward.default,
    reference.swish_relu,
    count=1,
    vmap_rule=one_by_one,
)
_smooth_relu = differentiable(
    "SmoothRelu",
    torch.ops.sparta_kernels._smooth_relu_forward.default,
    torch.ops.sparta_kernels._smooth_relu_backward.default,
    reference.smooth_relu,
    count=2,
    vmap_rule=one_by_one,
)


def swish_relu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``relu(x) * sigmoid(x)``, in one pass each way: Swish (Ramachandran et al., 2017) if x > 0, else 0.

    Args:
        x: any shape; float64, float32, bfloat16 or float16. Tensors without gaps in memory are read without a
            copy, others are copied first.
        backend: overrides `use_backend` for this call.

    Returns:
        y with the shape, dtype and memory format of x. Differentiable, in eager mode twice.

    Raises:
        TypeError: x is not a tensor of a supported dtype.
        ValueError: the ``backend`` does not fit.
    """
    check_tensor("swish_relu", "x", x)
    chosen = backends.choose(x.device, backend, "swish_relu: backend").backend
    if chosen == "reference":
        return reference.swish_relu(x)
    return _swish_relu(x, chosen)


def smooth_relu(x: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """SmoothReLU, in one pass each way: ``x - log(beta * x + 1) / beta`` if x > 0, else 0; ``beta = b * b``.

    It has no kink at 0, and approaches ReLU as beta grows. At beta = 0 it is 0, its limit there.

    Args:
        x: any shape; float64, float32, bfloat16 or float16. Tensors without gaps in memory are read without a
            copy, others are copied first.
        b: one element, ``()`` or ``(1,)``, any of those dtypes.
        backend: overrides `use_backend` for this call.

    Returns:
        y with the shape, dtype and memory format of x. Differentiable in x and b, in eager mode twice. The
        sum in b's gradient is accumulated in float32 (float64 for float64) and is bitwise repeatable.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype.
        ValueError: the shape of b, a device or the ``backend`` does not fit.
    """
    check_tensor("smooth_relu", "x", x)
    check_tensor("smooth_relu", "b", b, x)
    if b.numel() != 1:
        raise ValueError(f"smooth_relu: b must have one element, got shape {tuple(b.shape)}")
    chosen = backends.choose(x.device, backend, "smooth_relu: backend").backend
    if chosen == "reference":
        return reference.smooth_relu(x, b)
    return _smooth_relu(x, b, chosen)
