"""ReLU with channel attention: squeeze-and-excitation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .checks import check_count, check_feature_map

fx.wrap("check_feature_map")


class SqueezeExcite(nn.Module):
    """``r = relu(x)``, ``y = r * sigmoid(fc2(relu(fc1(mean_p(r)))))``: ReLU, then the attention of Hu et al. (2018).

    It is related to SPARTA, with attention over channels and none over positions. The SPARTA papers name it without
    evaluating it.

    Args:
        channels: C of the input.
        reduction: fc1 has ``C // reduction`` outputs, and at least 1.

    Shapes:
        x ``(N, C, H, W)``, of the parameters' dtype -> y, of the same.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        check_count("SqueezeExcite", "channels", channels)
        check_count("SqueezeExcite", "reduction", reduction)
        self.channels, self.reduction = channels, reduction
        hidden = max(1, channels // reduction)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def reset_parameters(self) -> None:
        """Reinitialise every parameter."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("SqueezeExcite", x, self.channels)
        x = F.relu(x)
        attention = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * attention[:, :, None, None]

    def extra_repr(self) -> str:
        return f"{self.channels}, reduction={self.reduction}"
