"""The device suite's measurements: it runs the benchmarks within their time, and keeps what they found.

In a rehearsal a CPU is in the GPU's place, and there is little work.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from origin import ROOT
from suite_runner import MOST_FAILURES, Job, StepFailed, StepTimedOut, last_lines

BENCHMARKS = Path(__file__).resolve().parent
# fmt: off
_TINY = (
    "--shape", "2,4,4,4", "--inputs", "2", "--seconds", "0.001", "--quick", "--threads", "1", "--dtype", "fp32",
    "--allocator", "default",
)
_TINY_ATTACK = (
    "--device", "cpu", "--width", "8", "--steps", "3", "--precision", "fp32", "--candidates", "loop", "ours-eager",
    "--budget", "600", "--threads", "1",
)
# fmt: on
_EVERYTHING = ("gate", "dynamic_conv", "pgd_step", "pgd_start", "add_relu", "swish_relu", "smooth_relu", "dyrelu")
_KERNEL_OF = {"native": "kernel", "triton": "triton_kernel"}
_MARGIN = 18.0  # seconds between a benchmark's budget and its step's limit: to start, to finish the last cell


def ops(job: Job) -> None:
    """The operations' benchmark."""
    results = job.folder / "ops.json"
    results.unlink(missing_ok=True)
    if job.dry_run:
        # Few candidates: the interpreter is slow.
        choice = ("--device", "cpu", *_TINY, "--operation", *_EVERYTHING)
        choice = (*choice, "--candidates", "copy", *_kernels(), "eager")
    else:
        choice = ("--device", "cuda", "--seconds", "0.1", "--budget", _budget(job))
    document = _measured(job, "ops.py", results, choice)
    job.figures |= {
        "cells": len(document["results"]),
        "ceilings": document.get("ceilings"),
        "bars": document["bars"],
        "shares": _shares(document["results"]),
        "not_measured": len(document["not_measured"]),
    }
    _finish(job, document)


def attack(job: Job) -> None:
    """The benchmark of an iteration of PGD: ours by every backend beside a plain loop, and SPARTA beside ReLU."""
    if job.dry_run:
        choice: tuple[str, ...] = (*_TINY_ATTACK, "--batch", "2")
    else:
        choice = (
            "--device",
            "cuda",
            "--precision",
            "bf16",
            "tf32",
            "--backends",
            *_backends(),
            "--budget",
            _budget(job),
        )
    _attack(job, "attack.json", choice)


def rivals(job: Job) -> None:
    """The same beside torch.compile and other libraries, a whole row of a table, and where the time of ours goes."""
    if job.dry_run:
        choice: tuple[str, ...] = (*_TINY_ATTACK, "--batch", "2", "--rounds", "1")
    else:
        choice = ("--device", "cuda", "--candidates", "all", "--precision", "bf16", "tf32", "fp32", "--rounds", "3")
        choice = (*choice, "--budget", _budget(job))
    _attack(job, "rivals.json", (*choice, "--activation", "sparta", "--row", "--breakdown"))


def batches(job: Job) -> None:
    """An iteration of PGD and its memory from small to large batches, in every precision."""
    if job.dry_run:
        choice: tuple[str, ...] = (*_TINY_ATTACK, "--batch", "2", "3", "--rounds", "1")
    else:
        choice = ("--device", "cuda", "--batch", "256", "1024", "2048", "--precision", "bf16", "tf32", "fp32")
        choice = (*choice, "--rounds", "3", "--budget", _budget(job))
    _attack(job, "batches.json", choice)


def _attack(job: Job, name: str, choice: tuple[str, ...]) -> None:
    """Run the benchmark of the attack, and keep the figures of every batch size."""
    results = job.folder / name
    results.unlink(missing_ok=True)
    document = _measured(job, "attack.py", results, choice)
    keys = (
        "median_ms",
        "images_per_second",
        "ratio_to_relu",
        "speedup_over_loop",
        "speedup_over_compiled",
        "peak_memory",
    )
    job.figures["batches"] = [
        {
            "batch": result["batch"],
            "iterations": {
                row["name"]: {key: row.get(key) for key in keys} for row in result["entries"] if "median_ms" in row
            },
            "row_ms": {row["name"]: row["median_ms"] for row in result["row"]},
            "parts_ms": {name: found["ms"] for name, found in result["breakdown"].items()},
        }
        for result in document["results"]
    ]
    job.figures |= {"bars": [] if job.dry_run else document["bars"], "not_measured": len(document["not_measured"])}
    _finish(job, document)


def training(job: Job) -> None:
    """The benchmark of adversarial training: what an epoch of CIFAR-10 would take."""
    results = job.folder / "training.json"
    results.unlink(missing_ok=True)
    if job.dry_run:
        choice = ("--device", "cpu", "--width", "2", "--batch", "4", "--steps", "1", "--rounds", "1", "--threads", "1")
        choice = (*choice, "--precision", "fp32", "--activation", "sparta")
    else:
        choice = ("--device", "cuda", "--batch", "128", "--precision", "bf16", "tf32", "--rounds", "15")
    document = _measured(job, "training.py", results, choice)
    keys = ("median_ms", "images_per_second", "epoch_seconds", "over_ours")
    job.figures["steps"] = {
        " ".join((result["activation"], result["precision"], row["candidate"])): {key: row[key] for key in keys}
        for result in document["results"]
        for row in result["entries"]
        if "median_ms" in row
    }
    _finish(job, document)


def activation(job: Job) -> None:
    """The benchmark of the whole activation."""
    results = job.folder / "activation.json"
    results.unlink(missing_ok=True)
    if job.dry_run:
        choice = ("--device", "cpu", *_TINY, "--layout", "nchw")
    else:
        choice = ("--device", "cuda", "--batch", "512", "--dtype", "bf16", "--seconds", "0.1", "--budget", _budget(job))
    document = _measured(job, "activation.py", results, choice)
    job.figures |= {
        "cells": {
            f"{'x'.join(map(str, cell['shape']))} {cell['dtype']} {cell['layout']}": {
                name: times["median_ms"] for name, times in cell["candidates"].items()
            }
            for cell in document["results"]
        },
        "bars": document["bars"],
        "not_measured": len(document["not_measured"]),
    }
    _finish(job, document)


def choices(job: Job) -> None:
    """The table that `auto` reads, from what the step ops measured, beginning with the package's."""
    measured, table = job.folder / "ops.json", job.folder / "choices.csv"
    if not measured.exists():
        raise StepFailed("there is no ops.json: the step ops has to come first")
    shutil.copyfile(ROOT / "sparta_kernels" / "backends" / "choices.csv", table)
    status, output = job.python(BENCHMARKS / "choices.py", measured, "--out", table)
    if status != 0:
        raise StepFailed(last_lines(output))
    rows = [line.rpartition(",")[2] for line in table.read_text().splitlines()[1:]]
    job.figures["rows"] = {backend: rows.count(backend) for backend in sorted(set(rows))}


def _budget(job: Job) -> str:
    return f"{max(1.0, job.left() - _MARGIN):.0f}"


def _backends() -> tuple[str, ...]:
    return ("native", "triton") if find_spec("triton") is not None else ("native",)


def _kernels() -> tuple[str, ...]:
    return tuple(name for backend in _backends() for name in (backend, _KERNEL_OF[backend]))


def _measured(job: Job, script: str, results: Path, choice: tuple[str, ...]) -> dict[str, Any]:
    """Run a benchmark; what it wrote, also where it failed or was stopped on the way."""
    status, output = 0, ""
    try:
        status, output = job.python(BENCHMARKS / script, *choice, "--json", results)
    except StepTimedOut:
        if not results.exists():
            raise
        job.figures["stopped"] = True
    if not results.exists():
        raise StepFailed(f"{script} ended with status {status}: {last_lines(output)}")
    document: dict[str, Any] = json.loads(results.read_text())
    if status != 0 and not document["failed"]:
        document["failed"].append(f"{script} ended with status {status}: {last_lines(output)}")
    return document


def _finish(job: Job, document: dict[str, Any]) -> None:
    """What a benchmark did not manage, once its figures are kept."""
    job.figures["failures"] = [text.splitlines()[0][:300] for text in document["failed"][:MOST_FAILURES]]
    if document["failed"]:
        raise StepFailed(f"{len(document['failed'])} candidates were wrong or broke")
    if job.figures.get("stopped"):
        raise StepTimedOut("it was stopped at its limit; what it had measured by then is kept")
    if not document["results"]:
        raise StepFailed("nothing was measured")


def _shares(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each bare kernel's share of copy's bandwidth, where the bars on it are set."""
    found: dict[str, dict[str, float]] = {}
    for cell in results:
        samples, *image = cell["shape"]
        if cell["operation"] != "gate" or samples < 512 or image not in ([64, 32, 32], [128, 16, 16]):
            continue
        shape = "x".join(map(str, cell["shape"]))
        shares = {
            backend: cell["candidates"][name]["share_of_copy"]
            for backend, name in _KERNEL_OF.items()
            if "share_of_copy" in cell["candidates"].get(name, {})
        }
        if shares:
            found[f"{cell['direction']} {shape} {cell['dtype']} {cell['layout']}"] = shares
    return found
