"""Clean and PGD-K errors of a network, all K from one trajectory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attack import PGDResult, checks, pgd
from ..backends import choose, use_backend
from .memory import PeakMemory


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of N images found. Every error is a share, 0..1, of the images misclassified.

    Attributes:
        images: N.
        clean_error: on the images as they are.
        errors: at each reported iterate of the attack: PGD-k by k.
        target_success: at each reported iterate, the share of images classified as their target class.
        images_per_second: clean pass and whole attack together, after a warm-up.
        seconds: what that took.
        peak_memory: bytes, most that was held during it: on a CPU the resident set of the process, on a GPU
            torch's tensors; None where it cannot be measured.
        loss_mean, loss_std: over the images, the cross-entropy to the target class at every iterate 0..steps.
    """

    images: int
    clean_error: float
    errors: dict[int, float]
    target_success: dict[int, float]
    images_per_second: float
    seconds: float
    peak_memory: int | None
    loss_mean: list[float]
    loss_std: list[float]

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as JSON can hold it: iterates become strings."""
        by_iterate = {
            name: {str(k): share for k, share in getattr(self, name).items()} for name in ("errors", "target_success")
        }
        return asdict(self) | by_iterate


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float = 1 / 255,
    steps: int = 50,
    report_at: Iterable[int] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    indices: Tensor | None = None,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a network on clean images and under the targeted PGD attack of `attack.pgd`.

    Every batch has equally many images, `batch_size` or all N if they are fewer: the last is filled up with
    copies of its first, whose results are dropped. Rounding depends on the shape of a batch, so results are
    bit for bit the same only for equal shapes.

    Args:
        model: in eval mode; takes images in [0, 1], returns (N, classes) logits.
        images: (N, C, H, W) with N >= 1; uint8 (divided by 255), or float32 in [0, 1].
        labels: (N,), any integer dtype.
        eps, step_size, steps, report_at, seed: as in `attack.pgd`; eps and step_size are in pixel units.
        batch_size: images in a batch, at most.
        indices: (N,) places of the images in their data set, which key the attack's randomness. None: 0..N-1.
        backend: what computes this package's operations: "auto", "reference", "native", ...
        progress: called with (model passes done, of how many) after each.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    where = "evaluate"
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        images = images.float() / 255
    checks.model(where, model, images)
    images = checks.images(where, images)
    if not len(images):
        raise ValueError(f"{where}: images must hold at least one image, got shape {tuple(images.shape)}")
    labels = checks.integers(where, "labels", labels, images)
    eps, step_size = checks.pixels(where, "eps", eps), checks.step(where, "step_size", step_size)
    steps = checks.integer(where, "steps", steps, low=1)
    reported = checks.iterates(where, report_at, steps)
    batch_size = checks.integer(where, "batch_size", batch_size, low=1)
    seed = checks.seed(where, seed)
    if indices is None:
        indices = torch.arange(len(images), device=images.device)
    indices = checks.integers(where, "indices", indices, images)
    if int(indices.min()) < 0:
        raise ValueError(f"{where}: indices must be >= 0, got {int(indices.min())}")
    if not isinstance(backend, str):
        raise TypeError(f"{where}: backend must be a string, got {type(backend).__name__}")
    choose(images.device, backend, f"{where}: backend")
    checks.callback(where, "progress", progress)

    batches = list(_batches(len(images), min(batch_size, len(images)), images.device))
    passes, done = len(batches) * (steps + 2), 0

    def tick(_: int = 0) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    def attack(rows: Tensor, count: int, callback: Callable[[int], None] | None) -> PGDResult:
        return pgd(
            model,
            images[rows],
            labels[rows],
            eps=eps,
            step_size=step_size,
            steps=count,
            report_at=reported if count == steps else (),
            seed=seed,
            indices=indices[rows],
            progress=callback,
        )

    wrong: list[Tensor] = []
    losses: list[Tensor] = []
    misled: dict[int, list[Tensor]] = {k: [] for k in reported}
    hits: dict[int, list[Tensor]] = {k: [] for k in reported}
    with use_backend(backend):
        # Untimed: first calls choose kernels and fill caches. The clean pass also tells the model's classes, with
        # which every label is checked at once.
        rows = batches[0][0]
        with torch.no_grad():
            classes = checks.logits(where, model(images[rows]), len(rows)).shape[1]
        checks.within(where, "labels", labels, classes)
        attack(rows, 1, None)
        memory = PeakMemory(images.device)
        start = time.perf_counter()
        for rows, real in batches:
            with torch.no_grad():
                wrong.append((model(images[rows]).argmax(1) != labels[rows])[:real])
            tick()
            result = attack(rows, steps, tick)
            targets = result.targets
            assert targets is not None  # the attack is targeted
            for k, predicted in result.predictions.items():
                misled[k].append((predicted != labels[rows])[:real])
                hits[k].append(torch.eq(predicted, targets)[:real])
            losses.append(result.losses[:, :real])
        clean_error = _share(wrong)  # waits for the device
        seconds = time.perf_counter() - start
        peak = memory.bytes()
    every = torch.cat(losses, dim=1).double()
    return Evaluation(
        images=len(images),
        clean_error=clean_error,
        errors={k: _share(parts) for k, parts in misled.items()},
        target_success={k: _share(parts) for k, parts in hits.items()},
        images_per_second=len(images) / seconds,
        seconds=seconds,
        peak_memory=peak,
        loss_mean=every.mean(1).tolist(),
        loss_std=every.std(1, correction=0).tolist(),
    )


def _batches(count: int, size: int, device: torch.device) -> Iterable[tuple[Tensor, int]]:
    """Row numbers of batches of exactly `size`, and how many of each are real; the rest repeat the first."""
    for start in range(0, count, size):
        rows = torch.arange(start, min(start + size, count), device=device)
        yield torch.cat([rows, rows[:1].expand(size - len(rows))]), len(rows)


def _share(parts: list[Tensor]) -> float:
    """The share of True among these masks."""
    return torch.cat(parts).double().mean().item()
