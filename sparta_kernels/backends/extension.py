"""The compiled module, and how it is told of tensors: by address, number of the dtype, and strides.

`kernels` and `place` are read where they are called, as attributes of this module: tests put the emulator's in their
place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.backends.layout import Rows

try:
    from sparta_kernels import _native
except ImportError as error:
    raise ImportError(
        "sparta_kernels is not installed correctly: its compiled module sparta_kernels._native could not be loaded "
        f"({error}). Install the package with `pip install .` from its source folder, and run from another folder"
    ) from error

kernels = _native

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def place(tensor: Tensor) -> tuple[int, int, int]:
    """Where a kernel runs: CPU threads, and the CUDA device (-1: the CPU) and its stream."""
    if tensor.device.type == "cpu":
        return torch.get_num_threads(), -1, 0
    device = tensor.device.index
    return 1, device, torch._C._cuda_getCurrentRawStream(device)


def small(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def matrices(rows: Rows) -> tuple[int, int, int]:
    return rows.tensor.data_ptr(), rows.sample_stride, rows.row_stride


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
