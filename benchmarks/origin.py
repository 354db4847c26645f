"""Which sources a result comes from. Needs neither torch nor the package: it must work before that is built."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("csrc", "sparta_kernels", "tests", "benchmarks")
_FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt")
_SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".csv"}


def commit() -> dict[str, Any] | None:
    """The commit that this checkout stands on, and whether files differ from it.

    Outside a repository it is what the variable SPARTA_COMMIT says, if anything.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        told = os.environ.get("SPARTA_COMMIT")
        return {"hash": told, "changed": None} if told else None


def tree() -> str:
    """A hash of the sources, committed or not: equal where they are."""
    found = hashlib.sha256()
    paths = [path for folder in _FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]
    for path in sorted([*paths, *(ROOT / name for name in _FILES)]):
        if path.is_file():
            content = path.read_bytes()
            found.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode())
            found.update(content)
    return found.hexdigest()[:16]
