"""Layers with constant weights, for attacks: differentiable in their input alone, and saving nothing else for backward.

A frozen layer takes its weights from the layer that it was made from; `refresh` takes them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frozen import frozen_convolution

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Form(NamedTuple):
    """Dtype and memory format of frozen weights.

    Attributes:
        dtype: what convolutions and linear layers compute in; None for that of the weights themselves.
        memory_format: of four-dimensional weights that are copies.
    """

    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format


class Statistics(NamedTuple):
    """A BatchNorm in eval mode that is not a module: the tensors that `torch.nn.functional.batch_norm` is given."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class _Frozen(nn.Module):
    """A convolution or linear layer whose weights get no gradient.

    Weights that are used unchanged are parameters that share the layer's memory. Others (folded, or in another dtype)
    are buffers that `refresh` rewrites in place.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, norm: Any, form: Form) -> None:
        super().__init__()
        self.training = False
        self._source: tuple[Any, Any] = (layer, norm)  # in a tuple: they are not this module's children
        weight, bias = layer.weight, layer.bias
        dtype = form.dtype or weight.dtype
        if norm is None and dtype == weight.dtype:
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
            self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            return
        shape = weight.detach().to(dtype)
        shape = shape.contiguous(memory_format=form.memory_format) if weight.dim() == 4 else shape.contiguous()
        self.register_buffer("weight", torch.empty_like(shape), persistent=False)
        has_bias = norm is not None or bias is not None
        like = norm.running_mean if norm is not None else bias
        self.register_buffer("bias", torch.empty_like(like, dtype=dtype) if has_bias else None, persistent=False)
        self.refresh()

    @property
    def source(self) -> nn.Module:
        """The layer that this was made from."""
        return self._source[0]

    @property
    def shared(self) -> bool:
        """Whether the weights are the layer's own."""
        return isinstance(self.weight, nn.Parameter)

    @torch.no_grad()
    def refresh(self) -> None:
        """Update to the layer's and the BatchNorm's current weights."""
        layer, norm = self._source
        if self.shared:
            # An optimiser or load_state_dict writes in place; an assignment to `.data` or .to() does not.
            for name in ("weight", "bias"):
                mine, now = getattr(self, name), getattr(layer, name)
                if mine is not None and mine.data_ptr() != now.data_ptr():
                    mine.data = now.detach()
            return
        if norm is None:
            self.weight.copy_(layer.weight)
            if self.bias is not None:
                self.bias.copy_(layer.bias)
            return
        scale, shift = scale_and_shift(layer.bias, norm, norm.running_var.dtype)
        torch.mul(layer.weight, scale.view(-1, *(1,) * (layer.weight.dim() - 1)), out=self.weight)
        self.bias.copy_(shift)  # type: ignore[union-attr]


def scale_and_shift(bias: Tensor | None, norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift by which a BatchNorm in eval mode turns ``Wx + bias`` into ``scale * Wx + shift``, in `dtype`.

    That is ``gamma (Wx + bias - mean) / sqrt(var + eps) + beta``. Both are differentiable in gamma, beta and bias.
    """
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if bias is None else bias.to(dtype) - norm.running_mean
    shift = shift * scale
    return scale, shift if norm.bias is None else shift + norm.bias


class FrozenConv(_Frozen):
    """A convolution with constant weights, in 1, 2 or 3 dimensions, transposed or not; `norm` is folded into it."""

    def __init__(self, conv: Any, norm: Any, form: Form) -> None:
        self.planar_weight: Tensor | None = None
        super().__init__(conv, norm, form)
        output_padding = getattr(conv, "output_padding", None) or (0,) * len(conv.stride)
        self.geometry = (conv.stride, _padding(conv), conv.dilation, conv.transposed, output_padding, conv.groups)
        if form.memory_format == torch.channels_last and self._better_planar():
            del self.planar_weight
            self.register_buffer(
                "planar_weight", self.weight.detach().clone(memory_format=torch.contiguous_format), False
            )

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < self.weight.dim():  # an image by itself
            return self(input.unsqueeze(0)).squeeze(0)
        if self.planar_weight is None or not _few_pixels(input):
            return frozen_convolution(input, self.weight, self.bias, *self.geometry)
        y = frozen_convolution(input.contiguous(), self.planar_weight, self.bias, *self.geometry)
        return y.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def refresh(self) -> None:
        super().refresh()
        if self.planar_weight is not None:
            self.planar_weight.copy_(self.weight)

    def _better_planar(self) -> bool:
        """Whether NCHW is faster than channels_last for images of few pixels: on a CPU, with many channels.

        The kernels work on a row of pixels at a time. For 512 channels of 4x4 pixels, NCHW takes 0.64 to 0.88 of the
        time with both conversions included (oneDNN 3.x, Zen 5, batch 32 to 256). From 6x6 pixels on, and for 256
        channels, it takes longer.
        """
        weight, (stride, _, _, transposed, *_) = self.weight, self.geometry
        if weight.device.type != "cpu" or weight.dim() != 4 or min(weight.shape[:2]) < 512:
            return False
        return weight.shape[2] > 1 and max(stride) == 1 and not transposed

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.weight.dtype}, {'shared' if self.shared else 'own'} weights"


class FrozenLinear(_Frozen):
    """A linear layer with constant weights."""

    def __init__(self, linear: nn.Linear, form: Form) -> None:
        super().__init__(linear, None, form)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)

    extra_repr = FrozenConv.extra_repr


def _few_pixels(x: Tensor) -> bool:
    """Whether images in channels_last have so few pixels that `FrozenConv` uses NCHW."""
    return max(x.shape[2:]) <= 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _padding(conv: Any) -> Sequence[int]:
    """The padding as numbers. `why_not` has checked that it is the same on both sides."""
    if conv.padding == "valid":
        return (0,) * len(conv.stride)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return conv.padding


def why_not(layer: Any) -> str | None:
    """Why `freeze` cannot freeze this layer; None if it can."""
    if type(layer) not in (*CONVOLUTIONS, nn.Linear):
        return f"{type(layer).__name__} is neither a convolution nor a linear layer of torch.nn"
    if has_hooks(layer):
        return "it has hooks"
    if isinstance(layer, nn.Linear):
        return None
    if layer.padding_mode != "zeros":
        return f"its padding is {layer.padding_mode!r}"
    if layer.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        return "its padding is not the same on both sides"
    return None


def why_not_fold(conv: Any, norm: Any) -> str | None:
    """Why `norm` cannot be folded into the (freezable) convolution before it; None if it can."""
    if type(norm) not in (*NORMS, Statistics):
        return f"{type(norm).__name__} is not a BatchNorm of torch.nn"
    if has_hooks(norm):
        return "it has hooks"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if type(conv) not in CONVOLUTIONS or conv.transposed:
        return f"it follows a {type(conv).__name__}"
    return None


def freeze(layer: nn.Module, norm: nn.Module | None, form: Form) -> nn.Module:
    """The frozen form of a layer for which `why_not` returns None; `norm` is folded into a convolution."""
    return FrozenLinear(layer, form) if isinstance(layer, nn.Linear) else FrozenConv(layer, norm, form)


def may_be_written(x: Any) -> bool:
    """Whether autograd lets an output be overwritten: a full backward hook on all modules passes it on as a view."""
    if torch.compiler.is_compiling():
        return True  # no hooks are there, and nothing is written in place
    return not type(getattr(x, "grad_fn", None)).__name__.startswith("BackwardHookFunction")


def has_hooks(module: Any) -> bool:
    """Whether the module has hooks, which a call runs besides its forward."""
    return any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
