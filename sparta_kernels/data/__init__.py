"""Data sets as tensors in memory."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from .augment import augment
from .cifar10 import CIFAR10
from .dataset import SPLITS, DataError, Dataset
from .digits import DIGITS
from .svhn import SVHN
from .tiny_imagenet import TINY_IMAGENET

DATASETS = {dataset.name: dataset for dataset in (DIGITS, CIFAR10, SVHN, TINY_IMAGENET)}


def describe(name: str) -> Dataset:
    """The description of the data set called `name`: classes, shape, mean and std. ValueError if unknown."""
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"data: name must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]


def load(name: str, root: str | os.PathLike[str] | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """Read one split of a data set.

    Args:
        name: "digits" (scikit-learn's 1797 handwritten digits of 8x8: 1437 to train, 360 to test,
            stratified), "cifar10", "svhn" or "tiny-imagenet", whose validation images are its test split.
        root: folder that has the data set's files, as `sparta data fetch` leaves them or extracted, or has them in a
            folder of the data set's name; digits need none.
        split: "train" or "test".

    Returns:
        Images, uint8 (N, C, H, W), and labels, int64 (N,), always in the same order.

    Raises:
        TypeError, ValueError: an argument is not as above.
        DataError: a file is missing, damaged or of the wrong kind; the message says what to put where.
        ImportError: the data set needs a package that is not installed.
    """
    dataset = describe(name)
    if split not in SPLITS:
        raise ValueError(f"data: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"data: root must be a path or None, got {root!r}")
    return dataset.read(None if root is None else Path(root), split)


__all__ = ["DATASETS", "SPLITS", "DataError", "Dataset", "augment", "describe", "load"]
