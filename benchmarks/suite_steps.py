"""The steps of the device suite: what is done, and the time that it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from suite_checks import build, sanitize, test
from suite_measurements import activation, attack, batches, choices, ops, rivals, training
from suite_runner import Job


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        do: what is done.
        limit: seconds that it may take.
        least: seconds without which it is not begun.
        log: the file that its commands print into.
        needs: the steps without which it cannot work.
        after: other steps whose results it uses.
        by_name: whether it is only done where `--only` names it, or in a rehearsal.
    """

    do: Callable[[Job], None]
    limit: float
    least: float
    log: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    by_name: bool = False


# A call's result is 8 files at most on some machines, and so many the usual ones make. Hence so few logs.
STEPS = {
    "build": Step(build, limit=200, least=20, log="test.log"),
    "test": Step(test, limit=200, least=60, log="test.log", needs=("build",)),
    "sanitize": Step(sanitize, limit=130, least=30, log="test.log", needs=("build",)),
    "ops": Step(ops, limit=160, least=50, log="benchmarks.log", needs=("build",)),
    "attack": Step(attack, limit=75, least=50, log="benchmarks.log", needs=("build",)),
    # What torch.compile needs for whole networks does not fit in beside the others.
    "rivals": Step(rivals, limit=300, least=60, log="benchmarks.log", needs=("build",), by_name=True),
    "batches": Step(batches, limit=200, least=60, log="benchmarks.log", needs=("build",), by_name=True),
    "training": Step(training, limit=60, least=30, log="benchmarks.log", needs=("build",)),
    # Last of those that measure: what torch.compile needs is whatever they leave.
    "activation": Step(activation, limit=75, least=30, log="benchmarks.log", needs=("build",)),
    "choices": Step(choices, limit=20, least=10, log="benchmarks.log", after=("ops",)),
}
