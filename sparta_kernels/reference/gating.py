"""SPARTA's gate and the dynamic convolution, Conv5, that feeds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparta_kernels.reference.dtypes import computing_dtype


def conv5(spatial: Tensor, kernel: Tensor | None) -> Tensor:
    """s[n,p] = kernel[n] * spatial[n,p]: at K = 1 the dynamic Conv5 is one predicted scalar a sample."""
    return spatial if kernel is None else spatial * kernel[:, None, None, None]


def spread(s: Tensor, share: int, height: int, width: int) -> Tensor:
    """s[h // share, w // share] at every (h, w): Eq. 6's floor(p / N)."""
    return s.repeat_interleave(share, dim=2).repeat_interleave(share, dim=3)[:, :, :height, :width]


def gather(full: Tensor, share: int) -> Tensor:
    """The transpose of `spread`: the sum over every share x share block, cut off at the image's border."""
    n, c, height, width = full.shape
    rows, columns = -(-height // share), -(-width // share)
    padded = F.pad(full, (0, columns * share - width, 0, rows * share - height))
    return padded.reshape(n, c, rows, share, columns, share).sum(dim=(3, 5))


def gate(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None = None, share: int = 1) -> Tensor:
    """SPARTA's gate: Eq. 3, 5 and 8, and Eq. 6 where ``share > 1``.

        s[n,p]   = kernel[n] * spatial[n,p]
        phi      = sigmoid(s[n,p] * channel[n,c])
        y        = relu(x) * phi

    Args:
        x: ``(N, C, H, W)``, any floating dtype.
        spatial: ``(N, 1, ceil(H / share), ceil(W / share))``, any floating dtype.
        channel: ``(N, C)``, any floating dtype.
        kernel: ``(N,)``, any floating dtype, or None for ``s = spatial``.
        share: side of the square blocks of positions that share one spatial value.

    Returns:
        y ``(N, C, H, W)`` in the dtype of x.

    Differentiable by autograd; each gradient comes back in the dtype of its input. ``relu(nan)`` is nan.
    """
    work = computing_dtype(x.dtype)
    small = conv5(spatial.to(work), None if kernel is None else kernel.to(work))
    s = spread(small, share, x.shape[2], x.shape[3])
    phi = torch.sigmoid(s * channel.to(work)[:, :, None, None])
    y = torch.relu(x.to(work)) * phi
    return y.to(x.dtype)


def gate_backward(
    gy: Tensor, x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None = None, share: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient of `gate`: Eq. 4 written out for the gate's own inputs, itself differentiable by autograd.

        gx            = gy * phi * (x > 0)
        gz            = gy * relu(x) * phi * (1 - phi)
        gs[n,p]       = sum_c gz * channel[n,c]            and over each block where share > 1
        gchannel[n,c] = sum_p gz * s[n,p]
        gspatial      = gs * kernel[n]
        gkernel[n]    = sum_p gs * spatial[n,p]

    Args:
        gy: ``(N, C, H, W)``, the gradient with respect to y; the others as in `gate`.

    Returns:
        ``(gx, gspatial, gchannel, gkernel)`` in the shapes and dtypes of ``(x, spatial, channel, kernel)``;
        gkernel is None where kernel is.

    ReLU's derivative is torch's: 0 at x = 0 (the paper's Eq. 2 and 4 say 1), and a nan in x lets the gradient
    through. Where x <= 0, gx is exactly 0, whatever gy and phi are.
    """
    work = computing_dtype(x.dtype)
    gy_, x_, spatial_, channel_ = gy.to(work), x.to(work), spatial.to(work), channel.to(work)
    kernel_ = None if kernel is None else kernel.to(work)

    small = conv5(spatial_, kernel_)
    s = spread(small, share, x.shape[2], x.shape[3])
    phi = torch.sigmoid(s * channel_[:, :, None, None])

    # where(), not a product with the mask: a product would turn an infinite gy or a nan phi into nan.
    gx = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * phi)
    gz = gy_ * torch.relu(x_) * phi * (1 - phi)
    gs = gather((gz * channel_[:, :, None, None]).sum(dim=1, keepdim=True), share)
    gchannel = (gz * s).sum(dim=(2, 3))
    gspatial = conv5(gs, kernel_)
    gkernel = None if kernel is None else (gs * spatial_).sum(dim=(1, 2, 3)).to(kernel.dtype)
    return gx.to(x.dtype), gspatial.to(spatial.dtype), gchannel.to(channel.dtype), gkernel


def dynamic_conv(spatial: Tensor, kernel: Tensor) -> Tensor:
    """Conv5 with a separate kernel for every sample: K x K cross-correlation, one channel, zero padded.

        out[n,h,w] = sum_{i,j} kernel[n,i,j] * spatial[n, h + i - K//2, w + j - K//2]

    Args:
        spatial: ``(N, 1, H, W)``, any floating dtype.
        kernel: ``(N, K, K)`` with K odd, any floating dtype.

    Returns:
        ``(N, 1, H, W)`` in the dtype of spatial. Differentiable by autograd.
    """
    work = computing_dtype(spatial.dtype)
    height, width = spatial.shape[2:]
    size = kernel.shape[-1]
    padded = F.pad(spatial.to(work), (size // 2,) * 4)
    out = torch.zeros_like(spatial, dtype=work)
    for i in range(size):
        for j in range(size):
            tap = kernel[:, i, j].to(work)[:, None, None, None]
            out = out + tap * padded[:, :, i : i + height, j : j + width]
    return out.to(spatial.dtype)
