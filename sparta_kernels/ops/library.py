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
    grad_grads: Sequence[Tensor],
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
    tensors = [grad_output, *inputs]
    asked = [i for i, (tensor, need) in enumerate(zip(tensors, needed, strict=True)) if need and tensor is not None]

    def first_order(*values: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(asked, values, strict=True))
        gy, *args = (known.get(i, tensor) for i, tensor in enumerate(tensors))
        differentiated = [i for i, want in enumerate(wanted) if want and args[i] is not None]

        def forward(*chosen: Tensor) -> Tensor:
            replaced = dict(zip(differentiated, chosen, strict=True))
            return function(*(replaced.get(i, arg) for i, arg in enumerate(args)))

        return torch.func.vjp(forward, *(args[i] for i in differentiated))[1](gy)

    # torch.func, not torch.autograd: it nests, under its own transforms too.
    incoming = (g for g, want in zip(grad_grads, wanted, strict=True) if want)
    second = torch.func.vjp(first_order, *(tensors[i] for i in asked))[1](tuple(incoming))
    found = dict(zip(asked, second, strict=True))
    return [found.get(i) for i in range(len(tensors))]
