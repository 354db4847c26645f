"""Measure the gate, forward and backward, against a copy of x, eager PyTorch and torch.compile.

    python benchmarks/ops.py --json out.json

Prints tables and writes one JSON file, kept up to date while measuring: Ctrl-C loses nothing. The README here
says what the numbers mean.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import bars
import gates
import timing
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparta_kernels.data.files import check_writable
from sparta_kernels.report import save_json

FAILED = 1  # a wrong result, or a full disk
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

TIMED = {
    "forward": "the call, without a graph: reading x, spatial, channel and kernel, allocating and writing y",
    "backward": "torch.autograd.grad on a graph made before (kernel: the call): from y's gradient to "
    "all four inputs' gradients, allocating and writing them",
    "outside": "freeing the results, compiling, checking",
}
_BUFFERS = 15  # of x's size, that the hungriest loop holds for each input: inputs, graphs, the last outputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    _fill_in(options)
    cases = _cases(options)
    _check(parser, options, cases)
    timing.use_allocator(options.allocator)
    torch.set_num_threads(options.threads)

    settings = {name: value for name, value in vars(options).items() if name not in ("json", "quick")}
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/ops.py", arguments),
        "settings": settings,
        "candidates": {name: gates.CANDIDATES[name] for name in options.candidates},
        "timed": TIMED,
        "complete": False,
        "results": [],
    }
    status = 0
    try:
        _measure(options, cases, document)
        document["complete"] = True
        _save(options.json, document)
    except KeyboardInterrupt:
        print("ops.py: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except (gates.WrongResult, OSError) as error:
        print(f"ops.py: {error}", file=sys.stderr)
        status = FAILED
    if document["results"]:
        _print(document)
    return status


def _measure(options: argparse.Namespace, cases: Sequence[gates.Case], document: dict[str, Any]) -> None:
    """Measure every case, adding to the document and writing it as results come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    # Nothing is drawn while a loop runs: the machine belongs to the candidates then.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases) * len(bars.DIRECTIONS))

        def say(what: str) -> None:
            progress.update(task, description=what, refresh=True)

        for case in cases:
            say(f"{case}: making inputs")
            count = _inputs(options, case)
            inputs = gates.make_inputs(case, count)
            candidates = {name: gates.make_candidate(name) for name in options.candidates}
            for name, candidate in candidates.items():
                say(f"{case}: {'compiling' if name == 'compile' else 'checking'} {name}")
                gates.check(name, candidate, inputs)
            for direction in bars.DIRECTIONS:
                say(f"{case}: measuring {direction}")
                calls = {name: getattr(ready, direction)(inputs) for name, ready in candidates.items()}
                with timing.OtherLoad() as others:
                    times = timing.interleave(calls, inputs=count, seconds=options.seconds, rounds=options.rounds)
                found = bars.cell(case.shape, case.dtype, case.layout, case.size, direction)
                found |= {"inputs": count, "other_load": others.share}
                found["candidates"] = {name: time.as_dict() for name, time in times.items()}
                document["results"].append(bars.finish(found))
                _save(options.json, document)
                medians = (f"{name} {time.median * 1e3:.3f}" for name, time in times.items())
                progress.console.print(f"{bars.title(found)}: {', '.join(medians)} ms")
                progress.advance(task)
        say("measured")


def _inputs(options: argparse.Namespace, case: gates.Case) -> int:
    count: int = options.inputs or timing.inputs_needed(case.size)
    return count


def _save(path: str | None, document: dict[str, Any]) -> None:
    document |= {"summary": bars.summarise(document["results"]), "bars": bars.judge(document["results"])}
    if path is not None:
        save_json(path, document)


def _print(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    results, device, allocator = document["results"], document["device"], document["settings"]["allocator"]
    for direction in bars.DIRECTIONS:
        console.print(bars.times_table(results, direction))
    console.print(
        f"{device['name']}, {device['threads']} threads, {document['build']['cpu']['isa']}, "
        f"torch {document['build']['versions']['torch']}. Medians; GB/s of the bytes that have to move.\n"
        + "\n".join(f"  {name}: {meaning}" for name, meaning in document["candidates"].items())
        + f"\nAll but copy allocate their outputs. Allocator {allocator}: {timing.ALLOCATORS[allocator]}."
    )
    console.print(bars.summary_table(document["summary"]))
    console.print(bars.bars_table(document["bars"]))
    noisy = sum(found["noisy"] for found in results)
    if noisy:
        console.print(
            f"{noisy} of {len(results)} cells are noisy (p80 over {bars.NOISY_SPREAD:g} times p20, or others "
            f"had over {bars.NOISY_LOAD:.0%} of the CPUs): measure again when nothing else runs."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ops.py", description="Measure the gate against copy, eager PyTorch and torch.compile."
    )
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the results here")
    add("--batch", nargs="+", type=_count, metavar="N", help="batch sizes (default: 128)")
    add("--shape", nargs="+", type=_shape, metavar="N,C,H,W", help="these shapes in place of the usual")
    add("--dtype", nargs="+", choices=gates.DTYPES, default=["fp32", "bf16"])
    add("--layout", nargs="+", choices=gates.LAYOUTS, default=list(gates.LAYOUTS))
    add(
        "--candidates",
        nargs="+",
        choices=gates.CANDIDATES,
        help="; ".join(f"{name}: {meaning}" for name, meaning in gates.CANDIDATES.items()),
    )
    add("--threads", type=_count, default=torch.get_num_threads(), metavar="N")
    add(
        "--quick",
        action="store_true",
        help="a look in under a minute: short loops, and compile only where --candidates names it",
    )
    add("--seconds", type=_seconds, help="time for each loop (default: 3; 0.3 with --quick)")
    add("--inputs", type=_count, metavar="N", help="inputs to rotate (default: past the last-level cache)")
    allocators = "; ".join(f"{name}: {meaning}" for name, meaning in timing.ALLOCATORS.items())
    add("--allocator", choices=timing.ALLOCATORS, default="keep", help=f"{allocators} (default: %(default)s)")
    return parser


def _fill_in(options: argparse.Namespace) -> None:
    """Settle what depends on other options."""
    options.seconds = options.seconds or (0.3 if options.quick else 3.0)
    options.rounds = 5 if options.quick else 10
    usual = [name for name in gates.CANDIDATES if name != "compile" or not options.quick]
    options.candidates = [name for name in gates.CANDIDATES if name in (options.candidates or usual)]


def _cases(options: argparse.Namespace) -> list[gates.Case]:
    shapes = options.shape or [(batch, *image) for batch in options.batch or [128] for image in gates.SHAPES]
    return [
        gates.Case(shape, dtype, layout)
        for shape in dict.fromkeys(shapes)
        for dtype in dict.fromkeys(options.dtype)
        for layout in dict.fromkeys(options.layout)
    ]


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace, cases: Sequence[gates.Case]) -> None:
    """Refuse what could not be done, before anything is."""
    if options.batch and options.shape:
        parser.error("argument --shape: not allowed with argument --batch")
    cpus = os.cpu_count() or 1
    if options.threads > cpus:
        parser.error(f"argument --threads: must be at most {cpus} (CPUs here), got {options.threads}")
    compiler = os.environ.get("CXX", "g++")  # as torch.compile looks for it
    if "compile" in options.candidates and shutil.which(compiler) is None:
        parser.error(
            f"argument --candidates: compile needs a C++ compiler, and {compiler} is not here; "
            "install it, set CXX, or name other candidates"
        )
    if options.json is not None:
        try:
            check_writable(options.json)
        except OSError as error:
            parser.error(f"argument --json: {error}")
    needed, largest = max((_BUFFERS * case.size * _inputs(options, case), str(case)) for case in cases)
    available = timing.available_memory()
    if available is not None and needed > available:
        parser.error(
            f"{largest} needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free; "
            "choose a smaller --batch or --shape"
        )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        samples, channels, height, width = (_count(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"must be four integers of at least 1, such as 128,64,32,32, got {text!r}"
        ) from None
    return samples, channels, height, width


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
