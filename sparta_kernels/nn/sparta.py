"""SPARTA as a module: the attention network (DSCANet) and the gate that it feeds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import sparta_activation
from .checks import check_count, check_feature_map
from .frozen import Form
from .frozen_sparta import FrozenSparta
from .gating import conv5_and_gate
from .recomputed import attention_in_training
from .whole import folded, is_one_operation


class Sparta(nn.Module):
    """Spatially attentive, adversarially robust activation: ``y = relu(x) * sigmoid(s (x) c)`` (Eq. 3, 5, 8).

    The papers' Fig. 2 gives the convolutions and their sizes. Normalisation, inner ReLUs and pooling are our
    interpretation. With P = H * W positions, C = channels, Co = hidden and K = kernel_size:

        CANet   h1 = relu(bn1(conv1(x)))  C -> Co    c = conv2(mean_p(h1))            Co -> C
        SANet   h3 = relu(bn3(conv3(x)))  C -> Co    a = conv4(h3)                    Co -> 1
        DPNet   h6 = relu(bn6(conv6(h3))) Co -> Co   kernel = predict(mean_p(h6))     Co -> K*K
        s = conv5(a; kernel), a K x K convolution with each sample's own kernel

    Args:
        channels: C of the input.
        hidden: Co; by default min(256, channels) at kernel_size 1 (the later paper), else channels (the
            earlier one).
        kernel_size: K, odd. At 3 the convolutions are 3x3 and padded, and conv2 runs before the mean.
        dynamic: False for "SPARTA-w/o-DPNet": Conv5 is one learned kernel, the parameter ``conv5 (K, K)``,
            and there are no conv6, bn6 and predict.
        share: N of Eq. 6: blocks of N x N positions (smaller at the border) share the mean of their s.

    Shapes:
        x ``(N, C, H, W)``, float64, float32, bfloat16 or float16 -> y, of x's shape, dtype and memory format.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    conv5: nn.Parameter  # only where dynamic is False

    def __init__(
        self,
        channels: int,
        *,
        hidden: int | None = None,
        kernel_size: int = 1,
        dynamic: bool = True,
        share: int = 1,
    ) -> None:
        super().__init__()
        check_count("Sparta", "channels", channels)
        check_count("Sparta", "kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"Sparta: kernel_size must be odd, got {kernel_size}")
        if hidden is None:
            hidden = min(256, channels) if kernel_size == 1 else channels
        check_count("Sparta", "hidden", hidden)
        if not isinstance(dynamic, bool):
            raise TypeError(f"Sparta: dynamic must be True or False, got {dynamic!r}")
        check_count("Sparta", "share", share)
        self.channels, self.hidden, self.kernel_size = channels, hidden, kernel_size
        self.dynamic, self.share = dynamic, share

        def conv(c_in: int, c_out: int) -> nn.Conv2d:
            return nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2)

        self.conv1, self.bn1 = conv(channels, hidden), nn.BatchNorm2d(hidden)
        self.conv2 = conv(hidden, channels)
        self.conv3, self.bn3 = conv(channels, hidden), nn.BatchNorm2d(hidden)
        self.conv4 = conv(hidden, 1)
        if dynamic:
            self.conv6, self.bn6 = conv(hidden, hidden), nn.BatchNorm2d(hidden)
            self.predict = nn.Linear(hidden, kernel_size**2)
        else:
            self.conv5 = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise every parameter and reset the running statistics."""
        # The convolutions that a BatchNorm and a ReLU follow keep the variance (He et al., 2015). conv2 and
        # conv4 keep torch's default, whose small outputs put phi near 1/2, where the sigmoid is steepest.
        # Conv5 begins near the identity: it multiplies a and c, and at 0 would leave both without a gradient.
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        for module in (self.conv1, self.conv3, *((self.conv6,) if self.dynamic else ())):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        kernel = self.predict.bias if self.dynamic else self.conv5
        with torch.no_grad():
            kernel.zero_().view(-1)[self.kernel_size**2 // 2] = 1

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("Sparta", x, self.channels)
        if is_one_operation(self, x):
            return sparta_activation(x, folded(self), share=self.share)
        found = attention_in_training(self, x)
        if found is not None:
            return conv5_and_gate(x, *found, self.kernel_size, self.share)
        h1 = F.relu(self.bn1(self.conv1(x)))
        if self.kernel_size == 1:
            channel = self.conv2(h1.mean((2, 3), keepdim=True)).flatten(1)
        else:
            channel = self.conv2(h1).mean((2, 3))

        h3 = F.relu(self.bn3(self.conv3(x)))
        spatial = self.conv4(h3)

        if self.dynamic:
            h6 = F.relu(self.bn6(self.conv6(h3)))
            kernel = self.predict(h6.mean((2, 3)))
        else:
            kernel = self.conv5.flatten().expand(x.shape[0], -1)

        return conv5_and_gate(x, spatial, channel, kernel, self.kernel_size, self.share)

    def prepare_for_attack(self, form: Form) -> FrozenSparta:
        """The module that `attack.prepare` replaces this one by."""
        return FrozenSparta(self, form)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, hidden={self.hidden}, kernel_size={self.kernel_size}, "
            f"dynamic={self.dynamic}, share={self.share}"
        )
