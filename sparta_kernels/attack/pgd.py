"""The L-infinity projected gradient attack: one trajectory, and the predictions along it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn

from . import checks
from .trajectory import PGDResult, Trajectory, worst


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
    restarts: int = 1,
    restart: int = 0,
    precision: str | None = None,
    engine: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> PGDResult:
    """Projected gradient descent (PGD) in the L-infinity ball of `eps` around each image.

    Each step moves every pixel by `step_size` against the sign of the gradient of the summed cross-entropy to
    the target (untargeted: along that to the label), then back into the ball, then into [0, 1]. This is the
    targeted attack of Xie et al. 2019 with which the SPARTA papers train and test (section "Setup"). With a fixed step
    size, iterate k of a long run *is* PGD-k, so one call gives the predictions at every iterate in `report_at`: `steps`
    backward passes and `steps + 1` forward passes in all (and in a precision below float32 one forward pass in float32
    for each reported iterate).

    An image's start noise and target depend on (seed, its index, restart) alone, never on the rest of the batch, its
    order or the device. The resulting images still depend on those through rounding.

    For speed, prepare the model once with `attack.prepare` and attack the result; any other model is attacked exactly
    as it is. Parameters are frozen during the attack, and their `requires_grad` is restored even if it fails. Their
    `.grad` is left alone, and the images are never modified.

    Args:
        model: takes (N, C, H, W) images in [0, 1] (normalisation belongs inside) and returns (N, classes)
            logits. It and all its parts must be in eval mode.
        images: (N, C, H, W), float32 (or float64: then so are iterates and steps), every pixel in [0, 1].
        labels: (N,), any integer dtype.
        eps: radius of the ball in pixel units, 0..1, such as 16/255.
        step_size: step in pixel units, above 0, such as 1/255.
        steps: number of steps, at least 1.
        report_at: iterates whose predictions are returned, ascending, each in 0..steps (0 is the start). None: the
            last, and those of 10, 30 and 50 that are below it.
        targets: (N,) integers, each different from the label. None: drawn for each image uniformly from the wrong
            classes. With targeted=False: (N, classes) probabilities in float32 or float64, for each image a
            distribution to be driven away from instead of its label; the gradient of the cross-entropy to softmax(f(x))
            is that of the Kullback-Leibler divergence from it, which TRADES (Zhang et al. 2019) maximises.
        seed: 0..2**63 - 1.
        indices: (N,) integers >= 0, the images' places in their data set. None: 0..N-1.
        targeted: False drives each image away from its label, or from the distribution in `targets`.
        random_start: start uniformly within +-eps of the image (then clamped to [0, 1]); False starts on it.
        restarts: number of attacks, each with different noise and targets; the result is the worst case.
        restart: number of the first restart; the last one's must be below 2**24 (training uses the epoch).
        precision: "fp32", "bf16", and on a GPU "tf32" and "fp16"; None: the prepared model's, else "fp32". Iterates,
            steps and reported predictions are always float32. Autocast around the call is disabled.
        engine: "eager" (operation by operation), "compile" (by torch.compile), on a GPU "graph" (each iteration one
            CUDA graph), or "auto": the one measured to be fastest. An unprepared model is prepared for this call if the
            precision or engine needs it.
        progress: called with k once iterate k, 0..steps, of the first restart has been through the model, with
            steps + 1 + k for the second, and so on. The loop itself never waits for the device.

    Returns:
        A `PGDResult`. For N = 0 everything in it is empty and the model is not called.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it. A model in training mode or
            one that does not return (N, classes) logits that depend on the images, or returns NaN, or has gradients
            that are not finite, is a ValueError.
    """
    where = "pgd"
    reported = checks.iterates(where, report_at, checks.integer(where, "steps", steps, low=1))
    checks.integer(where, "restarts", restarts, low=1, high=2**24)
    checks.integer(where, "restart", restart, low=0, high=2**24 - restarts)
    checks.callback(where, "progress", progress)
    attack = Trajectory(
        model,
        images,
        labels,
        where=where,
        eps=eps,
        step_size=step_size,
        steps=steps,
        targets=targets,
        seed=seed,
        indices=indices,
        targeted=targeted,
        random_start=random_start,
        precision=precision,
        engine=engine,
    )
    looked_at = reported if restarts == 1 else tuple(sorted({*reported, steps}))  # the worst is told by the last
    result = attack.run(restart, looked_at, progress)
    for number in range(1, restarts):
        passes = number * (steps + 1)
        later = None if progress is None else lambda k, before=passes: progress(before + k)
        result = worst(result, attack.run(restart + number, looked_at, later), attack.labels, steps)
    return replace(
        result,
        predictions={k: result.predictions[k] for k in reported},
        hits={k: result.hits[k] for k in reported if k in result.hits},
    )


def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    targets: Tensor | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    targeted: bool = True,
    random_start: bool = True,
    restart: int = 0,
    precision: str | None = None,
    engine: str = "auto",
) -> Tensor:
    """The adversarial images of `pgd` and nothing else, for training: `steps` passes each way.

    Arguments and errors are those of `pgd`. The model is not run on the last iterate.

    Returns:
        The last iterate (N, C, H, W), dtype and memory format of the images.
    """
    checks.integer("perturb", "restart", restart, low=0, high=2**24 - 1)
    attack = Trajectory(
        model,
        images,
        labels,
        where="perturb",
        eps=eps,
        step_size=step_size,
        steps=steps,
        targets=targets,
        seed=seed,
        indices=indices,
        targeted=targeted,
        random_start=random_start,
        precision=precision,
        engine=engine,
    )
    return attack.run(restart, None, None).adversarial
