"""The attack's launches, and its functions: those of `sparta_kernels.backends.native`."""

from __future__ import annotations

from torch import Tensor

from sparta_kernels.backends.layout import gapless, in_order_of
from sparta_kernels.backends.triton import pgd
from sparta_kernels.backends.triton.launch import Launch, ceil_div, power_above, run


def plan_pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, signed_step: float, eps: float, lower: float, upper: float
) -> list[Launch]:
    """The launches for an adv without gaps."""
    if adv.numel() == 0:
        return []
    block = 4096 // adv.itemsize  # with 4 warps 32 bytes a thread of each tensor
    arguments = (adv, in_order_of(grad, adv), in_order_of(clean, adv), signed_step, eps, lower, upper)
    constants = (adv.numel(), adv.numel() % block == 0, block)
    return [Launch(pgd.pgd_step, ceil_div(adv.numel(), block), arguments + constants, fused=False)]


def pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, signed_step: float, eps: float, lower: float, upper: float
) -> None:
    with gapless(adv) as target:
        run(plan_pgd_step(target, grad, clean, signed_step, eps, lower, upper), adv.device)


def plan_pgd_start(
    adv: Tensor,
    clean: Tensor,
    indices: Tensor,
    eps: float,
    seed: int,
    restart: int,
    lower: float,
    upper: float,
) -> list[Launch]:
    """The launches for an adv without gaps."""
    if adv.numel() == 0:
        return []
    samples, channels, height, width = adv.shape
    elements = channels * height * width
    quads = min(1024, power_above(ceil_div(elements, 4)))
    blocks = ceil_div(elements, 4 * quads)
    arguments = (
        adv,
        in_order_of(clean, adv),
        indices.contiguous(),
        seed,
        restart << 8,  # the purpose is 0
        eps,
        lower,
        upper,
        elements,
        height * width,
        width,
        *adv.stride(),
        blocks,
        adv.is_contiguous(),
        quads,
    )
    return [Launch(pgd.pgd_start, samples * blocks, arguments, fused=False)]


def pgd_start(
    adv: Tensor,
    clean: Tensor,
    indices: Tensor,
    eps: float,
    seed: int,
    restart: int,
    lower: float,
    upper: float,
) -> None:
    with gapless(adv) as target:
        run(plan_pgd_start(target, clean, indices, eps, seed, restart, lower, upper), adv.device)
