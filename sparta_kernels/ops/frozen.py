"""A convolution with constant weights, which saves nothing for their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _FrozenConvolution(Function):
    """Saves the weight and the input's shape. torch's own convolution saves its input even for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.geometry = x.shape, x.stride(), geometry
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # When only the input's gradient is computed, torch reads the input's shape, dtype and memory format, not its
        # values. On a CPU it makes a strided input contiguous first, so a dense one is passed: pages that are never
        # written cost nothing. On a GPU one element, expanded, will do.
        if grad.device.type == "cpu":
            like = torch.empty_strided(ctx.shape, ctx.stride, dtype=grad.dtype, device=grad.device)
        else:
            like = grad.new_empty(1).expand(ctx.shape)
        wanted = [True, False, False]
        gx, _, _ = torch.ops.aten.convolution_backward(grad, like, weight, None, *ctx.geometry, wanted)
        return gx, None, None, *(None for _ in ctx.geometry)


def frozen_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
) -> Tensor:
    """``torch.convolution`` for constant weights, in 1, 2 or 3 dimensions: differentiable in x alone, and once.

    Args:
        x: ``(N, C, ...)``, cast to the weight's dtype.
        weight, bias: as `torch.convolution` takes them; their gradients are not computed.
        stride, padding, dilation, output_padding: a number for each of the dimensions.

    Returns:
        The convolution, of the weight's dtype.
    """
    x = x.to(weight.dtype)
    geometry = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return torch.convolution(x, weight, bias, *geometry)
    return _FrozenConvolution.apply(x, weight, bias, *geometry)
