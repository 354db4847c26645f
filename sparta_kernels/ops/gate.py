"""sparta_gate: ``y = relu(x) * sigmoid(kernel * spatial (x) channel)``."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels import backends, reference
from sparta_kernels.ops.checks import check_images, check_integer, check_shape, check_tensor
from sparta_kernels.ops.library import differentiable, fill, register


def _forward(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int, backend: str) -> Tensor:
    return backends.module_for(backend, "gate_forward", x).gate_forward(x, spatial, channel, kernel, share)


def _forward_fake(
    x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int, backend: str
) -> Tensor:
    return torch.empty_like(x)


def _backward(
    gy: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None,
    share: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    module = backends.module_for(backend, "gate_backward", x)
    grads = module.gate_backward(gy, x, spatial, channel, kernel, share, wanted)
    return tuple(fill(grad, x) for grad in grads)


def _backward_fake(
    gy: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None,
    share: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    def empty(tensor: Tensor | None, want: bool, contiguous: bool) -> Tensor:
        if tensor is None or not want:
            return x.new_empty(0)
        return (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if contiguous else torch.empty_like(tensor)
        )

    small = [empty(t, want, True) for t, want in zip((spatial, channel, kernel), wanted[1:], strict=True)]
    return empty(x, wanted[0], False), *small


def _backward_of_sum(
    gy: Tensor,
    gy2: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor,
    share: int,
    backend: str,
) -> tuple[Tensor, ...]:
    module = backends.module_for(backend, "gate_backward", x)
    inputs = x, spatial, channel, kernel, share, [True] * 4
    if x.device.type == "cpu" and module is backends.module("native"):
        return module.gate_backward(gy, *inputs, gy2)
    return module.gate_backward(gy + gy2, *inputs)


def _backward_of_sum_fake(
    gy: Tensor,
    gy2: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor,
    share: int,
    backend: str,
) -> tuple[Tensor, ...]:
    return _backward_fake(gy, x, spatial, channel, kernel, share, [True] * 4, backend)


register(
    "_gate_forward(Tensor x, Tensor spatial, Tensor channel, Tensor? kernel, int share, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
register(
    "_gate_backward(Tensor gy, Tensor x, Tensor spatial, Tensor channel, Tensor? kernel, int share, bool[] wanted, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
# All gradients for gy + gy2, where y has two consumers.
register(
    "_gate_backward_of_sum(Tensor gy, Tensor gy2, Tensor x, Tensor spatial, Tensor channel, Tensor kernel, int share, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_of_sum,
    _backward_of_sum_fake,
)


raw_gate_forward = torch.ops.sparta_kernels._gate_forward.default
raw_gate_backward = torch.ops.sparta_kernels._gate_backward.default
raw_gate_backward_of_sum = torch.ops.sparta_kernels._gate_backward_of_sum.default
_gate = differentiable("SpartaGate", raw_gate_forward, raw_gate_backward, reference.gate, count=4)


def sparta_gate(
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None = None,
    *,
    share: int = 1,
    backend: str | None = None,
) -> Tensor:
    """SPARTA's gate (Eq. 3, 5 and 8; Eq. 6 where ``share > 1``) with the 1x1 dynamic Conv5, in one pass each way.

        y[n,c,h,w] = relu(x[n,c,h,w]) * sigmoid(kernel[n] * spatial[n, h // share, w // share] * channel[n,c])

    Args:
        x: ``(N, C, H, W)``; float64, float32, bfloat16 or float16. NCHW and channels_last are read without a
            copy, as are slices of them in N and C; other layouts are copied first.
        spatial: ``(N, 1, ceil(H / share), ceil(W / share))``, any of those dtypes: the input of Conv5, or
            (with ``kernel=None``) its output.
        channel: ``(N, C)``, any of those dtypes.
        kernel: ``(N,)``, any of those dtypes: Conv5's predicted weight. None stands for 1.
        share: side of the square blocks of pixels that share one spatial value.
        backend: overrides `use_backend` for this call.

    Returns:
        y with the shape, dtype and memory format of x. Differentiable, in eager mode twice. Sums are accumulated
        in float32 (float64 for float64) and are bitwise repeatable.

    Raises:
        TypeError: an argument is not what it should be, or has an unsupported dtype.
        ValueError: a shape, device, ``share`` or ``backend`` does not fit.
    """
    check_tensor("sparta_gate", "x", x)
    check_images("sparta_gate", "x", x)
    check_integer("sparta_gate", "share", share, 1, 2**31 - 1)
    samples, channels, height, width = x.shape
    check_tensor("sparta_gate", "spatial", spatial, x)
    check_shape(
        "sparta_gate",
        "spatial",
        spatial,
        "(N, 1, ceil(H/share), ceil(W/share))",
        (samples, 1, -(-height // share), -(-width // share)),
    )
    check_tensor("sparta_gate", "channel", channel, x)
    check_shape("sparta_gate", "channel", channel, "(N, C)", (samples, channels))
    if kernel is not None:
        check_tensor("sparta_gate", "kernel", kernel, x)
        check_shape("sparta_gate", "kernel", kernel, "(N,)", (samples,))
    chosen = backends.choose(x.device, backend, "sparta_gate: backend").backend
    if chosen == "reference":
        return reference.gate(x, spatial, channel, kernel, share)
    return _gate(x, spatial, channel, kernel, share, chosen)
