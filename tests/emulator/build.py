"""Compiles CUDA sources as C++ for the CPU, and links them with the emulator.

What is built lies in build/emulator (or, where that cannot be written, in the temporary folder) under names that are
hashes of everything that went into it, and is built once. Any number of processes may build at the same time.

Environment variables:
    CXX                       the compiler
    SPARTA_EMULATOR_SANITIZE  1: with AddressSanitizer and UndefinedBehaviorSanitizer (see sanitized.py)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SANITIZE = os.environ.get("SPARTA_EMULATOR_SANITIZE", "0") not in ("", "0")

COMPILER = os.environ.get("CXX", "g++")
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
WHERE_KNOWN = (
    "-ftrivial-auto-var-init=pattern",  # what is used before it is set shows, and shows every time
    "-fno-gnu-unique",  # or such symbols would be shared with other modules that are loaded
)
# In a sanitized build the first finding ends the process. A shift of a signed number beyond its sign is none: every
# compiler at hand defines it, and 2^t of a NaN makes one on its way to a NaN.
SANITIZERS = (
    *("-fsanitize=address,undefined", "-fno-sanitize=shift-base", "-fno-sanitize-recover=all"),
    *("-fno-omit-frame-pointer", "-g1", "-O1"),
)
# nvcc fuses multiplications and additions unless it is told not to, so this does as well, where the machine can.
FUSED = ("-ffp-contract=fast",)
UNFUSED = ("-ffp-contract=off",)  # as --fmad=false for the attack: adversarial images round alike everywhere
KERNELS = (
    *("-O2", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas", "-Wno-sign-compare"),
    *("-D__CUDACC__", "-include", "cuda_runtime.h"),
)


class Unit(NamedTuple):
    """A source file, and what it is compiled with beside the common flags."""

    source: Path
    flags: tuple[str, ...]


def emulated_module() -> Path:
    """The extension module `_native` with the kernels of csrc/cuda for its devices 0 and 1, and none for the CPU."""
    sources = translated(ROOT / "csrc")
    includes = (f"-I{sources}", f"-I{HERE}")
    python = (f"-I{_pybind11()}", f"-I{sysconfig.get_path('include')}")
    definitions = ("-DSPARTA_WITH_CUDA", '-DSPARTA_CUDA_ARCHS="emulated"', '-DSPARTA_COMPILER="emulator"')
    units = [
        *(
            Unit(path, (*KERNELS, *(UNFUSED if path.stem == "pgd" else _fused()), *includes))
            for path in sorted((sources / "cuda").glob("*.cu"))
        ),
        Unit(sources / "bindings.cpp", ("-O1", *definitions, *includes, *python)),
        *(Unit(sources / "cpu" / name, ("-O1", *includes)) for name in ("dispatch.cpp", "memory.cpp", "products.cpp")),
        Unit(HERE / "no_cpu.cpp", ("-O1", *includes)),
        *_emulator(),
    ]
    headers = [*sources.rglob("*.h"), *sources.rglob("*.cuh"), *HERE.glob("*.h")]
    return library("_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"), units, headers)


def example_library() -> Path:
    """The kernels of examples.cu, right ones and wrong ones, to be called through ctypes."""
    source = translated(HERE) / "examples.cu"
    units = [Unit(source, (*KERNELS, *_fused(), f"-I{HERE}")), *_emulator()]
    return library("examples.so", units, [*HERE.glob("*.h")])


def _emulator() -> list[Unit]:
    return [Unit(HERE / name, ("-O2", f"-I{HERE}")) for name in ("scheduler.cpp", "runtime.cpp", "fibers.cpp")]


# ---- sources -----------------------------------------------------------------------------------------------

# [extern] __shared__ alignas(16) Type<int> name[2][3];
_DECLARATION = r"__shared__\s+(?:alignas\([^()]*\)\s*)?(?P<type>[A-Za-z_][\w:<> ]*?)\s+(?P<name>\w+)"
_STATIC = re.compile(_DECLARATION + r"(?P<extents>(?:\[[^\[\]]*\])*);")
_DYNAMIC = re.compile(r"extern\s+" + _DECLARATION + r"\[\];")


def translate(text: str, name: str) -> str:
    """The one thing that C++ cannot be taught by macros: a block's shared variables live where the emulator puts them.

    Raises:
        ValueError: a declaration is not of the form that is understood here.
    """
    text = _DYNAMIC.sub(r"\g<type>* const \g<name> = static_cast<\g<type>*>(emulator::dynamic_shared());", text)
    text = _STATIC.sub(
        r"static emulator::Shared \g<name>_place; using \g<name>_type = \g<type>\g<extents>; "
        r'\g<name>_type& \g<name> = emulator::shared<\g<name>_type>(\g<name>_place, "\g<name>");',
        text,
    )
    for number, line in enumerate(text.splitlines(), 1):
        if "__shared__" in line.partition("//")[0]:
            raise ValueError(f"{name}:{number}: the emulator does not understand the declaration {line.strip()!r}")
    return text


def translated(folder: Path) -> Path:
    """A copy of the C++ and CUDA sources in `folder`, with the latter translated."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp") and p.is_file())
    texts = {path.relative_to(folder): path.read_text() for path in paths}
    for path, text in texts.items():
        name = str(Path(folder.name) / path)
        texts[path] = f'#line 1 "{name}"\n' + (translate(text, name) if path.suffix in (".cu", ".cuh") else text)
    target = build_folder() / f"sources-{_digest(f'{path}{text}' for path, text in texts.items())}"
    if not target.exists():
        temporary = Path(tempfile.mkdtemp(dir=target.parent))
        for path, text in texts.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(text)
        with suppress(OSError):  # another process was faster
            temporary.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
    return target


# ---- objects and libraries ---------------------------------------------------------------------------------


def library(name: str, units: Sequence[Unit], headers: Iterable[Path]) -> Path:
    """Compile and link, unless it is there already."""
    common = (*COMMON, *filter(_is_known, WHERE_KNOWN), *(SANITIZERS if SANITIZE else ()))
    headers_digest = _digest([*(path.read_text() for path in sorted(headers)), _compiler_version()])
    folder = build_folder()

    def compiled(unit: Unit) -> Path:
        flags = (*unit.flags, *common)  # a sanitized build's -O1 comes last
        target = folder / f"{unit.source.stem}-{_digest([unit.source.read_text(), *flags, headers_digest])}.o"
        if not target.exists():
            _run_into(target, COMPILER, "-c", "-x", "c++", unit.source, *flags)
        return target

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever waits here finds everything built
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, units))
        target = folder / _digest(path.name for path in objects) / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            _run_into(target, COMPILER, "-shared", *objects, *common, "-ldl")
    return target


def _run_into(target: Path, *command: str | Path) -> None:
    """Run a compiler whose output appears under its name only when it is complete."""
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    process = subprocess.run([*map(str, command), "-o", str(partial)], capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{process.stderr}")
    if process.stderr:
        print(process.stderr)
    partial.rename(target)


@lru_cache
def build_folder() -> Path:
    for parent in (ROOT / "build", Path(tempfile.gettempdir()) / f"sparta-{os.getuid()}"):
        folder = parent / "emulator"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise RuntimeError("the emulator finds no folder in which it may build")


def _fused() -> tuple[str, ...]:
    cpuinfo = Path("/proc/cpuinfo")
    can = cpuinfo.exists() and re.search(r"^flags\s*:.*\bfma\b", cpuinfo.read_text(), re.MULTILINE)
    return (*FUSED, "-mfma") if can else FUSED  # on aarch64 it is there without being asked for


@lru_cache
def _is_known(flag: str) -> bool:
    """To the compiler."""
    command = [COMPILER, "-Werror", flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


@lru_cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _pybind11() -> str:
    import pybind11

    return pybind11.get_include()


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]
