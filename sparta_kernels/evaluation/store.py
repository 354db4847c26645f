"""The file of an evaluation's outcomes, and those of its other processes beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..processes import Processes
from .outcomes import Outcomes, OutcomesError

# Not compared when a run is taken up: it is known only once the attack has run, and compared then.
_LATE = {"engine_used"}


class Store:
    """Keeps outcomes in a file, from which a run stopped at any moment can resume.

    Process 0 writes the file itself, every other process one beside it. A file left beside it belongs to a run that was
    stopped, with any number of processes.

    Args:
        path: the file; None keeps nothing.
        resume: go on from what is there, if anything is.
        overwrite: begin anew although it exists.
        processes: that share the work; all of them must see the folder.

    Raises:
        FileExistsError: it exists, and neither `resume` nor `overwrite` is set.
        OutcomesError: what is to be resumed is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | None, *, resume: bool, overwrite: bool, processes: Processes) -> None:
        self._path, self._processes = path, processes
        self._own = None if path is None else _part(path, processes.rank)
        self._found = [] if path is None else stored(path)
        if self._found and not (resume or overwrite):
            raise FileExistsError(f"outcomes {self._found[0]} exists; resume it, overwrite it, or name another file")
        self._before = [Outcomes.load(file) for file in self._found] if resume else []

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The settings of the resumed run; None if there is none."""
        return self._before[0].settings if self._before else None

    def take_up(self, outcomes: Outcomes) -> None:
        """Add outcomes known before to `outcomes`, and merge them into one file.

        Raises:
            OutcomesError: the run that is resumed is another one, or its file is damaged.
            OSError: the file cannot be written.
        """
        for file, before in zip(self._found, self._before, strict=False):
            self._compare(file, outcomes.settings, before.settings, except_for=_LATE)
            if not before.fits(outcomes):
                raise OutcomesError(f"outcomes {file}: its content is damaged (arrays that do not fit its settings)")
            self._compare(file, self._before[0].settings, before.settings)
            outcomes.take_over(before)
        if self._before:
            outcomes.settings |= {name: self._before[0].settings.get(name) for name in _LATE}
        self._processes.wait()  # all have read
        if self._path is not None and self._processes.rank == 0:
            if self._before:
                outcomes.save(self._path)
            _remove_parts(self._path)
            _remove_unfinished(self._path)
        self._processes.wait()  # all are written anew, if they are

    def settle(self, outcomes: Outcomes, **late: Any) -> None:
        """Set the settings that are known only now. OutcomesError if the resumed run had others."""
        outcomes.settings |= late
        if self._before:
            self._compare(self._found[0], outcomes.settings, self._before[0].settings)

    def save(self, outcomes: Outcomes) -> None:
        """Write what this process knows. OSError if that fails; what was written before is kept."""
        if self._own is not None:
            outcomes.save(self._own)

    def finish(self, outcomes: Outcomes) -> None:
        """Write the outcomes of all processes to the one file."""
        if self._path is not None and self._processes.rank == 0:
            outcomes.save(self._path)
            _remove_parts(self._path)

    def _compare(
        self, file: Path, new: Mapping[str, Any], old: Mapping[str, Any], except_for: Set[str] = frozenset()
    ) -> None:
        keys = sorted(key for key in (new.keys() | old.keys()) - except_for if new.get(key) != old.get(key))
        if keys:
            words = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in keys)
            raise OutcomesError(f"outcomes {file}: cannot resume with other settings: {words}{_advice(keys, old)}")


@contextmanager
def keeping(path: Path | None, *, resume: bool, overwrite: bool, processes: Processes) -> Iterator[Store]:
    """A `Store` whose file is claimed for the block; BlockingIOError if another process is using it."""
    with processes.claim(path):
        yield Store(path, resume=resume, overwrite=overwrite, processes=processes)


def stored(path: Path) -> list[Path]:
    """The files that hold the outcomes of `path`: the file itself, and those that several processes left beside it."""
    return [file for file in (path, *_parts(path)) if file.exists()]


def _part(path: Path, rank: int) -> Path:
    """Where process `rank` keeps its outcomes."""
    return path if rank == 0 else path.with_name(f"{path.name}.part{rank}")


def _parts(path: Path) -> list[Path]:
    """The files that processes other than 0 have left beside the file."""
    name = re.compile(re.escape(path.name) + r"\.part\d+")
    return sorted(file for file in path.parent.glob("*") if name.fullmatch(file.name))


def _remove_parts(path: Path) -> None:
    for file in _parts(path):
        file.unlink(missing_ok=True)


def _remove_unfinished(path: Path) -> None:
    """Remove temporary files of killed processes: see `data.files.write_atomically`."""
    name = re.compile(rf"\.{re.escape(path.name)}(\.part\d+)?\.[0-9a-f]{{8}}\.tmp")
    for file in path.parent.glob(".*.tmp"):
        if name.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _advice(keys: list[str], old: Mapping[str, Any]) -> str:
    """Why a setting that does not change any image's attack must be the same too."""
    if keys in (["threads"], ["batch_size"], ["batch_size", "threads"]):
        return " (rounding depends on it, and the outcomes would no longer be those of one run)"
    return ""
