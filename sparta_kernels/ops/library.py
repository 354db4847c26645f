"""The torch.library namespace ``sparta_kernels`` and what registering an operation takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparta_kernels import backends

_library = torch.library.Library("sparta_kernels", "DEF")


def register(schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define an operation: its schema, how it is computed on every device that has kernels, and its shapes."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in {device for module in backends.MODULES.values() for device in module.DEVICES}:
        _library.impl(name, implementation, device.upper())
    torch.library.register_fake(f"sparta_kernels::{name}", fake, lib=_library)


def fill(wanted: Tensor | None, like: Tensor) -> Tensor:
    """Operations return a fixed number of tensors: an empty one stands for a gradient that nobody asked for."""
    return like.new_empty(0) if wanted is None else wanted


def second_order(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad_output: Tensor,
    wanted: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of a gradient, by torch's own autograd over the plain PyTorch `function`.

    Args:
        function: the reference of the operation.
        inputs: the operation's tensors (None where absent).
        grad_output: the gradient that its backward pass was given.
        wanted: which inputs' gradients the backward pass computed.
        grad_grads: the incoming gradients of those gradients.
        needed: for ``(grad_output, *inputs)``, whose gradient is asked for.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that differentiating stops here even where an input is itself computed from another.
        tensors = [None if t is None else t.view_as(t) for t in inputs]
        gy = grad_output.view_as(grad_output)
        for tensor, want in zip(tensors, wanted, strict=True):
            if tensor is not None and want and not tensor.requires_grad:
                tensor.requires_grad_()
        for tensor, need in zip([gy, *tensors], needed, strict=True):
            if tensor is not None and need and not tensor.requires_grad:
                tensor.requires_grad_()
        first_inputs = [t for t, want in zip(tensors, wanted, strict=True) if want and t is not None]
        first = torch.autograd.grad(function(*tensors), first_inputs, gy, create_graph=True)
        pairs = [
            (gradient, grad_grad)
            for gradient, grad_grad in zip(
                first, (g for g, want in zip(grad_grads, wanted, strict=True) if want), strict=True
            )
            if grad_grad is not None and gradient.requires_grad
        ]
        asked = [t for t, need in zip([gy, *tensors], needed, strict=True) if need and t is not None]
        second = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            asked,
            [grad_grad for _, grad_grad in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
    found = iter(second)
    return [
        next(found) if need and t is not None else None
        for t, need in zip([gy, *tensors], needed, strict=True)
    ]
