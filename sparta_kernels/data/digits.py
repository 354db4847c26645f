"""scikit-learn's handwritten digits: 1797 greyscale images of 8x8, shipped with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset

TEST_IMAGES = 360


def _read(root: Path | None, split: str) -> tuple[Tensor, Tensor]:
    """The split's images and labels; `root` is not needed, the images ship with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data set needs scikit-learn: pip install scikit-learn") from error
    source = load_digits()
    # Pixels count 0..16 dots; 255/16 is exact in binary, so rounding is the only loss.
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = source.target.astype(np.int64)
    rows = _rows(labels, split)
    return torch.from_numpy(images[rows]), torch.from_numpy(labels[rows])


def _rows(labels: np.ndarray, split: str) -> np.ndarray:
    """Row numbers of a split, ascending. The 360 test images are stratified by class.

    `RandomState` because numpy promises that its stream never changes: the split is the same for everybody.
    """
    order = np.random.RandomState(0).permutation(len(labels))
    share = np.bincount(labels) * TEST_IMAGES / len(labels)
    quota = np.floor(share).astype(int)
    # The largest remainders make up for what rounding down left over.
    quota[np.argsort(quota - share, kind="stable")[: TEST_IMAGES - quota.sum()]] += 1
    test = np.concatenate([order[labels[order] == label][:count] for label, count in enumerate(quota)])
    return np.sort(test) if split == "test" else np.setdiff1d(np.arange(len(labels)), test)


DIGITS = Dataset(
    name="digits",
    classes=10,
    shape=(1, 8, 8),
    mean=(0.3058,),
    std=(0.3762,),
    read=_read,
    train_images=1437,
    test_images=TEST_IMAGES,
)
