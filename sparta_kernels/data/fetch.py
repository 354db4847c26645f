"""Downloads of the data sets' files, checked and resumable. Standard library only."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..claims import claimed
from .dataset import DataError

TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # connections, before a transfer that keeps breaking off is given up
_CHUNK = 1 << 20


@dataclass(frozen=True)
class File:
    """One published file of a data set.

    Attributes:
        name: the file's name.
        url: its address.
        size: in bytes.
        sha256: checksum of its content, in hexadecimal.
    """

    name: str
    url: str
    size: int
    sha256: str


_KRIZ = "https://www.cs.toronto.edu/~kriz"
_NETZER = "http://ufldl.stanford.edu/housenumbers"

FILES: dict[str, tuple[File, ...]] = {
    "digits": (),
    "cifar10": (
        File(
            "cifar-10-python.tar.gz",
            f"{_KRIZ}/cifar-10-python.tar.gz",
            170_498_071,
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        ),
    ),
    "svhn": (
        File(
            "train_32x32.mat",
            f"{_NETZER}/train_32x32.mat",
            182_040_794,
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        File(
            "test_32x32.mat",
            f"{_NETZER}/test_32x32.mat",
            64_275_384,
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
    "tiny-imagenet": (
        File(
            "tiny-imagenet-200.zip",
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            248_100_043,
            "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        ),
    ),
}

# The same data in another form: fetched where the given URL is that of such a file.
OTHER_FILES: dict[str, tuple[File, ...]] = {
    "cifar10": (
        File(
            "cifar-10-binary.tar.gz",
            f"{_KRIZ}/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
}

OnProgress = Callable[[File, int], None]


def files(name: str, url: str | None = None) -> tuple[File, ...]:
    """What to download for the data set called `name`, and from where.

    Args:
        name: a data set's name; digits have no files.
        url: another place to take them from: the address of a folder that has the files under their own names, or
            of one of them. None: where their authors publish them.

    Raises:
        ValueError: there is no such data set, or url is no http or https address.
    """
    if name not in FILES:
        raise ValueError(f"fetch: name must be one of {', '.join(FILES)}, got {name!r}")
    if url is None:
        return FILES[name]
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"fetch: url must begin with http:// or https:// and a host, got {url!r}")
    last = parts.path.rpartition("/")[2]
    for file in (*FILES[name], *OTHER_FILES.get(name, ())):
        if file.name == last:
            return (File(file.name, url, file.size, file.sha256),)
    return tuple(File(file.name, f"{url.rstrip('/')}/{file.name}", file.size, file.sha256) for file in FILES[name])


def is_there(file: File, root: str | os.PathLike[str]) -> bool:
    """Whether `root` has the complete file."""
    path = Path(root) / file.name
    return path.is_file() and path.stat().st_size == file.size and _sha256(path) == file.sha256


def part_of(file: File, root: str | os.PathLike[str]) -> Path:
    """The path of a file's incomplete download."""
    return Path(root) / f"{file.name}.part"


def download(file: File, root: str | os.PathLike[str], on_progress: OnProgress | None = None) -> Path:
    """Download one file into the folder `root`.

    The download is written to NAME.part, which is renamed once its checksum is right. A transfer that breaks off
    resumes where it stopped, in this call or, from `NAME.part`, in a later one, if the server supports that and still
    has the same file; otherwise it starts again.

    Args:
        on_progress: called with the file and the bytes that are there so far.

    Returns:
        The file's path.

    Raises:
        DataError: the server cannot be reached, refuses, or sends something else; the message says what is kept.
        BlockingIOError: another process is downloading it; the message tells which.
        OSError: it cannot be written.
    """
    path, part = Path(root) / file.name, part_of(file, root)
    with claimed(path):
        for attempt in range(TRIES):
            try:
                _transfer(file, part, on_progress or (lambda *_: None))
                break
            except _BrokenOff as error:
                if attempt + 1 == TRIES or not error.moved:
                    raise DataError(f"{file.url}: {error}; {kept(file, root)}") from error
            except OSError as error:
                if isinstance(error, DataError) or error.errno is None:
                    raise
                raise OSError(f"cannot write {part}: {error.strerror}; {kept(file, root)}") from error
        if part.stat().st_size != file.size or _sha256(part) != file.sha256:
            _discard(part)
            raise DataError(
                f"{file.url}: what arrived is not {file.name}: its sha256 is not {file.sha256[:12]}...; it was "
                "removed: try again, or another --url"
            )
        os.replace(part, path)
        _discard(part)
    return path


def kept(file: File, root: str | os.PathLike[str]) -> str:
    """What a failed transfer has left, and how to resume."""
    part = part_of(file, root)
    if not part.exists():
        return "nothing was kept"
    size = part.stat().st_size / 1e6
    return f"{size:.1f} of {file.size / 1e6:.1f} MB are kept in {part}: the same command goes on from there"


# ---- one transfer ------------------------------------------------------------------------------------------


class _BrokenOff(Exception):
    """The connection could not be made or was lost; `moved` says whether bytes had arrived."""

    def __init__(self, reason: object, moved: bool = False) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.moved = moved


def _transfer(file: File, part: Path, on_progress: OnProgress) -> None:
    """Complete `part`."""
    have = part.stat().st_size if part.exists() else 0
    if have > file.size:
        _discard(part)
        have = 0
    if have == file.size:
        return
    with _open(file, part, have) as response:
        start = _start(file, part, response, have)
        total = response.headers.get("Content-Length", "")
        if total.isdigit() and start + int(total) != file.size:
            raise DataError(
                f"{file.url}: must have {file.size} bytes, but the server has {start + int(total)}; try another --url"
            )
        with part.open("ab" if start else "wb") as out:
            _validator_of(part).write_text(_validator(response))
            done = start
            on_progress(file, done)
            while True:
                try:
                    chunk = response.read1(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _BrokenOff(error, moved=done > start) from error
                if not chunk:
                    break
                out.write(chunk)
                done += len(chunk)
                on_progress(file, done)
                if done > file.size:
                    break
    if done < file.size:
        raise _BrokenOff("the connection was closed early", moved=done > start)


def _open(file: File, part: Path, have: int) -> Any:
    """The server's answer to a request for the bytes from `have` on."""
    headers = {"User-Agent": f"sparta_kernels/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        validator = _validator_of(part)
        if validator.exists() and (value := validator.read_text()):
            headers["If-Range"] = value
    try:
        return urllib.request.urlopen(urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # what is here is no beginning of what is there
            _discard(part)
            raise _BrokenOff(f"HTTP {error.code} {error.reason}", moved=True) from error
        raise DataError(f"{file.url}: HTTP {error.code} {error.reason}; {_elsewhere(part)}") from error
    except urllib.error.URLError as error:
        raise _BrokenOff(error.reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no name that a host can have
        raise _BrokenOff(error) from error


def _start(file: File, part: Path, response: Any, have: int) -> int:
    """The place in the file of the answer's first byte: `have`, or 0 from a server that starts again."""
    if response.status == 200:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status != 206 or match is None or int(match[1]) != have:
        _discard(part)
        raise _BrokenOff(f"the server answered HTTP {response.status} to a request for the rest", moved=True)
    return have


def _validator(response: Any) -> str:
    """The validator of this version of the file for If-Range: a strong ETag or the date; or nothing."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def _validator_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_of(part).unlink(missing_ok=True)


def _elsewhere(part: Path) -> str:
    return f"give another place with --url, or put the file into {part.parent} yourself"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
