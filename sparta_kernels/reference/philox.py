"""Random numbers that belong to an image: functions of a seed and of its index in the data set alone."""

from __future__ import annotations

import torch
from torch import Tensor

PURPOSE_START = 0
PURPOSE_TARGET = 1
PURPOSE_AUGMENT = 2

_WORD = 0xFFFFFFFF  # the low 32 bits


def _multiply_32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit words. By 16-bit halves: the product overflows int64."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    low = a_low * b_low
    middle = a_low * b_high + a_high * b_low + (low >> 16)
    return a_high * b_high + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        counter: int64 ``(..., 4)``, words in ``[0, 2**32)``.
        key: int64 ``(..., 2)``, words in ``[0, 2**32)``; leading dimensions broadcast.

    Returns:
        int64 ``(..., 4)``, words in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply_32(0xD2511F53, c0)
        high1, low1 = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(seed: int, indices: Tensor, elements: int, purpose: int, restart: int) -> Tensor:
    """int64 ``(N, elements)``: one 32-bit word for every element of every image."""
    images = indices.to(torch.int64)
    key = torch.tensor([seed & _WORD, (seed >> 32) & _WORD], dtype=torch.int64, device=images.device)
    quad = torch.arange(-(-elements // 4), dtype=torch.int64, device=images.device)
    counter = torch.empty((len(images), len(quad), 4), dtype=torch.int64, device=images.device)
    counter[:, :, 0] = quad
    counter[:, :, 1] = purpose | restart << 8
    counter[:, :, 2] = (images & _WORD)[:, None]
    counter[:, :, 3] = ((images >> 32) & _WORD)[:, None]
    return philox4x32(counter, key).flatten(1)[:, :elements]


def uniform(seed: int, indices: Tensor, elements: int, purpose: int, restart: int = 0) -> Tensor:
    """Uniform numbers that depend on the image's index, not on its place in a batch.

    Philox4x32-10 with key ``(seed & 0xffffffff, seed >> 32)`` and counter ``(element // 4,
    purpose | restart << 8, index & 0xffffffff, index >> 32)``; the lane is ``element % 4``, and a word u
    becomes ``float32(u >> 8) * 2**-24``.

    Args:
        seed: in ``[0, 2**64)``.
        indices: ``(N,)`` integers, the images' indices in their data set.
        elements: how many numbers per image; element is the flat position in the ``(C, H, W)`` image.
        purpose: one of PURPOSE_START, PURPOSE_TARGET, PURPOSE_AUGMENT.
        restart: in ``[0, 2**24)``.

    Returns:
        float32 ``(N, elements)`` in ``[0, 1)``.
    """
    return (words(seed, indices, elements, purpose, restart) >> 8).to(torch.float32) * 2.0**-24
