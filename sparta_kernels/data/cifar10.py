"""CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of 32x32 in ten classes,
https://www.cs.toronto.edu/~kriz/cifar.html.

Both versions, "python" and "binary", are read from the archive or from the extracted folder. Nothing is extracted to
disk, and the python version's pickles can create only numbers, text and arrays.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset, damaged, missing, places

NAME = "cifar10"
CLASSES = 10
SHAPE = (3, 32, 32)
BATCH_IMAGES = 10_000  # in each of the six files
PIXELS = 3 * 32 * 32

_Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Version:
    """One of the forms in which the data set is published."""

    folder: str
    archive: str
    ending: str
    parse: Callable[[bytes], _Batch]

    def files(self, split: str) -> list[str]:
        names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
        return [name + self.ending for name in names]


def _read(root: Path | None, split: str) -> tuple[Tensor, Tensor]:
    folders = places(NAME, root)
    where, version, archived = _find(folders, split)
    contents = _from_archive(where, version, split) if archived else _from_folder(where, version, split)
    images = np.empty((len(contents), BATCH_IMAGES, *SHAPE), dtype=np.uint8)
    labels = np.empty((len(contents), BATCH_IMAGES), dtype=np.int64)
    for row, (name, content) in enumerate(contents.items()):
        try:
            pixels, classes = version.parse(content)
        except ValueError as error:
            raise damaged(NAME, where / name, str(error), folders[0]) from error
        images[row] = pixels.reshape(BATCH_IMAGES, *SHAPE)
        labels[row] = classes
    return torch.from_numpy(images).flatten(0, 1), torch.from_numpy(labels).flatten()


# ---- where it lies -----------------------------------------------------------------------------------------


def _find(folders: Sequence[Path], split: str) -> tuple[Path, _Version, bool]:
    """The extracted folder or the archive to read, which version it is, and whether it is an archive."""
    incomplete = []
    for folder in folders:
        for version in VERSIONS:
            for extracted in (folder / version.folder, folder):
                absent = [name for name in version.files(split) if not (extracted / name).is_file()]
                if not absent:
                    return extracted, version, False
                if extracted.is_dir() and extracted.name == version.folder:
                    incomplete.append(extracted / absent[0])
    for folder in folders:
        for version in VERSIONS:
            if (folder / version.archive).is_file():
                return folder / version.archive, version, True
    if incomplete:
        raise damaged(NAME, incomplete[0], "is not there, though its folder is", folders[0])
    wanted = [form for version in VERSIONS for form in (version.archive, f"the folder {version.folder}")]
    raise missing(NAME, folders[0], f"one of {', '.join(wanted)}")


def _from_folder(folder: Path, version: _Version, split: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in version.files(split)}


def _from_archive(path: Path, version: _Version, split: str) -> dict[str, bytes]:
    """The split's files, in order. The archive is read to its end, where the checksum stands."""
    wanted = {f"{version.folder}/{name}": name for name in version.files(split)}
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as unpacked:
            with tarfile.open(fileobj=unpacked, mode="r|", bufsize=1 << 20) as archive:
                for member in archive:
                    name = wanted.get(member.name.removeprefix("./"))
                    if name is None or not member.isfile():
                        continue
                    if member.size > 2 * BATCH_IMAGES * (PIXELS + 1):
                        raise tarfile.TarError(f"{name} is said to have {member.size} bytes")
                    file = archive.extractfile(member)
                    contents[name] = b"" if file is None else file.read()
            while unpacked.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(NAME, path, f"is truncated or damaged ({error})", path.parent) from error
    absent = [name for name in wanted.values() if name not in contents]
    if absent:
        raise damaged(NAME, path, f"has no {version.folder}/{absent[0]}", path.parent)
    return {name: contents[name] for name in wanted.values()}


# ---- what it says ------------------------------------------------------------------------------------------


def _parse_binary(content: bytes) -> _Batch:
    """Rows of one label and 3072 pixels."""
    if len(content) != BATCH_IMAGES * (PIXELS + 1):
        raise ValueError(f"must have {BATCH_IMAGES * (PIXELS + 1)} bytes, got {len(content)}")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(BATCH_IMAGES, PIXELS + 1)
    _check_labels(rows[:, 0])
    return rows[:, 1:], rows[:, 0]


def _parse_python(content: bytes) -> _Batch:
    """A pickled dictionary with `data`, an array of bytes, and `labels`, a list of integers."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"is truncated or damaged ({type(error).__name__}: {error})") from error
    if not isinstance(batch, Mapping):
        raise ValueError(f"must hold a dictionary, got {type(batch).__name__}")
    pixels, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(pixels, _PickledArray):
        raise ValueError(f"data must be an array, got {type(pixels).__name__}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError("labels must be a list of integers")
    if len(labels) != BATCH_IMAGES:
        raise ValueError(f"must have {BATCH_IMAGES} labels, got {len(labels)}")
    classes = np.array(labels, dtype=np.int64)
    _check_labels(classes)
    return pixels.array(), classes


def _check_labels(labels: np.ndarray) -> None:
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"labels must be 0 to {CLASSES - 1}, got {labels.min()} to {labels.max()}")


class _Refused(ValueError):
    """A pickle asks for what no file of CIFAR-10 does."""


class _PickledType:
    """Stands for numpy.dtype in a pickle: only its name is looked at."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _: Any) -> None:
        pass


class _PickledArray:
    """Stands for numpy.ndarray in a pickle: what the file says of it, to be checked before it becomes an array."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """uint8 (BATCH_IMAGES, PIXELS). ValueError if it is anything else."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("data must be an array, got none")
        _, shape, kind, by_columns, content = self.state
        name = getattr(kind, "name", None)
        if name not in ("u1", b"u1") or not isinstance(content, bytes):
            raise ValueError(f"data must be bytes, got type {name!r}")
        if shape != (BATCH_IMAGES, PIXELS) or len(content) != BATCH_IMAGES * PIXELS:
            raise ValueError(
                f"data must have shape {(BATCH_IMAGES, PIXELS)}, got {shape} and {len(content)} bytes of it"
            )
        return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Unpickler(pickle.Unpickler):
    """Makes plain Python values and the stand-ins above. A pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _PickledArray
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _PickledArray if name == "ndarray" else _PickledType
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes into old pickles
            return lambda text, codec: text.encode("latin1")
        raise _Refused(f"asks for {module}.{name}, which no file of CIFAR-10 does: do not trust it")


VERSIONS = (
    _Version("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _parse_python),
    _Version("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _parse_binary),
)

# Mean and std are the ones in general use with this data set.
CIFAR10 = Dataset(
    name=NAME,
    classes=CLASSES,
    shape=SHAPE,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    read=_read,
    train_images=5 * BATCH_IMAGES,
    test_images=BATCH_IMAGES,
    crop=4,
    flip=True,
)
