"""Small Spartas and what they are called with, in float64, for the tests of the modules."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.nn import Sparta

SHAPE = (3, 6, 5, 7)
# Those whose attention the kernels compute as a whole.
WHOLE = [{}, {"hidden": 19}, {"share": 2}, {"dynamic": False}, {"dynamic": False, "share": 3, "hidden": 1}]
CONFIGURATIONS = [
    {},
    {"hidden": 3},
    {"share": 2},
    {"share": 16},
    {"dynamic": False},
    {"dynamic": False, "share": 3},
    {"kernel_size": 3},
    {"kernel_size": 3, "hidden": 4, "share": 2},
    {"kernel_size": 3, "dynamic": False},
    {"kernel_size": 5},
]


def build(channels: int = 6, dtype: torch.dtype = torch.float64, **arguments: object) -> Sparta:
    """A Sparta with every parameter and statistic away from its start, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(1)
    module = Sparta(channels, **arguments).to(dtype)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
