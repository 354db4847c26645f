"""The measurements as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bars import EACH_BARS, LARGE_BATCH, LARGE_SITES, SHARE_BARS, Cell, in_scope, ratio
from gates import KERNELS
from rich.table import Table

_WITH_RATE = ("copy", "native", "kernel")
_HEADINGS = {"triton_kernel": "triton\nkernel"}


def times_table(results: Sequence[Cell], operation: str, direction: str) -> Table:
    """One row for each cell: medians, ratios to copy, and the rate of the bytes that have to move."""
    cells = _of(results, operation, direction)
    names = list({name: None for found in cells for name in found["candidates"]})
    table = _table(f"{_called(operation)} {direction}", names, "ms")
    for name in names[1:] if names[:1] == ["copy"] else ():
        table.add_column(f"{name}\n/ copy", justify="right", no_wrap=True)
    for name in names:
        if name in _WITH_RATE:
            table.add_column(f"{name}\nGB/s", justify="right", no_wrap=True)
    table.add_column("")
    for found in cells:
        row = _named(found) + [_number(found, name, "median_ms", "{:.3f}") for name in names]
        if names[:1] == ["copy"]:
            row += [_coloured(found, name, direction) for name in names[1:]]
        row += [_number(found, name, "gb_per_s", "{:.1f}") for name in names if name in _WITH_RATE]
        table.add_row(*row, "noisy" if found["noisy"] else "")
    return table


def _coloured(found: Cell, name: str, direction: str) -> str:
    if name not in found["candidates"]:
        return ""
    value = ratio(found, name)
    if name != "kernel" or not in_scope(found):
        return f"{value:.2f}"
    return f"[{'green' if value <= EACH_BARS[direction] else 'red'}]{value:.2f}[/]"


def device_table(results: Sequence[Cell], operation: str, direction: str) -> Table:
    """The same of a GPU: microseconds, shares of copy's bandwidth, and what it costs the host to launch a call."""
    cells = _of(results, operation, direction)
    names = list({name: None for found in cells for name in found["candidates"]})
    kernels = [name for name in KERNELS if name in names]
    table = _table(f"{_called(operation)} {direction}", ["floor", *names], "us")
    for name in kernels:
        table.add_column(f"{KERNELS[name]}\nof copy", justify="right", no_wrap=True)
    for name in kernels:
        table.add_column(f"{KERNELS[name]}\nexcess", justify="right", no_wrap=True)
    hosts = [name for name in KERNELS.values() if name in names]
    for name in hosts:
        table.add_column(f"{name}\nhost us", justify="right", no_wrap=True)
    table.add_column("")
    for found in cells:
        row = [*_named(found), f"{1e3 * found['floor_ms']:.1f}"]
        row += [_number(found, name, "median_ms", "{:.1f}", 1e3) for name in names]
        row += [_share(found, name, direction) for name in kernels]
        row += [_number(found, name, "excess_us", "{:.1f}") for name in kernels]
        row += [_number(found, name, "host_us", "{:.0f}") for name in hosts]
        loose = [name for name, times in found["candidates"].items() if not times.get("captured", True)]
        notes = ["noisy"] * found["noisy"] + [f"no graph: {', '.join(loose)}"] * bool(loose)
        table.add_row(*row, "; ".join(notes))
    return table


def _share(found: Cell, name: str, direction: str) -> str:
    text = _number(found, name, "share_of_copy", "{:.0%}")
    judged = in_scope(found) and found["shape"][0] >= LARGE_BATCH and tuple(found["shape"][1:]) in LARGE_SITES
    if not text or not judged:
        return text
    reached = found["candidates"][name]["share_of_copy"] >= SHARE_BARS[direction]
    return f"[{'green' if reached else 'red'}]{text}[/]"


def _number(found: Cell, name: str, key: str, form: str, factor: float = 1.0) -> str:
    value = found["candidates"].get(name, {}).get(key)
    return "" if value is None else form.format(factor * value)


def _of(results: Sequence[Cell], operation: str, direction: str) -> list[Cell]:
    return [found for found in results if (found["operation"], found["direction"]) == (operation, direction)]


def _called(operation: str) -> str:
    return operation[0].upper() + operation[1:]


def _table(title: str, names: Sequence[str], unit: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("N x C x H x W", "dtype", "layout"):
        table.add_column(heading, no_wrap=True)
    for name in names:
        table.add_column(_HEADINGS.get(name, f"{name}\n{unit}"), justify="right", no_wrap=True)
    return table


def _named(found: Cell) -> list[str]:
    return ["x".join(map(str, found["shape"])), found["dtype"], found["layout"]]


def summary_table(summary: dict[str, Any]) -> Table:
    """The gate's time over copy's time by every candidate, in geometric mean and at worst."""
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
