"""The interface of data sets. A new one is a file like digits.py and a line in __init__.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

SPLITS = ("train", "test")


class DataError(OSError):
    """A data set's file is missing, damaged or of the wrong kind; the message says what to put where."""


@dataclass(frozen=True)
class Dataset:
    """A data set's description, and the function that reads it.

    Attributes:
        name: its name in `load` and on the command line.
        classes: number of classes.
        shape: (C, H, W) of its images.
        mean, std: of each channel over the training images in [0, 1], for the normalisation inside a model.
        read: (root, split) -> uint8 images (N, C, H, W) and int64 labels (N,).
        train_images, test_images: how many there are; 0 if unknown.
        crop: zero pixels padded around a training image before a random crop of its own size; 0 for none.
        flip: whether a training image may be mirrored, left to right, in augmentation.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: Callable[[Path | None, str], tuple[Tensor, Tensor]]
    train_images: int = 0
    test_images: int = 0
    crop: int = 0
    flip: bool = False


def places(name: str, root: Path | None) -> tuple[Path, ...]:
    """The folders that may hold the data set's files: root and root/name, where there is one.

    Raises:
        DataError: no root, or none that is a folder.
    """
    if root is None:
        raise DataError(f"{name}: needs the folder with its files: pass it as root; {_fetch(name, 'DIR')}")
    if not root.is_dir():
        raise DataError(f"{name}: root {root} is no folder; {_fetch(name, root)}")
    return tuple(folder for folder in (root, root / name) if folder.is_dir())


def missing(name: str, root: Path, wanted: str) -> DataError:
    """The error for files that are not in `root`; `wanted` says which."""
    return DataError(f"{name}: {root} must hold {wanted}; {_fetch(name, root)}")


def damaged(name: str, path: str | Path, what: str, root: str | Path = "DIR") -> DataError:
    """The error for a file that is there but wrong; `what` says how."""
    return DataError(f"{name}: {path}: {what}; put an intact copy in its place, or remove it: {_fetch(name, root)}")


def _fetch(name: str, root: str | Path) -> str:
    return f"`sparta data fetch {name} --root {root}` downloads it"
