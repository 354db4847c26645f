"""Dynamic ReLU: the maximum of a few lines, predicted for every sample and channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import dyrelu
from ..ops.checks import check_integer
from .checks import check_count, check_feature_map

fx.wrap("check_feature_map")
fx.wrap("dyrelu")


class DyReLU(nn.Module):
    """DyReLU-B (Chen et al., 2020): ``y[n, c] = max_k a[n, c, k] * x[n, c] + b[n, c, k]``.

    With ``t = 2 * sigmoid(fc2(relu(fc1(mean_p(x))))) - 1``, 2k numbers per channel, the slopes are
    ``a = (1, 0, ..., 0) + t[:, :, :k]`` and the intercepts ``b = 0.5 * t[:, :, k:]``. Names, normalisation and factors
    are those of Islanna/DynamicReLU (dyrelu.py, ``DyReLUB``). microsoft/DynamicHead uses a hard sigmoid instead.

    The SPARTA papers do not give k. DyReLU's paper uses 2; the sizes in the SPARTA papers' Table 6 imply 3.

    Args:
        channels: C of the input.
        k: how many lines, at most 8.
        reduction: fc1 has ``C // reduction`` outputs, and at least 1.

    Shapes:
        x ``(N, C, H, W)``, of the parameters' dtype -> y, of the same and in x's memory format.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(self, channels: int, *, k: int = 3, reduction: int = 4) -> None:
        super().__init__()
        check_count("DyReLU", "channels", channels)
        check_integer("DyReLU", "k", k, 1, 8)
        check_count("DyReLU", "reduction", reduction)
        self.channels, self.k, self.reduction = channels, k, reduction
        hidden = max(1, channels // reduction)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, 2 * k * channels)

    def reset_parameters(self) -> None:
        """Reinitialise every parameter."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("DyReLU", x, self.channels)
        t = 2 * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3)))))) - 1
        t = t.unflatten(1, (self.channels, 2, self.k))
        # No buffer for ReLU's own slopes: one that a checkpoint does not hold is garbage once it is read.
        slopes = torch.cat([1 + t[:, :, 0, :1], t[:, :, 0, 1:]], dim=-1)
        return dyrelu(x, slopes, 0.5 * t[:, :, 1])

    def extra_repr(self) -> str:
        return f"{self.channels}, k={self.k}, reduction={self.reduction}"
