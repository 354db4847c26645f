"""SPARTA as an attack runs it: BatchNorm folded, weights constant, a bit instead of a hidden tensor for each ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.relu import add_relu, add_relu_fork
from .frozen import Form, freeze
from .gating import conv5_and_gate

if TYPE_CHECKING:
    from .sparta import Sparta


class _PixelMean(Function):
    """The mean over pixels. torch's own writes out the gradient of every pixel, though all are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


class FrozenSparta(nn.Module):
    """The function of a `Sparta` in eval mode, differentiable in x alone; shapes as there.

    ``forward(x, skip)`` is the function of ``x + skip``, and may overwrite x: what it stands behind in a residual
    network is the output of a convolution that nobody else reads.
    """

    takes_skip = True

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
        self.eval()

    def refresh(self) -> None:
        """Take over where the static kernel lies now; the layers have a `refresh` of their own."""
        if not self.dynamic:
            self.conv5.data = self._source[0].conv5.detach()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x.to(self.conv1.weight.dtype)  # type: ignore[arg-type]
        if skip is not None:
            alike = isinstance(skip, Tensor) and skip.dtype == x.dtype and skip.shape == x.shape
            x = x.add_(skip) if alike else x + skip
        h1 = add_relu(self.conv1(x), inplace=True)
        if self.kernel_size == 1:
            channel = self.conv2(_PixelMean.apply(h1)).flatten(1)
        else:
            channel = _PixelMean.apply(self.conv2(h1)).flatten(1)

        if self.dynamic:
            h3, h3_again = add_relu_fork(self.conv3(x), inplace=True)
            h6 = add_relu(self.conv6(h3_again), inplace=True)
            kernel = self.predict(_PixelMean.apply(h6).flatten(1))
        else:
            h3 = add_relu(self.conv3(x), inplace=True)
            kernel = self.conv5.flatten().expand(x.shape[0], -1)
        spatial = self.conv4(h3)

        return conv5_and_gate(x, spatial, channel, kernel, self.kernel_size, self.share)
