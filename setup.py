"""Drives CMake: `pip install .` builds sparta_kernels/_native and installs it beside the Python files.

Environment variables:
    SPARTA_CUDA        ON, OFF or AUTO (default): whether to build the CUDA sources
    SPARTA_CUDA_ARCHS  semicolon-separated architectures; by default those of 80, 90 and 100 that nvcc knows
    CXX, CUDACXX       the compilers, as for any CMake project
    CMAKE_BUILD_PARALLEL_LEVEL   how many files to compile at once
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension with no sources of its own: CMakeLists.txt knows them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, build, and install into the folder where setuptools expects the module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            # Given anew each time: under build isolation the one of an earlier build is gone.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "CMAKE_INSTALL_PREFIX": target.parent,
        }
        # Given anew each time too, or a folder that was built in before would remember an earlier choice.
        options["SPARTA_CUDA"] = os.environ.get("SPARTA_CUDA", "AUTO")
        options["SPARTA_CUDA_ARCHS"] = os.environ.get("SPARTA_CUDA_ARCHS", "")
        if options["SPARTA_CUDA"] not in ("ON", "OFF", "AUTO"):
            raise SystemExit(f"SPARTA_CUDA must be one of ON, OFF, AUTO, got {options['SPARTA_CUDA']!r}")
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "install"], check=True)


setup(ext_modules=[CMakeExtension("sparta_kernels._native")], cmdclass={"build_ext": CMakeBuild})
