"""What every data set has to offer. A new one is one file like digits.py and one line in __init__.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Dataset:
    """A data set's facts, and the function that reads it.

    Attributes:
        name: what it is called in `load` and on the command line.
        classes: number of classes.
        shape: (C, H, W) of its images.
        mean, std: of each channel over the training images in [0, 1], for the normalisation inside a model.
        read: (root, split) -> uint8 images (N, C, H, W) and int64 labels (N,).
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[Path | None, str], tuple[Tensor, Tensor]]
