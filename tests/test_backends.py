"""Which backend computes an operation, what an installation says of itself, and what a broken one says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
import torch

import sparta_kernels
from sparta_kernels import _native, backends, build_info, dynamic_conv, reference, sparta_gate, use_backend
from sparta_kernels.backends import extension, native

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """The backends that computed gates, in order; ".backward" after those of a backward pass."""
    seen: list[str] = []

    def watch(place: object, name: str, word: str) -> None:
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, **k: seen.append(word) or original(*a, **k))

    watch(reference, "gate", "reference")
    watch(native, "gate_forward", "native")
    watch(native, "gate_backward", "native.backward")
    return seen


def gate(backend: str | None = None, **options: bool) -> torch.Tensor:
    x = torch.ones(1, 1, 2, 2, **options)
    return sparta_gate(x, torch.ones(1, 1, 2, 2), torch.ones(1, 1), backend=backend)


# ---- use_backend and choose --------------------------------------------------------------------------------


def test_auto_takes_the_compiled_kernels(used):
    gate()
    gate("auto")
    assert used == ["native", "native"]
    choice = backends.choose(CPU)
    assert choice.backend == "native"
    assert "cpu" in choice.reason


def test_use_backend_holds_until_the_next_call(used):
    before = backends._requested
    use_backend("reference")
    gate()
    use_backend("native")
    gate()
    use_backend(before)
    assert used == ["reference", "native"]


def test_use_backend_as_a_block(used):
    with use_backend("reference"):
        gate()
        with use_backend("native"):
            gate()
        gate()
    gate()
    assert used == ["reference", "native", "reference", "native"]


def test_a_block_ends_after_an_error_too(used):
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    gate()
    assert used == ["native"]


def test_the_argument_goes_before_use_backend(used):
    with use_backend("reference"):
        gate("native")
        gate("auto")
    assert used == ["native", "native"]


def test_a_wrong_name_changes_nothing(used):
    with use_backend("reference"):
        with pytest.raises(ValueError, match="use_backend: name"):
            use_backend("fast")
        gate()
    assert used == ["reference"]


def test_backward_stays_with_the_backend_of_forward(used):
    y = gate("native", requires_grad=True)
    with use_backend("reference"):
        y.sum().backward()
    y = gate("reference", requires_grad=True)
    with use_backend("native"):
        y.sum().backward()
    assert used == ["native", "native.backward", "reference"]


def test_a_backend_without_kernels_for_the_device_is_refused(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(backends, "DEVICES", {"native": ("cpu",)})
    with pytest.raises(ValueError, match="'native' has no kernels for cuda tensors; available there: reference"):
        backends.choose(cuda, "native")
    with use_backend("native"), pytest.raises(ValueError, match="has no kernels for cuda"):
        backends.choose(cuda)
    choice = backends.choose(cuda, "auto")
    assert choice.backend == "reference"
    assert "cuda" in choice.reason
    assert backends.choose(cuda, "reference").backend == "reference"


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_shapes_can_be_asked_for_on_the_meta_device(backend):
    x = torch.empty(2, 3, 5, 4, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    spatial = torch.empty(2, 1, 5, 4, device="meta")
    y = sparta_gate(x, spatial, torch.empty(2, 3, device="meta"), backend=backend)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    out = dynamic_conv(spatial, torch.empty(2, 3, 3, device="meta"), backend=backend)
    assert out.shape == spatial.shape


# ---- instruction sets --------------------------------------------------------------------------------------


def test_the_best_supported_instruction_set_runs():
    built, supported = extension.kernels.built_isas(), extension.kernels.supported_isas()
    assert supported == [isa for isa in built if isa in supported]
    assert supported[0] == built[0] == "baseline"
    code = "from sparta_kernels import _native; print(_native.isa())"
    assert run(code).stdout.split() == [supported[-1]]


def test_an_instruction_set_that_does_not_run_here_is_refused():
    before = extension.kernels.isa()
    with pytest.raises(ValueError, match=r"isa must be one of baseline.*, got mmx"):
        extension.kernels.set_isa("mmx")
    assert extension.kernels.isa() == before


# ---- what an installation says of itself -------------------------------------------------------------------


def test_build_info():
    info = build_info()
    assert json.loads(json.dumps(info["cpu"])) == info["cpu"]
    json.dumps(info)
    assert info["versions"]["sparta_kernels"] == sparta_kernels.__version__
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu"]["isa"] in info["cpu"]["isa_supported"]
    assert set(info["cpu"]["isa_supported"]) <= set(info["cpu"]["isa_built"])
    assert info["cpu"]["threads"] == torch.get_num_threads()
    assert info["backends"] == ["reference", *backends.DEVICES]
    assert set(info["operations"]) == set(sparta_kernels.__all__) - {
        "AttentionWeights",
        "__version__",
        "build_info",
        "keep_freed_memory",
        "use_backend",
    }
    for devices in info["operations"].values():
        assert devices["cpu"]["backend"] == "native"
        assert devices["cpu"]["reason"]


CUDA_BUILT = {"built": True, "archs": "80;90", "runtime_version": 12080, "devices": []}


@pytest.mark.parametrize(
    ("cuda", "note"),
    [
        ({"built": False}, "built without CUDA"),
        (CUDA_BUILT | {"driver_version": 0}, "no NVIDIA driver"),
        (CUDA_BUILT | {"driver_version": 12040}, "runs CUDA 12.4 at most, older than the 12.8 of this build"),
        (CUDA_BUILT | {"driver_version": 13000}, "new enough"),
    ],
)
def test_build_info_compares_driver_and_build(monkeypatch, cuda, note):
    class Native:
        def __getattr__(self, name):
            return (lambda: dict(cuda)) if name == "cuda_info" else getattr(_native, name)

    monkeypatch.setattr(extension, "kernels", Native())
    assert note in build_info()["cuda"]["note"]


def test_importing_asks_no_driver():
    """It would be started: devices could not be hidden any more, nor used after a fork."""
    code = (
        "import sparta_kernels._native as native\n"
        "def asked(): raise SystemExit('the driver was asked')\n"
        "native.cuda_info = asked\n"
        "import sparta_kernels.cli, sparta_kernels.nn, sparta_kernels.attack, sparta_kernels.training\n"
        "print(sparta_kernels.backends.DEVICES['native'] == (('cpu', 'cuda') if native.with_cuda else ('cpu',)))\n"
    )
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# ---- a broken installation ---------------------------------------------------------------------------------


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a fresh interpreter that imports the same sparta_kernels."""
    package = str(Path(sparta_kernels.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": package, **environment},
        check=False,
    )


HIDE = """
import sys
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ImportError("No module named {name}")
sys.meta_path.insert(0, Hider())
import sparta_kernels
"""


@pytest.mark.parametrize(
    ("missing", "advice"),
    [("torch", "pip install torch"), ("sparta_kernels._native", "pip install .")],
)
def test_importing_without_a_needed_part_says_in_one_line_what_to_do(missing, advice):
    done = run(HIDE.format(name=missing))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sparta_kernels")
    assert advice in last


def test_importing_does_not_start_the_rest():
    """The package's import loads the operations: no network, no attack, no plots and no compiler."""
    code = """
import sys, sparta_kernels
for name in "sparta_kernels.nn sparta_kernels.attack matplotlib sklearn torch._inductor.compile_fx".split():
    assert name not in sys.modules, name
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


# ---- the sources -------------------------------------------------------------------------------------------


def test_the_kernels_know_neither_torch_nor_python():
    """What keeps one wheel good for every version of torch. The bindings alone may see Python."""
    for path in (ROOT / "csrc").rglob("*.*"):
        included = re.findall(r"#include [<\"](.*)[>\"]", path.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10)/", name)], path
        if path.name != "bindings.cpp":
            assert not [name for name in included if re.match(r"pybind11/|Python", name)], path


def test_every_planted_fault_still_finds_its_text():
    """So that a change of the sources cannot leave `make mutants` behind."""
    mutants.check_texts(mutants.FAULTS)
    assert len({fault.name for fault in mutants.FAULTS}) == len(mutants.FAULTS)
