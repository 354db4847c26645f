"""The results of a training run's batches and epochs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """A completed training step. `error` is that of the images trained on, adversarial or not."""

    epoch: int
    number: int
    batches: int
    images: int
    loss: float
    error: float


@dataclass(frozen=True)
class Epoch:
    """A completed and stored epoch.

    Attributes:
        epoch: its number, from 1.
        loss, error: means over the images trained on (adversarial ones in adversarial training), during training.
        clean_error: share of the test images misclassified after the epoch; with `ema`, by the averaged weights.
        images_per_second: of the epoch's training.
        learning_rate: of its last step.
        robust_error: the same for the first test images under attack; None if not requested.
        seconds: time of its training, without tests.
    """

    epoch: int
    loss: float
    error: float
    clean_error: float
    images_per_second: float
    learning_rate: float
    robust_error: float | None = None
    seconds: float = 0.0


@dataclass
class Position:
    """Progress within an epoch.

    Attributes:
        step: its steps that are done.
        loss: summed over their images.
        wrong: how many of those were misclassified.
        rate: the learning rate of the last step.
        seconds: that the steps took.
    """

    step: int = 0
    loss: float = 0.0
    wrong: int = 0
    rate: float = 0.0
    seconds: float = 0.0
