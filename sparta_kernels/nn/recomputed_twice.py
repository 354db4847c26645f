"""The arguments of the attention network in training mode, and its second derivatives in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor | None, ...]


class Options(NamedTuple):
    """Everything not differentiated: each convolution's geometry, each BatchNorm's epsilon, the backend of ReLU."""

    geometries: dict[str, tuple[Any, ...]]
    eps: dict[str, float]
    dynamic: bool
    pooled: bool  # conv2 sees the mean alone: it has one pixel
    backend: str


class Weights(NamedTuple):
    """Weight and bias of every layer, in the Function's order; None where a layer has none."""

    w1: Tensor
    b1: Tensor | None
    gamma1: Tensor | None
    beta1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    w3: Tensor
    b3: Tensor | None
    gamma3: Tensor | None
    beta3: Tensor | None
    w4: Tensor
    b4: Tensor | None
    w6: Tensor | None = None
    b6: Tensor | None = None
    gamma6: Tensor | None = None
    beta6: Tensor | None = None
    w7: Tensor | None = None
    b7: Tensor | None = None


def composition(options: Options, x: Tensor, w: Weights) -> tuple[Tensor, ...]:
    """The plain composition, for higher derivatives; it does not update the running statistics."""

    def branch(number: int, input: Tensor, weight: Any, bias: Any, gamma: Any, beta: Any) -> Tensor:
        z = torch.convolution(input, weight, bias, *options.geometries[f"conv{number}"])
        return F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.0, options.eps[f"bn{number}"]))

    h1 = branch(1, x, *w[:4])
    if options.pooled:
        h1 = h1.mean((2, 3), keepdim=True)
    channel = torch.convolution(h1, w.w2, w.b2, *options.geometries["conv2"]).mean((2, 3))
    h3 = branch(3, x, *w[6:10])
    spatial = torch.convolution(h3, w.w4, w.b4, *options.geometries["conv4"])
    if not options.dynamic:
        return spatial, channel
    mean6 = branch(6, h3, *w[12:16]).mean((2, 3))
    return spatial, channel, F.linear(mean6, w.w7, w.b7)  # type: ignore[arg-type]


def differentiable(
    options: Options, needs: Sequence[bool], inputs: Sequence[Any], grads: Sequence[Tensor | None]
) -> Grads:
    """The gradients with a graph of their own."""
    places = [i for i, (need, tensor) in enumerate(zip(needs, inputs, strict=True)) if need and tensor is not None]
    # As functions of fresh names for the inputs: one tensor may stand at two places.
    named: list[Any] = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    outputs = composition(options, named[0], Weights(*named[1:]))
    pairs = [
        (output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None and output.requires_grad
    ]
    if not pairs or not places:
        return (None,) * len(inputs)
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        [named[i] for i in places],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    results = dict(zip(places, found, strict=True))
    return tuple(results.get(i) for i in range(len(inputs)))
