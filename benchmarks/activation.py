"""Measure the whole activation, forward and the gradient of its input, at the sites of a ResNet-18.

    python benchmarks/activation.py --json activation.json

The weights are frozen and BatchNorm is in eval mode: it is what an attack's step computes of SPARTA. Prints tables and
writes one JSON file, kept up to date while measuring: Ctrl-C loses nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import activation_candidates
import bars
import device_timing
import gates
import ops
import ops_options
import timing
import torch
from activation_candidates import CANDIDATES
from rich.console import Console
from rich.table import Table

from sparta_kernels import backends
from sparta_kernels.report import megabytes, save_json

FAILED, INTERRUPTED = ops.FAILED, ops.INTERRUPTED

OVER_COMPILE = {"cpu": {"fp32": 1.3, "bf16": 1.5}, "cuda": {"bf16": 2.0}}  # times as fast as torch.compile
_BATCHES = {"cpu": [32, 128], "cuda": [128, 512]}
_TIMED = {
    "both": "the call with its graph, and torch.autograd.grad of x from y's gradient: allocating and writing y, what "
    "is kept between, and gx. copy: the one copy. products: the four products",
    "outside": "freeing the results, compiling, checking, folding and packing the weights",
}
_MEMORY = "bytes of tensors at the peak of a call, x and y's gradient not counted, nor what a library has for itself"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, cases = read(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = False  # all candidates compute in the dtype that they are given
    else:
        timing.use_allocator(options.allocator)
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/activation.py", arguments, device_timing.describe() if on_gpu else None),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "quick")},
        "candidates": {name: CANDIDATES[name] for name in options.candidates},
        "timed": _TIMED,
        "memory": _MEMORY,
        "complete": False,
        "results": [],
        "failed": [],
        "not_measured": [],
    }
    operations = {"activation": activation_candidates.Operation(options.backend)}
    ways = ops.Ways("activation.py", operations, _save, _print)
    return ops.run(ways, options, ops.plan(options, cases, operations, _importance), document, started)


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[gates.Case]]:
    """The options that these arguments give, complete, and the cases to measure. A bad argument exits with 2."""
    parser = argparse.ArgumentParser(
        prog="activation.py", description="Measure the whole activation against eager PyTorch and torch.compile."
    )
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the results here")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", nargs="+", type=ops_options.count, metavar="N", help="default: 32 and 128; on a GPU 128 and 512")
    add("--shape", nargs="+", type=ops_options.shape, metavar="N,C,H,W", help="these shapes in place of the sites'")
    add("--dtype", nargs="+", choices=gates.DTYPES, default=["fp32", "bf16"], help="default: fp32 and bf16")
    add("--layout", nargs="+", choices=gates.LAYOUTS, default=list(gates.LAYOUTS), help="of x (default: both)")
    add(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        help="; ".join(f"{name}: {meaning}" for name, meaning in CANDIDATES.items()),
    )
    add("--backend", choices=backends.NAMES, default="auto", help="of ours (default: auto)")
    add("--threads", type=ops_options.count, default=torch.get_num_threads(), metavar="N")
    add("--quick", action="store_true", help="short loops at batch 32; compile only where --candidates names it")
    add("--seconds", type=ops_options.seconds, help="time for each loop (default: 3; 0.3 with --quick or on a GPU)")
    add("--inputs", type=ops_options.count, metavar="N", help="inputs to rotate (default: past the last-level cache)")
    add("--budget", type=ops_options.seconds, metavar="SECONDS", help="end by about then; what is left out is listed")
    allocators = "; ".join(f"{name}: {meaning}" for name, meaning in timing.ALLOCATORS.items())
    add("--allocator", choices=timing.ALLOCATORS, default="keep", help=f"{allocators} (default: %(default)s)")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    ops_options.check_device(parser, options.device)
    if options.batch and options.shape:
        parser.error("argument --shape: not allowed with argument --batch")
    if options.backend not in ("auto", "reference") and options.device not in backends.DEVICES.get(options.backend, ()):
        parser.error(f"argument --backend: {options.backend} has no kernels for {options.device} here")
    options.seconds = options.seconds or (0.3 if options.quick or on_gpu else 3.0)
    options.rounds = 5 if options.quick else 7 if on_gpu else 10
    options.batch = options.batch or ([32] if options.quick else _BATCHES[options.device])
    asked = options.candidates or [name for name in CANDIDATES if name != "compile" or not options.quick]
    options.candidates = [name for name in CANDIDATES if name in asked]
    cases = activation_candidates.cases(options.batch, options.shape, options.dtype, options.layout)
    ops_options.check(parser, options, cases)
    return options, cases


def _importance(case: gates.Case) -> tuple[bool, int]:
    """The cells that a bar is set for on a GPU first; less work before more."""
    return case.dtype != "bf16", case.shape[0]


def judge(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours against torch.compile, in geometric mean over the four sites at every batch size asked for.

    Other shapes, and batches smaller than the usual, are only measured. `passed` is None unless all `wanted` cells of
    a dtype and layout were measured by both.
    """
    settings, device = document["settings"], document["device"]["type"]
    shapes = settings["shape"] or [(batch, *image) for batch in settings["batch"] for image in gates.SHAPES]
    batches = {samples for samples, *image in shapes if _in_scope((samples, *image), device)}
    return list(_judge(document["results"], device, len(gates.SHAPES) * max(1, len(batches))))


def _in_scope(shape: Sequence[int], device: str) -> bool:
    """Whether the bars are meant for this shape."""
    samples, *image = shape
    return samples >= min(_BATCHES[device]) and tuple(image) in gates.SHAPES


def _judge(results: Sequence[bars.Cell], device: str, wanted: int) -> Iterator[dict[str, Any]]:
    results = [found for found in results if _in_scope(found["shape"], device)]
    for dtype, limit in OVER_COMPILE[device].items():
        for layout in gates.LAYOUTS:
            cells = [found for found in results if (found["dtype"], found["layout"]) == (dtype, layout)]
            speedups = [value for found in cells if (value := speedup(found, "ours", "compile")) is not None]
            mean = timing.geometric_mean(speedups) if speedups else None
            yield {
                "name": f"compile / ours, {dtype}, {layout}, geometric mean",
                "value": mean,
                "relation": ">=",
                "limit": limit,
                "passed": None if mean is None or len(speedups) < wanted else mean >= limit,
                "cells": len(speedups),
                "wanted": wanted,
            }


def speedup(found: bars.Cell, name: str, other: str) -> float | None:
    """How many times as fast as `other` it is, where both were measured."""
    its, theirs = (found["candidates"].get(key, {}).get("median_ms") for key in (name, other))
    return None if its is None or theirs is None else theirs / its


def _save(path: str | None, document: dict[str, Any]) -> None:
    document["bars"] = judge(document)
    if path is not None:
        save_json(path, document)


def table(document: dict[str, Any]) -> Table:
    """A row for each cell: medians, what ours is beside the others, memory."""
    results, names = document["results"], list(document["candidates"])
    made = Table(title=f"The whole activation, both ways, {document['device']['name']}: ms", title_justify="left")
    for heading in ("N x C x H x W", "dtype", "layout"):
        made.add_column(heading, no_wrap=True)
    ratios = {
        "eager": "eager\n/ ours",
        "compile": "compile\n/ ours",
        "products": "ours /\nproducts",
        "relu": "ours /\nrelu",
    }
    ratios = {name: heading for name, heading in ratios.items() if name in names and "ours" in names}
    remembered = [name for name in ("relu", "eager", "compile", "ours") if name in names]
    for heading in (*names, *ratios.values(), *(f"{name}\nmemory" for name in remembered)):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("")
    for found in results:
        row = ["x".join(map(str, found["shape"])), found["dtype"], found["layout"]]
        measured = found["candidates"]
        row += [f"{measured[name]['median_ms']:.3f}" if name in measured else "" for name in names]
        for name in ratios:
            pair = ("ours", name) if name in ("eager", "compile") else (name, "ours")
            value = speedup(found, *pair)
            row.append("" if value is None else f"{value:.2f}")
        row += [megabytes(measured[name].get("memory")) if name in measured else "" for name in remembered]
        made.add_row(*row, "noisy" if found["noisy"] else "")
    return made


def _print(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table(document))
    console.print("\n".join(f"  {name}: {meaning}" for name, meaning in document["candidates"].items()))
    judged = Table(title="Against torch.compile", title_justify="left")
    for heading in ("bar", "measured", "allowed", "cells", ""):
        judged.add_column(heading)
    verdicts = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "not all measured"}
    for bar in document["bars"]:
        value = "" if bar["value"] is None else f"{bar['value']:.2f}"
        cells = f"{bar['cells']} of {bar['wanted']}"
        judged.add_row(bar["name"], value, f">= {bar['limit']:g}", cells, verdicts[bar["passed"]])
    console.print(judged)
    noisy = sum(found["noisy"] for found in document["results"])
    if noisy:
        console.print(f"{noisy} of {len(document['results'])} cells are noisy: measure again when nothing else runs.")


if __name__ == "__main__":
    sys.exit(main())
