"""Keep freed memory in the process, so that the next large buffer costs no page faults."""

from __future__ import annotations

import os
import threading
from contextlib import ContextDecorator
from pathlib import Path
from types import TracebackType

from sparta_kernels import _native

# What mallopt(3) lets the environment say about the same settings: glibc reads it once, when the process starts.
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TUNABLES = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")
_ENVIRONMENT = Path("/proc/self/environ")

_lock = threading.Lock()
_entered = 0  # by all threads together


class keep_freed_memory(ContextDecorator):
    """Keep freed memory in the process, during a ``with`` block or a function's calls.

        with sparta_kernels.keep_freed_memory():
            result = attack.pgd(model, images, labels, ...)

        @sparta_kernels.keep_freed_memory()
        def evaluate_everything(): ...

    An attack or a training step on a CPU allocates and frees the same large buffers over and over. glibc returns such
    buffers to the kernel, which has to map and zero every page again when the next one is written. An iteration of PGD
    on 128 to 256 CIFAR images then takes 1.2 to 1.6 times as long.

    Inside the block glibc allocates no buffer by mmap and never trims its heap (``mallopt``: ``M_MMAP_MAX`` 0,
    ``M_TRIM_THRESHOLD`` -1). After it, free memory is returned (``malloc_trim``) and the settings are restored, but for
    one thing that glibc does not let anybody undo: its thresholds no longer adapt to what is freed. They stay at the
    largest values that they could have reached (mmap for buffers above 32 MiB, trimming of heaps from 64 MiB on).

    The setting holds for the process. Blocks may be nested and may overlap in several threads; the last to end restores
    it. It is fully effective for buffers that the main thread allocates, whichever thread frees them. Buffers that
    another thread *allocates* come from that thread's own heaps: there glibc still returns those above 64 MiB, and
    heaps that become empty. The process's memory reaches its peak within the first iterations and stays there until
    the end of the block.

    The block has no effect, and raises no error, if malloc is not glibc's (another C library, macOS, jemalloc or
    tcmalloc), or if the process's environment sets any of these
    (``MALLOC_MMAP_MAX_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_TOP_PAD_``, or the same in
    ``GLIBC_TUNABLES``), since those could not be restored. Settings that the program
    itself has made by ``mallopt`` cannot be read; afterwards they are glibc's defaults.

    Attributes:
        active: whether the block is being executed and keeps freed memory.
        reason: why freed memory cannot be kept; empty if it can.
    """

    def __init__(self) -> None:
        self.reason = _obstacle()
        self._depth = 0

    @property
    def active(self) -> bool:
        return self._depth > 0 and not self.reason

    def __enter__(self) -> keep_freed_memory:
        global _entered
        with _lock:
            if not self.reason:
                if _entered == 0 and not _native.keep_freed_memory():
                    self.reason = "glibc refused the setting"
                else:
                    _entered += 1
            self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _entered
        with _lock:
            self._depth -= 1
            if not self.reason:
                _entered -= 1
                if _entered == 0:
                    _native.return_freed_memory()


def _obstacle() -> str:
    """Why freed memory cannot or should not be kept here; empty if it can."""
    if not _native.malloc_is_glibc():
        return "malloc is not glibc's"
    try:
        environment = dict(
            entry.split("=", 1) for entry in os.fsdecode(_ENVIRONMENT.read_bytes()).split("\0") if "=" in entry
        )
    except OSError:  # no /proc here: what the environment is by now
        environment = dict(os.environ)
    # glibc cuts its own copy of the environment at the colons while it reads, so the rest may look like variables.
    tunables = [entry.partition("=")[0] for entry in environment.get("GLIBC_TUNABLES", "").split(":")] + [*environment]
    found = [name for name in _VARIABLES if name in environment]
    found += [f"GLIBC_TUNABLES ({name})" for name in _TUNABLES if f"glibc.malloc.{name}" in tunables]
    return f"the environment sets {', '.join(found)}" if found else ""
