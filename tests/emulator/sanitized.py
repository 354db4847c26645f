"""Runs Python with the emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/emulator/sanitized.py -m pytest -s -k emulated tests/test_gate.py
    python tests/emulator/sanitized.py -c "..."

Tensors, shared memory and the threads' stacks are all guarded. The first finding ends the process, with a report
(which pytest keeps to itself without -s).
"""

from __future__ import annotations

import os
import subprocess
import sys


def environment() -> dict[str, str]:
    """With the sanitizer's library in front of everything, as it must be where the program is not built for it."""
    # libstdc++ beside it, or the sanitizer would not find the exceptions that it looks after.
    found = [_find(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    options = "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0"
    return os.environ | {
        "SPARTA_EMULATOR_SANITIZE": "1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": f"{options}:{os.environ.get('ASAN_OPTIONS', '')}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{os.environ.get('UBSAN_OPTIONS', '')}",
    }


def _find(library: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
