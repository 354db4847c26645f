"""The learning rate of every update."""

from __future__ import annotations

import math

from .settings import Settings

# Schedules whose learning rate at a step is the same in a longer run.
INDEPENDENT_OF_EPOCHS = ("milestones", "constant")


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """The learning rate of update number `step`, counted from 0 over the whole run; above 0 for each of them."""
    total = settings.epochs * steps_per_epoch
    if settings.schedule == "one-cycle":
        top = max(1, total // 4)
        done = step + 1
        return settings.learning_rate * (done / top if done <= top else (total + 1 - done) / (total + 1 - top))
    warmup = settings.warmup * steps_per_epoch
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, warmup))
    if settings.schedule == "milestones":
        return rate * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
    if settings.schedule == "cosine":
        part = max(0, step - warmup) / (total - warmup)
        return rate * 0.5 * (1 + math.cos(math.pi * part))
    return rate
