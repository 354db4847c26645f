"""dyrelu: the maximum of K lines, which differ by sample and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels import backends, reference
from sparta_kernels.ops.checks import check_shape, check_tensor
from sparta_kernels.ops.library import differentiable, fill, register

LINES = 8  # at most


def _forward(x: Tensor, slopes: Tensor, intercepts: Tensor, backend: str) -> Tensor:
    return backends.module_for(backend, "dyrelu_forward", x).dyrelu_forward(x, slopes, intercepts)


def _forward_fake(x: Tensor, slopes: Tensor, intercepts: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


def _backward(
    gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    module = backends.module_for(backend, "dyrelu_backward", x)
    return tuple(fill(grad, x) for grad in module.dyrelu_backward(gy, x, slopes, intercepts, wanted))


def _backward_fake(
    gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    small = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for t, want in zip((slopes, intercepts), wanted[1:], strict=True)
    )
    return torch.empty_like(x) if wanted[0] else x.new_empty(0), *small


register("_dyrelu_forward(Tensor x, Tensor slopes, Tensor intercepts, str backend) -> Tensor", _forward, _forward_fake)
register(
    "_dyrelu_backward(Tensor gy, Tensor x, Tensor slopes, Tensor intercepts, bool[] wanted, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)

_dyrelu = differentiable(
    "DyRelu",
    torch.ops.sparta_kernels._dyrelu_forward.default,
    torch.ops.sparta_kernels._dyrelu_backward.default,
    reference.dyrelu,
    count=3,
)


def dyrelu(x: Tensor, slopes: Tensor, intercepts: Tensor, *, backend: str | None = None) -> Tensor:
    """Dynamic ReLU (Chen et al., 2020, Eq. 3), in one pass each way: the maximum of K lines.

        y[n,c,...] = max over k of slopes[n,c,k] * x[n,c,...] + intercepts[n,c,k]

    Args:
        x: ``(N, C, ...)``, usually ``(N, C, H, W)``; float64, float32, bfloat16 or float16. NCHW and channels_last are
            read without a copy, as are slices of them in N and C; other layouts are copied first.
        slopes, intercepts: ``(N, C, K)`` with 1 <= K <= 8, any of those dtypes.
        backend: overrides `use_backend` for this call.

    Returns:
        y with the shape, dtype and memory format of x. Differentiable in all three arguments, in eager mode
        twice. Among equal lines the first gets the gradient. NaN counts as the maximum, as in torch.max. Sums are
        accumulated in float32 (float64 for float64) and are bitwise repeatable.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype.
        ValueError: a shape, device or ``backend`` does not fit.
    """
    check_tensor("dyrelu", "x", x)
    if x.dim() < 2:
        raise ValueError(f"dyrelu: x must have shape (N, C, ...), got {tuple(x.shape)}")
    samples, channels = x.shape[:2]
    check_tensor("dyrelu", "slopes", slopes, x)
    if slopes.dim() != 3 or not 1 <= slopes.shape[2] <= LINES:
        raise ValueError(f"dyrelu: slopes must have shape (N, C, K) with 1 <= K <= {LINES}, got {tuple(slopes.shape)}")
    shape = samples, channels, slopes.shape[2]
    check_shape("dyrelu", "slopes", slopes, "(N, C, K)", shape)
    check_tensor("dyrelu", "intercepts", intercepts, x)
    check_shape("dyrelu", "intercepts", intercepts, "(N, C, K)", shape)
    chosen = backends.choose(x.device, backend, "dyrelu: backend").backend
    if chosen == "reference":
        return reference.dyrelu(x, slopes, intercepts)
    if x.dim() == 4:
        return _dyrelu(x, slopes, intercepts, chosen)
    images = x.reshape(samples, channels, -1, 1) if x.numel() else x.reshape(samples, channels, 0, 1)
    return _dyrelu(images, slopes, intercepts, chosen).reshape(x.shape)
