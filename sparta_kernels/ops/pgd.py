"""pgd_step_ and pgd_start_: the attack's elementwise operations, in place, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparta_kernels import backends, reference
from sparta_kernels.ops.checks import (
    check_bounds,
    check_images,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
)
from sparta_kernels.ops.library import register


def _step(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    signed_step: float,
    eps: float,
    lower: float,
    upper: float,
    backend: str,
) -> None:
    increment_version(adv)  # so that autograd notices a write into what it saved
    backends.module_for(backend, "pgd_step", adv).pgd_step(adv, grad, clean, signed_step, eps, lower, upper)


def _start(
    adv: Tensor,
    clean: Tensor,
    indices: Tensor,
    eps: float,
    seed: int,
    restart: int,
    lower: float,
    upper: float,
    backend: str,
) -> None:
    increment_version(adv)
    backends.module_for(backend, "pgd_start", adv).pgd_start(adv, clean, indices, eps, seed, restart, lower, upper)


def _nothing(*_: object) -> None:
    """The fake of an operation that only writes into its argument."""


register(
    "_pgd_step_(Tensor(a!) adv, Tensor grad, Tensor clean, float signed_step, float eps, float lower, float upper, "
    "str backend) -> ()",
    _step,
    _nothing,
)
register(
    "_pgd_start_(Tensor(a!) adv, Tensor clean, Tensor indices, float eps, int seed, int restart, float lower, "
    "float upper, str backend) -> ()",
    _start,
    _nothing,
)


def _check_pair(operation: str, adv: Tensor, name: str, other: Tensor) -> None:
    """`other` must match adv, the tensor that is written, in everything but its strides."""
    check_tensor(operation, name, other, adv)
    check_shape(operation, name, other, "of adv", tuple(adv.shape))
    if other.dtype != adv.dtype:
        raise TypeError(f"{operation}: {name} must have adv's dtype {adv.dtype}, got {other.dtype}")


def _check_adv(operation: str, adv: Tensor) -> None:
    check_tensor(operation, "adv", adv)
    check_images(operation, "adv", adv)
    if adv.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operation}: adv must not require a gradient while it is written; use torch.no_grad()")
    if not torch.compiler.is_compiling() and adv.is_neg():  # torch.compile cannot ask
        raise ValueError(f"{operation}: adv is written, so it must not be a negated view; use adv.resolve_neg()")
    expanded = any(stride == 0 and extent > 1 for stride, extent in zip(adv.stride(), adv.shape, strict=True))
    if expanded and adv.numel() > 0:
        raise ValueError(f"{operation}: adv is written, so it must not be expanded; got strides {adv.stride()}")


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
    targeted: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of L-inf PGD (Madry et al., 2018) on `adv`, in place, in one pass.

        moved = adv - step_size * sign(grad)              (+ where targeted is False)
        adv   = clamp(clean + clamp(moved - clean, -eps, eps), lower, upper)

    It is computed in this order and without FMA contraction, so images are the same on every backend.

    Args:
        adv: ``(N, C, H, W)``, the iterate; float64, float32, bfloat16 or float16 (the 16-bit ones computed in float32).
        grad: shape and dtype of adv, the gradient of the loss at adv. A targeted attack minimises the loss to the
            target.
        clean: shape and dtype of adv, the original images.
        step_size, eps: in pixel units, finite and not negative.
        lower, upper: the range of a pixel.
        targeted: False to maximise the loss.
        backend: overrides `use_backend` for this call.

    Returns:
        adv.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device, number or ``backend`` does not fit. adv is then unchanged.
    """
    _check_adv("pgd_step_", adv)
    _check_pair("pgd_step_", adv, "grad", grad)
    _check_pair("pgd_step_", adv, "clean", clean)
    check_number("pgd_step_", "step_size", step_size, 0.0)
    check_number("pgd_step_", "eps", eps, 0.0)
    check_bounds("pgd_step_", lower, upper)
    if not isinstance(targeted, bool):
        raise TypeError(f"pgd_step_: targeted must be a bool, got {type(targeted).__name__}")
    chosen = backends.choose(adv.device, backend, "pgd_step_: backend").backend
    with torch.no_grad():
        if chosen == "reference":
            return adv.copy_(reference.pgd_step(adv, grad, clean, step_size, eps, lower, upper, targeted))
        signed_step = -step_size if targeted else step_size
        torch.ops.sparta_kernels._pgd_step_(adv, grad, clean, signed_step, eps, lower, upper, chosen)
    return adv


def pgd_start_(
    adv: Tensor,
    clean: Tensor,
    indices: Tensor,
    eps: float,
    *,
    seed: int = 0,
    restart: int = 0,
    lower: float = 0.0,
    upper: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Write PGD's random start into `adv`: ``clamp(clean + U(-eps, eps), lower, upper)``.

    The numbers come from Philox4x32-10, keyed by the seed and counted by the image's index in its data set. So they do
    not depend on the batch, the device, the memory format or the backend.

    Args:
        adv: ``(N, C, H, W)``, overwritten; float64, float32, bfloat16 or float16.
        clean: shape and dtype of adv.
        indices: int64 ``(N,)``, each sample's index in its data set.
        eps: half width of the noise in pixel units, finite and not negative.
        seed: in [0, 2**63).
        restart: in [0, 2**24); each restart draws different noise.
        lower, upper: the range of a pixel.
        backend: overrides `use_backend` for this call.

    Returns:
        adv.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device, number or ``backend`` does not fit. adv is then unchanged.
    """
    _check_adv("pgd_start_", adv)
    _check_pair("pgd_start_", adv, "clean", clean)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"pgd_start_: indices must be an int64 tensor, got {given}")
    check_shape("pgd_start_", "indices", indices, "(N,)", (adv.shape[0],))
    if indices.device != adv.device:
        raise ValueError(f"pgd_start_: indices must be on {adv.device} like the first tensor, got {indices.device}")
    check_number("pgd_start_", "eps", eps, 0.0)
    check_integer("pgd_start_", "seed", seed, 0, 2**63 - 1)
    check_integer("pgd_start_", "restart", restart, 0, 2**24 - 1)
    check_bounds("pgd_start_", lower, upper)
    chosen = backends.choose(adv.device, backend, "pgd_start_: backend").backend
    with torch.no_grad():
        if chosen == "reference":
            start = reference.pgd_start(clean, indices, eps=eps, seed=seed, restart=restart, lower=lower, upper=upper)
            return adv.copy_(start)
        torch.ops.sparta_kernels._pgd_start_(adv, clean, indices, eps, seed, restart, lower, upper, chosen)
    return adv
