"""Exclusive use of a file by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Claim `path`, a file that need not exist, for the duration of the block.

    The claim is a lock on the file .NAME.lock beside it. The system releases it when the process ends, however it
    ends. On a file system without locks there is only a warning; where nothing can be written, nothing is claimed.

    Raises:
        BlockingIOError: another process, or another block of this one, holds the claim; the message tells which.
        OSError: this process cannot open the lock file.
    """
    path = Path(path)
    lock = path.parent / f".{path.name}.lock"
    taken = _take(path, lock)
    try:
        yield
    finally:
        if taken is not None:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)  # before anybody else can have it
            os.close(taken)


def _take(path: Path, lock: Path) -> int | None:
    """The lock file, open and locked; None where that is impossible."""
    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            if lock.exists():
                raise type(error)(f"cannot claim {path}: {lock}: {error.strerror}") from error
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (AttributeError, OSError) as error:
            owner = os.read(file, 1000).decode(errors="replace")
            os.close(file)
            if getattr(error, "errno", None) in _HELD:
                raise BlockingIOError(f"{path} is in use by {owner or 'another process'}") from error
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
            warnings.warn(f"{path}: cannot be locked; make sure that no other process uses it ({error})", stacklevel=4)
            return None
        if _is_there(file, lock):
            with contextlib.suppress(OSError):  # a full disk, of which whoever writes tells
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        os.close(file)  # its owner has just removed it


def _is_there(file: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), lock.stat())
    except OSError:
        return False
