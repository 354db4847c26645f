"""The result of an evaluation, counted from the outcomes of its images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .batch_size import BatchSize
from .outcomes import Outcomes


@dataclass(frozen=True)
class Parity:
    """A lower precision compared with fp32: the same attack in both, on the first images.

    Attributes:
        images: how many.
        tolerance: largest difference allowed at the last reported iterate, in percentage points.
        errors: of the fp32 attack at each reported iterate, as shares of these images.
        differences: at each, the error in the lower precision minus that in fp32, in percentage points.
    """

    images: int
    tolerance: float
    errors: dict[int, float]
    differences: dict[int, float]

    @property
    def difference(self) -> float:
        """That at the last reported iterate."""
        return self.differences[max(self.differences)]

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return abs(self.difference) <= self.tolerance


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating N images. Every error is the share, 0..1, of images misclassified.

    Attributes:
        images: N.
        clean_error: on the clean images.
        errors: at each reported iterate of the attack, PGD-k by k. With restarts, the share misclassified in any.
        target_success: at each reported iterate, the share of images classified as their target class, in any
            restart; empty for an untargeted attack.
        attacked: how many of the N were attacked in this run; the others' outcomes were resumed.
        images_per_second: of those, clean pass and attack together, after a warm-up; None if there are none.
        seconds: time taken. With several processes, that of the slowest.
        peak_memory: bytes: on a CPU the process's resident set at its largest, on a GPU that of torch's tensors; None
            where it cannot be measured. With several processes, the largest.
        loss_mean, loss_std: over the images, the cross-entropy to the target class (untargeted: to the label) at
            every iterate 0..steps.
        restarts: of the attack.
        precision: in which its gradients were computed.
        engine, engine_reason: what ran the attack, and why it was chosen.
        batch: images attacked at once, and why so many.
        threads: of the CPU, in each process.
        processes: how many shared the images.
        parity: how the precision compares with fp32; None if not requested, or if it is fp32.
    """

    images: int
    clean_error: float
    errors: dict[int, float]
    target_success: dict[int, float]
    attacked: int
    images_per_second: float | None
    seconds: float
    peak_memory: int | None
    loss_mean: list[float]
    loss_std: list[float]
    restarts: int
    precision: str
    engine: str
    engine_reason: str
    batch: BatchSize
    threads: int
    processes: int
    parity: Parity | None

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as JSON-serialisable values; iterates become strings."""
        content = asdict(self) | {"batch": self.batch._asdict()}
        if self.parity is not None:
            content["parity"] |= {"difference": self.parity.difference, "passed": self.parity.passed}
            _iterates_as_strings(content["parity"])
        _iterates_as_strings(content)
        return content


def errors(outcomes: Outcomes) -> tuple[float, dict[int, float]]:
    """The clean error, and that at each reported iterate, over the images whose outcome is known (at least one)."""
    arrays = outcomes.arrays
    done = arrays["done"]
    labels = arrays["label"][done]
    clean = float((arrays["clean"][done] != labels).mean())
    return clean, _by_iterate(outcomes, arrays["prediction"][done] != labels[:, None])


def target_success(outcomes: Outcomes) -> dict[int, float]:
    """The share of images on which the attack hit its target, at each reported iterate."""
    return _by_iterate(outcomes, outcomes.arrays["hit"][outcomes.arrays["done"]])


def losses(outcomes: Outcomes) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the loss at every iterate."""
    every = outcomes.arrays["loss"].astype(np.float64)
    return every.mean(0).tolist(), every.std(0).tolist()


def parity(outcomes: Outcomes, tolerance: float) -> Parity | None:
    """The attack beside the fp32 one; None if there was none."""
    exact = outcomes.arrays["parity_prediction"]
    count = len(exact)
    if not count:
        return None
    labels = outcomes.arrays["label"][:count, None]
    wrong = outcomes.arrays["prediction"][:count] != labels
    # From the counts: shares are rounded, and 7 of 100 images would be a little more than 7 percentage points.
    more = 100 * (wrong.sum(0) - (exact != labels).sum(0)) / count
    return Parity(
        count,
        tolerance,
        errors=_by_iterate(outcomes, exact != labels),
        differences=dict(zip(outcomes.arrays["report_at"].tolist(), more.tolist(), strict=True)),
    )


def _by_iterate(outcomes: Outcomes, values: np.ndarray) -> dict[int, float]:
    """The mean over the images of (N, K) values, by reported iterate."""
    return dict(zip(outcomes.arrays["report_at"].tolist(), values.mean(0).tolist(), strict=True))


def _iterates_as_strings(content: dict[str, Any]) -> None:
    for name in ("errors", "target_success", "differences"):
        if name in content:
            content[name] = {str(k): share for k, share in content[name].items()}
