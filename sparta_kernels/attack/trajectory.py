"""One attack on one batch: from its start to its last iterate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import reference
from ..ops import pgd_start_
from . import checks, engines
from .engines import Engine, Step
from .prepare import Prepared, check_precision, prepare


@dataclass(frozen=True)
class PGDResult:
    """The result of an attack on N images.

    Attributes:
        adversarial: the last iterate (N, C, H, W), in dtype and memory format as the images.
        targets: the class each image was driven towards, int64 (N,); None for an untargeted attack.
        predictions: for each reported iterate, in ascending order, the predicted classes, int64 (N,), computed in
            float32 whatever the attack's precision.
        hits: for each reported iterate, whether the prediction is the target, bool (N,); empty if untargeted.
        losses: cross-entropy to the target (untargeted: to the label, or the distribution given) at every iterate
            0..steps, (steps + 1, N), in the attack's precision.
        engine: what ran the iterations, and why it was chosen.

    With several restarts, each image has its worst result. predictions[k] comes from the first restart misclassified at
    iterate k, else from the first one. hits[k] tells whether any restart hit its target. adversarial, targets and
    losses come from the first restart misclassified at the last iterate, else from the first one.
    """

    adversarial: Tensor
    targets: Tensor | None
    predictions: dict[int, Tensor]
    hits: dict[int, Tensor]
    losses: Tensor
    engine: Engine

    def __repr__(self) -> str:  # not the pixels
        kind = "untargeted" if self.targets is None else "targeted"
        return (
            f"PGDResult({kind}, adversarial={tuple(self.adversarial.shape)}, predictions at "
            f"{', '.join(map(str, self.predictions))}, losses={tuple(self.losses.shape)}, engine={self.engine.name})"
        )


class NotFinite(ValueError):
    """A model's logits or gradients are NaN or infinite."""


class Trajectory:
    """The checked arguments of an attack, for several starts. Errors are `pgd`'s, named `where`."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        where: str,
        eps: float,
        step_size: float,
        steps: int,
        targets: Tensor | None,
        seed: int,
        indices: Tensor | None,
        targeted: bool,
        random_start: bool,
        precision: str | None,
        engine: str,
    ) -> None:
        checks.model(where, model, images)
        self.images = checks.images(where, images)
        self.labels = checks.integers(where, "labels", labels, images)
        checks.flag(where, "targeted", targeted)
        self.targets = None if targets is None else _targets(where, targets, images, targeted)
        self.step = Step(
            checks.pixels(where, "eps", eps),
            checks.step(where, "step_size", step_size),
            targeted,
            soft=self.targets is not None and not targeted,
        )
        self.steps = checks.integer(where, "steps", steps, low=1)
        self.seed = checks.seed(where, seed)
        self.random_start = checks.flag(where, "random_start", random_start)
        if indices is None:
            indices = torch.arange(len(images), device=images.device)
        self.indices = checks.integers(where, "indices", indices, images)
        if len(indices) and int(self.indices.min()) < 0:
            raise ValueError(f"{where}: indices must be >= 0, got {int(self.indices.min())}")
        self.asked = checks.choice(where, "engine", engine, engines.ENGINES)
        self.model = _in_precision(where, model, precision, engine)
        self.engine = engines.choose(engine, self.model, images.device)

    def run(self, restart: int, reported: tuple[int, ...] | None, progress: Callable[[int], None] | None) -> PGDResult:
        """Run one trajectory. If `reported` is None it ends with the last step, without a forward pass after it."""
        if not len(self.images):
            return self._nothing(reported or ())
        predictions: dict[int, Tensor] = {}
        seen: list[Tensor] = []
        chosen: list[Tensor] = []

        def goal(classes: int) -> Tensor:
            chosen[:] = [self._goal(classes, restart)]
            return chosen[0]

        with _attack_mode(self.model, self.images.device.type):
            self.engine, loop = engines.begin(self.engine, self.asked, self.model, self.step, self.images, goal)
            if self.random_start:
                pgd_start_(loop.adversarial, self.images, self.indices, self.step.eps, seed=self.seed, restart=restart)
            exact = self.model.exact if isinstance(self.model, Prepared) and self.model.precision != "fp32" else None
            for k in range(self.steps if reported is None else self.steps + 1):
                wanted = reported is not None and k in reported
                if wanted and exact is not None:
                    predictions[k] = exact(loop.adversarial).argmax(1)
                # The prediction at iterate k costs nothing: step k + 1 needs this very forward pass.
                logits, losses = loop.iterate() if k < self.steps else loop.look()
                if wanted and exact is None:
                    predictions[k] = logits.argmax(1)
                if reported is not None:
                    seen.append(losses.clone())
                if progress is not None:
                    progress(k)
            adversarial = torch.empty_like(self.images).copy_(loop.adversarial)
            losses = _without_nan(torch.stack(seen)) if seen else self.images.new_zeros(0, len(self.images))
            if not bool(loop.finite):
                raise NotFinite("pgd: model must have finite gradients, got NaN or infinity")
        (goals,) = chosen
        return PGDResult(
            adversarial,
            goals if self.step.targeted else None,
            predictions,
            {k: predicted == goals for k, predicted in predictions.items()} if self.step.targeted else {},
            losses,
            self.engine,
        )

    def _nothing(self, reported: tuple[int, ...]) -> PGDResult:
        """The result for no images at all."""
        targeted = self.step.targeted
        return PGDResult(
            adversarial=self.images.clone(),
            targets=self.labels if targeted else None,
            predictions={k: self.labels.clone() for k in reported},
            hits={k: self.labels.bool() for k in reported} if targeted else {},
            losses=self.images.new_zeros(self.steps + 1, 0),
            engine=self.engine,
        )

    def _goal(self, classes: int, restart: int) -> Tensor:
        """The classes or distributions of the loss, checked against the model's number of classes."""
        labels, targets = self.labels, self.targets
        checks.within("pgd", "labels", labels, classes)
        if not self.step.targeted:
            if targets is None:
                return labels
            if targets.shape[1] != classes:
                raise ValueError(f"pgd: targets must have the model's {classes} classes, got {tuple(targets.shape)}")
            return targets
        if targets is None:
            return reference.pgd_targets(labels, classes, self.indices, seed=self.seed, restart=restart)
        checks.within("pgd", "targets", targets, classes)
        same = int((targets == labels).sum())
        if same:
            raise ValueError(f"pgd: targets must differ from the labels, got {same} of {len(labels)} that are equal")
        return targets


def _targets(where: str, value: object, images: Tensor, targeted: bool) -> Tensor:
    """Classes (N,) to be driven to, or distributions (N, classes) to be driven away from."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        if not targeted and isinstance(value, Tensor):
            raise ValueError(
                f"{where}: targets must be None, or probabilities, when targeted=False, got a tensor of {value.dtype}"
            )
        return checks.integers(where, "targets", value, images)
    if targeted:
        raise TypeError(f"{where}: targets must have an integer dtype when targeted=True, got {value.dtype}")
    return checks.distributions(where, "targets", value, images)


def _in_precision(where: str, model: nn.Module, precision: str | None, engine: str) -> nn.Module:
    """The model, prepared where `precision` or `engine` needs it."""
    if precision is not None:
        check_precision(where, precision, model)
    if not isinstance(model, Prepared):
        plain = precision in (None, "fp32") and engine in ("auto", "eager")
        return model if plain else prepare(model, precision=precision or "fp32")
    if precision not in (None, model.precision):
        raise ValueError(
            f"{where}: precision must be the prepared model's, {model.precision!r}, or None, got {precision!r}"
        )
    return model


def _without_nan(losses: Tensor) -> Tensor:
    """The losses (iterates, N); a NaN among them raises: the model's logits were NaN or infinite."""
    bad = losses.isnan().any(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NotFinite(f"pgd: model must return finite logits, got NaN or infinity at iterate {first}")
    return losses


def worst(one: PGDResult, other: PGDResult, labels: Tensor, last: int) -> PGDResult:
    """The worse of two restarts for each image; the first in a tie. Both have reported the iterate `last`."""

    def better(k: int) -> Tensor:  # images that only the other restart gets misclassified
        return (one.predictions[k] == labels) & (other.predictions[k] != labels)

    def pick(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *(1,) * (a.dim() - 1)), b, a)

    taken = better(last)
    return replace(
        one,
        adversarial=torch.empty_like(one.adversarial).copy_(pick(taken, one.adversarial, other.adversarial)),
        targets=None if one.targets is None else pick(taken, one.targets, other.targets),  # type: ignore[arg-type]
        predictions={k: pick(better(k), mine, other.predictions[k]) for k, mine in one.predictions.items()},
        hits={k: mine | other.hits[k] for k, mine in one.hits.items()},
        losses=torch.where(taken, other.losses, one.losses),
    )


@contextmanager
def _attack_mode(model: nn.Module, device_type: str) -> Iterator[None]:
    """Gradients on, autocast off, parameters frozen; everything is restored afterwards, also after an error."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
