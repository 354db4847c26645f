"""SPARTA for attacks: BatchNorm folded, weights constant, and bits saved for the ReLUs instead of hidden tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..backends.layout import is_gapless
from ..ops.attention import activate
from ..ops.attention_kernels import AttentionWeights, Packed, fused_backend, pack
from ..ops.relu import add_relu, add_relu_fork
from .frozen import Form, freeze, may_be_written
from .gating import conv5_and_gate
from .whole import can_be_folded, folded

if TYPE_CHECKING:
    from .sparta import Sparta


class _PixelMean(Function):
    """The mean over pixels. Its gradient is expanded; torch's own materialises it, though all pixels' are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


class FrozenSparta(nn.Module):
    """A `Sparta` in eval mode, differentiable in x alone; shapes as there.

    ``forward(x, skip)`` computes it for ``x + skip``, and may overwrite x, which in a residual network is the output of
    a convolution without other consumers.
    """

    takes_skip = True
    forks = True

    def __init__(self, sparta: Sparta, form: Form) -> None:
        super().__init__()
        self.kernel_size, self.dynamic, self.share = sparta.kernel_size, sparta.dynamic, sparta.share
        self.conv1 = freeze(sparta.conv1, sparta.bn1, form)
        self.conv2 = freeze(sparta.conv2, None, form)
        self.conv3 = freeze(sparta.conv3, sparta.bn3, form)
        self.conv4 = freeze(sparta.conv4, None, form)
        if sparta.dynamic:
            self.conv6 = freeze(sparta.conv6, sparta.bn6, form)
            self.predict = freeze(sparta.predict, None, form)
        else:
            self.conv5 = nn.Parameter(sparta.conv5.detach(), requires_grad=False)
        self._source = (sparta,)
        self._whole: AttentionWeights | None = self._folded() if can_be_folded(sparta) else None
        self._packed: dict[tuple[str, torch.dtype], Packed] = {}
        self.eval()

    def refresh(self) -> None:
        """Update to the current weights, in place; the layers have a `refresh` of their own."""
        if not self.dynamic:
            self.conv5.data = self._source[0].conv5.detach()
        if self._whole is None:
            return
        self._whole = self._folded()
        for (backend, dtype), packed in self._packed.items():
            now = pack(self._whole, dtype, backend)
            if all(mine.shape == other.shape for mine, other in zip(packed.tensors, now.tensors, strict=True)):
                for mine, other in zip(packed.tensors, now.tensors, strict=True):
                    mine.copy_(other)
            else:  # packed for other products: torch.backends.mkldnn has been switched
                packed.tensors[:] = now.tensors

    def _folded(self) -> AttentionWeights:
        with torch.inference_mode(False), torch.no_grad():
            weights: Any = (None if weight is None else weight.clone() for weight in folded(self._source[0]))
            return AttentionWeights(*weights)

    def _one_operation(self, x: Tensor) -> tuple[AttentionWeights, Packed] | None:
        """The weights for the whole activation as one operation; None if there are no kernels for x."""
        if self._whole is None or x.device != self._whole.w4.device:
            return None
        backend, _ = fused_backend(x, self._whole.hidden)
        if not backend:
            return None
        key = backend, x.dtype
        if key not in self._packed:
            self._packed[key] = pack(self._whole, x.dtype, backend)
        return self._whole, self._packed[key]

    def forward(self, x: Tensor, skip: Tensor | None = None, *, twice: bool = False) -> Any:
        """With `twice`, return y twice for two consumers, in the same memory: write into neither."""
        x = x.to(self.conv1.weight.dtype)  # type: ignore[arg-type]
        whole = self._one_operation(x)
        if skip is not None:
            alike = isinstance(skip, Tensor) and skip.dtype == x.dtype and skip.shape == x.shape
            alike = alike and skip.device == x.device and not (x.is_leaf and x.requires_grad) and may_be_written(x)
            if whole is not None and alike and skip.stride() == x.stride() and is_gapless(x):
                return activate(x, *whole, self.share, skip=skip, twice=twice)
            x = x.add_(skip) if alike else x + skip
        if whole is not None:
            return activate(x, *whole, self.share, twice=twice)
        y = self._layer_by_layer(x)
        return (y, y) if twice else y

    def _layer_by_layer(self, x: Tensor) -> Tensor:
        h1 = _relu(self.conv1(x))
        if self.kernel_size == 1:
            channel = self.conv2(_PixelMean.apply(h1)).flatten(1)
        else:
            channel = _PixelMean.apply(self.conv2(h1)).flatten(1)

        if self.dynamic:
            h3 = self.conv3(x)
            h3, h3_again = add_relu_fork(h3, inplace=may_be_written(h3))
            h6 = _relu(self.conv6(h3_again))
            kernel = self.predict(_PixelMean.apply(h6).flatten(1))
        else:
            h3 = _relu(self.conv3(x))
            kernel = self.conv5.flatten().expand(x.shape[0], -1)
        spatial = self.conv4(h3)

        return conv5_and_gate(x, spatial, channel, kernel, self.kernel_size, self.share)


def _relu(x: Tensor) -> Tensor:
    """Of a layer's output, in its memory where that is allowed."""
    return add_relu(x, inplace=may_be_written(x))
