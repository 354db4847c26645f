"""The compiled module, and how tensors are described to it: by address, dtype number and strides.

Call `kernels` and `place` as attributes of this module, not by imported names: tests replace them by the emulator's.
"""

from __future__ import annotations

from typing import Any

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


def scratch_size(kernel: str, place: tuple[int, int, int], *arguments: Any) -> int:
    """Bytes of scratch memory that a kernel wants from its caller: none on a CPU, where kernels allocate their own."""
    return 0 if place[1] < 0 else getattr(kernels, f"{kernel}_scratch")(*arguments)


def small(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype of a contiguous tensor."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def matrices(rows: Rows | None) -> tuple[int, int, int]:
    """Address, sample stride and row stride of an image batch."""
    return (0, 0, 0) if rows is None else (rows.tensor.data_ptr(), rows.sample_stride, rows.row_stride)


def address(tensor: Tensor | None) -> int:
    """That of a tensor whose dtype and layout the kernel knows; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(map(address, tensors))
