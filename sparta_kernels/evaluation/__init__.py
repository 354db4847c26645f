"""Robust evaluation."""

from .evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
