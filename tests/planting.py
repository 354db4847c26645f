"""How tests/mutants.py plants a fault: in a copy of the sources, which is built where it has to be, and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "csrc",
    "sparta_kernels",
    "tests",
    "CMakeLists.txt",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)
BUILD = "compiled"  # the folder; in "build" the emulator keeps what it has built


@dataclass(frozen=True)
class Fault:
    """`old`, found once in `file`, becomes `new`; one of `tests`, of those that `only` names, must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = "not emulated and not triton"  # as pytest's -k


def stop(message: str) -> None:
    print(f"mutants: {message}", file=sys.stderr)
    raise SystemExit(2)


class Copy:
    """The sources in a folder of their own, built there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, folder / "kept"
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(source, folder / name)
        # Two instruction sets, hardly optimised, show every fault and build in a quarter of the time.
        self.substitute("CMakeLists.txt", r"^  (sparta_cpu_kernels\(|set\(_)avx512.*$", "")
        self.substitute("CMakeLists.txt", "-O3", "-O1")
        self.substitute("csrc/cpu/dispatch.cpp", r"^    SPARTA_CPU_KERNELS\(avx512.*$", "")
        self.run(
            ["cmake", "-S", ".", "-B", BUILD, "-G", "Ninja", "-DSPARTA_CUDA=OFF", "-DCMAKE_BUILD_TYPE=None",
             f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={folder}"]
        )  # fmt: skip
        self.build()
        where = self.run([sys.executable, "-c", "import sparta_kernels; print(sparta_kernels.__file__)"])
        if not where.startswith(str(folder)):
            stop(f"the tests would run {where.strip()}, not the copy in {folder}")

    def substitute(self, file: str, pattern: str, new: str) -> None:
        path = self.folder / file
        text, count = re.subn(pattern, new, path.read_text(), flags=re.MULTILINE)
        if count == 0:
            stop(f"nothing in {file} matches {pattern}")
        path.write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "PYTHONPATH": str(self.folder),
            "HYPOTHESIS_PROFILE": "mutants",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, **own, "PATH": tools}

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            stop(f"{' '.join(command)} failed\n{done.stdout}{done.stderr}")
        return done.stdout

    def build(self) -> None:
        self.run(["cmake", "--build", BUILD, "--target", "install"])

    def first_failure(self, tests: list[str], only: str) -> str | None:
        """The first test that fails, or None."""
        options = ["-x", "-q", "-rf", "--tb=no", "--no-header", "-m", "not slow", "-p", "no:cacheprovider", "-k", only]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return None
        if done.returncode < 0:
            return f"the interpreter died of signal {-done.returncode}"
        failed = re.search(r"^FAILED (?:tests/)?(.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
        if done.returncode != 1 or failed is None:
            stop(f"pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return failed[1]  # type: ignore[index]

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The fault is in the sources and, where they are compiled, in what was built of them."""
        path = self.folder / fault.file
        text, times = path.read_text(), path.stat()
        compiled = not fault.file.endswith(".py") and not fault.file.startswith("csrc/cuda")  # the emulator's own
        if compiled and not self.kept.exists():
            shutil.copytree(self.folder / BUILD, self.kept)
        path.write_text(text.replace(fault.old, fault.new))
        try:
            if compiled:
                self.build()
            yield
        finally:
            path.write_text(text)
            if compiled:  # as it was, times included: nothing is compiled again
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                shutil.rmtree(self.folder / BUILD)
                shutil.copytree(self.kept, self.folder / BUILD)
                self.build()

    def catches(self, fault: Fault) -> str | None:
        """The test that catches the fault, or None."""
        with self.planted(fault):
            return self.first_failure([fault.tests], fault.only)
