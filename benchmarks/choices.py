"""Write the table by which `auto` chooses between the backends on a GPU, from what ops.py measured there.

    python benchmarks/choices.py ops.json

Rows of the same operation, capability, dtype and layout are replaced, others stay.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gates import DTYPES, KERNELS

from sparta_kernels.backends import choices
from sparta_kernels.backends.choices import Row
from sparta_kernels.data.files import check_writable, write_atomically

TIE = 0.02  # a kernel that is faster by less is not: the compiled one is taken then
_OPERATIONS = {  # the names of ops.py, and those of the table
    ("gate", "forward"): "gate_forward",
    ("gate", "backward"): "gate_backward",
    ("dynamic_conv", "forward"): "conv_forward",
    ("dynamic_conv", "backward"): "conv_backward",
    ("pgd_step", "call"): "pgd_step",
    ("pgd_start", "call"): "pgd_start",
    ("add_relu", "forward"): "relu_forward",
    ("add_relu", "backward"): "relu_backward",
    **{
        (name, direction): f"{name}_{direction}"
        for name in ("swish_relu", "smooth_relu", "dyrelu")
        for direction in ("forward", "backward")
    },
}
_LAYOUTS = {"nchw": "planar", "channels_last": "channels_last"}

Kind = tuple[str, str, str, str]  # operation, capability, dtype, layout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 nothing to write. A bad argument exits with 2."""
    parser = argparse.ArgumentParser(prog="choices.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", metavar="OPS.json", help="what ops.py --device cuda wrote")
    parser.add_argument(
        "--out", metavar="FILE", help="the table to write, and to start from (default: the one of the package)"
    )
    options = parser.parse_args(arguments)
    try:
        document = json.loads(Path(options.results).read_text())
        cells, device = document["results"], document["device"]
        capability = device.get("capability", "cpu")
        measured = fastest(cells, capability)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(
            f"argument OPS.json: {options.results} is not what ops.py writes ({type(error).__name__}: {error})"
        )
    if capability == "cpu" and options.out is None:
        parser.error(
            f"argument OPS.json: {options.results} was measured on a CPU, where auto does not ask the table; "
            "name a file with --out to see what would be written"
        )
    path = Path(options.out or choices.FILE)
    try:
        check_writable(path)
        before = choices.read(path) if path.exists() else ()
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")
    if not measured:
        print(f"choices.py: {options.results} has no cell with both kernels; nothing is written", file=sys.stderr)
        return 1
    rows = merge(before, measured)
    write_atomically(path, as_csv(rows).encode())
    for row in measured:
        print(*row)
    print(f"{path}: {len(measured)} rows for capability {capability}, {len(rows) - len(measured)} others kept")
    return 0


def fastest(cells: Iterable[Mapping[str, Any]], capability: str) -> list[Row]:
    """A row for every change of mind: from small to large, the last size at which its backend was the faster one."""
    times: dict[Kind, dict[int, list[float]]] = {}
    for cell in cells:
        taken = [cell["candidates"].get(name) for name in KERNELS]
        if None in taken:
            continue
        operation = _OPERATIONS[cell["operation"], cell["direction"]]
        layout = _LAYOUTS[cell["layout"]] if cell["operation"] in ("gate", "dyrelu") else "any"
        kind = (operation, capability, str(DTYPES[cell["dtype"]]).removeprefix("torch."), layout)
        native, triton = (found["median_ms"] for found in taken)
        # Shapes of equal size decide together.
        times.setdefault(kind, {}).setdefault(math.prod(cell["shape"]), []).append(math.log(native / triton))
    rows: list[Row] = []
    for kind, sizes in sorted(times.items()):
        group: list[Row] = []
        for elements, advantages in sorted(sizes.items()):
            triton_is_faster = sum(advantages) / len(advantages) > math.log1p(TIE)
            row = Row(*kind, elements, "triton" if triton_is_faster else "native")
            if group and group[-1].backend == row.backend:
                group.pop()
            group.append(row)
        rows += group
    return rows


def merge(before: Iterable[Row], measured: Sequence[Row]) -> list[Row]:
    """The table with what was measured in the place of what it said of the same operations, dtypes and layouts."""
    replaced = {row[:4] for row in measured}
    return sorted([*(row for row in before if row[:4] not in replaced), *measured])


def as_csv(rows: Iterable[Row]) -> str:
    """The table as text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(choices.COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
