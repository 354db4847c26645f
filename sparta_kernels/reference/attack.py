"""The attack: its start, its targets and its step."""

from __future__ import annotations

import torch
from torch import Tensor

from sparta_kernels.reference.dtypes import computing_dtype
from sparta_kernels.reference.philox import PURPOSE_START, PURPOSE_TARGET, uniform, words


def pgd_start(
    clean: Tensor,
    indices: Tensor,
    *,
    eps: float,
    seed: int = 0,
    restart: int = 0,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """A start drawn uniformly from the eps ball (Madry et al., 2018), reproducible image by image.

        adv = clamp(clean + (2 * u - 1) * eps, lower, upper)

    Args:
        clean: ``(N, C, H, W)``, images in pixel units, any floating dtype.
        indices: ``(N,)`` integers, see `uniform`; u is drawn with PURPOSE_START.
        eps: radius in pixel units.

    Returns:
        adv, like clean. Computed in float64 for float64 images, else in float32, without fused multiply-add.
    """
    work = computing_dtype(clean.dtype)
    u = uniform(seed, indices, clean[:1].numel(), PURPOSE_START, restart)
    radius, low, high = (torch.tensor(v, dtype=work, device=clean.device) for v in (eps, lower, upper))
    noise = (2 * u.to(clean.device, work) - 1) * radius
    return torch.clamp(clean.to(work) + noise.reshape(clean.shape), low, high).to(clean.dtype)


def pgd_targets(labels: Tensor, classes: int, indices: Tensor, *, seed: int = 0, restart: int = 0) -> Tensor:
    """A wrong class for every image, uniform over the others: ``(label + U{1..classes-1}) mod classes``.

    The offset is ``1 + ((u * (classes - 1)) >> 32)`` with u the word of element 0 for PURPOSE_TARGET.

    Args:
        labels: ``(N,)`` integers in ``[0, classes)``.
        classes: at least 2.
        indices: ``(N,)`` integers, see `uniform`.

    Returns:
        int64 ``(N,)`` on the device of labels.
    """
    u = words(seed, indices, 1, PURPOSE_TARGET, restart)[:, 0].to(labels.device)
    offset = 1 + ((u * (classes - 1)) >> 32)
    return (labels.to(torch.int64) + offset) % classes


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
    targeted: bool = True,
) -> Tensor:
    """One step of projected gradient descent in the L-inf ball, in torchattacks' order of operations.

        a   = adv - step_size * sign(grad)        (+ if not targeted)
        d   = clamp(a - clean, -eps, eps)
        adv = clamp(clean + d, lower, upper)

    Args:
        adv, grad, clean: of one shape, any floating dtype; grad is of the summed loss.
        step_size, eps, lower, upper: in pixel units; rounded to the computing dtype first.
        targeted: step down the loss (towards a target) or up (away from the label).

    Returns:
        The next iterate, like adv. Computed in float64 for a float64 adv, else in float32, every operation
        rounded by itself (no fused multiply-add), and rounded once to the dtype of adv.
    """
    work = computing_dtype(adv.dtype)
    step, radius, low, high = (torch.tensor(v, dtype=work, device=adv.device) for v in (step_size, eps, lower, upper))
    clean_ = clean.to(work)
    move = step * torch.sign(grad.to(work))
    a = adv.to(work) - move if targeted else adv.to(work) + move
    d = torch.clamp(a - clean_, -radius, radius)
    return torch.clamp(clean_ + d, low, high).to(adv.dtype)
