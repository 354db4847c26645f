"""What the times amount to: ratios, and the bars that the gate is held against on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gates import KERNELS, SHAPES
from timing import geometric_mean

DIRECTIONS = ("forward", "backward")
FLOOR_COPIES = {  # of x: what has to be read and written, over one read and one write
    "gate": {"forward": 1.0, "backward": 1.5},  # read x, write y; read x and gy, write gx
    "dynamic_conv": {"forward": 1.0, "backward": 1.5},  # the same of spatial
    "pgd_step": {"call": 2.0},  # read adv, grad and clean, write adv
    "pgd_start": {"call": 1.0},  # read clean, write adv
    # Read a and b, write y; read y's gradient, write the one of both. The bits are 1/64 of a copy in float32.
    "add_relu": {"forward": 1.5, "backward": 1.0},
    # Read x, write y; read x and gy, write gx. What belongs to channels is little at large sites.
    "swish_relu": {"forward": 1.0, "backward": 1.5},
    "smooth_relu": {"forward": 1.0, "backward": 1.5},
    "dyrelu": {"forward": 1.0, "backward": 1.5},
    # The whole activation and its input's gradient: read x twice, write y; read x and gy twice, write gx. And the bits.
    "activation": {"both": 4.0},
}
MEAN_BARS = {"forward": 1.05, "backward": 1.75}  # times copy
EACH_BARS = {"forward": 1.2, "backward": 2.0}  # times copy
COMPILE_BARS = {"forward": 1.3, "backward": 2.0}  # times faster than torch.compile, on a CPU
SHARE_BARS = {"forward": 0.92, "backward": 0.88}  # of a copy's bandwidth, on a GPU at the large sites
LARGE_SITES, SMALL_SITES = SHAPES[:2], SHAPES[2:]
LARGE_BATCH = 512
EXCESS_BAR = 2.0  # microseconds over an empty launch and the floor, on a GPU at the small sites

NOISY_SPREAD = 1.5  # a cell is noisy where some candidate's p80 is over so many times its p20
NOISY_LOAD = 0.1  # or others had more than this share of the CPUs

Cell = dict[str, Any]


def cell(shape: Sequence[int], dtype: str, layout: str, size: int, direction: str, operation: str = "gate") -> Cell:
    """A cell of the results, not yet measured; `size` is x's in bytes. The floor counts x, gy, y and gx."""
    return {
        "operation": operation,
        "shape": list(shape),
        "dtype": dtype,
        "layout": layout,
        "direction": direction,
        "copy_bytes": 2 * size,
        "floor_bytes": int(2 * size * FLOOR_COPIES[operation][direction]),
    }


def finish(found: Cell, ceilings: Mapping[str, float] | None = None) -> Cell:
    """Add what follows from the times.

    That is each candidate's ratio to copy and rate of the bytes that have to move, and whether the cell is noisy;
    given a GPU's `ceilings` (`device_timing.ceilings`) also the floor's time at the rate of a large copy, each
    candidate's share of the rate that copy has in this cell, and its excess over an empty launch and the floor.
    """
    candidates = found["candidates"]
    if ceilings is not None:
        found["floor_ms"] = found["floor_bytes"] / ceilings["copy_gb_per_s"] / 1e6
    for name, times in candidates.items():
        moved = found["copy_bytes" if name == "copy" else "floor_bytes"]
        times["gb_per_s"] = moved / times["median_ms"] / 1e6
        if "copy" in candidates:
            times["ratio_to_copy"] = times["median_ms"] / candidates["copy"]["median_ms"]
        if ceilings is not None and name != "copy":
            if "copy" in candidates:
                times["share_of_copy"] = moved / found["copy_bytes"] / times["ratio_to_copy"]
            times["excess_us"] = 1e3 * (times["median_ms"] - found["floor_ms"]) - ceilings["empty_launch_us"]
    found["noisy"] = (found["other_load"] or 0) > NOISY_LOAD or any(
        times["p80_ms"] > NOISY_SPREAD * times["p20_ms"] for times in candidates.values()
    )
    return found


def title(found: Cell) -> str:
    """A cell's name, such as "128x64x32x32 fp32 nchw forward"."""
    shape = "x".join(map(str, found["shape"]))
    named = f"{shape} {found['dtype']} {found['layout']} {found['direction']}"
    return named if found["operation"] == "gate" else f"{found['operation']} {named}"


def summarise(results: Sequence[Cell]) -> dict[str, Any]:
    """Geometric mean and worst ratio to copy of every candidate for the gate, forward and backward, over all cells."""
    summary: dict[str, Any] = {}
    for direction in DIRECTIONS:
        cells = _gate(results, direction)
        for name in {name: None for found in cells for name in found["candidates"]}:
            having = [found for found in cells if "ratio_to_copy" in found["candidates"].get(name, {})]
            if name == "copy" or not having:
                continue
            worst = max(having, key=lambda found: ratio(found, name))
            summary.setdefault(direction, {})[name] = {
                "geometric_mean": geometric_mean(ratio(found, name) for found in having),
                "worst": ratio(worst, name),
                "worst_cell": title(worst),
                "cells": len(having),
            }
    return summary


def judge(results: Sequence[Cell], device: str = "cpu") -> list[dict[str, Any]]:
    """Hold the gate against its bars, over the cells that they are set for.

    Those are fp32 and bf16 at the four shapes of ResNet's groups and batches of 128 and more; others are only
    measured. `passed` is None where no such cell was measured.

    Against copy it is the bare kernel that is judged, on a GPU the faster one of each cell: how well it uses the
    memory. Against torch.compile, on a CPU, it is the operation, with what Python costs on both sides. The
    operation's own ratio to copy is in the summary.
    """
    cells = [found for found in results if in_scope(found)]
    return list(_judge_cpu(cells) if device == "cpu" else _judge_gpu(cells))


def _judge_cpu(results: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    for direction in DIRECTIONS:
        cells = _gate(results, direction)
        ratios = [ratio(found, "kernel") for found in cells if _has(found, "kernel", "copy")]
        yield from _against_copy(direction, "kernel", ratios)
        for layout in {found["layout"]: None for found in cells}:
            speedups = [
                found["candidates"]["compile"]["median_ms"] / found["candidates"]["native"]["median_ms"]
                for found in cells
                if found["layout"] == layout and _has(found, "native", "compile")
            ]
            mean = geometric_mean(speedups) if speedups else None
            name = f"{direction}, compile / native, {layout}, geometric mean"
            yield _bar(name, mean, ">=", COMPILE_BARS[direction], len(speedups))


def _judge_gpu(results: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    for direction in DIRECTIONS:
        cells = [found for found in _gate(results, direction) if fastest(found) and _has(found, "copy")]
        best = [(found, found["candidates"][fastest(found)]) for found in cells]
        large = [
            times["share_of_copy"]
            for found, times in best
            if tuple(found["shape"][1:]) in LARGE_SITES and found["shape"][0] >= LARGE_BATCH
        ]
        name = f"{direction}, share of copy's bandwidth, large sites, worst"
        yield _bar(name, min(large, default=None), ">=", SHARE_BARS[direction], len(large))
        small = [times["excess_us"] for found, times in best if tuple(found["shape"][1:]) in SMALL_SITES]
        name = f"{direction}, us over empty launch and floor, small sites, worst"
        yield _bar(name, max(small, default=None), "<=", EXCESS_BAR, len(small))
        yield from _against_copy(direction, "faster kernel", [times["ratio_to_copy"] for _, times in best])


def _against_copy(direction: str, who: str, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    mean = geometric_mean(ratios) if ratios else None
    yield _bar(f"{direction}, {who} / copy, geometric mean", mean, "<=", MEAN_BARS[direction], len(ratios))
    worst = max(ratios, default=None)
    yield _bar(f"{direction}, {who} / copy, worst", worst, "<=", EACH_BARS[direction], len(ratios))


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


def in_scope(found: Cell) -> bool:
    """Whether the bars are meant for this cell."""
    samples, *image = found["shape"]
    gate = found["operation"] == "gate"
    return gate and samples >= 128 and tuple(image) in SHAPES and found["dtype"] in ("fp32", "bf16")


def fastest(found: Cell) -> str | None:
    """The faster of the bare kernels that were measured here."""
    measured = [name for name in KERNELS if name in found["candidates"]]
    return min(measured, key=lambda name: found["candidates"][name]["median_ms"], default=None)


def ratio(found: Cell, name: str) -> float:
    """A candidate's time over copy's."""
    value: float = found["candidates"][name]["ratio_to_copy"]
    return value


def _gate(results: Sequence[Cell], direction: str) -> list[Cell]:
    return [found for found in results if found["operation"] == "gate" and found["direction"] == direction]


def _has(found: Cell, *candidates: str) -> bool:
    return all(name in found["candidates"] for name in candidates)
