"""Select TF32 or exact float32 products on a GPU through torch's settings, and restore these afterwards.

torch has two names for each setting: `allow_tf32` with `set_float32_matmul_precision`, and the newer `fp32_precision`.
Kernels obey the newer one. Once it disagrees with the older ones, reading these is an error (in torch.compile too), so
the older ones are written as well wherever they can be read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_MATMUL: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn
_NEWER: tuple[Any, ...] = (_MATMUL, _CUDNN.conv, _CUDNN.rnn)
_ALSO_WRITTEN: tuple[Any, ...] = (_MKLDNN.matmul,)  # by set_float32_matmul_precision


class _Older(NamedTuple):
    """A setting's older name."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    values: tuple[str | bool, str | bool]  # exact, TF32


_OLDER = (  # in the order in which they are to be restored: the first one tells "high" from "medium"
    _Older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest", "high")),
    _Older(lambda: _MATMUL.allow_tf32, lambda value: setattr(_MATMUL, "allow_tf32", value), (False, True)),
    _Older(lambda: _CUDNN.allow_tf32, lambda value: setattr(_CUDNN, "allow_tf32", value), (False, True)),
)
_Settings = tuple[list[Any], list[str]]  # of `_OLDER`, None where one cannot be read, and of `_NEWER + _ALSO_WRITTEN`

_lock = threading.Lock()
_asked: list[bool] = []  # by everybody, in any thread, who is computing: whether in TF32
_before: _Settings = [], []


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Compute a GPU's float32 products in TF32, or exactly, within the block.

    torch's settings hold for the process. If several threads compute, the one that entered last decides for all of
    them; the settings are restored when the last one leaves.
    """
    global _before
    with _lock:
        if not _asked:
            _before = _read()
        _asked.append(tf32)
        _compute_in(tf32)
    try:
        yield
    finally:
        with _lock:
            _asked.reverse()
            _asked.remove(tf32)  # the last one
            _asked.reverse()
            if _asked:
                _compute_in(_asked[-1])
            else:
                _restore(_before)


def _compute_in(tf32: bool) -> None:
    if all(_is_tf32(product) == tf32 for product in _NEWER):
        return
    for setting in _OLDER:
        wanted = setting.values[tf32]
        if _read_older(setting) not in (None, wanted):
            setting.write(wanted)
    for product in _NEWER:
        if _is_tf32(product) != tf32:
            product.fp32_precision = "tf32" if tf32 else "ieee"


def _is_tf32(product: Any) -> bool:
    return product.fp32_precision == "tf32"


def _read_older(setting: _Older) -> Any:
    try:
        return setting.read()
    except RuntimeError:  # it was set by its newer name, and torch does not translate
        return None


def _read() -> _Settings:
    return [_read_older(setting) for setting in _OLDER], [setting.fp32_precision for setting in _NEWER + _ALSO_WRITTEN]


def _restore(before: _Settings) -> None:
    older, newer = before
    for setting, value in zip(_OLDER, older, strict=True):
        if value is not None and _read_older(setting) != value:
            setting.write(value)
    for product, precision in zip(_NEWER + _ALSO_WRITTEN, newer, strict=True):
        if product.fp32_precision != precision:
            product.fp32_precision = precision
