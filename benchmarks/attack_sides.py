"""The two processes that take turns on a CPU: ours keeps the memory that it frees, theirs is as their users have it.

In one process the others would find in the heap what ours has left there, and save page faults by it. On a GPU the
memory is torch's own either way, and one process does it all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attack_candidates import OURS, Bench, Entry, Settings
from other_process import OtherProcess


class Sides:
    """Where each entry runs: ours here, on a CPU the others in a second process."""

    def __init__(self, settings: Settings, batch: int, entries: Iterable[Entry]) -> None:
        self.here = Bench(settings, batch)
        apart = settings.device == "cpu" and any(entry.candidate not in OURS for entry in entries)
        self._there = OtherProcess(Bench, settings, batch) if apart else None

    def call(self, name: str, entry: Entry) -> Any:
        """What the method `name` of the entry's `Bench` says of it."""
        if self._there is None or entry.candidate in OURS:
            return getattr(self.here, name)(entry)
        return self._there.call(name, entry)

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        if self._there is not None:
            self._there.close()
