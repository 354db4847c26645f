"""The table of measurements that tells which backend is faster.

A row of ``choices.csv``, beside this file, names the backend for an operation, compute capability, dtype and layout,
and tensors of up to a number of elements. Rows differ where the faster backend does; the last row of a group also holds
above its size. ``benchmarks/choices.py`` writes it from what ``benchmarks/ops.py`` measured.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparta_kernels.backends.layout import is_planar

FILE = Path(__file__).with_name("choices.csv")
COLUMNS = ("operation", "capability", "dtype", "layout", "elements", "backend")
OPERATIONS = (
    *("gate_forward", "gate_backward", "conv_forward", "conv_backward"),
    *("pgd_step", "pgd_start", "relu_forward", "relu_backward"),
    *("swish_relu_forward", "swish_relu_backward", "smooth_relu_forward", "smooth_relu_backward"),
    *("dyrelu_forward", "dyrelu_backward"),
)
BACKENDS = ("native", "triton")
UNMEASURED = "native"


class Choice(NamedTuple):
    """A backend's name, and why it was chosen."""

    backend: str
    reason: str


class Row(NamedTuple):
    """A row of the table. Capability is such as "9.0", dtype such as "bfloat16", layout as `layout_of` returns it."""

    operation: str
    capability: str
    dtype: str
    layout: str
    elements: int
    backend: str


def read(path: Path) -> tuple[Row, ...]:
    """Read a table, sorted with a group's smallest sizes first.

    Raises:
        ValueError: the file is not such a table; the message names the line.
    """
    found = []
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: the columns must be {', '.join(COLUMNS)}, got {lines.fieldnames}")
        for line in lines:
            elements = line["elements"] or ""
            if line["backend"] not in BACKENDS or not elements.isdecimal():
                raise ValueError(
                    f"{path}:{lines.line_num}: backend must be one of {', '.join(BACKENDS)} and elements a number, "
                    f"got {line['backend']!r} and {elements!r}"
                )
            kind = (line["operation"], line["capability"], line["dtype"], line["layout"])
            found.append(Row(*kind, int(elements), line["backend"]))
    return tuple(sorted(found))


@lru_cache
def rows() -> tuple[Row, ...]:
    """The installed table."""
    return read(FILE)


def told(capability: str) -> dict[str, str]:
    """The installed table for one kind of GPU, as readable phrases."""
    phrases: dict[str, str] = {}
    groups: dict[str, list[Row]] = {}
    for row in rows():
        if row.capability == capability:
            groups.setdefault(f"{row.operation} {row.dtype} {row.layout}", []).append(row)
    for name, group in groups.items():
        *below, last = group
        phrases[name] = ", ".join([*(f"{row.backend} to {row.elements} elements" for row in below), last.backend])
    return phrases


def layout_of(operation: str, tensor: Tensor) -> str:
    """ "planar" or "channels_last" for the gate's and dyrelu's x; the other operations are "any"."""
    if not operation.startswith(("gate", "dyrelu")):
        return "any"
    return "planar" if is_planar(tensor.shape, tensor.stride()) else "channels_last"


def fastest(operation: str, tensor: Tensor) -> Choice:
    """The backend for a CUDA tensor (the gate's x, the convolution's spatial, the attack's adv)."""
    layout = layout_of(operation, tensor)
    return _look_up(operation, tensor.device, tensor.dtype, layout, tensor.numel())


@lru_cache(maxsize=4096)
def _look_up(operation: str, device: torch.device, dtype: torch.dtype, layout: str, elements: int) -> Choice:
    major, minor = torch.cuda.get_device_capability(device)
    kind = (operation, f"{major}.{minor}", str(dtype).removeprefix("torch."), layout)
    measured = [row for row in rows() if row[:4] == kind]
    if not measured:
        return Choice(UNMEASURED, f"{' '.join(kind)} has not been measured")
    row = next((row for row in measured if elements <= row.elements), measured[-1])
    return Choice(row.backend, f"measured to be the faster for {' '.join(kind)} at {row.elements} elements")
