"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: str | os.PathLike[str]) -> Path:
    """`path` if a file can be written there; otherwise an OSError that says why not. Leaves nothing behind.

    The only sure way to know is to write: a permission bit says nothing to root, nor of a full or read-only disk.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is not a regular file, and would be replaced by one")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is read-only")
    with _temporary(path):
        return path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` so that, if the power fails, the old or the new file is there, whole.

    Raises:
        OSError: it cannot be written; the old file, if any, is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write instead of `path`, whose place it takes, whole and for good, once the block has ended well."""
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    if os.name == "posix":  # the rename itself is only safe once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new empty file beside `path` (a rename must not cross file systems), removed unless moved away."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            temporary.touch(exist_ok=False)
        except OSError as error:
            raise type(error)(f"cannot write {path}: {error.strerror}") from error
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
