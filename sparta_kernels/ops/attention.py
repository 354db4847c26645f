"""sparta_attention and sparta_activation: SPARTA's attention network, and the whole activation, at K = 1.

No hidden tensor reaches memory: backward needs one bit per element of h1, h3 and h6 (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sparta_kernels import backends, reference
from sparta_kernels.ops.attention_gradients import weight_gradients
from sparta_kernels.ops.attention_kernels import (
    AttentionWeights,
    Packed,
    fused_backend,
    pack,
    raw_backward_,
    raw_forward,
    raw_forward_,
)
from sparta_kernels.ops.checks import check_images, check_integer, check_shape, check_tensor
from sparta_kernels.ops.gate import raw_gate_backward, raw_gate_backward_of_sum, raw_gate_forward
from sparta_kernels.ops.library import asked, untraced

# ---- forward and backward of the two operations below ------------------------------------------------------


class _Attended(NamedTuple):
    a: Tensor  # (N, 1, H, W)
    channel: Tensor  # (N, C)
    kernel: Tensor  # (N,)
    mean1: Tensor
    mean6: Tensor
    bits: Tensor


def _attend(x: Tensor, packed: Packed, keep: bool, skip: Tensor | None = None) -> _Attended:
    """The attention network of x; with `skip` that of x + skip, which is written over x."""
    options = packed.tensors, packed.hidden, packed.dynamic, keep, packed.backend
    return _Attended(*(raw_forward(x, *options) if skip is None else raw_forward_(x, skip, *options)))


class _Saved:
    """Shared by the two functions: what is saved for backward, and the gradients."""

    @staticmethod
    def save(ctx: Any, x: Tensor, found: _Attended, packed: Packed, weights: AttentionWeights, *more: Tensor) -> None:
        wanted = any(ctx.needs_input_grad[1 : 1 + len(weights)])
        means = (found.mean1, found.mean6) if wanted else ()
        ctx.save_for_backward(x, found.bits, *more, *means, *weights)
        ctx.packed = packed

    @staticmethod
    def load(ctx: Any) -> tuple[Tensor, Tensor, list[Tensor], AttentionWeights]:
        x, bits, *more = ctx.saved_tensors
        size = len(AttentionWeights._fields)
        return x, bits, more[:-size], AttentionWeights(*more[-size:])

    @staticmethod
    def gradients(
        ctx: Any,
        x: Tensor,
        bits: Tensor,
        means: Sequence[Tensor],
        weights: AttentionWeights,
        grads: tuple[Tensor, Tensor, Tensor],
        gx: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, added to gx unless that is None, and of the weights.

        `grads` are those of a, channel and kernel.
        """
        if gx is not None:
            raw_backward_(gx, *grads, bits, ctx.packed.tensors, ctx.packed.hidden, ctx.packed.backend)
        wanted = asked(ctx, 0, (x, *weights))[1:]
        found: Sequence[Tensor | None] = (None,) * len(weights)
        if any(wanted):
            with torch.autocast(x.device.type, enabled=False):
                found = weight_gradients(x, weights, bits, means, *grads)
        return gx, *(
            None if value is None or weight is None or not want else value.view(weight.shape).to(weight.dtype)
            for value, weight, want in zip(found, weights, wanted, strict=True)
        )


class SpartaAttention(Function):
    """Maps x and the weights to (a, channel, kernel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *weights, packed = rest
        found = _attend(x, packed, True)
        ctx.set_materialize_grads(False)
        ctx.work = found.a.dtype
        _Saved.save(ctx, x, found, packed, AttentionWeights(*weights))
        return found.a, found.channel, found.kernel

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, bits, means, weights = _Saved.load(ctx)
        if torch.is_grad_enabled():
            return *_again(ctx, x, weights, grads, None), None
        samples, channels, height, width = x.shape
        shapes = (samples, 1, height, width), (samples, channels), (samples,)
        found = tuple(
            x.new_zeros(shape, dtype=ctx.work) if grad is None else grad
            for grad, shape in zip(grads, shapes, strict=True)
        )
        gx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        return *_Saved.gradients(ctx, x, bits, means, weights, found, gx), None  # type: ignore[arg-type]


class SpartaActivation(Function):
    """Maps x and the weights to y. Backward writes the gate's part of x's gradient, and adds the rest in place.

    With `skip` it maps x + skip, which overwrites x: nothing else may need x's own value. With `twice` it returns y for
    two consumers, whose gradients arrive separately and are added as they are read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Any:
        *weights, skip, packed, share, gate, twice = rest
        found = _attend(x, packed, True, skip)
        spatial = _shared(found.a, share)
        _Saved.save(ctx, x, found, packed, AttentionWeights(*weights), spatial, found.channel, found.kernel)
        ctx.share, ctx.gate, ctx.has_skip = share, gate, skip is not None
        ctx.set_materialize_grads(False)
        y = raw_gate_forward(x, spatial, found.channel, found.kernel, share, gate)
        return (y, y[...]) if twice else y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gy2: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if gy is None:
            gy, gy2 = gy2, None
        if gy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, bits, (spatial, channel, kernel, *means), weights = _Saved.load(ctx)
        others: Any = (None,) * 4
        if torch.is_grad_enabled():
            if ctx.has_skip:
                raise RuntimeError("the activation of x + skip, written over x, can be differentiated once only")
            return *_again(ctx, x, weights, (gy if gy2 is None else gy + gy2,), ctx.share), None, *others
        needs_x, needs_skip = ctx.needs_input_grad[0], ctx.needs_input_grad[-5]
        wanted = [needs_x or needs_skip, True, True, True]
        if gy2 is not None and not wanted[0]:
            gy, gy2 = gy + gy2, None
        inputs = x, spatial, channel, kernel, ctx.share
        gx, gspatial, gchannel, gkernel = (
            raw_gate_backward(gy, *inputs, wanted, ctx.gate)
            if gy2 is None
            else raw_gate_backward_of_sum(gy, gy2, *inputs, ctx.gate)
        )
        found = _unshared(gspatial, ctx.share, x), gchannel, gkernel
        gx, *grads = _Saved.gradients(ctx, x, bits, means, weights, found, gx if wanted[0] else None)
        return gx if needs_x else None, *grads, gx if needs_skip else None, *others


def _shared(a: Tensor, share: int) -> Tensor:
    """Eq. 6: each block of share x share pixels gets the mean of its values."""
    return a if share == 1 else F.avg_pool2d(a, share, ceil_mode=True)


def _unshared(gspatial: Tensor, share: int, x: Tensor) -> Tensor:
    if share == 1:
        return gspatial
    a = gspatial.new_empty(x.shape[0], 1, *x.shape[2:])
    return torch.ops.aten.avg_pool2d_backward(gspatial, a, [share, share], [share, share], [0, 0], True, True, None)


def _again(
    ctx: Any, x: Tensor, weights: AttentionWeights, grads: Sequence[Tensor | None], share: int | None
) -> list[Tensor | None]:
    """The gradients in plain PyTorch, which are differentiable again."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # As views: one input may be another one, or computed from it, and only its direct gradient is asked for.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (x, *weights)]
        found: Any = reference.folded_attention(*inputs)  # type: ignore[arg-type]
        if share is not None:
            a, channel, kernel = found
            found = (reference.gate(inputs[0], _shared(a, share), channel, kernel, share),)  # type: ignore[arg-type]
        wanted = asked(ctx, 0, (x, *weights))
        places = [i for i, want in enumerate(wanted) if want]
        pairs = [(out, grad) for out, grad in zip(found, grads, strict=True) if grad is not None and out.requires_grad]
        if not pairs or not places:
            return [None] * len(inputs)
        outputs, incoming = zip(*((out, grad.to(out.dtype)) for out, grad in pairs), strict=True)
        leaves: Any = [inputs[i] for i in places]
        again = torch.autograd.grad(outputs, leaves, incoming, create_graph=True, allow_unused=True)
    by_input = dict(zip(places, again, strict=True))
    return [by_input.get(i) for i in range(len(inputs))]


# ---- the operations ----------------------------------------------------------------------------------------


def _check(operation: str, x: Tensor, weights: AttentionWeights) -> None:
    check_tensor(operation, "x", x)
    check_images(operation, "x", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{operation}: x must have C, H, W >= 1, got shape {tuple(x.shape)}")
    if not isinstance(weights, AttentionWeights):
        raise TypeError(f"{operation}: weights must be AttentionWeights, got {type(weights).__name__}")
    absent = [name for name in ("w6", "b6", "w7") if getattr(weights, name) is None]
    if len(absent) not in (0, 3):
        raise ValueError(f"{operation}: weights.w6, b6 and w7 must all be given, or none; missing: {', '.join(absent)}")
    check_tensor(operation, "weights.w4", weights.w4, x)
    if weights.w4.dim() != 1 or weights.w4.numel() == 0:
        raise ValueError(f"{operation}: weights.w4 must have shape (Co,), got {tuple(weights.w4.shape)}")
    channels, hidden = x.shape[1], weights.hidden
    shapes = {
        "w13": (2 * hidden, channels),
        "b13": (2 * hidden,),
        "b4": (1,),
        "w2": (channels, hidden),
        "b2": (channels,),
        "b7": (1,),
        "w6": (hidden, hidden),
        "b6": (hidden,),
        "w7": (hidden,),
    }
    for name, shape in shapes.items():
        value = getattr(weights, name)
        if value is not None or name not in ("w6", "b6", "w7"):
            check_tensor(operation, f"weights.{name}", value, x)
            check_shape(operation, f"weights.{name}", value, "for C channels and Co hidden", shape)


def sparta_attention(
    x: Tensor, weights: AttentionWeights, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention network (DSCANet, Fig. 2) at K = 1 with BatchNorm folded in: the gate's factors, in one pass.

        h1 = relu(w1 x + b1)    channel = w2 mean_p(h1) + b2
        h3 = relu(w3 x + b3)    spatial = w4 h3 + b4
        h6 = relu(w6 h3 + b6)   kernel  = w7 mean_p(h6) + b7

    Args:
        x: ``(N, C, H, W)``, C, H, W >= 1; float64, float32, bfloat16 or float16. NCHW and channels_last are read
            without a copy, as are slices of them in N and C; other layouts are copied first. float64 and float32 are
            multiplied as such, the 16-bit formats in their own precision or a higher one. Sums are accumulated in
            float32 (float64 for float64) and are bitwise repeatable.
        weights: on x's device, in any floating dtypes.
        backend: overrides `use_backend` for this call. If neither selects one and there are no kernels for x, plain
            PyTorch computes this; likewise under torch.compile, torch.func, torch.jit and forward-mode AD.

    Returns:
        ``spatial (N, 1, H, W)``, ``channel (N, C)``, ``kernel (N,)``, in float32 (float64 for float64; from
        plain PyTorch, in x's dtype). Differentiable in x and in the weights, in eager mode any number of times. x and
        three bits per hidden channel and pixel are saved for backward. Weight gradients are computed only where they
        are requested.

    Raises:
        TypeError: an argument is not what it should be, or has an unsupported dtype.
        ValueError: a shape or device does not fit, or ``backend`` has no kernels for x.
    """
    _check("sparta_attention", x, weights)
    chosen = _choose("sparta_attention", x, weights, backend)
    if not chosen:
        return reference.folded_attention(x, *weights)
    packed = pack(weights, x.dtype, chosen)
    if torch.is_grad_enabled() and _differentiable(x, weights):
        return SpartaAttention.apply(x, *weights, packed)
    found = _attend(x, packed, False)
    return found.a, found.channel, found.kernel


def sparta_activation(x: Tensor, weights: AttentionWeights, *, share: int = 1, backend: str | None = None) -> Tensor:
    """The whole activation at K = 1 with BatchNorm folded in: `sparta_attention` and the gate (Eq. 3, 5, 6, 8).

        y = relu(x) * sigmoid(kernel * spatial (x) channel)

    Args:
        share: each block of share x share pixels uses the mean of its spatial values (Eq. 6). The other arguments, and
            the errors, are those of `sparta_attention`.

    Returns:
        y with the shape, dtype and memory format of x. Differentiable as `sparta_attention` is.
    """
    _check("sparta_activation", x, weights)
    check_integer("sparta_activation", "share", share, 1, 2**31 - 1)
    chosen = _choose("sparta_activation", x, weights, backend)
    if not chosen:
        spatial, channel, kernel = reference.folded_attention(x, *weights)
        return reference.gate(x, _shared(spatial, share), channel, kernel, share)
    return activate(x, weights, pack(weights, x.dtype, chosen), share, backend)


def activate(
    x: Tensor,
    weights: AttentionWeights,
    packed: Packed,
    share: int,
    backend: str | None = None,
    *,
    skip: Tensor | None = None,
    twice: bool = False,
) -> Any:
    """`sparta_activation` for checked arguments and packed weights.

    Args:
        skip: like x, which has no gaps, in shape, dtype, device and strides: y is that of x + skip, written over x.
        twice: return y twice, for two consumers, in the same memory: their gradients are added in the gate's pass.
    """
    gate = backends.choose(x.device, backend).backend  # for the gate `auto` may prefer another backend
    if torch.is_grad_enabled() and (_differentiable(x, weights) or (skip is not None and skip.requires_grad)):
        return SpartaActivation.apply(x, *weights, skip, packed, share, gate, twice)
    found = _attend(x, packed, False, skip)
    y = raw_gate_forward(x, _shared(found.a, share), found.channel, found.kernel, share, gate)
    return (y, y[...]) if twice else y


def _choose(operation: str, x: Tensor, weights: AttentionWeights, backend: str | None) -> str:
    chosen, reason = fused_backend(x, weights.hidden, backend, f"{operation}: backend")
    name = backends._requested if backend is None else backend
    if not chosen and name not in ("auto", "reference") and untraced() and x.numel() > 0:
        raise ValueError(f"{operation}: backend {name!r} cannot take x: {reason}")
    return chosen


def _differentiable(x: Tensor, weights: AttentionWeights) -> bool:
    return x.requires_grad or any(weight is not None and weight.requires_grad for weight in weights)
