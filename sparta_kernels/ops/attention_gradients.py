"""The gradients of the attention network's weights, from the bits that its kernels save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparta_kernels.ops.attention_kernels import AttentionWeights

_ELEMENTS = 1 << 22  # of a hidden tensor that are in memory at a time, or as many as one sample has


def weight_gradients(
    x: Tensor,
    weights: AttentionWeights,
    bits: Tensor,
    means: Sequence[Tensor],
    ga: Tensor,
    gchannel: Tensor,
    gkernel: Tensor,
) -> list[Tensor | None]:
    """The gradients in the order of the weights, by a library's matrix products, a few samples at a time.

        v1 = gchannel w2 / P    v6 = gkernel w7 / P
        G1 = m1 v1    G6 = m6 v6    G3 = m3 (ga (x) w4 + w6^T G6)      m: the bit is set
        gw13 = sum (G1, G3) x^T     gw6 = sum G6 h3^T                  gw4 = sum ga h3
        gw2 = gchannel^T mean(h1)   gw7 = gkernel^T mean(h6)

    h3 is recomputed; everything is in float32 (float64 for float64).
    """
    mean1, mean6 = means
    work, hidden, pixels = mean1.dtype, weights.hidden, x.shape[2] * x.shape[3]
    w13, b13, w4, w2 = (weight.detach().to(work) for weight in (weights.w13, weights.b13, weights.w4, weights.w2))
    w6, w7 = (None if weight is None else weight.detach().to(work) for weight in (weights.w6, weights.w7))
    w3, b3 = w13[hidden:], b13[hidden:]
    ga, gchannel, gkernel = ga.to(work), gchannel.to(work), gkernel.to(work)
    v1 = gchannel @ w2 / pixels
    v6 = None if w7 is None else torch.outer(gkernel, w7 / pixels)
    gw13, gb13, gw4 = torch.zeros_like(w13), torch.zeros_like(b13), torch.zeros_like(w4)
    gw6, gb6 = (None, None) if w6 is None else (torch.zeros_like(w6), torch.zeros_like(w4))

    for part in _parts(x.shape[0], pixels * hidden):
        rows = x[part].flatten(2).transpose(1, 2).to(work)  # (n, P, C)
        m1, m3, *m6 = hidden_bits(bits[part], hidden).unbind(2)
        h3 = torch.relu(rows @ w3.t() + b3)
        ga_rows = ga[part].flatten(1)[..., None]
        g3 = ga_rows * w4
        if w6 is not None and v6 is not None and gw6 is not None and gb6 is not None:
            g6 = _where(m6[0], v6[part][:, None])
            g3 += g6 @ w6
            gw6 += torch.einsum("npi,npj->ij", g6, h3)
            gb6 += g6.sum((0, 1))
        g13 = torch.cat((_where(m1, v1[part][:, None]), _where(m3, g3)), 2)
        gw13 += torch.einsum("npi,npj->ij", g13, rows)
        gb13 += g13.sum((0, 1))
        gw4 += (ga_rows * h3).sum((0, 1))

    gw2, gb2 = gchannel.t() @ mean1, gchannel.sum(0)
    gw7 = None if w6 is None else gkernel @ mean6
    return [gw13, gb13, gw4, ga.sum().view(1), gw2, gb2, gkernel.sum().view(1), gw6, gb6, gw7]


def _parts(samples: int, elements: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(1, elements))
    return (slice(first, first + step) for first in range(0, samples, step))


def _where(mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))


def hidden_bits(bits: Tensor, hidden: int) -> Tensor:
    """(n, P, masks, Co): whether the bit is set."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :hidden].bool()
