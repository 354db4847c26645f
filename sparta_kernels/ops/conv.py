"""dynamic_conv: Conv5 with a separate K x K kernel for every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels import backends, reference
from sparta_kernels.ops.checks import check_images, check_shape, check_tensor
from sparta_kernels.ops.library import differentiable, fill, register


def _forward(spatial: Tensor, kernel: Tensor, backend: str) -> Tensor:
    return backends.module_for(backend, "conv_forward", spatial).conv_forward(spatial, kernel)


def _forward_fake(spatial: Tensor, kernel: Tensor, backend: str) -> Tensor:
    return torch.empty_like(spatial, memory_format=torch.contiguous_format)


def _backward(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    module = backends.module_for(backend, "conv_backward", spatial)
    grads = module.conv_backward(grad_output, spatial, kernel, wanted)
    return tuple(fill(grad, spatial) for grad in grads)


def _backward_fake(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else spatial.new_empty(0)
        for tensor, want in zip((spatial, kernel), wanted, strict=True)
    )


register("_conv_forward(Tensor spatial, Tensor kernel, str backend) -> Tensor", _forward, _forward_fake)
register(
    "_conv_backward(Tensor grad_output, Tensor spatial, Tensor kernel, bool[] wanted, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


_dynamic_conv = differentiable(
    "DynamicConv",
    torch.ops.sparta_kernels._conv_forward.default,
    torch.ops.sparta_kernels._conv_backward.default,
    reference.dynamic_conv,
    count=2,
)


def dynamic_conv(spatial: Tensor, kernel: Tensor, *, backend: str | None = None) -> Tensor:
    """Cross-correlate each sample's one-channel map with its own K x K kernel, zero padded to keep the size.

        out[n,0,h,w] = sum over i, j of kernel[n,i,j] * spatial[n, 0, h + i - K//2, w + j - K//2]

    This is SPARTA's Conv5 (Fig. 2) at ``kernel_size=3``; at 1 it is part of `sparta_gate`.

    Args:
        spatial: ``(N, 1, H, W)``; float64, float32, bfloat16 or float16.
        kernel: ``(N, K, K)`` with K odd, any of those dtypes.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(N, 1, H, W)``, contiguous, in the dtype of spatial. Differentiable, in eager mode twice.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype.
        ValueError: a shape, device or ``backend`` does not fit.
    """
    check_tensor("dynamic_conv", "spatial", spatial)
    check_images("dynamic_conv", "spatial", spatial)
    samples, channels, height, width = spatial.shape
    if channels != 1:
        check_shape("dynamic_conv", "spatial", spatial, "(N, 1, H, W)", (samples, 1, height, width))
    check_tensor("dynamic_conv", "kernel", kernel, spatial)
    if kernel.dim() != 3 or kernel.shape[1] != kernel.shape[2] or kernel.shape[1] % 2 == 0:
        raise ValueError(f"dynamic_conv: kernel must have shape (N, K, K) with K odd, got {tuple(kernel.shape)}")
    size = kernel.shape[-1]
    check_shape("dynamic_conv", "kernel", kernel, "(N, K, K)", (samples, size, size))
    chosen = backends.choose(spatial.device, backend, "dynamic_conv: backend").backend
    if chosen == "reference":
        return reference.dynamic_conv(spatial, kernel)
    return _dynamic_conv(spatial, kernel, chosen)
