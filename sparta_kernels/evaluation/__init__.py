"""Robust evaluation."""

from .batch_size import BatchSize, find_batch_size
from .evaluate import evaluate
from .outcomes import Outcomes, OutcomesError
from .result import Evaluation, Parity
from .run import Progress
from .store import stored

__all__ = [
    "BatchSize",
    "Evaluation",
    "Outcomes",
    "OutcomesError",
    "Parity",
    "Progress",
    "evaluate",
    "find_batch_size",
    "stored",
]
