"""The attention network in training mode without saved hidden tensors: backward recomputes them.

At each site the plain composition saves seven feature maps: x, and the output of every convolution and every ReLU. Here
x is saved (the gate saves it anyway), with one bit per ReLU element and the batch statistics. Backward recomputes the
rest, one branch at a time. For small images the convolutions' outputs are saved too.

Two alternatives were measured and rejected (one CPU core, batch 32, ResNet-18's sites from 64x32x32 to 512x4x4):

- The statistics of bn1 and bn3 follow from the mean and the covariance of x, and so would their gradients: no z1 and
  z3, no pass of a BatchNorm. The covariance and its gradient's product with x take 3.8, 2.9, 2.9 and 3.0 ms, small
  matrices not counted; what they would replace takes 6.3, 4.0, 3.2 and 1.7 ms. That saves half a percent of a training
  step, at the price of cancellation in the variances.
- In channels_last all this takes 0.8 of the time, copies of x included. But there torch's BatchNorm sums sequentially:
  errors of weight gradients in float32 are 3e-4 to 8e-4, against 1e-6 to 9e-6 in NCHW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .. import backends
from ..ops.library import asked, untraced
from .frozen import has_hooks
from .recomputed_twice import Grads, Options, Weights, differentiable

if TYPE_CHECKING:
    from .sparta import Sparta

_aten = torch.ops.aten
_relu_ = torch.ops.sparta_kernels._relu_forward_.default
_relu_backward = torch.ops.sparta_kernels._relu_backward.default

# Images of at most so many pixels keep their convolutions' outputs: in a ResNet-18 on 32x32 pixels 0.02 of the memory,
# and 0.4 of the time that making them again would take.
_FEW_PIXELS = 64


def attention_in_training(sparta: Sparta, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """spatial, channel and kernel as `Sparta.forward` computes them with batch statistics, saving no hidden tensor.

    The running statistics are updated exactly as in the plain composition. Differentiable any number of times.

    Args:
        sparta: in training mode.
        x: ``(N, C, H, W)``.

    Returns:
        spatial ``(N, 1, H, W)``, channel ``(N, C)`` and kernel ``(N, K * K)``; or None where the plain composition has
        to be taken: without a gradient, while compiling or under a transform, with the backend ``reference``, or where
        a layer is not what `Sparta` made, and calling it might do more.
    """
    chosen = _backend(sparta, x)
    if chosen is None:
        return None
    layers = _layers(sparta)
    norms = {name: layer for name, layer in layers.items() if isinstance(layer, nn.BatchNorm2d)}
    tensors = _tensors(layers)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does it: products in its dtype, BatchNorm with parameters in their own.
        dtype = torch.get_autocast_dtype(device)
        x = _cast(x, dtype)
        names = [name for name in layers for _ in range(2)]
        tensors = [
            tensor if name in norms or tensor is None else _cast(tensor, dtype)
            for tensor, name in zip(tensors, names, strict=True)
        ]
    options = Options(
        {name: _geometry(layer) for name, layer in layers.items() if isinstance(layer, nn.Conv2d)},
        {name: norm.eps for name, norm in norms.items()},
        sparta.dynamic,
        sparta.kernel_size == 1,
        chosen,
    )
    with torch.autocast(device, enabled=False):
        spatial, channel, *rest = _Attention.apply(options, norms, x, *tensors)
    kernel = rest[0] if sparta.dynamic else sparta.conv5.flatten().expand(x.shape[0], -1)
    return spatial, channel, kernel


def _backend(sparta: Sparta, x: Tensor) -> str | None:
    """The backend of the ReLUs; None if the plain composition has to be used."""
    if not untraced() or not torch.is_grad_enabled() or x.device.type not in ("cpu", "cuda"):
        return None
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:  # no statistics: a BatchNorm says so itself
        return None
    layers = _layers(sparta)
    if nn.modules.module._has_any_global_hook() or not all(map(_is_plain, layers.values())):
        return None
    if sparta.kernel_size == 1 and sparta.conv2.kernel_size != (1, 1):  # the mean would not commute with it
        return None
    if not all(_fit(layers[f"conv{i}"], layers[f"bn{i}"]) for i in (1, 3, 6) if f"bn{i}" in layers):
        return None
    tensors = [x, *(tensor for tensor in _tensors(layers) if tensor is not None)]
    if not any(tensor.requires_grad for tensor in tensors):
        return None
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):  # it may have rules of its own
        return None
    backend = backends.choose(x.device).backend
    return None if backend == "reference" else backend


def _layers(sparta: Sparta) -> dict[str, Any]:
    names = ("conv1", "bn1", "conv2", "conv3", "bn3", "conv4", *(("conv6", "bn6", "predict") if sparta.dynamic else ()))
    return {name: getattr(sparta, name) for name in names}


def _tensors(layers: dict[str, Any]) -> list[Tensor | None]:
    return [tensor for layer in layers.values() for tensor in (layer.weight, layer.bias)]


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer would do exactly what the Function does in its place."""
    if has_hooks(layer) or "forward" in vars(layer):
        return False
    if type(layer) is nn.BatchNorm2d:
        return layer.training
    if type(layer) is nn.Conv2d:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.stride != (1, 1):
            return False
        geometry = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
        return all(
            2 * padding == dilation * (size - 1) for size, padding, dilation in geometry
        )  # the image's size stays
    return type(layer) is nn.Linear


def _fit(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether the BatchNorm has as many channels; the low-level operation used here does not check."""
    values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(value is None or value.shape == conv.weight.shape[:1] for value in values)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups


def _step(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, bool, float, float]:
    """Count the batch, as a BatchNorm's forward does, and return torch's arguments for the running statistics."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    tracked = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
    return *tracked, True, momentum, norm.eps


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


class _Branch(NamedTuple):
    """The tensors saved of ``relu(bn(conv(x)))``."""

    mean: Tensor
    inverse: Tensor  # of the standard deviation
    bits: Tensor
    output: Tensor | None  # the convolution's, where it is kept
    stride: tuple[int, ...]  # of its tensors


class _Attention(Function):
    """(spatial, channel), and kernel where it is predicted."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, norms: dict[str, nn.BatchNorm2d], x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        w = Weights(*tensors)  # type: ignore[arg-type]
        keep = x.shape[2] * x.shape[3] <= _FEW_PIXELS
        kept: list[Tensor | None] = []
        strides: list[tuple[int, ...]] = []

        def branch(number: int, input: Tensor, weight: Any, bias: Any, gamma: Any, beta: Any) -> Tensor:
            z = torch.convolution(input, weight, bias, *options.geometries[f"conv{number}"])
            h, mean, inverse = _aten.native_batch_norm(z, gamma, beta, *_step(norms[f"bn{number}"]))
            kept.extend((mean, inverse, _relu_(h, None, True, options.backend), z if keep else None))
            strides.append(h.stride())
            return h

        h1 = branch(1, x, *w[:4])
        mean1 = h1.mean((2, 3), keepdim=True) if options.pooled else None
        channel = torch.convolution(h1 if mean1 is None else mean1, w.w2, w.b2, *options.geometries["conv2"])
        channel = channel.flatten(1) if options.pooled else channel.mean((2, 3))
        del h1

        h3 = branch(3, x, *w[6:10])
        spatial = torch.convolution(h3, w.w4, w.b4, *options.geometries["conv4"])
        found, mean6 = (spatial, channel), None
        if options.dynamic:
            mean6 = branch(6, h3, *w[12:16]).mean((2, 3))
            found = (*found, F.linear(mean6, w.w7, w.b7))  # type: ignore[arg-type, assignment]

        ctx.save_for_backward(x, *tensors, mean1, mean6, *kept)
        ctx.options, ctx.strides, ctx.count = options, strides, len(tensors)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        x, *rest = ctx.saved_tensors
        tensors, (mean1, mean6, *kept) = rest[: ctx.count], rest[ctx.count :]
        needs = asked(ctx, 2, (x, *tensors))
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                return None, None, *differentiable(ctx.options, needs, (x, *tensors), grads)
            branches = {
                number: _Branch(*parts)
                for number, *parts in zip((1, 3, 6), *(kept[i::4] for i in range(4)), ctx.strides, strict=False)
            }
            backward = _Backward(ctx.options, x, Weights(*tensors), branches, needs)
            return None, None, *backward(grads, mean1, mean6)


class _Backward:
    """The gradients of `_Attention`, one branch after the other, so that few feature maps are alive at once."""

    def __init__(
        self, options: Options, x: Tensor, weights: Weights, branches: dict[int, _Branch], needs: Sequence[bool]
    ) -> None:
        self.options, self.x, self.w, self.branches = options, x, weights, branches
        self.needs = dict(zip(("x", *weights._fields), needs, strict=False))
        self.found: dict[str, Tensor | None] = {}
        self.gx: Tensor | None = None

    def __call__(self, grads: Sequence[Tensor | None], mean1: Tensor | None, mean6: Tensor | None) -> Grads:
        gspatial, gchannel, *rest = grads
        gkernel = rest[0] if rest else None
        if gspatial is not None or gkernel is not None:
            self._spatial_and_kernel(gspatial, gkernel, mean6)
        if gchannel is not None:
            self._channel(gchannel, mean1)
        return self.gx, *(self.found.get(name) for name in self.w._fields[: len(self.branches) * 6])

    def _channel(self, grad: Tensor, mean1: Tensor | None) -> None:
        before = self._wanted("x", "w1", "b1", "gamma1", "beta1")
        pixels = self.x.shape[2] * self.x.shape[3]
        if mean1 is not None:
            found = self._convolution(2, grad[:, :, None, None], mean1, before)
            if found is None:
                return
            z1 = self._convolved(1, self.x)
            gh1 = (found / pixels).expand(z1.shape)
            del found
        else:
            z1 = self._convolved(1, self.x)
            each = (grad / pixels)[:, :, None, None].expand(*grad.shape, *self.x.shape[2:])
            found = self._convolution(2, each, self._hidden(1, z1) if self._wanted("w2") else z1, before)
            if found is None:
                return
            gh1 = found
            del found
        gz1 = self._normalised(1, gh1, z1, self._wanted("x", "w1"))
        del z1, gh1
        self._before(1, gz1)

    def _spatial_and_kernel(self, gspatial: Tensor | None, gkernel: Tensor | None, mean6: Tensor | None) -> None:
        before3 = self._wanted("x", "w3", "b3", "gamma3", "beta3")
        before6 = before3 or self._wanted("w6", "b6", "gamma6", "beta6")
        if gkernel is not None:
            assert mean6 is not None
            if self._wanted("w7"):
                self.found["w7"] = gkernel.t() @ mean6
            if self._wanted("b7"):
                self.found["b7"] = gkernel.sum(0)
        if not before6:
            gkernel = None
        if gkernel is None and (gspatial is None or not (before3 or self._wanted("w4", "b4"))):
            return

        z3 = self._convolved(3, self.x)
        # A convolution whose weight's gradient is not asked for does not read its input: one of the same shape will do.
        reads = gspatial is not None and self._wanted("w4")
        reads |= gkernel is not None and (self._wanted("w6") or self.branches[6].output is None)
        h3 = self._hidden(3, z3) if reads else z3
        gh3: Tensor | None = None
        if gkernel is not None:
            assert self.w.w7 is not None
            z6 = self._convolved(6, h3)
            gh6 = (gkernel @ self.w.w7 / (h3.shape[2] * h3.shape[3]))[:, :, None, None].expand(z6.shape)
            gz6 = self._normalised(6, gh6, z6, before3 or self._wanted("w6"))
            del z6, gh6
            if gz6 is not None:
                gh3 = self._convolution(6, gz6, h3, before3)
            del gz6
        if gspatial is not None:
            pixel_wise = self.w.w4.shape == (1, h3.shape[1], 1, 1)
            found = self._convolution(4, gspatial, h3, before3 and not pixel_wise)
            if before3 and pixel_wise:  # an outer product, added in one pass
                gh3 = gspatial * self.w.w4 if gh3 is None else gh3.addcmul_(gspatial, self.w.w4)
            elif found is not None:
                gh3 = found if gh3 is None else gh3.add_(found)
            del found
        del h3
        if gh3 is not None:
            gz3 = self._normalised(3, gh3, z3, self._wanted("x", "w3"))
            del z3, gh3
            self._before(3, gz3)

    def _before(self, number: int, gz: Tensor | None) -> None:
        """From the gradient of a convolution of x to that of x."""
        gx = None if gz is None else self._convolution(number, gz, self.x, self._wanted("x"))
        if gx is not None:
            self.gx = gx if self.gx is None else self.gx.add_(gx)

    def _wanted(self, *names: str) -> bool:
        return any(self.needs.get(name, False) for name in names)

    def _convolved(self, number: int, input: Tensor) -> Tensor:
        """The convolution's output, recomputed if it was not saved."""
        output = self.branches[number].output
        if output is not None:
            return output
        weight, bias = (getattr(self.w, f"{kind}{number}") for kind in "wb")
        return torch.convolution(input, weight, bias, *self.options.geometries[f"conv{number}"])

    def _hidden(self, number: int, z: Tensor) -> Tensor:
        """``relu(bn(z))`` again, with the batch's statistics."""
        mean, inverse, *_ = self.branches[number]
        gamma, beta = (getattr(self.w, f"{kind}{number}") for kind in ("gamma", "beta"))
        scale = inverse if gamma is None else gamma * inverse
        shift = -mean * scale if beta is None else beta - mean * scale
        return torch.addcmul(shift[:, None, None], z, scale[:, None, None]).to(z.dtype).relu_()

    def _normalised(self, number: int, grad: Tensor, z: Tensor, needs_input: bool) -> Tensor | None:
        """From the gradient of ``relu(bn(z))`` to that of z, the batch's statistics being functions of z."""
        mean, inverse, bits, _, stride = self.branches[number]
        ours = {kind: f"{kind}{number}" for kind in ("gamma", "beta", "b")}
        wanted = [needs_input, self._wanted(ours["gamma"]), self._wanted(ours["beta"], ours["b"])]
        if not any(wanted):
            return None
        grad = _relu_backward(grad, None, bits, stride, self.options.backend)
        gamma = getattr(self.w, ours["gamma"])
        statistics = (None, None, mean, inverse, True, self.options.eps[f"bn{number}"])
        gz, self.found[ours["gamma"]], gbeta = _aten.native_batch_norm_backward(grad, z, gamma, *statistics, wanted)
        if self._wanted(ours["beta"]):
            self.found[ours["beta"]] = gbeta
        if self._wanted(ours["b"]):
            # A BatchNorm takes away whatever a bias adds before it: what torch sums up there is rounding, but for NaN.
            self.found[ours["b"]] = 0 * gbeta
        return gz

    def _convolution(self, number: int, grad: Tensor, input: Tensor, needs_input: bool) -> Tensor | None:
        """The gradient of a convolution's input; those of its weight and bias are stored in `found`."""
        weight, bias = (getattr(self.w, f"{kind}{number}") for kind in "wb")
        sizes = None if bias is None else list(bias.shape)
        biased = self._wanted(f"b{number}") and number not in self.branches
        wanted = [needs_input, self._wanted(f"w{number}"), biased]
        if not any(wanted):
            return None
        geometry = self.options.geometries[f"conv{number}"]
        found, self.found[f"w{number}"], gb = _aten.convolution_backward(grad, input, weight, sizes, *geometry, wanted)
        if biased:
            self.found[f"b{number}"] = gb
        return found
