"""The test errors of a network in training, after each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import attack
from ..processes import Processes
from .run import TrainingDiverged
from .settings import Settings


class Tester:
    """Measures a network's clean and robust errors on test images, which the processes share.

    Args:
        model: the network; it may change between calls.
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        settings: of the run: batch size, attack and precision.
        robust_images: how many of the first images are attacked.
        processes: the processes that share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        settings: Settings,
        robust_images: int,
        processes: Processes,
    ) -> None:
        self._images, self._labels, self._settings, self._processes = images, labels, settings, processes
        self._robust_images = min(robust_images, len(images))
        name = "sparta" if settings.attack == "none" else settings.attack
        self._preset = attack.preset(name, settings.eps, settings.attack_steps)
        self._prepared = attack.prepare(model.eval(), precision=settings.precision)

    def __call__(self) -> tuple[float, float | None]:
        """The error on all clean images, and that on the first images under attack; None if none are to be attacked.

        Raises:
            TrainingDiverged: the network is not finite.
        """
        self._prepared.refresh()
        clean = self._error(len(self._images), self._predicted)
        return clean, self._error(self._robust_images, self._predicted_under_attack) if self._robust_images else None

    def _error(self, count: int, predicted: Callable[[Tensor, Tensor], Tensor]) -> float:
        counts = torch.zeros(2, dtype=torch.int64, device=self._images.device)  # wrong, and not finite
        indices = torch.arange(count, device=self._images.device)
        batches = indices.split(self._settings.batch_size)
        mine = self._processes.share(batches)
        for i in range(math.ceil(len(batches) / self._processes.count)):  # as often in all processes
            for rows in mine[i : i + 1]:
                classes = predicted(self._images[rows].float() / 255, rows)
                counts += torch.stack([(classes != self._labels[rows]).sum(), (classes < 0).sum()])
            self._processes.leave_if_interrupted()
        wrong, bad = self._processes.sums(counts)
        if bad:
            told = f"the network's logits are not finite for {bad:.0f} of {count} images"
            raise TrainingDiverged(f"training: in the test after an epoch: {told}")
        return wrong / count

    def _predicted(self, x: Tensor, _: Tensor) -> Tensor:
        """Classes; -1 where logits are not finite."""
        logits = self._prepared.exact(x)
        return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)

    def _predicted_under_attack(self, x: Tensor, rows: Tensor) -> Tensor:
        preset = self._preset
        try:
            result = attack.pgd(
                self._prepared,
                x,
                self._labels[rows],
                eps=preset.eps,
                step_size=preset.step_size,
                steps=preset.steps,
                report_at=[preset.steps],
                seed=self._settings.seed,
                indices=rows,
            )
        except attack.NotFinite as error:
            raise TrainingDiverged(f"training: in the test after an epoch: {error}") from error
        return result.predictions[preset.steps]
