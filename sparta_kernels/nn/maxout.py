"""MaxOut over channels."""

from __future__ import annotations

from torch import Tensor, fx, nn

from .checks import check_count, check_feature_map

fx.wrap("check_feature_map")


class MaxOut(nn.Module):
    """The maximum of k learned linear functions of a position's channels (Goodfellow et al., 2013).

    ``y[n, c, h, w] = max_i (W_i x[n, :, h, w] + b_i)[c]``, as one 1x1 convolution C -> k * C, whose channels
    ``i * C .. (i + 1) * C - 1`` are the i-th function's.

    DyReLU is related: its functions are one multiplication per channel, but differ between samples. The SPARTA papers
    name MaxOut without evaluating it.

    Args:
        channels: C of the input.
        k: how many functions.

    Shapes:
        x ``(N, C, H, W)``, of the parameters' dtype -> y, of the same.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(self, channels: int, *, k: int = 2) -> None:
        super().__init__()
        check_count("MaxOut", "channels", channels)
        check_count("MaxOut", "k", k)
        self.channels, self.k = channels, k
        self.conv = nn.Conv2d(channels, k * channels, 1)

    def reset_parameters(self) -> None:
        """Reinitialise every parameter."""
        self.conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("MaxOut", x, self.channels)
        return self.conv(x).unflatten(1, (self.k, self.channels)).amax(1)

    def extra_repr(self) -> str:
        return f"{self.channels}, k={self.k}"
