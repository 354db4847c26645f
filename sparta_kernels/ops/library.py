"""The torch.library namespace ``sparta_kernels``, and helpers to register operations in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.jit import is_tracing  # type: ignore[attr-defined]

_library = torch.library.Library("sparta_kernels", "DEF")


def register(schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define an operation by its schema, its implementation and its fake (shapes)."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"sparta_kernels::{name}", fake, lib=_library)


def batched(operation: Any) -> None:
    """Register a torch.vmap rule for an operation whose tensors all start with the sample axis N.

    The new axis B is folded into it: the operation runs once, on B * N samples.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def with_batch(value: Any, dim: int | None) -> Any:  # (B, N, ...)
            if not isinstance(value, Tensor):
                return value
            return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

        stacked = [with_batch(value, dim) for value, dim in zip(args, in_dims, strict=True)]
        samples = stacked[0].shape[1]
        outputs = operation(*(value.flatten(0, 1) if isinstance(value, Tensor) else value for value in stacked))
        single = isinstance(outputs, Tensor)
        unfolded = [
            (value, None)
            if value.shape == (0,) and info.batch_size  # see `fill`
            else (value.unflatten(0, (info.batch_size, samples)), 0)
            for value in ([outputs] if single else outputs)
        ]
        return unfolded[0] if single else tuple(zip(*unfolded, strict=True))

    torch.library.register_vmap(operation, rule, lib=_library)


def one_by_one(operation: Any) -> None:
    """Register a torch.vmap rule for an operation of any tensors: it runs once for every slice of the new axis."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def slices(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)
            return [_slice(value, dim, i) if isinstance(dim, int) else value for value, dim in pairs]

        # An empty axis takes one run all the same, on made-up values: it tells the shapes of the results.
        outputs = [operation(*slices(i)) for i in range(max(1, info.batch_size))]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)[: info.batch_size], 0
        stacked = tuple(torch.stack(values)[: info.batch_size] for values in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(operation, rule, lib=_library)


def _slice(value: Tensor, dim: int, i: int) -> Tensor:
    if value.shape[dim] > 0:
        return value.select(dim, i)
    return value.new_zeros(value.movedim(dim, 0).shape[1:])


def fill(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Operations return a fixed number of tensors; an empty one stands for a gradient that was not requested."""
    return like.new_empty(0) if gradient is None else gradient


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


def differentiable(
    name: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor],
    count: int,
    vmap_rule: Callable[[Any], None] = batched,
) -> Callable[..., Tensor]:
    """Make a differentiable function of an operation's raw forward and backward, by an autograd.Function.

    Args:
        name: what the operation is called in a graph, e.g. ``grad_fn=<SpartaGateBackward>``.
        forward: ``forward(*tensors, *options, backend)``.
        backward: ``backward(grad, *tensors, *options, wanted, backend)`` with one gradient for each of `tensors`;
            the gradient itself where there is one tensor.
        reference: ``reference(*tensors, *options)`` in plain PyTorch: what second derivatives are taken of.
        count: how many tensors there are; each may be None.
        vmap_rule: registers one for an operation: `batched` or `one_by_one`.

    Returns:
        A function of ``(*tensors, *options, backend)``.
    """

    vmap_rule(forward)
    vmap_rule(backward)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:-1]
        ctx.backend = inputs[-1]

    def first_order(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:count])
        args = (grad, *ctx.saved_tensors, *ctx.options, wanted, ctx.backend)
        # `Backward` makes the gradient differentiable again, which it never has to be in compiled code.
        if torch.compiler.is_compiling() or (eager() and not torch.is_grad_enabled()):
            grads = backward(*args)
        else:
            grads = Backward.apply(*args)
        if isinstance(grads, Tensor):
            grads = (grads,)
        found = (value if want else None for value, want in zip(grads, wanted, strict=True))
        return *found, *(None for _ in ctx.options), None

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: count + 1])
        *ctx.options, ctx.wanted, _ = inputs[count + 1 :]

    def differentiate_again(ctx: Any, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, *tensors = ctx.saved_tensors
        grads = second_order(
            lambda *values: reference(*values, *ctx.options),
            tensors,
            grad,
            ctx.wanted,
            grad_grads,
            ctx.needs_input_grad[: count + 1],
        )
        return *grads, *(None for _ in ctx.options), None, None

    def save_and_forward(ctx: Any, *args: Any) -> Tensor:
        save(ctx, args, args[0])
        return forward(*args)

    def function(suffix: str, **methods: Any) -> Any:
        static = {key: staticmethod(value) if callable(value) else value for key, value in methods.items()}
        return type(name + suffix, (Function,), static)

    Backward = function(
        "Backward",
        forward=backward,
        setup_context=save_backward,
        backward=differentiate_again,
        generate_vmap_rule=True,
    )
    # torch.func and torch.compile need the form with setup_context; in eager mode it costs 15 microseconds more a call.
    Transformed = function("", forward=forward, setup_context=save, backward=first_order, generate_vmap_rule=True)
    Eager = function("", forward=save_and_forward, backward=first_order)

    def apply(*args: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return Transformed.apply(*args)
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:count])
        # Under forward-mode AD the Function raises an error (it has no jvp); forward would drop the tangent silently.
        if not wanted and torch.autograd.forward_ad._current_level < 0:
            return forward(*args)
        return Transformed.apply(*args) if torch.compiler.is_compiling() else Eager.apply(*args)

    return apply


def eager() -> bool:
    """Whether this is plain eager autograd: no compiler, no torch.func transform."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def untraced() -> bool:
    """The same, and neither torch.jit.trace nor forward-mode AD, which need to see plain PyTorch."""
    return eager() and not is_tracing() and torch.autograd.forward_ad._current_level < 0


def asked(ctx: Any, first: int, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which inputs of a Function have gradients that this backward pass requests.

    ``needs_input_grad`` tells whose gradient exists. An attack on a network whose weights are trainable asks for that
    of the images alone.

    Args:
        ctx: that of the Function, while its backward runs.
        first: the position of ``tensors[0]`` among the Function's arguments; no tensor stands before it.
        tensors: the arguments from there on, None where one is absent.
    """
    needed = ctx.needs_input_grad[first : first + len(tensors)]
    nodes = iter(ctx.next_functions)  # what is not a tensor has none
    behind = [None if tensor is None else next(nodes)[0] for tensor in tensors]
    return [need and _will_run(node) for need, node in zip(needed, behind, strict=True)]


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # not in this torch; or a leaf that torch.autograd.grad was given
        return True
