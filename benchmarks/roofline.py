"""Draw how near the operations come to the rate of a copy, from what ops.py measured.

    python benchmarks/roofline.py OPS.json [OPS.json ...] --out roofline.png

Everything here is bound by memory. So the roof is the rate of a copy, and on a GPU, to its left, the time of an empty
launch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bars
from timing import geometric_mean

from sparta_kernels.data.files import check_writable
from sparta_kernels.report.plot import COLOURS, check_plot, new_figure, save_figure

_DRAWN = {  # what lies below comes first: how a candidate is called, and its colour
    "eager": ("eager PyTorch", COLOURS[4]),
    "compile": ("torch.compile", COLOURS[3]),
    "triton_kernel": ("Triton kernel", COLOURS[2]),
    "kernel": ("compiled kernel", COLOURS[0]),
}
_MARKS = ("o", "s", "^", "D")  # of dtypes, as they come
_ROOF = "#444444"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 drawn. A bad argument exits with 2."""
    parser = argparse.ArgumentParser(prog="roofline.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("results", metavar="OPS.json", nargs="+", help="what ops.py wrote, all on one device")
    parser.add_argument("--out", metavar="FILE", required=True, help="the picture, in the format of its ending")
    parser.add_argument("--operation", default="gate", choices=list(bars.FLOOR_COPIES), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        check_plot(options.out)
        check_writable(options.out)
    except (OSError, ValueError, ImportError) as error:
        parser.error(f"argument --out: {error}")
    cells: list[bars.Cell] = []
    devices: dict[str, Any] = {}
    ceilings = None
    for path in options.results:
        try:
            document = json.loads(Path(path).read_text())
            devices[document["device"]["name"]] = document["device"]
            ceilings = document.get("ceilings") or ceilings
            cells += _cells(document["results"], options.operation)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"argument OPS.json: {path} is not what ops.py writes ({type(error).__name__}: {error})")
    if len(devices) > 1:
        parser.error(f"argument OPS.json: measured on several devices: {', '.join(devices)}")
    if not cells:
        parser.error(f"argument --operation: no copy was measured beside {options.operation}")
    ((name, device),) = devices.items()
    threads = f", {device['threads']} threads" if "threads" in device else ""
    draw(options.out, f"{options.operation}: {name}{threads}", cells, ceilings)
    return 0


def _cells(results: Sequence[bars.Cell], operation: str) -> Iterator[bars.Cell]:
    for cell in results:
        if cell.get("operation", "gate") == operation and "copy" in cell["candidates"]:
            yield {key: cell[key] for key in ("direction", "dtype", "floor_bytes", "candidates")}


def draw(path: str, title: str, cells: Sequence[bars.Cell], ceilings: Mapping[str, float] | None) -> None:
    """A panel for each direction: the rate of the bytes that have to move, over their number."""
    from matplotlib.ticker import LogLocator, NullFormatter

    directions = list(dict.fromkeys(cell["direction"] for cell in cells))
    dtypes = list(dict.fromkeys(cell["dtype"] for cell in cells))
    names = [name for name in _DRAWN if any(name in cell["candidates"] for cell in cells)]
    figure = new_figure(1.2 + 4.2 * len(directions), 4.4)
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, directions, strict=True):
        here = [cell for cell in cells if cell["direction"] == direction]
        axes.plot(*_roof(here, ceilings), color=_ROOF, linewidth=1.2, zorder=1)
        for name in names:
            for mark, dtype in zip(_MARKS, dtypes, strict=False):
                points = [
                    (1e-6 * cell["floor_bytes"], cell["candidates"][name]["gb_per_s"])
                    for cell in here
                    if cell["dtype"] == dtype and name in cell["candidates"]
                ]
                if points:
                    axes.scatter(*zip(*points, strict=True), color=_DRAWN[name][1], marker=mark, s=26, alpha=0.75, lw=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(direction, fontsize=10, loc="left")
        axes.set_xlabel("bytes that have to move (MB)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(labelsize=8, labelleft=axes is panels[0])
    panels[0].set_ylabel("their rate (GB/s)")
    _legend(figure, names, dtypes, "large copy and empty launch" if ceilings else "copy of as many bytes")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    save_figure(path, figure)


def _roof(cells: Sequence[bars.Cell], ceilings: Mapping[str, float] | None) -> tuple[list[float], list[float]]:
    """The rate that nothing goes beyond, over megabytes: by the ceilings, else as copies of such sizes had it."""
    sizes = sorted({cell["floor_bytes"] for cell in cells})
    if ceilings is None:
        copies = {
            size: [cell["candidates"]["copy"]["gb_per_s"] for cell in cells if cell["floor_bytes"] == size]
            for size in sizes
        }
        rates = [geometric_mean(copies[size]) for size in sizes]
    else:
        launch, copy = 1e-6 * ceilings["empty_launch_us"], 1e9 * ceilings["copy_gb_per_s"]
        rates = [1e-9 * size / (launch + size / copy) for size in sizes]
    return [1e-6 * size for size in sizes], rates


def _legend(figure: Any, names: Sequence[str], dtypes: Sequence[str], roof: str) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=_ROOF, label=roof)]
    entries += [
        Line2D([], [], color=_DRAWN[name][1], marker="o", linestyle="", label=_DRAWN[name][0])
        for name in reversed(names)
    ]
    entries += [
        Line2D([], [], color="grey", marker=mark, linestyle="", label=dtype)
        for mark, dtype in zip(_MARKS, dtypes, strict=False)
    ]
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
