"""The GPU kernels as the compilers leave them, for every architecture; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparta_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
ARCHS = {80, 90, 100}
ACTIVATIONS = {
    f"{name}_{direction}" for name in ("swish_relu", "smooth_relu", "dyrelu") for direction in ("forward", "backward")
}
OPERATIONS = {
    "native": {
        "gate_forward",
        "gate_backward",
        "gate_finish",
        "conv_correlate",
        "conv_grad_tap",
        "pgd_step",
        "pgd_start",
        "relu_forward",
        "relu_backward",
        "smooth_relu_finish",
        "dyrelu_finish",
        *ACTIVATIONS,
    },
    "triton": {
        "gate_forward",
        "gate_backward",
        "conv_correlate",
        "conv_grad_kernel",
        "pgd_step",
        "pgd_start",
        "relu_forward",
        "relu_backward",
        "add_up",
        *ACTIVATIONS,
        "attention_forward",
        "attention_finish",
        "attention_backward",
    },
}
# Of the attention network, in kB: what a program may have of shared memory, less what the system takes.
SHARED = {80: 163, 90: 227, 100: 227}
DTYPES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks/compiled.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module", params=["native", "triton"])
def kernels(request, tmp_path_factory) -> list[dict]:
    if request.param == "native" and "cuda" not in backends.DEVICES["native"]:
        pytest.skip("built without CUDA")
    if request.param not in backends.DEVICES:
        pytest.skip("triton is not installed")
    file = tmp_path_factory.mktemp("compiled") / "compiled.json"
    done = run("--backend", request.param, "--json", file)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return json.loads(file.read_text())["kernels"]


def test_every_operation_is_compiled_for_every_architecture_without_spills(kernels):
    found = {(kernel["arch"], kernel["name"]) for kernel in kernels}
    assert found >= {(arch, name) for arch in ARCHS for name in OPERATIONS[kernels[0]["backend"]]}
    for kernel in kernels:
        assert (kernel["spills"], kernel["stack"], kernel["local"]) == (0, 0, 0), kernel
        assert kernel["instructions"] > 20


def test_two_blocks_fit_on_a_multiprocessor(kernels):
    """Of 256 threads: 65,536 registers, and 100 kB of shared memory on the smallest that these run on (8.6)."""
    for kernel in kernels:
        if kernel["name"] in ("attention_forward", "attention_backward"):
            continue  # their matrices fill a multiprocessor
        assert kernel["registers"] <= (255 if kernel["backend"] == "triton" else 128), kernel
        assert kernel["shared"] <= 49 * 1024, kernel  # 1 kB of it is the system's own


def test_the_gate_moves_what_it_must(kernels):
    """16 bytes at a time: forward x and y, backward x, gy and gx; what is more is factors, out of a cache."""
    counted = 0
    for kernel in kernels:
        loop, size = kernel.get("main_loop"), DTYPES[kernel["dtype"]]
        if loop is None or not kernel["name"].startswith("gate"):
            continue
        counted += 1
        must = size if kernel["name"] == "gate_forward" else 2 * size
        assert loop["bytes_stored_per_element"] == size, kernel
        assert must <= loop["bytes_loaded_per_element"] <= 2 * must, kernel
        assert loop["elements_per_thread"] >= 16 // size, kernel
    assert counted >= len(ARCHS) * len(DTYPES) * 2


def test_relu_moves_what_it_must(kernels):
    """16 bytes at a time: one tensor or two, and the result; and not much more than the bits' eighth of a byte."""
    counted = 0
    for kernel in kernels:
        loop, size = kernel.get("main_loop"), DTYPES[kernel["dtype"]]
        if loop is None or not kernel["name"].startswith("relu"):
            continue
        counted += 1
        assert loop["bytes_stored_per_element"] == size, kernel
        assert loop["bytes_loaded_per_element"] == size * (2 if kernel["case"].endswith("two") else 1), kernel
        assert loop["elements_per_thread"] >= (4 if size == 8 else 8), kernel
        assert loop["narrow_bytes_per_element"] <= 0.5, kernel
    assert counted == len(ARCHS) * len(DTYPES) * 4


def test_activations_move_what_they_must(kernels):
    """16 bytes at a time: forward x and y, backward x, gy and gx. dyrelu's coefficients are more."""
    counted = 0
    for kernel in kernels:
        loop, size = kernel.get("main_loop"), DTYPES[kernel["dtype"]]
        if loop is None or not kernel["name"].startswith(("swish_relu", "smooth_relu")):
            continue
        counted += 1
        assert loop["bytes_stored_per_element"] == size, kernel
        assert loop["bytes_loaded_per_element"] == size * (1 if kernel["name"].endswith("forward") else 2), kernel
        assert loop["elements_per_thread"] >= 16 // size, kernel
    assert counted == len(ARCHS) * len(DTYPES) * (2 if kernels[0]["backend"] == "native" else 4)


def test_the_attention_network_is_computed_by_tensor_cores(kernels):
    """And fits where it has to run: 255 registers a thread, and the shared memory of one multiprocessor."""
    found = [k for k in kernels if k["name"] in ("attention_forward", "attention_backward")]
    assert len(found) == (len(ARCHS) * 2 * (10 + 2 + 4) if kernels[0]["backend"] == "triton" else 0)
    for kernel in found:
        assert kernel["matrix_instructions"] >= 12, kernel
        assert kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= SHARED[kernel["arch"]] * 1024, kernel


def test_wrong_arguments(tmp_path):
    assert "invalid choice" in run("--arch", 70).stderr
    done = run("--json", tmp_path / "none" / "x.json", "--backend", "native")
    assert done.returncode == 2
    assert "argument --json" in done.stderr
