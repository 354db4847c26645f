"""What the gate's times amount to: ratios, the bars they are held against, and tables of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gates import SHAPES
from rich.table import Table
from timing import geometric_mean

DIRECTIONS = ("forward", "backward")
FLOOR_COPIES = {"forward": 1.0, "backward": 1.5}  # of x: read x, write y; read x and gy, write gx
MEAN_BARS = {"forward": 1.05, "backward": 1.75}  # times copy
EACH_BARS = {"forward": 1.2, "backward": 2.0}  # times copy
COMPILE_BARS = {"forward": 1.3, "backward": 2.0}  # times faster than torch.compile

NOISY_SPREAD = 1.5  # a cell is noisy where some candidate's p80 is over so many times its p20
NOISY_LOAD = 0.1  # or others had more than this share of the CPUs

_WITH_RATE = ("copy", "native", "kernel")

Cell = dict[str, Any]


def cell(shape: Sequence[int], dtype: str, layout: str, size: int, direction: str) -> Cell:
    """A cell of the results, not yet measured; `size` is x's in bytes. The floor counts x, gy, y and gx."""
    return {
        "shape": list(shape),
        "dtype": dtype,
        "layout": layout,
        "direction": direction,
        "copy_bytes": 2 * size,
        "floor_bytes": int(2 * size * FLOOR_COPIES[direction]),
    }


def finish(found: Cell) -> Cell:
    """Add each candidate's ratio to copy and rate of the bytes that have to move, and whether it is noisy."""
    candidates = found["candidates"]
    for name, times in candidates.items():
        if "copy" in candidates:
            times["ratio_to_copy"] = times["median_ms"] / candidates["copy"]["median_ms"]
        moved = found["copy_bytes" if name == "copy" else "floor_bytes"]
        times["gb_per_s"] = moved / times["median_ms"] / 1e6
    found["noisy"] = (found["other_load"] or 0) > NOISY_LOAD or any(
        times["p80_ms"] > NOISY_SPREAD * times["p20_ms"] for times in candidates.values()
    )
    return found


def title(found: Cell) -> str:
    """A cell's name, such as "128x64x32x32 fp32 nchw forward"."""
    shape = "x".join(map(str, found["shape"]))
    return f"{shape} {found['dtype']} {found['layout']} {found['direction']}"


def summarise(results: Sequence[Cell]) -> dict[str, Any]:
    """Geometric mean and worst ratio to copy of every candidate, forward and backward, over all cells."""
    summary: dict[str, Any] = {}
    for direction in DIRECTIONS:
        cells = [found for found in results if found["direction"] == direction]
        for name in {name: None for found in cells for name in found["candidates"]}:
            having = [found for found in cells if "ratio_to_copy" in found["candidates"].get(name, {})]
            if name == "copy" or not having:
                continue
            worst = max(having, key=lambda found: _ratio(found, name))
            summary.setdefault(direction, {})[name] = {
                "geometric_mean": geometric_mean(_ratio(found, name) for found in having),
                "worst": _ratio(worst, name),
                "worst_cell": title(worst),
                "cells": len(having),
            }
    return summary


def judge(results: Sequence[Cell]) -> list[dict[str, Any]]:
    """Hold the gate against its bars, over the cells that they are set for.

    Against copy it is the kernel that is judged: how well it uses the memory. Against torch.compile it is the
    operation, with what Python costs on both sides. The operation's own ratio to copy is in the summary.
    Those are fp32 and bf16 at the four shapes of ResNet's groups and batches of 128 and more; others are only
    measured. `passed` is None where no such cell was measured.
    """
    return list(_judge([found for found in results if _in_scope(found)]))


def _judge(results: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    for direction in DIRECTIONS:
        cells = [found for found in results if found["direction"] == direction]
        ratios = [_ratio(found, "kernel") for found in cells if _has(found, "kernel", "copy")]
        mean = geometric_mean(ratios) if ratios else None
        yield _bar(f"{direction}, kernel / copy, geometric mean", mean, "<=", MEAN_BARS[direction], len(ratios))
        worst = max(ratios, default=None)
        yield _bar(f"{direction}, kernel / copy, worst", worst, "<=", EACH_BARS[direction], len(ratios))
        for layout in {found["layout"]: None for found in cells}:
            speedups = [
                found["candidates"]["compile"]["median_ms"] / found["candidates"]["native"]["median_ms"]
                for found in cells
                if found["layout"] == layout and _has(found, "native", "compile")
            ]
            mean = geometric_mean(speedups) if speedups else None
            name = f"{direction}, compile / native, {layout}, geometric mean"
            yield _bar(name, mean, ">=", COMPILE_BARS[direction], len(speedups))


def _bar(name: str, value: float | None, relation: str, limit: float, cells: int) -> dict[str, Any]:
    passed = None if value is None else (value <= limit if relation == "<=" else value >= limit)
    return {
        "name": name,
        "value": value,
        "relation": relation,
        "limit": limit,
        "passed": passed,
        "cells": cells,
    }


def _in_scope(found: Cell) -> bool:
    samples, *image = found["shape"]
    return samples >= 128 and tuple(image) in SHAPES and found["dtype"] in ("fp32", "bf16")


def _has(found: Cell, *candidates: str) -> bool:
    return all(name in found["candidates"] for name in candidates)


def _ratio(found: Cell, name: str) -> float:
    ratio: float = found["candidates"][name]["ratio_to_copy"]
    return ratio


def times_table(results: Sequence[Cell], direction: str) -> Table:
    """One row for each cell: medians, ratios to copy, and the rate of the bytes that have to move."""
    cells = [found for found in results if found["direction"] == direction]
    names = list({name: None for found in cells for name in found["candidates"]})
    table = Table(title=f"Gate {direction}", title_justify="left")
    for heading in ("N x C x H x W", "dtype", "layout"):
        table.add_column(heading, no_wrap=True)
    for name in names:
        table.add_column(f"{name}\nms", justify="right", no_wrap=True)
    for name in names[1:] if names[:1] == ["copy"] else ():
        table.add_column(f"{name}\n/ copy", justify="right", no_wrap=True)
    for name in names:
        if name in _WITH_RATE:
            table.add_column(f"{name}\nGB/s", justify="right", no_wrap=True)
    table.add_column("")
    for found in cells:
        candidates = found["candidates"]
        row = ["x".join(map(str, found["shape"])), found["dtype"], found["layout"]]
        row += [f"{candidates[name]['median_ms']:.3f}" for name in names]
        if names[:1] == ["copy"]:
            row += [_coloured(found, name, direction) for name in names[1:]]
        row += [f"{candidates[name]['gb_per_s']:.1f}" for name in names if name in _WITH_RATE]
        table.add_row(*row, "noisy" if found["noisy"] else "")
    return table


def _coloured(found: Cell, name: str, direction: str) -> str:
    ratio = _ratio(found, name)
    if name != "kernel" or not _in_scope(found):
        return f"{ratio:.2f}"
    return f"[{'green' if ratio <= EACH_BARS[direction] else 'red'}]{ratio:.2f}[/]"


def summary_table(summary: dict[str, Any]) -> Table:
    """Time over copy's time of every candidate, in geometric mean and at worst."""
    table = Table(title="Time / copy over all cells", title_justify="left")
    for heading in ("", "candidate"):
        table.add_column(heading)
    for heading in ("geometric mean", "worst", "cells"):
        table.add_column(heading, justify="right")
    table.add_column("worst at")
    for direction, candidates in summary.items():
        for name, found in candidates.items():
            numbers = (f"{found['geometric_mean']:.3f}", f"{found['worst']:.2f}", str(found["cells"]))
            table.add_row(direction, name, *numbers, found["worst_cell"])
    return table


def bars_table(bars: Sequence[dict[str, Any]]) -> Table:
    """Each bar with what was measured and the verdict."""
    table = Table(title="The gate against its bars", title_justify="left")
    table.add_column("bar")
    for heading in ("measured", "allowed", "cells"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    verdicts = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "not measured"}
    for bar in bars:
        value = "" if bar["value"] is None else f"{bar['value']:.3f}"
        limit = f"{bar['relation']} {bar['limit']:g}"
        table.add_row(bar["name"], value, limit, str(bar["cells"]), verdicts[bar["passed"]])
    return table
