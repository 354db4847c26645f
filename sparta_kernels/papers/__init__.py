"""Every table and figure of the two SPARTA papers: what they print, and the runs that reproduce it."""

from .experiments import QUICK_LABEL, Need, Plan, Run, experiments, needs, quick_plan
from .progress import RunsProgress
from .published import Published, published
from .results import Result, write
from .run import work
from .runs import Runs

__all__ = [
    "QUICK_LABEL",
    "Need",
    "Plan",
    "Published",
    "Result",
    "Run",
    "Runs",
    "RunsProgress",
    "experiments",
    "needs",
    "published",
    "quick_plan",
    "work",
    "write",
]
