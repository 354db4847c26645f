"""The folder that keeps runs, one per network: its checkpoint, and the outcome for every test image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import claims, evaluation
from ..evaluation import result
from ..evaluation.outcomes import Outcomes
from ..training import CheckpointError
from ..training.checkpoint import read_metadata
from .experiments import Need, Plan, Run


@dataclass(frozen=True)
class Found:
    """The result of an evaluation; errors are shares of the test images.

    Attributes:
        clean: error on clean images.
        errors: under the attack, by iterate; empty if only clean images were evaluated.
        outcomes: of every image.
    """

    clean: float
    errors: dict[int, float]
    outcomes: Outcomes

    @cached_property
    def parity(self) -> evaluation.Parity | None:
        """How gradients of a lower precision compare with fp32's; None for fp32."""
        return result.parity(self.outcomes, 1.0)


@dataclass(frozen=True)
class State:
    """A run's progress: completed epochs, evaluated test images, and whether nothing is left."""

    epochs: int
    images: int
    done: bool


class Runs:
    """The runs of one plan in `folder`, which need not exist yet."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan

    def checkpoint(self, run: Run) -> Path:
        """The file of its network."""
        return self.folder / run.folder / "network.safetensors"

    def outcomes(self, run: Run, need: Need) -> Path:
        """The file of its evaluation."""
        return self.folder / run.folder / ("pgd.npz" if need is Need.ATTACKED else "clean.npz")

    def attack(self, run: Run, need: Need) -> dict[str, Any]:
        """Arguments of `evaluation.evaluate`; for clean images alone, one step whose result is ignored."""
        plan = self.plan
        report_at = plan.report_at if need is Need.ATTACKED else (1,)
        return {
            "eps": plan.eps,
            "step_size": plan.step_size,
            "steps": report_at[-1],
            "report_at": list(report_at),
            "precision": plan.precision if need is Need.ATTACKED else "fp32",
            "seed": run.settings().seed,
        }

    def epochs_done(self, run: Run) -> int:
        """How many complete epochs its checkpoint has.

        Raises:
            CheckpointError: the file is damaged, or of another run.
        """
        path = self.checkpoint(run)
        if not path.exists():
            return 0
        metadata = read_metadata(path)
        settings = json.loads(run.arguments)
        other = [name for name, value in settings.items() if metadata["settings"].get(name) != value]
        if other:
            raise CheckpointError(f"checkpoint {path}: of another run ({', '.join(other)}); move it away")
        return int(metadata["epoch"])

    def found(self, run: Run, need: Need) -> Found | None:
        """Its evaluation, if that is complete and by this plan."""
        for kind in (Need.ATTACKED, Need.CLEAN):  # an attack's has the clean error too
            if kind < need or not self._stored(run, kind):
                continue
            outcomes = Outcomes.load(self.outcomes(run, kind))
            known = outcomes.arrays["done"].all() and outcomes.arrays["parity_done"].all()
            if known and self._by_this_plan(outcomes, run, kind):
                clean, errors = result.errors(outcomes)
                return Found(clean, errors if kind is Need.ATTACKED else {}, outcomes)
        return None

    def state(self, run: Run, need: Need) -> State:
        """How far it is."""
        epochs = self.epochs_done(run)
        trained = epochs == run.epochs
        if need is Need.TRAINED or not trained:
            return State(epochs, 0, trained and need is Need.TRAINED)
        found = self.found(run, need)
        if found is not None:
            return State(epochs, len(found.outcomes.arrays["done"]), True)
        known = 0
        if self._stored(run, need):
            outcomes = Outcomes.load(self.outcomes(run, need))
            known = int(outcomes.arrays["done"].sum()) if self._by_this_plan(outcomes, run, need) else 0
        return State(epochs, known, False)

    @contextmanager
    def claimed(self, run: Run) -> Iterator[None]:
        """Claim the run for the block: other processes may share the folder, each with its own device.

        Raises:
            BlockingIOError: another process is working on it.
        """
        folder = self.folder / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        with claims.claimed(folder / "run"):
            yield

    def _stored(self, run: Run, need: Need) -> bool:
        return bool(evaluation.stored(self.outcomes(run, need))) and self.outcomes(run, need).exists()

    def _by_this_plan(self, outcomes: Outcomes, run: Run, need: Need) -> bool:
        """Whether these are outcomes of the plan's attack, on as many images."""
        wanted = self.attack(run, need)
        count = self.plan.images
        return all(outcomes.settings.get(name) == value for name, value in wanted.items()) and (
            count is None or len(outcomes.arrays["done"]) == count
        )
