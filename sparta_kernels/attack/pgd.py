"""The L-infinity projected gradient attack, plainly: one trajectory, and the predictions along it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..ops import pgd_start_, pgd_step_
from . import checks

PRECISIONS = ("fp32",)
ENGINES = ("auto", "eager")


@dataclass(frozen=True)
class PGDResult:
    """What an attack on N images gives.

    Attributes:
        adversarial: the last iterate (N, C, H, W), dtype and memory format of the images.
        targets: the class each image was driven towards, int64 (N,); None for an untargeted attack.
        predictions: for each reported iterate, in rising order, the predicted classes, int64 (N,).
        losses: cross-entropy to the target (untargeted: to the label) at every iterate 0..steps, (steps + 1,
            N).
    """

    adversarial: Tensor
    targets: Tensor | None
    predictions: dict[int, Tensor]
    losses: Tensor


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    report_at: Iterable[int] | None = None,
    targets: Tensor | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    targeted: bool = True,
    random_start: bool = True,
    restart: int = 0,
    precision: str = "fp32",
    engine: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> PGDResult:
    """Projected gradient descent (PGD) in the L-infinity ball of `eps` around each image.

    Each step moves every pixel by `step_size` against the sign of the gradient of the summed cross-entropy to
    the target (untargeted: along that to the label), then back into the ball, then into [0, 1]. This is the
    targeted attack of Xie et al. 2019 with which the SPARTA papers train and test (section "Setup"). With one
    step size, iterate k of a long run *is* PGD-k, so one call gives the predictions at every iterate named in
    `report_at`: `steps` backward passes and `steps + 1` forward passes in all.

    Start noise and target of an image depend on (seed, its index, restart) alone, never on the other images
    of the batch, its order or the device. What the images become still depends on them through rounding.

    The model's parameters are frozen meanwhile and get their `requires_grad` back whatever happens; their
    `.grad` is left alone. The images are never modified.

    Args:
        model: takes (N, C, H, W) images in [0, 1] (normalisation belongs inside) and returns (N, classes)
            logits. It and all its parts must be in eval mode.
        images: (N, C, H, W), float32 (float64 is attacked in float64), every pixel in [0, 1].
        labels: (N,), any integer dtype.
        eps: radius of the ball in pixel units, 0..1, such as 16/255.
        step_size: step in pixel units, above 0, such as 1/255.
        steps: number of steps, at least 1.
        report_at: iterates whose predictions are kept, each in 0..steps (0 is the start). None: 10, 30 and 50
            as far as `steps` reaches, and the last.
        targets: (N,) integers, each unlike the label. None: drawn for each image, uniformly among the wrong
            classes.
        seed: 0..2**63 - 1.
        indices: (N,) integers >= 0, the images' places in their data set. None: 0..N-1.
        targeted: False drives each image away from its label, and takes no targets.
        random_start: start uniformly within +-eps of the image (then clamped to [0, 1]); False starts on it.
        restart: 0..2**24 - 1, the number of this draw: another restart, other noise and targets (training
            uses the epoch).
        precision: "fp32", the only one so far; an autocast around the call is switched off.
        engine: "auto" or "eager".
        progress: called with k once iterate k, 0..steps, has been through the model. The loop never waits for
            the device by itself.

    Returns:
        A `PGDResult`. For N = 0 everything in it is empty and the model is not called.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. A model in training mode or
            one that does not return (N, classes) logits that depend on the images is a ValueError.
    """
    where = "pgd"
    checks.model(where, model, images)
    images = checks.images(where, images)
    labels = checks.integers(where, "labels", labels, images)
    eps, step_size = checks.pixels(where, "eps", eps), checks.step(where, "step_size", step_size)
    steps = checks.integer(where, "steps", steps, low=1)
    reported = checks.iterates(where, report_at, steps)
    seed, restart = checks.seed(where, seed), checks.integer(where, "restart", restart, low=0, high=2**24 - 1)
    checks.flag(where, "targeted", targeted)
    checks.flag(where, "random_start", random_start)
    checks.choice(where, "precision", precision, PRECISIONS)
    checks.choice(where, "engine", engine, ENGINES)
    checks.callback(where, "progress", progress)
    if targets is not None:
        if not targeted:
            raise ValueError(f"{where}: targets must be None when targeted=False, got a tensor")
        targets = checks.integers(where, "targets", targets, images)
    if indices is None:
        indices = torch.arange(len(images), device=images.device)
    else:
        indices = checks.integers(where, "indices", indices, images)
        if len(indices) and int(indices.min()) < 0:
            raise ValueError(f"{where}: indices must be >= 0, got {int(indices.min())}")

    if not len(images):
        return PGDResult(
            adversarial=images.clone(),
            targets=labels if targeted else None,
            predictions={k: labels.clone() for k in reported},
            losses=images.new_zeros(steps + 1, 0),
        )

    predictions: dict[int, Tensor] = {}
    losses: list[Tensor] = []
    with _attack_mode(model, images.device.type):
        adversarial = images.clone()
        if random_start:
            pgd_start_(adversarial, images, indices, eps, seed=seed, restart=restart)
        leaf, logits = _forward(model, adversarial, differentiable=True)
        goal = _goal(labels, targets, logits.shape[1], indices, targeted=targeted, seed=seed, restart=restart)
        for k in range(steps + 1):
            # The prediction at iterate k costs nothing: step k + 1 needs this very forward pass.
            loss = F.cross_entropy(logits, goal, reduction="none")
            losses.append(loss.detach())
            if k in reported:
                predictions[k] = logits.detach().argmax(1)
            if progress is not None:
                progress(k)
            if k < steps:
                # Summed, not averaged: an image's gradient must not depend on the size of its batch.
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                pgd_step_(adversarial, gradient, images, step_size, eps, targeted=targeted)
                leaf, logits = _forward(model, adversarial, differentiable=k + 1 < steps)
    return PGDResult(adversarial, goal if targeted else None, predictions, torch.stack(losses))


@contextmanager
def _attack_mode(model: nn.Module, device_type: str) -> Iterator[None]:
    """Gradients on, autocast off, parameters frozen; afterwards, whatever happened, all as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def _forward(model: nn.Module, adversarial: Tensor, *, differentiable: bool) -> tuple[Tensor, Tensor]:
    """The iterate as a leaf sharing `adversarial`'s memory, and the model's logits for it, at least fp32."""
    leaf = adversarial.detach().requires_grad_(differentiable)
    with torch.set_grad_enabled(differentiable):
        logits = checks.logits("pgd", model(leaf), len(leaf))
    if differentiable and not logits.requires_grad:
        raise ValueError("pgd: model must return logits that depend on the images, got a result without a gradient")
    return leaf, logits if logits.dtype == torch.float64 else logits.float()


def _goal(
    labels: Tensor,
    targets: Tensor | None,
    classes: int,
    indices: Tensor,
    *,
    targeted: bool,
    seed: int,
    restart: int,
) -> Tensor:
    """The class whose cross-entropy is driven down (targeted) or up, checked against the model's classes."""
    checks.within("pgd", "labels", labels, classes)
    if not targeted:
        return labels
    if targets is None:
        return reference.pgd_targets(labels, classes, indices, seed=seed, restart=restart)
    checks.within("pgd", "targets", targets, classes)
    same = int((targets == labels).sum())
    if same:
        raise ValueError(f"pgd: targets must differ from the labels, got {same} of {len(labels)} that are equal")
    return targets
