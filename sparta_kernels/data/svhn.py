"""SVHN (Netzer et al., 2011), format 2: 99,289 digits of 32x32, http://ufldl.stanford.edu/housenumbers/."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset, damaged, missing, places

NAME = "svhn"
CLASSES = 10
COUNTS = {"train": 73_257, "test": 26_032}
SHAPE = (3, 32, 32)


def _read(root: Path | None, split: str) -> tuple[Tensor, Tensor]:
    folders = places(NAME, root)
    file = f"{split}_32x32.mat"
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        raise missing(NAME, folders[0], file)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("the svhn data set needs SciPy: pip install scipy") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged files, which are refused below
            found = loadmat(str(path), variable_names=("X", "y"))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise damaged(NAME, path, f"is truncated or damaged ({type(error).__name__}: {error})", path.parent) from error
    try:
        return _tensors(found, COUNTS[split])
    except ValueError as error:
        raise damaged(NAME, path, str(error), path.parent) from error


def _tensors(found: dict[str, np.ndarray], count: int) -> tuple[Tensor, Tensor]:
    """X (H, W, C, N) and y (N, 1), in which the digit 0 is 10, as images (N, C, H, W) and labels (N,)."""
    channels, height, width = SHAPE
    for name, shape in (("X", (height, width, channels, count)), ("y", (count, 1))):
        if name not in found:
            raise ValueError(f"has no variable {name}")
        if found[name].shape != shape or found[name].dtype != np.uint8:
            raise ValueError(
                f"{name} must be uint8 of shape {shape}, got {found[name].dtype} of shape {found[name].shape}"
            )
    labels = found["y"][:, 0].astype(np.int64)
    if labels.min() < 1 or labels.max() > CLASSES:
        raise ValueError(f"y must be 1 to {CLASSES}, got {labels.min()} to {labels.max()}")
    images = np.ascontiguousarray(found["X"].transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(labels % CLASSES)


# Mean and std are the ones in general use with this data set. A mirrored digit is another sign: no flip.
SVHN = Dataset(
    name=NAME,
    classes=CLASSES,
    shape=SHAPE,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    read=_read,
    train_images=COUNTS["train"],
    test_images=COUNTS["test"],
    crop=4,
    flip=False,
)
