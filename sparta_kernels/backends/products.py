"""The matrix products that the CPU kernels call: oneDNN's brgemm and BLAS's dgemm, as bundled with torch.

torch compiles its own code against these functions of libtorch_cpu (``at::native::cpublas``), but they are not a public
API. So they are looked up by mangled name, which includes the arguments, and tested before use. If one is missing or
computes something else, the kernels that need it are not used.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from sparta_kernels.backends.extension import DTYPES, kernels

_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPK{}Pfb"
_NAMES = (
    _BRGEMM.format("fS3_"),  # float32
    _BRGEMM.format("N3c108BFloat16ES5_"),
    "_ZN2at6native7cpublas14brgemm_releaseEb",
    "dgemm_",
)


@lru_cache
def available() -> frozenset[torch.dtype]:
    """The dtypes whose products work on this machine."""
    try:
        library = ctypes.CDLL("libtorch_cpu.so")  # the one that is loaded
    except OSError:
        return frozenset()
    found: list[Any] = [getattr(library, name, None) for name in _NAMES]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]
    if addresses[2] == 0:
        addresses[0] = addresses[1] = 0
    kernels.set_products(addresses)
    switches: Any = torch.backends.mkldnn
    before = switches.enabled
    switches.enabled = True  # as it will be where it counts: the answer is kept
    try:
        return frozenset(dtype for dtype in (torch.float64, torch.float32, torch.bfloat16) if _right(dtype))
    finally:
        switches.enabled = before


def in_pairs(matrix: torch.Tensor) -> torch.Tensor:
    """A bfloat16 matrix as the right operand of a product: rows interleaved in pairs, a zero row after an odd last."""
    if matrix.shape[0] % 2:
        matrix = torch.nn.functional.pad(matrix, (0, 0, 0, 1))
    return matrix.unflatten(0, (-1, 2)).transpose(1, 2).contiguous()


def out_of_pairs(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of `in_pairs`; keeps the zero row after an odd last one."""
    return matrix.transpose(1, 2).flatten(0, 1).contiguous() if matrix.numel() else matrix


def _right(dtype: torch.dtype) -> bool:
    """Whether a product of small integers, which every dtype represents exactly, is correct."""
    # In numpy: whatever mode torch is in does not matter.
    a = (np.arange(5 * 18) % 7 - 3.0).reshape(5, 18)
    b = (np.arange(18 * 33) % 5 - 2.0).reshape(18, 33)
    left, right = (_in_memory(matrix, dtype) for matrix in (a, b))
    if dtype == torch.bfloat16:
        right = np.ascontiguousarray(right.reshape(9, 2, 33).transpose(0, 2, 1))  # as `in_pairs`
    c = np.full((5, 33), np.nan, np.float64 if dtype == torch.float64 else np.float32)
    try:
        kernels.multiply(DTYPES[dtype], 5, 33, 18, left.ctypes.data, right.ctypes.data, c.ctypes.data)
    except RuntimeError:
        return False
    return bool((c == a @ b).all())


def _in_memory(matrix: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    if dtype == torch.float64:
        return matrix
    single = matrix.astype(np.float32)
    return (single.view(np.uint32) >> 16).astype(np.uint16) if dtype == torch.bfloat16 else single
