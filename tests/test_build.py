"""The build: a wheel made under isolation, without torch, and what CMake says of CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str | Path], folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a source archive holds: nothing that was built."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("csrc", "sparta_kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    # What the compiler makes of it is for other tests to see: a quarter of the time.
    settings = folder / "CMakeLists.txt"
    text = settings.read_text()
    assert "-O3" in text
    settings.write_text(text.replace("-O3", "-O0"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    built = run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", target, source], SPARTA_CUDA="OFF")
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = target.glob("*.whl")
    return found


def test_wheel_is_complete_and_works(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert sum(name.startswith("sparta_kernels/_native.") and name.endswith(".so") for name in names) == 1
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "sparta_kernels").rglob("*.py")}
    assert python <= set(names), python - set(names)
    assert {"sparta_kernels/py.typed", "sparta_kernels/_native.pyi"} <= set(names)
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)

    code = (
        "import sparta_kernels, torch\n"
        "assert sparta_kernels.__file__.startswith({site!r}), sparta_kernels.__file__\n"
        "assert sparta_kernels.build_info()['cuda']['built'] is False\n"
        "y = sparta_kernels.sparta_gate(torch.ones(1, 2, 2, 2), torch.zeros(1, 1, 2, 2), torch.ones(1, 2))\n"
        "assert torch.equal(y, torch.full((1, 2, 2, 2), 0.5))"
    )
    site = str(tmp_path / "site")
    used = run([sys.executable, "-c", code.format(site=site)], tmp_path, PYTHONPATH=site)
    assert used.returncode == 0, used.stderr


def test_source_archive_is_all_that_the_makefile_needs(tmp_path: Path) -> None:
    """The tests' helpers too: setuptools would pack tests/test_*.py alone."""
    listed = run(["git", "ls-files"], ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():  # without what was built in the checkout
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    code = "import setuptools.build_meta as made; print(made.build_sdist('dist'))"
    made = run([sys.executable, "-c", code], tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in listed.stdout.split() if not name.startswith(".") and (ROOT / name).exists()}
    assert wanted <= packed, wanted - packed
    assert not any(name.endswith((".so", ".pyc")) for name in packed)


def test_builds_again_where_it_was_built(source: Path, wheel: Path, tmp_path: Path) -> None:
    """Under isolation every build has its own cmake, ninja and pybind11; those of the last one are gone."""
    again = run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source], SPARTA_CUDA="OFF")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / wheel.name).exists()


def configure(source: Path, build: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = [f"-DSPARTA_CUDA={mode}", f"-DPython_EXECUTABLE={sys.executable}"]
    return run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *options], **environment)


def without_nvcc() -> dict[str, str]:
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    return {"PATH": os.pathsep.join(folders), "CUDACXX": "/nonexistent/nvcc", "CUDA_PATH": "", "CUDA_HOME": ""}


def needs_tools() -> None:
    if any(shutil.which(tool, path=without_nvcc()["PATH"]) is None for tool in ("cmake", "ninja", "c++")):
        pytest.skip("cmake, ninja or the compiler lie in the same folder as nvcc")


def test_missing_cuda_is_said_loudly(source: Path, tmp_path: Path) -> None:
    needs_tools()
    configured = configure(source, tmp_path, "AUTO", **without_nvcc())
    assert configured.returncode == 0, configured.stderr
    assert "No CUDA compiler (nvcc) was found: building for the CPU only" in configured.stderr


def test_cuda_on_without_nvcc_fails(source: Path, tmp_path: Path) -> None:
    needs_tools()
    configured = configure(source, tmp_path, "ON", **without_nvcc())
    assert configured.returncode != 0
    assert "SPARTA_CUDA=ON, but no CUDA compiler was found" in configured.stderr


def test_unknown_cuda_mode_is_refused(source: Path) -> None:
    refused = run([sys.executable, source / "setup.py", "build_ext"], SPARTA_CUDA="maybe")
    assert refused.returncode != 0
    assert "SPARTA_CUDA must be one of ON, OFF, AUTO, got 'maybe'" in refused.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_shared_headers_compile_for_a_gpu(tmp_path: Path) -> None:
    unit = tmp_path / "unit.cu"
    unit.write_text(
        '#include "kernels.h"\n#include "philox.h"\n'
        "using namespace sparta;\n"
        "template <class Real> __global__ void all(Real* a, uint32_t* words) {\n"
        "  const Sigmoid<Real> phi = sigmoid_scaled<24>(a[0]);\n"
        "  a[1] = gate(a[0], phi.value) + gate_grad_input(a[0], a[1], phi.value) + gate_grad_logit(a[0], a[1], phi);\n"
        "  a[2] = pgd_stepped(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);\n"
        "  a[3] = pgd_started(a[0], Real(uniform(words[0])), a[1], a[2], a[3]);\n"
        "  words[1] = image_words(1, 2, Purpose::start, 3, 4).word[0];\n"
        "}\n"
        "template __global__ void all<float>(float*, uint32_t*);\n"
        "template __global__ void all<double>(double*, uint32_t*);\n"
    )
    flags = ["-std=c++17", "-arch=sm_80", "-I", ROOT / "csrc", "-c", unit, "-o", tmp_path / "unit.o"]
    compiled = run(["nvcc", *flags])
    assert compiled.returncode == 0, compiled.stderr
