"""How the benchmarks build the module from sources that they have changed, or in a place of its own: by CMake alone.

Whatever version of setuptools there is has no say then.
"""

from __future__ import annotations

import sys
from pathlib import Path


def build_commands(source: Path, folder: Path, target: Path, cuda_archs: str | None) -> list[list[str | Path]]:
    """The commands that build the sources of a checkout in `folder` and put the module into `target`/sparta_kernels.

    For the CPU alone if `cuda_archs` is None, else also for these compute capabilities ("90", "80;90").
    """
    settings: dict[str, str | Path] = {"Python_EXECUTABLE": sys.executable, "CMAKE_INSTALL_PREFIX": target}
    if cuda_archs is None:
        settings["SPARTA_CUDA"] = "OFF"
    else:
        settings |= {"SPARTA_CUDA": "ON", "SPARTA_CUDA_ARCHS": cuda_archs}
    return [
        ["cmake", "-S", source, "-B", folder, "-G", "Ninja", *(f"-D{key}={value}" for key, value in settings.items())],
        ["cmake", "--build", folder, "--target", "install"],
    ]
