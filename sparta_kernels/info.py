"""Describes this installation: versions, instruction sets, devices, and the backend that each operation would use."""

from __future__ import annotations

import platform
from typing import Any

import torch

from sparta_kernels import backends
from sparta_kernels._version import __version__
from sparta_kernels.backends import choices, extension
from sparta_kernels.backends.choices import Choice
from sparta_kernels.ops.attention_kernels import fused_backend
from sparta_kernels.ops.checks import FLOATS

OPERATIONS = ("sparta_gate", "dynamic_conv", "pgd_step_", "pgd_start_", "swish_relu", "smooth_relu", "dyrelu")
ATTENTION = ("sparta_attention", "sparta_activation")  # whose kernels are not for every dtype


def _cuda() -> dict[str, Any]:
    cuda: dict[str, Any] = extension.kernels.cuda_info()
    if not cuda["built"]:
        cuda["note"] = "built without CUDA: nvcc was not found, or SPARTA_CUDA=OFF"
    elif cuda["driver_version"] == 0:
        cuda["note"] = "no NVIDIA driver on this machine"
    elif cuda["driver_version"] < cuda["runtime_version"]:
        cuda["note"] = (
            f"the driver runs CUDA {_cuda_version(cuda['driver_version'])} at most, older than the "
            f"{_cuda_version(cuda['runtime_version'])} of this build: update the driver, or build with an older nvcc"
        )
    else:
        cuda["note"] = "the driver is new enough for this build"
    for device in cuda.get("devices", ()):
        capability = "{}.{}".format(*device["capability"])
        device["choices"] = choices.told(capability) or f"{choices.UNMEASURED}: nothing was measured on {capability}"
    return cuda


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _attention(kind: str) -> Choice:
    """What `auto` takes for bfloat16, and what it takes for each dtype as the reason."""
    found: dict[str, list[str]] = {}  # dtypes, by what is said of them
    chosen = ""
    for dtype in FLOATS:
        try:
            backend, why = fused_backend(torch.empty(1, 1, 1, 1, dtype=dtype, device=kind), 1, "auto")
        except (RuntimeError, AssertionError) as error:  # a device that torch lists, but cannot use
            backend, why = "", str(error).partition("\n")[0]
        backend, why = (backend, "its kernels") if backend else ("reference", why)
        found.setdefault(f"{backend} ({why})", []).append(str(dtype).removeprefix("torch."))
        chosen = backend if dtype == torch.bfloat16 else chosen
    return Choice(chosen, "; ".join(f"{', '.join(dtypes)}: {words}" for words, dtypes in found.items()))


def build_info() -> dict[str, Any]:
    """Describe this installation as a dict that `json.dumps` accepts.

    Returns:
        A dict with "versions"; "cpu" (instruction sets built, supported and used; threads); "cuda" (architectures
        built, driver, devices, and the backend measured to be faster on such devices); "operations": for every
        operation and kind of device, the backend that ``auto`` takes and why; and "engines": the same for attack
        engines, for every kind of device and precision.
    """
    from sparta_kernels.attack import engines  # attacks stand on what this module stands on

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = {kind: backends.choose(torch.device(kind), "auto") for kind in kinds}
    return {
        "versions": {
            "sparta_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": extension.kernels.compiler,
        },
        "cpu": {
            "isa_built": extension.kernels.built_isas(),
            "isa_supported": extension.kernels.supported_isas(),
            "isa": extension.kernels.isa(),
            "threads": torch.get_num_threads(),
        },
        "cuda": _cuda(),
        "backends": ["reference", *backends.DEVICES],
        "operations": {
            **{operation: {kind: choice._asdict() for kind, choice in chosen.items()} for operation in OPERATIONS},
            **{operation: {kind: _attention(kind)._asdict() for kind in kinds} for operation in ATTENTION},
        },
        "engines": engines.chosen(),
    }
