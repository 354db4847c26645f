"""The fixed list of batches that an evaluation consists of, and what is computed for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import attack
from ..attack import PGDResult, Prepared


class Batch(NamedTuple):
    """`real` images from number `start` on, padded to `size` with copies of the first.

    `parity`: whether it belongs to the fp32 attack that another precision is compared with.
    """

    start: int
    real: int
    size: int
    parity: bool

    @property
    def span(self) -> slice:
        """The real images."""
        return slice(self.start, self.start + self.real)

    def rows(self, device: torch.device) -> Tensor:
        """All `size` image numbers."""
        rows = torch.arange(self.start, self.start + self.real, device=device)
        return torch.cat([rows, rows[:1].expand(self.size - self.real)])


def batches(images: int, size: int, parity_images: int) -> list[Batch]:
    """Every batch of an evaluation: those of the attack, then those of the fp32 attack on the first images."""
    found = []
    for count, parity in ((images, False), (parity_images, True)):
        equal = min(size, count)
        for start in range(0, count, equal or 1):
            found.append(Batch(start, min(equal, count - start), equal, parity))
    return found


@dataclass
class Attacker:
    """Attacks batches of these images.

    Attributes:
        prepared: the network.
        images, labels, indices: (N, C, H, W), (N,), (N,) on one device.
        steps, report_at, engine: as `attack.pgd` takes them.
        options: its further settings.
    """

    prepared: Prepared
    images: Tensor
    labels: Tensor
    indices: Tensor
    steps: int
    report_at: tuple[int, ...]
    engine: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self._exact: Prepared | None = None

    def warm_up(self, batch: Batch) -> PGDResult:
        """Run one step, since first calls choose kernels, compile and capture."""
        rows = batch.rows(self.images.device)
        self.prepared.exact(self.images[rows])
        return self._pgd(self.prepared, rows, 1, (1,), self.engine, None)

    def trial(self, count: int) -> None:
        """Run one step on the first `count` images, with an engine that does not compile for every shape."""
        rows = torch.arange(count, device=self.images.device)
        self._pgd(self.prepared, rows, 1, (1,), "eager", None)

    def run(self, batch: Batch, tick: Callable[[int], None]) -> dict[str, np.ndarray]:
        """The outcomes of the batch's real images, by the names of the arrays in `Outcomes`."""
        rows = batch.rows(self.images.device)
        if batch.parity:
            if self._exact is None:
                self._exact = attack.prepare(self.prepared.model, precision="fp32")
            # By the plainest engine: a fault of another one would show too.
            found = self._pgd(self._exact, rows, self.steps, self.report_at, "eager", tick)
            results = {"parity_prediction": _stack(found.predictions)}
        else:
            clean = self.prepared.exact(self.images[rows]).argmax(1)
            tick(0)
            found = self._pgd(self.prepared, rows, self.steps, self.report_at, self.engine, tick)
            targets = torch.full_like(clean, -1) if found.targets is None else found.targets
            results = {
                "clean": clean,
                "target": targets,
                "prediction": _stack(found.predictions),
                "loss": found.losses.T.float(),
                "hit": _stack(found.hits) if found.hits else rows.new_zeros(len(rows), len(self.report_at)).bool(),
            }
        known = torch.ones(len(rows), dtype=torch.bool)
        results["parity_done" if batch.parity else "done"] = known
        return {name: values[: batch.real].cpu().numpy() for name, values in results.items()}

    def passes(self, batch: Batch) -> int:
        """How often `run` calls `tick`."""
        return int(self.options["restarts"]) * (self.steps + 1) + (not batch.parity)

    def _pgd(
        self,
        model: Prepared,
        rows: Tensor,
        steps: int,
        report_at: tuple[int, ...],
        engine: str,
        progress: Callable[[int], None] | None,
    ) -> PGDResult:
        return attack.pgd(
            model,
            self.images[rows],
            self.labels[rows],
            steps=steps,
            report_at=report_at,
            indices=self.indices[rows],
            engine=engine,
            progress=progress,
            **self.options,
        )


def _stack(by_iterate: dict[int, Tensor]) -> Tensor:
    """(N, K) from K tensors (N,), in ascending order of the iterates."""
    return torch.stack([by_iterate[k] for k in sorted(by_iterate)], dim=1)
