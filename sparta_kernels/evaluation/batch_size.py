"""How many images to attack at once: as many as help and fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .memory import PeakMemory, available

# Past these a larger batch gains nothing: measured on a CPU; on a GPU kernels that fill the machine long before.
MOST = {"cpu": 256, "cuda": 1024}
# Of the memory that is free now. Others share a CPU's, and its allocator leaves gaps; a GPU's has to hold a captured
# graph's beside that of the passes before the capture.
SHARE = {"cpu": 0.5, "cuda": 0.4}
TRIALS = (4, 16)  # images


class BatchSize(NamedTuple):
    """A number of images, and the reason for it."""

    images: int
    reason: str


def find_batch_size(
    attack: Callable[[int], object], count: int, device: torch.device, processes: int = 1, *, sharers: int = 1
) -> BatchSize:
    """Find a batch size for attacking `count` images in equal batches, with little padding.

    The memory per image is the slope between the peaks of two small attacks. If it cannot be measured, or is lost in
    noise, memory sets no limit.

    Args:
        attack: called with a number of images, 1..`count`, which it attacks with one step.
        count: images in all, at least 1.
        device: where the attack runs.
        processes: how many share the images.
        sharers: how many of them share this memory.
    """
    most = MOST[device.type]
    reason = f"at most {most} on {'a CPU' if device.type == 'cpu' else 'a GPU'}"
    free = available(device)
    small, large = (min(trial, count) for trial in TRIALS)
    if free is not None and small < large:
        attack(small)  # first calls allocate what stays
        costs = [_peak(attack, images, device) for images in (small, large)]
        if None not in costs and costs[1] > costs[0]:  # type: ignore[operator]
            per_image = (costs[1] - costs[0]) / (large - small)  # type: ignore[operator]
            fits = max(1, int(SHARE[device.type] * free / sharers / per_image))
            if fits < most:
                most = fits
                reason = f"{per_image / 1e6:.3g} MB an image, {free / sharers / 1e9:.3g} GB free"
    # Equal shares instead of full batches and one that is mostly padding.
    batches = -(-count // most)
    batches = -(-batches // processes) * processes
    return BatchSize(-(-count // batches), reason)


def _peak(attack: Callable[[int], object], images: int, device: torch.device) -> int | None:
    memory = PeakMemory(device)
    attack(images)
    return memory.bytes()
