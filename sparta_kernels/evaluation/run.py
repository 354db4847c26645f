"""Runs an evaluation batch by batch; each is stored at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..processes import Processes
from . import result
from .batch_size import BatchSize
from .batches import Attacker, batches
from .memory import PeakMemory
from .outcomes import Outcomes
from .store import Store


@dataclass(frozen=True)
class Progress:
    """A process's progress through its share.

    Attributes:
        done, total: model passes.
        batch: images attacked at once, and why so many.
        images: number of images whose outcome is known, including those from before a resume.
        images_per_second: of the batches done now; None before the first.
        clean_error, robust_error: shares of those images misclassified, clean and at the last reported iterate;
            None if there are none yet.
    """

    done: int
    total: int
    batch: BatchSize
    images: int = 0
    images_per_second: float | None = None
    clean_error: float | None = None
    robust_error: float | None = None


class Work(NamedTuple):
    """All outcomes, and the cost of those that were not known before."""

    outcomes: Outcomes
    attacked: int
    seconds: float
    peak_memory: int | None
    engine: str
    engine_reason: str


def run(
    attacker: Attacker,
    size: BatchSize,
    known: Outcomes,
    store: Store,
    processes: Processes,
    progress: Callable[[Progress], None] | None,
) -> Work:
    """Attack the images that are not `known` yet. Each process does its share, and gets all outcomes."""
    every = batches(len(attacker.images), size.images, len(known.arrays["parity_done"]))
    mine = processes.share([batch for batch in every if not known.knows(batch.parity, batch.span)])
    outcomes = known if processes.rank == 0 else known.blank()  # what is known must be there once when it is summed
    engine, reason = outcomes.settings.get("engine_used"), "all was known"
    peak, attacked, seconds = None, 0, 0.0
    done, total = 0, sum(attacker.passes(batch) for batch in mine)
    errors = _errors_so_far(outcomes)

    def tick(_: int) -> None:
        nonlocal done
        done += 1
        tell()

    def tell() -> None:
        if progress is not None:
            progress(Progress(done, total, size, *errors[:1], attacked / seconds if attacked else None, *errors[1:]))

    tell()
    if mine:
        memory = PeakMemory(attacker.images.device)
        engine, reason = attacker.warm_up(mine[0]).engine
        store.settle(outcomes, engine_used=engine)
        store.save(outcomes)
        if engine != "graph":  # a graph holds what its capture allocated; replaying it allocates nothing
            memory = PeakMemory(attacker.images.device)
    for batch in mine:
        start = time.perf_counter()
        outcomes.put(batch.span, **attacker.run(batch, tick))
        store.save(outcomes)
        if not batch.parity:
            attacked, seconds = attacked + batch.real, seconds + time.perf_counter() - start
            peak, errors = memory.bytes(), _errors_so_far(outcomes)
        tell()
    for name in outcomes.RESULTS + outcomes.PARITY:
        outcomes.arrays[name] = processes.combine(outcomes.arrays[name])
    store.finish(outcomes)
    largest = processes.largest(-1 if peak is None else peak)
    return Work(
        outcomes,
        attacked=processes.total(attacked),
        seconds=processes.largest(seconds),
        peak_memory=None if largest < 0 else int(largest),
        engine=engine or "none",
        engine_reason=reason,
    )


def _errors_so_far(outcomes: Outcomes) -> tuple[int, float | None, float | None]:
    """How many images' outcome is known, and the shares of them misclassified: clean, and at the last iterate."""
    count = int(outcomes.arrays["done"].sum())
    if not count:
        return 0, None, None
    clean, robust = result.errors(outcomes)
    return count, clean, robust[max(robust)]
