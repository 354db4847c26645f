"""The end of every form of SPARTA: Conv5 with the predicted kernel, and the gate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops import dynamic_conv, sparta_gate


def conv5_and_gate(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor, kernel_size: int, share: int) -> Tensor:
    """``relu(x) * sigmoid(s (x) c)`` with ``s = conv5(spatial; kernel)`` (Eq. 3, 5, 6, 8).

    Args:
        x: ``(N, C, H, W)``.
        spatial: ``(N, 1, H, W)``.
        channel: ``(N, C)``.
        kernel: ``(N, kernel_size * kernel_size)``, each sample's own.
        share: blocks of share x share positions have the mean of their s.
    """
    factor: Tensor | None = None
    if kernel_size == 1:
        factor = kernel[:, 0]  # the gate applies it: a factor commutes with the mean below
    else:
        spatial = dynamic_conv(spatial, kernel.unflatten(1, (kernel_size, kernel_size)))
    if share > 1:
        spatial = F.avg_pool2d(spatial, share, ceil_mode=True)
    return sparta_gate(x, spatial, channel, factor, share=share)
