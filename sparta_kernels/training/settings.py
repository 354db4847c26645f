"""What a training run is made of: all that decides its weights, so that it can be stored and resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from .. import attack, data
from ..attack import checks

MODELS = ("resnet18", "resnet34")
SCHEDULES = ("one-cycle", "milestones")
ATTACKS = ("none", *attack.PRESETS)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights a run ends with, given the machine and its thread count.

    Attributes:
        data: name of the data set.
        model: "resnet18" or "resnet34".
        activation, sites, width: of the ResNet; see `sparta_kernels.nn`.
        epochs: passes over the training images.
        batch_size: images in a batch, at most; the images are spread evenly over ceil(N / batch_size)
            batches.
        learning_rate: the highest that the schedule reaches.
        schedule: "one-cycle" (a line up from 0 over the first quarter of all steps, a line down over the rest
            that would meet 0 one step after the last) or "milestones" (a tenth after each epoch named).
        milestones: epochs after which the learning rate drops; the papers' are 30 and 60.
        momentum, weight_decay: of stochastic gradient descent (SGD); the papers give the weight decay only.
        attack: "none" for standard training, else the preset whose adversarial images replace the clean ones.
        eps: radius of that attack in pixel units.
        attack_steps: its number of steps.
        seed: of the initial weights, the order of the images, and the attack's randomness.
    """

    data: str = "digits"
    model: str = "resnet18"
    activation: str = "sparta"
    sites: str = "G1234.B2"
    width: int = 64
    epochs: int = 90
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: str = "milestones"
    milestones: tuple[int, ...] = (30, 60)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    attack: str = "xie2019"
    eps: float = 16 / 255
    attack_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        where = "training"
        data.describe(self.data)
        checks.choice(where, "model", self.model, MODELS)
        checks.choice(where, "schedule", self.schedule, SCHEDULES)
        checks.choice(where, "attack", self.attack, ATTACKS)
        for name in ("width", "epochs", "attack_steps"):
            checks.integer(where, name, getattr(self, name), low=1)
        # Spread evenly, no batch is then a single image, which batch normalisation cannot learn from.
        checks.integer(where, "batch_size", self.batch_size, low=3)
        for name in ("activation", "sites"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{where}: {name} must be a string, got {getattr(self, name)!r}")
        checks.real(
            where, "learning_rate", self.learning_rate, "finite and above 0", low=0.0, high=math.inf, open_low=True
        )
        below_1 = math.nextafter(1.0, 0.0)
        checks.real(where, "momentum", self.momentum, "at least 0 and below 1", low=0.0, high=below_1)
        checks.real(where, "weight_decay", self.weight_decay, "finite and at least 0", low=0.0, high=math.inf)
        checks.pixels(where, "eps", self.eps)
        checks.seed(where, self.seed)
        if isinstance(self.milestones, (str, bytes)) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"{where}: milestones must be a sequence of integers >= 1, got {self.milestones!r}")
        milestones = tuple(checks.integer(where, "each of milestones", m, low=1) for m in self.milestones)
        object.__setattr__(self, "milestones", milestones)

    def as_dict(self) -> dict[str, object]:
        """The settings as JSON can hold them."""
        return dataclasses.asdict(self) | {"milestones": list(self.milestones)}


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """The learning rate of update number `step`, counted from 0 over the whole run."""
    if settings.schedule == "milestones":
        passed = sum(step >= milestone * steps_per_epoch for milestone in settings.milestones)
        return settings.learning_rate * 0.1**passed
    total = settings.epochs * steps_per_epoch
    top = max(1, total // 4)
    done = step + 1
    return settings.learning_rate * (done / top if done <= top else (total + 1 - done) / (total + 1 - top))
