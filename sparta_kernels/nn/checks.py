"""Checks that the modules share, beside those of `sparta_kernels.ops.checks`."""

from __future__ import annotations

from torch import Tensor

from ..ops.checks import check_integer, check_tensor


def check_count(where: str, name: str, value: object) -> None:
    """A positive int."""
    check_integer(where, name, value, 1, 2**31 - 1)


def check_feature_map(where: str, x: Tensor, channels: int) -> None:
    """A floating tensor (N, channels, H, W)."""
    check_tensor(where, "x", x)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{where}: x must have shape (N, {channels}, H, W), got {tuple(x.shape)}")
