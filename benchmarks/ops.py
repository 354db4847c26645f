"""Measure the operations against a copy, eager PyTorch and torch.compile, on a CPU or a GPU.

    python benchmarks/ops.py --json out.json

Prints tables and writes one JSON file, kept up to date while measuring: Ctrl-C loses nothing. The README here
says what the numbers mean.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import bars
import device_timing
import gates
import ops_options
import small
import tables
import timing
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparta_kernels.report import save_json

FAILED = 1  # a wrong result, or a full disk
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

TIMED = {
    "cpu": {
        "forward": "the call, without a graph: reading x, spatial, channel and kernel, allocating and writing y",
        "backward": "torch.autograd.grad on a graph made before (kernels: the call): from y's gradient to "
        "all inputs' gradients, allocating and writing them",
        "call": "the call, in place",
        "outside": "freeing the results, compiling, checking",
    },
    "cuda": {
        "forward, backward, call": "as on a CPU, but only what the GPU does: between two events around one replay of "
        "a CUDA graph of `calls` calls, divided by their number",
        "host_us": "the host's time for one call without a graph: Python, dispatcher, autograd, launches",
        "outside": "allocating, freeing, compiling, checking",
    },
}
_LARGEST_USUAL = 1024  # images in a batch
_FIRST = {"measure": 10.0, "compile": 25.0}  # seconds that a case is taken to need before one has been measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, cases = ops_options.read(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = False  # all candidates compute in the dtype that they are given
    else:
        timing.use_allocator(options.allocator)
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "quick")}
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/ops.py", arguments, device_timing.describe() if on_gpu else None),
        "settings": settings,
        "candidates": {name: gates.CANDIDATES[name] for name in options.candidates},
        "timed": TIMED[options.device],
        "complete": False,
        "results": [],
        "failed": [],
        "not_measured": [],
    }
    ways = Ways("ops.py", small.OPERATIONS, _save, _print)
    return run(ways, options, plan(options, cases, small.OPERATIONS, _importance), document, started)


class Ways(NamedTuple):
    """What is particular to a benchmark that measures operations: its name, they, what it makes of the results."""

    name: str
    operations: Mapping[str, Any]
    save: Callable[[str | None, dict[str, Any]], None]
    show: Callable[[dict[str, Any]], None]


Plan = list[tuple[str, gates.Case, list[str]]]


def run(ways: Ways, options: argparse.Namespace, plan: Plan, document: dict[str, Any], started: float) -> int:
    """Measure what the plan says, tell it, and return the exit status."""
    status = 0
    try:
        with device_timing.Cuda() if options.device == "cuda" else nullcontext() as device:
            if device is not None:
                document["ceilings"] = device_timing.ceilings(device)
            _measure(ways, options, plan, document, device, started)
        document["complete"] = not document["not_measured"] and not document["failed"]
        ways.save(options.json, document)
    except KeyboardInterrupt:
        print(f"{ways.name}: interrupted", file=sys.stderr)
        status = INTERRUPTED
        try:  # what was noted since the last cell: what is wrong, what was left out
            ways.save(options.json, document)
        except OSError as error:
            print(f"{ways.name}: {error}", file=sys.stderr)
    except torch.AcceleratorError as error:
        if not document["failed"]:  # else `_measure` has noted where it was
            document["failed"].append(str(error).splitlines()[0])
        ways.save(options.json, document)
    except OSError as error:
        print(f"{ways.name}: {error}", file=sys.stderr)
        status = FAILED
    if document["results"]:
        ways.show(document)
    for missing in document["not_measured"]:
        print(f"not measured: {missing}", file=sys.stderr)
    for failure in document["failed"]:
        print(f"{ways.name}: {failure}", file=sys.stderr)
    return status or (FAILED if document["failed"] else 0)


def plan(
    options: argparse.Namespace,
    cases: Sequence[gates.Case],
    operations: Mapping[str, Any],
    importance: Callable[[gates.Case], Any],
) -> Plan:
    """Every case to be measured, by which candidates, in which of two phases.

    On a GPU, compiling takes far longer than measuring. So everything is measured without torch.compile first, and a
    second time with it, the most important cases first each time.
    """
    plan = []
    if options.device == "cuda":
        cases = sorted(cases, key=importance)
    early = [name for name in options.candidates if name != "compile" or options.device == "cpu"]
    for phase, names in {"measure": early, "compile": options.candidates}.items():
        for case in cases:
            able = [name for name in names if name in operations[case.operation].candidates]
            if able and (phase == "measure" or ("compile" in able and able != early)):
                plan.append((phase, case, able))
    return plan


def _importance(case: gates.Case) -> tuple[int, int]:
    """The cells that bars are set for, the other operations, the other cells; less work before more.

    Batches that are larger still tell the least, and take the longest.
    """
    batch, site = case.shape[0], tuple(case.shape[1:])
    if case.operation != "gate":
        return 1, batch
    if bars.LARGE_BATCH <= batch <= _LARGEST_USUAL:
        return (0 if site in bars.LARGE_SITES else 2), batch
    return 3, batch


def _measure(
    ways: Ways,
    options: argparse.Namespace,
    plan: Plan,
    document: dict[str, Any],
    device: device_timing.Cuda | None,
    started: float,
) -> None:
    """Measure what the plan says as far as the budget goes, adding to the document and writing it as results come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    needed = dict(_FIRST)
    # Nothing is drawn while a loop runs: the machine belongs to the candidates then.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(plan))
        for phase, case, names in plan:
            begun = time.monotonic()
            # The slowest case of its phase so far says whether there is time for another one.
            if options.budget is not None and begun - started + needed[phase] > options.budget:
                document["not_measured"].append(f"{case}, {phase}: no time left")
                continue

            def say(what: str, case: gates.Case = case) -> None:
                progress.update(task, description=f"{case}: {what}", refresh=True)

            try:
                for found in _measure_case(ways, options, case, names, document, device, say):
                    _add(document["results"], found)
                    ways.save(options.json, document)
                    times = (f"{name} {times['median_ms']:.3f}" for name, times in found["candidates"].items())
                    progress.console.print(f"{bars.title(found)}: {', '.join(times)} ms")
            except torch.OutOfMemoryError as error:
                document["not_measured"].append(f"{case}, {phase}: {str(error).splitlines()[0]}")
            except torch.AcceleratorError as error:
                where, what = progress.tasks[0].description, str(error).splitlines()[0]
                document["failed"].append(f"{where}: {what}; nothing on the GPU works any more")
                raise
            spent = time.monotonic() - begun
            needed[phase] = spent if needed[phase] == _FIRST[phase] else max(spent, needed[phase])
            progress.advance(task)
        progress.update(task, description="measured", refresh=True)


def _measure_case(
    ways: Ways,
    options: argparse.Namespace,
    case: gates.Case,
    names: Sequence[str],
    document: dict[str, Any],
    device: device_timing.Cuda | None,
    say: Callable[[str], None],
) -> Iterator[bars.Cell]:
    """Check the candidates for a case, and time them in every direction. One that fails is named and left out."""
    say("making inputs")
    operation, count = ways.operations[case.operation], ops_options.inputs(options, case)
    inputs = operation.make_inputs(case, count, options.device)
    candidates = {}
    for name in names:
        say(f"{'compiling' if name == 'compile' else 'checking'} {name}")
        try:
            candidates[name] = operation.make_candidate(name)
            operation.check(name, candidates[name], inputs)
        except (torch.AcceleratorError, torch.OutOfMemoryError):  # after the first nothing on the GPU works any more
            raise
        except Exception as error:  # whatever it is: the others are measured all the same
            wrong = isinstance(error, gates.WrongResult)
            document["failed"].append(str(error) if wrong else f"{case}: {name}: {type(error).__name__}: {error}")
            candidates.pop(name, None)
    if not candidates:
        return
    for direction in bars.FLOOR_COPIES[case.operation]:
        say(f"measuring {direction}")
        calls = {name: getattr(candidate, direction)(inputs) for name, candidate in candidates.items()}
        found = bars.cell(case.shape, case.dtype, case.layout, case.size, direction, case.operation)
        found |= {"inputs": count, "other_load": None}
        if device is None:
            with timing.OtherLoad() as others:
                times = timing.interleave(calls, inputs=count, seconds=options.seconds, rounds=options.rounds)
            found["other_load"] = others.share
        else:
            times = device_timing.interleave(
                device, calls, inputs=count, seconds=options.seconds, rounds=options.rounds
            )
        found["candidates"] = {
            name: {**measured.as_dict(), **getattr(candidates[name], "notes", {})} for name, measured in times.items()
        }
        yield bars.finish(found, document.get("ceilings"))


def _add(results: list[bars.Cell], found: bars.Cell) -> None:
    """Add a cell to the results, in the place of an earlier measurement of the same."""
    titles = [bars.title(other) for other in results]
    if bars.title(found) in titles:
        results[titles.index(bars.title(found))] = found
    else:
        results.append(found)


def _save(path: str | None, document: dict[str, Any]) -> None:
    results, device = document["results"], document["device"]["type"]
    document |= {"summary": bars.summarise(results), "bars": bars.judge(results, device)}
    if path is not None:
        save_json(path, document)


def _print(document: dict[str, Any]) -> None:
    results, device = document["results"], document["device"]
    on_gpu = device["type"] == "cuda"
    console = Console(width=None if sys.stdout.isatty() else 180 if on_gpu else 140, highlight=False)
    for operation, directions in bars.FLOOR_COPIES.items():
        for direction in directions:
            if any((found["operation"], found["direction"]) == (operation, direction) for found in results):
                table = tables.device_table if on_gpu else tables.times_table
                console.print(table(results, operation, direction))
    versions = document["build"]["versions"]
    meanings = "\n".join(f"  {name}: {meaning}" for name, meaning in document["candidates"].items())
    if on_gpu:
        ceilings = document["ceilings"]
        console.print(
            f"{device['name']}, torch {versions['torch']}. Medians of the device's time. A large copy: "
            f"{ceilings['copy_gb_per_s']:.0f} GB/s; a large bf16 matrix product: "
            f"{ceilings['matmul_tflops']:.0f} TFLOP/s; "
            f"an empty launch in a graph: {ceilings['empty_launch_us']:.2f} us. "
            f"Of copy: share of copy's bandwidth in the same cell. Excess: us over empty launch and floor.\n{meanings}"
        )
    else:
        allocator = document["settings"]["allocator"]
        console.print(
            f"{device['name']}, {device['threads']} threads, {document['build']['cpu']['isa']}, "
            f"torch {versions['torch']}. Medians; GB/s of the bytes that have to move.\n{meanings}"
            f"\nAll but copy allocate their outputs. Allocator {allocator}: {timing.ALLOCATORS[allocator]}."
        )
    console.print(tables.summary_table(document["summary"]))
    console.print(tables.bars_table(document["bars"]))
    noisy = sum(found["noisy"] for found in results)
    if noisy:
        console.print(
            f"{noisy} of {len(results)} cells are noisy (p80 over {bars.NOISY_SPREAD:g} times p20, or others "
            f"had over {bars.NOISY_LOAD:.0%} of the CPUs): measure again when nothing else runs."
        )
    if document["not_measured"]:
        console.print(f"{len(document['not_measured'])} cases were not measured; the JSON names them.")


if __name__ == "__main__":
    sys.exit(main())
