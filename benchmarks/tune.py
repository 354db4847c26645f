"""Try other constants in the gate's kernels: copies of the sources that differ in one, built and measured in turns.

    python benchmarks/tune.py --json tune.json
    python benchmarks/tune.py --device cuda --variant ring-2 triton-forward-8-warps

Prints by how much each variant is faster than the sources as they are, and changes nothing. Ctrl-C keeps what was
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import bars
import device_timing
import gates
import timing
import torch
from building import build_commands
from ops_options import check_device, check_file, count, seconds, shape
from origin import ROOT
from rich.console import Console
from rich.table import Table
from suite_runner import environment, last_lines
from tune_variants import VARIANTS, Variant

from sparta_kernels.report import save_json

FAILED = 1  # a variant is wrong or does not build
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

_COPIED = ("csrc", "sparta_kernels", "benchmarks")
_BASE = "as they are"
_CORES_OF_A_BUILD = 2
_SHAPES = {
    "cpu": [(128, 64, 32, 32), (128, 512, 4, 4)],
    "cuda": [(512, 64, 32, 32), (512, 128, 16, 16), (512, 512, 4, 4)],
}
_KERNEL_OF = {backend: name for name, backend in gates.KERNELS.items()}


class Unusable(Exception):
    """A variant cannot be measured; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 a variant failed, 130 Ctrl-C. A bad argument exits with 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _read(arguments)
    on_gpu = options.device == "cuda"
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/tune.py", arguments, device_timing.describe() if on_gpu else None),
        "variants": {variant.name: variant.edits for variant in options.variant},
        "complete": False,
        "results": [],
        "failed": [],
    }
    status = 0
    with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
        try:
            tuning = _Tuning(options, Path(scratch), document)
            tuning.build()
            tuning.measure()
            document["complete"] = not document["failed"]
        except KeyboardInterrupt:
            print("tune.py: interrupted", file=sys.stderr)
            status = INTERRUPTED
        except Unusable as error:
            document["failed"].append(f"the sources as they are: {error}")
    for failure in document["failed"]:
        print(f"tune.py: {failure}", file=sys.stderr)
    if options.json is not None:
        save_json(options.json, document)
    _print(document)
    return status or (FAILED if document["failed"] else 0)


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune.py", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--variant", nargs="+", choices=list(VARIANTS), help="default: all of the device")
    add("--shape", nargs="+", type=shape, metavar="N,C,H,W", help="of x (default: sites of ResNets)")
    add("--dtype", nargs="+", choices=gates.DTYPES, default=["fp32", "bf16"])
    add("--layout", nargs="+", choices=gates.LAYOUTS, default=list(gates.LAYOUTS))
    add("--seconds", type=seconds, default=0.3, help="time for each loop (default: %(default)g)")
    add("--rounds", type=count, default=3, metavar="N", help="turns of each variant (default: %(default)s)")
    add("--json", metavar="FILE", help="write the results here, after every turn")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    check_file(parser, options.json)
    options.shape = options.shape or _SHAPES[options.device]
    for name in options.variant or ():
        if VARIANTS[name].device != options.device:
            parser.error(f"argument --variant: {name} is for --device {VARIANTS[name].device}")
    asked = options.variant or [name for name, variant in VARIANTS.items() if variant.device == options.device]
    options.variant = [VARIANTS[name] for name in dict.fromkeys(asked)]
    return options


class _Tuning:
    """Copies of the sources, and what is measured of them."""

    def __init__(self, options: argparse.Namespace, scratch: Path, document: dict[str, Any]) -> None:
        self.options, self.scratch, self.document = options, scratch, document
        self.started = time.monotonic()
        self.base = Variant(_BASE, options.device, "", ())
        self.ready: list[Variant] = []
        self.samples: dict[str, dict[str, list[float]]] = {}  # of a variant, of a cell: milliseconds

    def build(self) -> None:
        """Copy and build everything; what does not build is noted and left out."""
        self._tell("builds the sources as they are")
        self._prepare(self.base)
        self.ready = [self.base]
        at_once = max(1, (os.cpu_count() or 1) // _CORES_OF_A_BUILD)
        with ThreadPoolExecutor(at_once) as pool:
            for variant, reason in zip(
                self.options.variant, pool.map(self._failure, self.options.variant), strict=True
            ):
                if reason is None:
                    self.ready.append(variant)
                else:
                    self.document["failed"].append(f"{variant.name}: {reason}")

    def measure(self) -> None:
        """Give each variant its turns, in another order every round."""
        order = random.Random(0)
        for turn in range(1, self.options.rounds + 1):
            for variant in order.sample(self.ready, len(self.ready)):
                self._tell(f"round {turn} of {self.options.rounds}: {variant.name}")
                try:
                    self._turn(variant)
                except Unusable as error:
                    if variant is self.base:
                        raise
                    self.document["failed"].append(f"{variant.name}: {error}")
                    self.ready.remove(variant)
                    self.samples.pop(variant.name, None)
                self._save()

    def _save(self) -> None:
        """Write what there is of variants that were measured, as the base was."""
        measured = [
            variant
            for variant in self.ready
            if variant.name in self.samples and f"{_BASE} {variant.backend}" in self.samples
        ]
        self.document["results"] = [self._result(variant) for variant in measured]
        if self.options.json is not None:
            save_json(self.options.json, self.document)

    def _failure(self, variant: Variant) -> str | None:
        self._tell(f"builds {variant.name}" if variant.compiled else f"copies for {variant.name}")
        try:
            self._prepare(variant)
        except Unusable as error:
            return str(error)
        return None

    def _prepare(self, variant: Variant) -> None:
        folder = self._folder(variant)
        for name in _COPIED:
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", ".*")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        for file, old, new in variant.edits:
            path = folder / file
            text = path.read_text()
            if text.count(old) != 1:
                raise Unusable(f"{file} has {old!r} {text.count(old)} times, not once")
            path.write_text(text.replace(old, new))
        if not variant.compiled and variant is not self.base:
            (module,) = (self._folder(self.base) / "sparta_kernels").glob("_native*.so")
            shutil.copy(module, folder / "sparta_kernels")
            return
        for command in build_commands(folder, folder / "compiled", folder, self._archs()):
            done = self._run(command, folder)
            if done.returncode != 0:
                raise Unusable(f"does not build: {last_lines(done.stdout, 3)}")

    def _archs(self) -> str | None:
        if self.options.device == "cpu":
            return None
        return "".join(map(str, torch.cuda.get_device_capability()))

    def _turn(self, variant: Variant) -> None:
        """One run of ops.py on a variant, in a process of its own."""
        folder = self._folder(variant)
        backends = [variant.backend] if variant.backend else sorted({v.backend for v in self.ready if v.backend})
        results, options = folder / "ops.json", self.options
        command = [sys.executable, folder / "benchmarks" / "ops.py", "--device", options.device, "--json", results]
        command += ["--candidates", "copy", *(_KERNEL_OF[backend] for backend in backends), "--operation", "gate"]
        command += ["--shape", *(",".join(map(str, one)) for one in options.shape), "--dtype", *options.dtype]
        command += ["--layout", *options.layout, "--seconds", f"{options.seconds:g}", "--quick"]
        done = self._run(command, folder)
        document = json.loads(results.read_text()) if results.exists() else {"failed": []}
        if done.returncode != 0:
            raise Unusable((document["failed"] or [last_lines(done.stdout, 2)])[0])
        for cell in document["results"]:
            for backend in backends:
                times = cell["candidates"][_KERNEL_OF[backend]]
                name = variant.name if variant.backend else f"{_BASE} {backend}"
                self.samples.setdefault(name, {}).setdefault(bars.title(cell), []).append(times["median_ms"])

    def _run(self, command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            cwd=folder,
            env=environment(root=folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _result(self, variant: Variant) -> dict[str, Any]:
        """How much faster than the base it is: in geometric mean by direction and dtype, and in every cell."""
        base = self.samples[f"{_BASE} {variant.backend}"]
        cells = {
            title: {"base_ms": base[title], "ms": own, "speedup": median(base[title]) / median(own)}
            for title, own in self.samples[variant.name].items()
        }
        groups: dict[str, list[float]] = {}
        for title, cell in cells.items():
            _, dtype, _, direction = title.split()
            groups.setdefault(f"{direction} {dtype}", []).append(cell["speedup"])
        return {
            "variant": variant.name,
            "backend": variant.backend,
            "speedup": {group: timing.geometric_mean(values) for group, values in groups.items()},
            "least": {group: min(values) for group, values in groups.items()},
            "cells": cells,
        }

    def _folder(self, variant: Variant) -> Path:
        return self.scratch / variant.name.replace(" ", "-")

    def _tell(self, what: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {what}", file=sys.stderr, flush=True)


def _print(document: Mapping[str, Any]) -> None:
    if not document["results"]:
        return
    groups = sorted({group for result in document["results"] for group in result["speedup"]}, reverse=True)
    table = Table(
        title=f"Times as fast as the sources as they are, {document['device']['name']}: geometric mean (least)",
        title_justify="left",
    )
    table.add_column("variant", no_wrap=True)
    for group in groups:
        table.add_column(group, justify="right", no_wrap=True)
    for result in sorted(document["results"], key=lambda result: -max(result["speedup"].values())):
        figures = [
            f"{result['speedup'][group]:.3f} ({result['least'][group]:.2f})" if group in result["speedup"] else ""
            for group in groups
        ]
        table.add_row(result["variant"], *figures)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
