"""Attacks on any `torch.nn.Module` that takes images in [0, 1]."""

from .pgd import PGDResult, pgd
from .presets import PRESETS, Preset, preset

__all__ = ["PRESETS", "PGDResult", "Preset", "pgd", "preset"]
