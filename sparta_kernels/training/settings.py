"""The settings of a training run: everything that decides its weights, so that it can be stored and resumed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from .. import attack, data
from ..attack import checks

MODELS = ("resnet18", "resnet34")
SCHEDULES = ("one-cycle", "milestones", "cosine", "constant")
ATTACKS = ("none", *attack.PRESETS)
LOSSES = ("cross-entropy", "trades")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's final weights, given the machine and its thread count.

    Attributes:
        data: name of the data set.
        model: "resnet18" or "resnet34".
        activation, sites, width: of the ResNet; see `sparta_kernels.nn`.
        epochs: passes over the training images.
        batch_size: most images in a batch; the images are spread evenly over ceil(N / batch_size) batches.
        learning_rate: the schedule's highest.
        schedule: "one-cycle" (linear from 0 over the first quarter of all steps, then linear to 0, which it would reach
            one step after the last), "milestones" (divided by ten after each epoch named), "cosine" (half a cosine from
            the highest to 0, which it would reach one step after the last) or "constant".
        milestones: epochs after which the learning rate drops; the papers' are 30 and 60.
        warmup: epochs over which the learning rate first rises linearly; 0 with "one-cycle", which has its own.
        momentum, weight_decay: of stochastic gradient descent (SGD); the papers give the weight decay only.
        nesterov: SGD with Nesterov's momentum.
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016), in [0, 1).
        loss: "cross-entropy", or "trades" (Zhang et al. 2019): cross-entropy of the clean image, plus
            `trades_beta` times the Kullback-Leibler divergence between its prediction and the adversarial image's. The
            attack then maximises that divergence, untargeted.
        trades_beta: weight of that divergence, at least 0; TRADES' authors use 6 on CIFAR-10.
        ema: decay per update of an exponential moving average (EMA) of weights and statistics, 0 for none. The errors
            after an epoch are then the average's.
        precision: of the attack and the update: "fp32", "bf16", and on a GPU "tf32" and "fp16" (with a
            scaled loss). Weights, momentum and images stay float32.
        augment: crop and flip the training images as the data set's description says (`data.describe`).
        attack: "none" for standard training, else the preset whose adversarial images replace the clean ones.
        eps: radius of that attack in pixel units.
        attack_steps: its number of steps.
        sparta_from: a checkpoint whose SPARTA modules are copied into the new network, site by site; "" for none.
        freeze_sparta: freeze those: no gradient, and their BatchNorms in eval mode.
        seed: of the initial weights, the order of the images, augmentation, and the attack's randomness.
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
    warmup: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    label_smoothing: float = 0.0
    loss: str = "cross-entropy"
    trades_beta: float = 6.0
    ema: float = 0.0
    precision: str = "fp32"
    augment: bool = True
    attack: str = "xie2019"
    eps: float = 16 / 255
    attack_steps: int = 10
    sparta_from: str = ""
    freeze_sparta: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        where = "training"
        data.describe(self.data)
        checks.choice(where, "model", self.model, MODELS)
        checks.choice(where, "schedule", self.schedule, SCHEDULES)
        checks.choice(where, "attack", self.attack, ATTACKS)
        checks.choice(where, "loss", self.loss, LOSSES)
        checks.choice(where, "precision", self.precision, attack.PRECISIONS)
        for name in ("width", "epochs", "attack_steps"):
            checks.integer(where, name, getattr(self, name), low=1)
        # Spread evenly, no batch is then a single image, which batch normalisation cannot learn from.
        checks.integer(where, "batch_size", self.batch_size, low=3)
        for name in ("activation", "sites", "sparta_from"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{where}: {name} must be a string, got {getattr(self, name)!r}")
        checks.real(
            where, "learning_rate", self.learning_rate, "finite and above 0", low=0.0, high=math.inf, open_low=True
        )
        below_1 = math.nextafter(1.0, 0.0)
        for name in ("momentum", "label_smoothing", "ema"):
            checks.real(where, name, getattr(self, name), "at least 0 and below 1", low=0.0, high=below_1)
        for name in ("weight_decay", "trades_beta"):
            checks.real(where, name, getattr(self, name), "finite and at least 0", low=0.0, high=math.inf)
        for name in ("nesterov", "augment", "freeze_sparta"):
            checks.flag(where, name, getattr(self, name))
        checks.pixels(where, "eps", self.eps)
        checks.seed(where, self.seed)
        if isinstance(self.milestones, (str, bytes)) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"{where}: milestones must be a sequence of integers >= 1, got {self.milestones!r}")
        milestones = tuple(checks.integer(where, "each of milestones", m, low=1) for m in self.milestones)
        object.__setattr__(self, "milestones", milestones)
        checks.integer(where, "warmup", self.warmup, low=0, high=self.epochs - 1)
        self._check_together(where)

    def _check_together(self, where: str) -> None:
        """Refuse settings that contradict each other."""
        if self.warmup and self.schedule == "one-cycle":
            raise ValueError(f"{where}: warmup must be 0 with the one-cycle schedule, got {self.warmup}")
        if self.nesterov and not self.momentum:
            raise ValueError(f"{where}: nesterov must be False without momentum, got True")
        if self.loss == "trades" and self.attack == "none":
            raise ValueError(f"{where}: loss must be 'cross-entropy' without an attack, got 'trades'")
        if self.freeze_sparta and not self.sparta_from:
            raise ValueError(f"{where}: freeze_sparta must be False without sparta_from, got True")

    def as_dict(self) -> dict[str, object]:
        """The settings as JSON-serialisable values."""
        return dataclasses.asdict(self) | {"milestones": list(self.milestones)}
