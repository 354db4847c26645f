"""Tiny-ImageNet (Stanford CS231n): 110,000 labelled images of 64x64 in 200 classes, from the zip or extracted.

Decoding takes tens of seconds, so the pixels are cached in a safetensors file beside the source: 1.2 GB for the
    training
images, 0.1 GB for the others. The cache records its source, and is rebuilt for another one.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .dataset import Dataset, damaged, missing, places
from .files import replacing

NAME = "tiny-imagenet"
FOLDER = "tiny-imagenet-200"
CLASSES = 200
SHAPE = (3, 64, 64)
COUNTS = {"train": 100_000, "test": 10_000}

# The list of a zip's members, with a checksum of each, is at its end; this one's takes half of this.
_ZIP_TAIL = 32 << 20
_LARGEST = 16 << 20  # bytes of any file that is looked at


def _read(root: Path | None, split: str) -> tuple[Tensor, Tensor]:
    folders = places(NAME, root)
    source, beside = _find(folders)
    if source is None:
        for folder in folders:
            found = _from_cache(_cache(folder, split), split, None)
            if found is not None:
                return found
        raise missing(NAME, folders[0], f"{FOLDER}.zip or the folder {FOLDER}")
    try:
        with source:
            fingerprint = source.fingerprint(split)
            found = _from_cache(_cache(beside, split), split, fingerprint)
            if found is not None:
                return found
            images, labels = _decode(source, split)
    except ImportError as error:
        raise ImportError("the tiny-imagenet data set needs Pillow: pip install pillow") from error
    except (ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise damaged(NAME, source.path, str(error) or "is truncated", beside) from error
    _keep(_cache(beside, split), images, labels, fingerprint)
    return images, labels


# ---- where it lies -----------------------------------------------------------------------------------------


class _Folder:
    """The extracted folder. Names of files are relative to it, with slashes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def fingerprint(self, split: str) -> str:
        """Names, sizes and times of all images of the split."""
        digest = hashlib.sha256(b"".join(self.read(name) for name in ("wnids.txt", _ANNOTATIONS)))
        for folder in sorted((self.path / _SPLIT_FOLDERS[split]).glob("**/images")):
            with os.scandir(folder) as entries:
                facts = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries]
            digest.update(repr((folder.parent.name, sorted(facts))).encode())
        return digest.hexdigest()

    def images(self, folder: str) -> list[str]:
        """The names of the images in one folder, sorted."""
        path = self.path / folder
        return sorted(f"{folder}/{name}" for name in os.listdir(path)) if path.is_dir() else []

    def read(self, name: str) -> bytes:
        """The content of a file. ValueError if it is not there."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"has no {name}") from None


class _Zip:
    """The zip as it comes, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self._zip: zipfile.ZipFile | None = None

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def fingerprint(self, split: str) -> str:
        """Its size and its end, with the list of its members and their checksums: read without parsing it."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _ZIP_TAIL))
            return hashlib.sha256(str(size).encode() + file.read()).hexdigest()

    def images(self, folder: str) -> list[str]:
        self._open()
        return self._images.get(folder, [])

    def read(self, name: str) -> bytes:
        try:
            member = self._open().getinfo(f"{FOLDER}/{name}")
        except KeyError:
            raise ValueError(f"has no {name}") from None
        if member.file_size > _LARGEST:
            raise ValueError(f"{name} is said to have {member.file_size} bytes")
        return self._open().read(member)

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path)
            self._images: dict[str, list[str]] = {}
            for name in sorted(self._zip.namelist()):
                folder, _, file = name.removeprefix(f"{FOLDER}/").rpartition("/")
                if file:
                    self._images.setdefault(folder, []).append(f"{folder}/{file}")
        return self._zip


def _find(folders: tuple[Path, ...]) -> tuple[_Zip | _Folder | None, Path]:
    """The source, if any, and the folder in which its cache lies."""
    for folder in folders:
        if (folder / f"{FOLDER}.zip").is_file():
            return _Zip(folder / f"{FOLDER}.zip"), folder
        for extracted in (folder / FOLDER, folder):
            if (extracted / "wnids.txt").is_file() or (extracted.name == FOLDER and extracted.is_dir()):
                return _Folder(extracted), folder
    return None, folders[0]


# ---- its images --------------------------------------------------------------------------------------------

_SPLIT_FOLDERS = {"train": "train", "test": "val"}  # what is called test there has no labels
_ANNOTATIONS = "val/val_annotations.txt"


def _decode(source: _Zip | _Folder, split: str) -> tuple[Tensor, Tensor]:
    from PIL import Image, UnidentifiedImageError

    files = _labelled(source, split)
    if len(files) != COUNTS[split]:
        raise ValueError(f"must have {COUNTS[split]} images in {_SPLIT_FOLDERS[split]}, got {len(files)}")
    channels, height, width = SHAPE
    images = np.empty((len(files), channels, height, width), dtype=np.uint8)
    for row, (name, _) in enumerate(_shown(files, f"decoding {NAME} ({split})")):
        try:
            with Image.open(io.BytesIO(source.read(name)), formats=("JPEG",)) as image:
                if image.size != (width, height):
                    raise ValueError(f"{name} must be {width}x{height} pixels, got {image.size[0]}x{image.size[1]}")
                images[row] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except UnidentifiedImageError:
            raise ValueError(f"{name} is no JPEG") from None
        except (OSError, SyntaxError) as error:  # what Pillow raises for a truncated or damaged one
            raise ValueError(f"{name} is truncated or damaged ({error})") from error
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return torch.from_numpy(images), labels


def _labelled(source: _Zip | _Folder, split: str) -> list[tuple[str, int]]:
    """The images' names with their labels. Classes are numbered by their sorted names, as torchvision's folders are."""
    names = sorted(source.read("wnids.txt").decode(errors="replace").split())
    if len(set(names)) != CLASSES or len(names) != CLASSES:
        raise ValueError(f"wnids.txt must name {CLASSES} classes, got {len(set(names))}")
    number = {name: label for label, name in enumerate(names)}
    if split == "train":
        return [(image, number[name]) for name in names for image in source.images(f"train/{name}/images")]
    rows = [line.split("\t") for line in source.read(_ANNOTATIONS).decode(errors="replace").splitlines()]
    for row in rows:
        if len(row) < 2 or row[1] not in number or "/" in row[0] or "\\" in row[0]:
            raise ValueError(f"{_ANNOTATIONS} must name an image and its class in each line, got {row[:2]}")
    return [(f"val/images/{image}", number[name]) for image, name, *_ in rows]


def _shown(files: list[tuple[str, int]], what: str) -> Iterator[tuple[str, int]]:
    """The files, with a transient progress bar if there is a terminal."""
    console = Console(stderr=True)
    quiet = not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0"
    yield from track(files, what, console=console, transient=True, disable=quiet)


# ---- the cache ---------------------------------------------------------------------------------------------


def _cache(folder: Path, split: str) -> Path:
    return folder / f"{FOLDER}.{split}.safetensors"


def _from_cache(path: Path, split: str, fingerprint: str | None) -> tuple[Tensor, Tensor] | None:
    """The cached tensors, if they are intact and match the fingerprint, where one is given."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            if fingerprint is not None and (file.metadata() or {}).get("source") != fingerprint:
                return None
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (SafetensorError, OSError):
        return None
    fits = images.shape == (COUNTS[split], *SHAPE) and labels.shape == (COUNTS[split],)
    return (images, labels) if fits and (images.dtype, labels.dtype) == (torch.uint8, torch.int64) else None


def _keep(path: Path, images: Tensor, labels: Tensor, fingerprint: str) -> None:
    """Cache the pixels; if that fails, warn and continue without."""
    try:
        with replacing(path) as temporary:
            save_file({"images": images, "labels": labels}, str(temporary), {"source": fingerprint})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"{NAME}: the decoded images are not kept and will be decoded again next time ({error})", stacklevel=4
        )


# Mean and std are the ones in general use with this data set.
TINY_IMAGENET = Dataset(
    name=NAME,
    classes=CLASSES,
    shape=SHAPE,
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2770, 0.2691, 0.2821),
    read=_read,
    train_images=COUNTS["train"],
    test_images=COUNTS["test"],
    crop=8,
    flip=True,
)
