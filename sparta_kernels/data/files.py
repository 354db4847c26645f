"""Atomic writes: a file is either written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


def check_writable(path: str | os.PathLike[str]) -> Path:
    """`path` if a file can be written there; otherwise an OSError that says why not. Leaves nothing behind.

    The only reliable test is to write: permission bits say nothing about root, or about full or read-only disks.
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
    """Write `content` to `path` so that, even after a power failure, either the old or the new file is there, complete.

    Raises:
        OSError: it cannot be written; the old file, if any, is untouched.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        if error.strerror is None:  # it says so already
            raise
        raise type(error)(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write instead of `path`, which it replaces atomically and durably if the block succeeds."""
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
    """A new empty file beside `path` (a rename must not cross file systems), removed unless moved away.

    It is locked meanwhile. One that is not locked was left by a process that was killed, and is removed here.
    """
    _remove_abandoned(path)
    try:
        temporary, owned = _create(path)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror}") from error
    with owned:
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """Create the temporary file; returns its path, and it open and locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        owned = temporary.open("xb")
        _lock(owned, wait=True)
        if temporary.exists():  # not taken for an abandoned one before it was locked
            return temporary, owned
        owned.close()


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files left by processes that were killed while they wrote `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    try:
        found = [path.with_name(other) for other in os.listdir(path.parent) if name.fullmatch(other)]
    except OSError:  # a folder that cannot be listed
        return
    for abandoned in found:
        with contextlib.suppress(OSError), abandoned.open("rb+") as file:  # gone by now, or not ours to remove
            if _lock(file, wait=False):
                abandoned.unlink(missing_ok=True)


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Lock the file until it is closed or the process ends; returns whether that succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (AttributeError, OSError):  # a system or a file system without locks, or somebody else's
        return False
    return True
