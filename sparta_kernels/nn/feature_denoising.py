"""Feature denoising as an activation: ReLU plus a non-local mean of the feature map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .checks import check_count, check_feature_map

fx.wrap("check_feature_map")


class FeatureDenoising(nn.Module):
    """ReLU and the denoising block of Xie et al. (2019): ``y = r + bn(conv(m))``, ``r = relu(x)``.

    m is the non-local mean in its embedded Gaussian form: with ``t = theta(r)`` and ``p = phi(r)``, both of C'
    channels, ``m[:, i] = sum_j softmax_j(t[:, i] . p[:, j] / sqrt(C')) r[:, j]`` over the positions i and j of an
    image. All three convolutions are 1x1 and have no biases.

    This follows facebookresearch/ImageNet-Adversarial-Training (resnet_model.py, ``denoising`` and ``non_local_op``),
    down to the division by sqrt(C') and the initialisation: theta and phi from a normal distribution of deviation 0.01,
    bn's weight 0, so that a new module is a ReLU. There the block follows the last residual block of every group. The
    SPARTA papers only say "equipping"; replacing a block's last ReLU, at their sites, puts it in that same place.

    Every position is compared with every other. Time grows with (H * W) squared, and so does memory where torch has no
    fused attention.

    Args:
        channels: C of the input.
        hidden: C'; by default half of C, at least 1.

    Shapes:
        x ``(N, C, H, W)``, of the parameters' dtype -> y, of the same.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(self, channels: int, *, hidden: int | None = None) -> None:
        super().__init__()
        check_count("FeatureDenoising", "channels", channels)
        if hidden is None:
            hidden = max(1, channels // 2)
        check_count("FeatureDenoising", "hidden", hidden)
        self.channels, self.hidden = channels, hidden
        self.theta = nn.Conv2d(channels, hidden, 1, bias=False)
        self.phi = nn.Conv2d(channels, hidden, 1, bias=False)
        self.conv, self.bn = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise every parameter and reset the running statistics."""
        for embedding in (self.theta, self.phi):
            nn.init.normal_(embedding.weight, std=0.01)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn.reset_parameters()
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("FeatureDenoising", x, self.channels)
        x = F.relu(x)
        theta, phi = _positions_first(self.theta(x)), _positions_first(self.phi(x))
        mean = F.scaled_dot_product_attention(theta, phi, _positions_first(x))
        mean = mean.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.bn(self.conv(mean))

    def extra_repr(self) -> str:
        return f"{self.channels}, hidden={self.hidden}"


def _positions_first(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H * W, C): one head of attention over the positions."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
