"""The precision of the reference."""

from __future__ import annotations

import torch


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a function computes in for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
