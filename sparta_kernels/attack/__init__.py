"""Attacks on any `torch.nn.Module` that takes images in [0, 1]."""

from .engines import ENGINES, Engine
from .pgd import perturb, pgd
from .prepare import PRECISIONS, Prepared, prepare
from .presets import PRESETS, Preset, preset
from .rewrite import Report
from .trajectory import NotFinite, PGDResult

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "PRESETS",
    "Engine",
    "NotFinite",
    "PGDResult",
    "Prepared",
    "Preset",
    "Report",
    "perturb",
    "pgd",
    "prepare",
    "preset",
]
