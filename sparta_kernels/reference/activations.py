"""ReLU of a sum, and the activations that SPARTA is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.reference.dtypes import computing_dtype


def add_relu(a: Tensor, b: Tensor | None = None) -> Tensor:
    """The backbone's ``relu(a + b)``, or ``relu(a)``: the sum is rounded to its dtype before.

    Args:
        a: any shape and floating dtype.
        b: shape and dtype of a.

    Returns:
        Like a. Differentiable by autograd.
    """
    return torch.relu(a if b is None else a + b)


def swish_relu(x: Tensor) -> Tensor:
    """``relu(x) * sigmoid(x)``: Swish (Ramachandran et al., 2017) where x > 0, and 0 elsewhere.

    Args:
        x: any shape and floating dtype.

    Returns:
        y like x. Differentiable by autograd. ``relu(nan)`` is nan.
    """
    x_ = x.to(computing_dtype(x.dtype))
    return (torch.relu(x_) * torch.sigmoid(x_)).to(x.dtype)


def swish_relu_backward(gy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `swish_relu`, itself differentiable by autograd.

        gx = gy * phi * (1 + x * (1 - phi)) * (x > 0)        with phi = sigmoid(x)

    Returns:
        gx like x: exactly 0 where x <= 0, whatever gy is; a nan in x lets the gradient through.
    """
    work = computing_dtype(x.dtype)
    gy_, x_ = gy.to(work), x.to(work)
    phi = torch.sigmoid(x_)
    gx = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * (phi * (1 + x_ * (1 - phi))))
    return gx.to(x.dtype)


def _smooth_relu_terms(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x), beta and t = beta * relu(x), all in x's dtype. An infinite t counts as the largest number."""
    positive, beta = torch.relu(x), b.to(x.dtype).reshape(()).square()
    return positive, beta, (beta * positive).clamp(max=torch.finfo(x.dtype).max)


def smooth_relu(x: Tensor, b: Tensor) -> Tensor:
    """SmoothReLU: ReLU without its kink; it approaches ReLU as beta grows.

        y = x - log(beta * x + 1) / beta    where x > 0, else 0    with beta = b * b

    Computed as ``relu(x) * (1 - log1p(t) / t)`` with ``t = beta * relu(x)``: it is 0 at beta = 0, its limit there.

    Args:
        x: any shape and floating dtype.
        b: one element, any floating dtype.

    Returns:
        y like x. Differentiable by autograd. ``relu(nan)`` is nan, and inf stays inf.
    """
    positive, _, t = _smooth_relu_terms(x.to(computing_dtype(x.dtype)), b)
    divisor = torch.where(t == 0, torch.ones_like(t), t)
    return (positive * torch.where(t == 0, t, 1 - torch.log1p(t) / divisor)).to(x.dtype)


def smooth_relu_backward(gy: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `smooth_relu`, themselves differentiable by autograd.

        t  = beta * relu(x)
        gx = gy * t / (1 + t)                                             0 where x <= 0
        gb = 2 / b * sum gy * (log(1 + t) - t / (1 + t)) / beta           over x > 0; 0 where beta is

    Returns:
        ``(gx, gb)`` in the shapes and dtypes of ``(x, b)``.
    """
    work = computing_dtype(x.dtype)
    gy_, x_ = gy.to(work), x.to(work)
    _, beta, t = _smooth_relu_terms(x_, b)
    slope = t / (1 + t)
    gx = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * slope)
    none = beta == 0
    terms = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * (torch.log1p(t) - slope))
    divisor = torch.where(none, torch.ones_like(beta), beta * b.to(work).reshape(()))
    gb = torch.where(none, torch.zeros_like(beta), 2 * terms.sum() / divisor)
    return gx.to(x.dtype), gb.reshape(b.shape).to(b.dtype)


def _steepest(x: Tensor, slopes: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
    """The largest ``slopes[n,c,k] * x[n,c,...] + intercepts[n,c,k]``, and its k, the first of equals or NaN."""

    def line(k: int) -> Tensor:
        spread = (*slopes.shape[:2], *(1,) * (x.dim() - 2))
        return slopes[:, :, k].reshape(spread) * x + intercepts[:, :, k].reshape(spread)

    best = line(0)
    index = torch.zeros_like(best, dtype=torch.int64)
    for k in range(1, slopes.shape[2]):
        stays = (line(k) <= best) | best.isnan()
        best, index = torch.where(stays, best, line(k)), index.masked_fill(~stays, k)
    return best, index


def dyrelu(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    """Dynamic ReLU (Chen et al., 2020, Eq. 3): the maximum of K lines, which differ by sample and channel.

        y[n,c,p] = max over k of slopes[n,c,k] * x[n,c,p] + intercepts[n,c,k]

    Args:
        x: ``(N, C, ...)``, any floating dtype.
        slopes, intercepts: ``(N, C, K)``, any floating dtype.

    Returns:
        y like x. Differentiable by autograd; among equals the lowest k gets the gradient. NaN as in torch.max.
    """
    work = computing_dtype(x.dtype)
    return _steepest(x.to(work), slopes.to(work), intercepts.to(work))[0].to(x.dtype)


def dyrelu_backward(gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `dyrelu`, themselves differentiable by autograd. k* is the line that is the largest.

        gx                 = gy * slopes[n,c,k*]
        gslopes[n,c,k]     = sum_p gy * x where k* = k
        gintercepts[n,c,k] = sum_p gy where k* = k

    Returns:
        ``(gx, gslopes, gintercepts)`` in the shapes and dtypes of ``(x, slopes, intercepts)``.
    """
    work = computing_dtype(x.dtype)
    gy_, x_, slopes_ = gy.to(work), x.to(work), slopes.to(work)
    index = _steepest(x_, slopes_, intercepts.to(work))[1][..., None].flatten(2)  # (N, C, P)
    gx = gy_ * slopes_.gather(2, index).reshape(x.shape)

    def by_line(terms: Tensor) -> Tensor:
        flat = terms[..., None].flatten(2)
        chosen = [torch.where(index == k, flat, torch.zeros_like(flat)) for k in range(slopes.shape[2])]
        return torch.stack([part.sum(2) for part in chosen], dim=2)

    return gx.to(x.dtype), by_line(gy_ * x_).to(slopes.dtype), by_line(gy_).to(intercepts.dtype)
