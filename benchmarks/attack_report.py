"""What `attack.py` makes of its measurements: ratios, the bars that they are held to, and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import timing
from attack_breakdown import PARTS
from attack_candidates import OURS
from rich.table import Table

from sparta_kernels.report import megabytes

# By precision and batch, how many times as fast as torchattacks in fp32 an iteration should be on a CPU.
_OVER_TORCHATTACKS = {"fp32": {32: 1.35, 256: 1.8}, "bf16": {32: 4.5, 256: 5.5}}
_ROW = {"fp32": 2.4, "bf16": 8.0}
_OVER_LOOP, _OVER_COMPILED = 2.5, 1.3  # on a GPU, in the same precision
_MEMORY_OF_LOOP = 0.6
_OVER_RELU, _MEMORY_OVER_RELU = 1.10, 1.15


def has_amx() -> bool:
    """Whether the CPU has matrix units for bfloat16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def add_figures(result: dict[str, Any]) -> None:
    """Give the rows of a batch size their quantiles and ratios, from the samples that they have."""
    rows = result["entries"]
    for row in rows:
        if row["iteration_ms"]:
            row |= timing.summary([1e-3 * sample for sample in row["iteration_ms"]]).as_dict()
            row["page_faults"] = float(numpy.median(row["iteration_faults"]))
            row["images_per_second"] = 1e3 * result["batch"] / row["median_ms"]
    for row in rows:
        for name, other, of_time in (
            ("ratio_to_relu", {"activation": "relu"}, lambda own, its: own / its),
            ("speedup_over_loop", {"candidate": "loop", "backend": ""}, lambda own, its: its / own),
            ("speedup_over_compiled", {"candidate": "compiled", "backend": ""}, lambda own, its: its / own),
        ):
            found = _row(rows, **{**_keys(row), **other})
            if found is not None and "median_ms" in row:
                row[name] = of_time(row["median_ms"], found["median_ms"])
        library = _library(rows, row["activation"])
        if library is not None and "median_ms" in row:
            row["speedup_over_torchattacks"] = library["median_ms"] / row["median_ms"]


def bars(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, beside what was measured; `passed` is None where this device is not meant."""
    cuda = document["settings"]["device"] == "cuda"
    return [bar for result in document["results"] for bar in _bars(result, cuda, document["amx"])]


def _bars(result: Mapping[str, Any], cuda: bool, amx: bool) -> Iterator[dict[str, Any]]:
    rows, batch = result["entries"], result["batch"]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        ours = _fastest(rows, "sparta", precision)
        if ours is None:
            continue
        meant = cuda or precision != "bf16" or amx
        loop = _row(rows, activation="sparta", precision=precision, candidate="loop", backend="")
        where = f"batch {batch}, {precision}, {ours['candidate']}"
        if cuda:
            for name, limit in (("loop", _OVER_LOOP), ("compiled", _OVER_COMPILED)):
                if f"speedup_over_{name}" in ours:
                    yield _bar(f"SPARTA over {name}, {where}", ours[f"speedup_over_{name}"], ">=", limit)
        elif batch in _OVER_TORCHATTACKS.get(precision, {}) and "speedup_over_torchattacks" in ours:
            limit = _OVER_TORCHATTACKS[precision][batch]
            value = ours["speedup_over_torchattacks"]
            yield _bar(f"SPARTA over torchattacks (fp32), {where}", value, ">=", limit, meant)
        if loop is not None and loop["memory"] and ours["memory"] is not None:
            value = ours["memory"] / loop["memory"]
            yield _bar(f"memory of an iteration, of the loop's, {where}", value, "<=", _MEMORY_OF_LOOP)
        relu = _row(rows, **{**_keys(ours), "activation": "relu"})
        if relu is not None:
            yield _bar(f"SPARTA / ReLU, {where}", ours["median_ms"] / relu["median_ms"], "<=", _OVER_RELU)
            if relu["memory"] and ours["memory"] is not None:
                value = ours["memory"] / relu["memory"]
                yield _bar(f"memory of an iteration, SPARTA / ReLU, {where}", value, "<=", _MEMORY_OVER_RELU)
    for row in result.get("row", ()):
        if "speedup_over_torchattacks" in row and row["candidate"] in OURS and row["precision"] in _ROW:
            name = f"clean + PGD-10 + PGD-30 + PGD-50 over torchattacks (fp32), batch {batch}, {row['precision']}"
            meant = cuda or row["precision"] != "bf16" or amx
            yield _bar(name, row["speedup_over_torchattacks"], ">=", _ROW[row["precision"]], meant)


def _bar(name: str, value: float, relation: str, limit: float, meant: bool = True) -> dict[str, Any]:
    passed = (value >= limit if relation == ">=" else value <= limit) if meant else None
    return {"name": name, "value": value, "relation": relation, "limit": limit, "passed": passed}


def _keys(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("activation", "precision", "candidate", "backend")}


def _row(rows: Sequence[dict[str, Any]], **keys: Any) -> dict[str, Any] | None:
    """The row with these keys, if it was measured."""
    return next((row for row in rows if "median_ms" in row and _keys(row) == keys), None)


def _library(rows: Sequence[dict[str, Any]], activation: str) -> dict[str, Any] | None:
    """torchattacks on this activation, in the one precision that it runs in."""
    wanted = (activation, "torchattacks")
    measured = (row for row in rows if "median_ms" in row)
    return next((row for row in measured if (row["activation"], row["candidate"]) == wanted), None)


def _fastest(rows: Sequence[dict[str, Any]], activation: str, precision: str) -> dict[str, Any] | None:
    ours = [row for row in rows if row["candidate"] in OURS and "median_ms" in row]
    ours = [row for row in ours if (row["activation"], row["precision"]) == (activation, precision)]
    return min(ours, key=lambda row: row["median_ms"], default=None)


def iterations_table(result: Mapping[str, Any], device: str) -> Table:
    """A row for each entry of a batch size."""
    title = f"PGD iteration, ResNet-18, 3x32x32, batch {result['batch']}, {device}"
    table = Table(title=title, title_justify="left")
    for heading in ("activation", "precision", "candidate"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "p20", "p80", "images/s", "page\nfaults", "memory", "x torch-\nattacks", "x loop", "/ relu"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["entries"]:
        if "median_ms" not in row:
            continue
        backend = f"/{row['backend']}" if row["backend"] not in ("", "auto") else ""
        ratios = ("speedup_over_torchattacks", "speedup_over_loop", "ratio_to_relu")
        table.add_row(
            row["activation"],
            row["precision"],
            row["candidate"] + backend,
            *(f"{row[key]:.2f}" for key in ("median_ms", "p20_ms", "p80_ms")),
            f"{row['images_per_second']:.0f}",
            f"{row['page_faults']:.0f}",
            megabytes(row["memory"]),
            *(f"{row[key]:.2f}" if key in row else "" for key in ratios),
        )
    return table


def row_table(result: Mapping[str, Any]) -> Table:
    """What one model's clean error and three PGD errors cost."""
    table = Table(title=f"clean + PGD-10 + PGD-30 + PGD-50, batch {result['batch']}", title_justify="left")
    table.add_column("entry")
    for heading in ("s", "p20", "p80", "x torchattacks"):
        table.add_column(heading, justify="right")
    for row in result["row"]:
        numbers = [f"{1e-3 * row[key]:.2f}" for key in ("median_ms", "p20_ms", "p80_ms") if key in row]
        speedup = row.get("speedup_over_torchattacks")
        table.add_row(row["name"], *numbers, "" if speedup is None else f"{speedup:.2f}")
    return table


def breakdown_table(result: Mapping[str, Any]) -> Table:
    """Where our iterations spend their time."""
    title = f"Where ours (eager) spends an iteration, ms of its operations, batch {result['batch']}"
    table = Table(title=title, title_justify="left")
    table.add_column("entry")
    for part in (*PARTS, "sum"):
        table.add_column(part.replace("_", "\n"), justify="right")
    for name, found in result["breakdown"].items():
        numbers = [found["ms"][part] for part in PARTS]
        table.add_row(name, *(f"{number:.2f}" for number in (*numbers, sum(numbers))))
    return table


def bars_table(document: Mapping[str, Any]) -> Table:
    """Each bar with what was measured and the verdict."""
    amx = "" if document["settings"]["device"] == "cuda" or document["amx"] else " (no AMX here: those of bf16 are not)"
    table = Table(title=f"What was asked for{amx}", title_justify="left")
    table.add_column("bar")
    for heading in ("measured", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    verdicts = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "not meant"}
    for bar in document["bars"]:
        table.add_row(
            bar["name"], f"{bar['value']:.2f}", f"{bar['relation']} {bar['limit']:g}", verdicts[bar["passed"]]
        )
    return table
