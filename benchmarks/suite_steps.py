"""The steps of the device suite, and their rehearsal where there is no GPU."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from origin import ROOT
from suite_runner import Job, StepFailed, StepSkipped, StepTimedOut, last_lines

BENCHMARKS = Path(__file__).resolve().parent
_WORKERS = 8  # processes that test at once: each takes its own share of the GPU's memory
_HANGS = 90.0  # seconds after which a test is taken to hang
_GIVING_UP = 15.0  # seconds that pytest-xdist waits for a process that hangs, before the report is written
# Several test at once; and that a property fails is enough, without a search for the smallest example.
_FOR_TESTS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}
_MOST_FAILURES = 20  # that are told in full
_TINY = (
    "--shape",
    "2,4,4,4",
    "--inputs",
    "2",
    "--seconds",
    "0.001",
    "--quick",
    "--threads",
    "1",
    "--dtype",
    "fp32",
    "--allocator",
    "default",
)
_EVERYTHING = ("gate", "dynamic_conv", "pgd_step", "pgd_start", "add_relu", "swish_relu", "smooth_relu", "dyrelu")
_MARGIN = 18.0  # seconds between a benchmark's budget and its step's limit: to start, to finish the last cell
# compute-sanitizer's exit status where it has found errors.
_ERRORS_FOUND = 99
_SANITIZER = Path("/usr/local/cuda/bin/compute-sanitizer")
_TOOLS = (  # the backend, the tool, its options: in this order, as far as the time goes
    ("native", "memcheck", ("--report-api-errors", "no")),
    ("native", "racecheck", ()),
    ("triton", "memcheck", ("--report-api-errors", "no")),
    ("native", "synccheck", ()),
    ("native", "initcheck", ()),
)
_SANITIZED = {"native": (), "triton": ("--dtype", "bfloat16")}  # compiling Triton's takes longer than running them
_NEEDED_TOOLS = 2

_PROBE = """
import json, platform, torch
found = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda, "device": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory,
              "multiprocessors": p.multi_processor_count, "devices": torch.cuda.device_count()}
print(json.dumps(found))
"""
_INFO = "import json, sparta_kernels; print(json.dumps(sparta_kernels.build_info()))"
_LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("sparta_kernels._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps({"cuda": module.cuda_info(), "versions": {"compiler": module.compiler}}))
"""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        do: what is done.
        limit: seconds that it may take.
        least: seconds without which it is not begun.
        log: the file that its commands print into.
        needs: the steps without which it cannot work.
        after: other steps whose results it uses.
    """

    do: Callable[[Job], None]
    limit: float
    least: float
    log: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def probe(job: Job) -> dict[str, Any]:
    """The versions and the GPU that the steps will find."""
    status, output = job.python("-c", _PROBE, limit=120)
    if status != 0:
        raise StepFailed(f"torch does not work here: {last_lines(output)}")
    found: dict[str, Any] = _json_line(output)
    return found


def build(job: Job) -> None:
    """Compile the module: in place for this GPU, or in a rehearsal elsewhere for the CPU.

    CMake alone does it: whatever version of setuptools there is has no say.
    """
    if job.dry_run:
        folder, target, cuda = job.scratch / "build", job.scratch / "installed", {"SPARTA_CUDA": "OFF"}
    else:
        folder, target = ROOT / "build" / "device-suite", ROOT
        cuda = {"SPARTA_CUDA": "ON", "SPARTA_CUDA_ARCHS": job.machine["capability"].replace(".", "")}
    settings = {"Python_EXECUTABLE": sys.executable, "CMAKE_INSTALL_PREFIX": target, **cuda}
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{key}={value}" for key, value in settings.items())],
        ["cmake", "--build", folder, "--target", "install"],
    ):
        status, output = job.run(command)
        if status != 0:
            raise StepFailed(last_lines(output))
    if job.dry_run:
        (module,) = target.glob("sparta_kernels/_native*.so")
        status, output = job.python("-c", _LOAD, module)
    else:
        status, output = job.python("-c", _INFO)
    if status != 0:
        raise StepFailed(f"the module cannot be imported: {last_lines(output)}")
    info = _json_line(output)
    job.figures |= {"cuda": info["cuda"], "compiler": info["versions"]["compiler"]}
    if not job.dry_run and not info["cuda"]["built"]:
        raise StepFailed("the module was built without CUDA")


def is_built() -> bool:
    """Whether there is a module in place that this interpreter would load."""
    return any((ROOT / "sparta_kernels" / f"_native{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def test(job: Job) -> None:
    """The tests that need a GPU. In a rehearsal: that there are any, and a few that need none."""
    if job.dry_run:
        _, output = job.python("-m", "pytest", "tests", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider")
        counted = re.search(r"^(\d+)(?:/\d+)? tests? collected", output, flags=re.MULTILINE)
        job.figures["gpu_tests"] = int(counted[1]) if counted else 0
        if not job.figures["gpu_tests"]:
            raise StepFailed(f"no test is marked gpu: {last_lines(output)}")
        _pytest(job, "few", "tests/test_dynamic_conv.py", "-k", "size_1_is_a_product and float32")
    else:
        # What takes gigabytes runs alone; the rest side by side where pytest-xdist is installed.
        _pytest(job, "most", "tests", "-m", "gpu and not slow", *_side_by_side())
        _pytest(job, "large", "tests", "-m", "gpu and slow")
    figures = job.figures
    if figures.get("failed", 0) + figures.get("errors", 0):
        raise StepFailed(f"{figures['failed']} tests failed, {figures['errors']} had errors")
    if not figures.get("passed", 0):
        raise StepFailed("no test passed")


def _side_by_side() -> tuple[str, ...]:
    """Options to share the tests among processes, as far as there are plugins for it.

    Tests that compile take a hundred times as long as others, and stand side by side: an idle process takes some over.
    A kernel that hangs costs one process, which is replaced.
    """
    if find_spec("xdist") is None:
        return ()
    shared = ("-n", str(_WORKERS), "--dist", "worksteal")
    limited = ("--timeout", f"{_HANGS:g}", "--timeout-method", "thread")
    return (*shared, *limited) if find_spec("pytest_timeout") is not None else shared


def _pytest(job: Job, name: str, *arguments: str) -> None:
    """Run tests, and add their counts and failures to the step's figures, also where time is up meanwhile."""
    report = job.scratch / f"{name}.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1")
    # A file of tests that cannot be imported must not cost the others.
    options = (*options, "--continue-on-collection-errors")
    limit = max(1.0, job.left() - _GIVING_UP)
    try:
        status, output = job.python("-m", "pytest", *options, *arguments, limit=limit, grace=_GIVING_UP, **_FOR_TESTS)
    finally:
        if report.exists():
            _count(report, job.figures)
    if status not in (0, 1, 5) or (status == 1 and not job.figures.get("failures")):  # 1: failures, 5: no such test
        raise StepFailed(f"pytest ended with status {status}: {last_lines(output)}")


def _count(report: Path, figures: dict[str, Any]) -> None:
    try:
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    except xml.etree.ElementTree.ParseError:  # it was stopped while writing
        return
    for key in ("passed", "failed", "errors", "skipped"):
        figures.setdefault(key, 0)
    failures = figures.setdefault("failures", [])
    for case in cases:
        outcomes = {kind: case.find(kind) for kind in ("failure", "error", "skipped")}
        kind = next((kind for kind, found in outcomes.items() if found is not None), None)
        figures[{"failure": "failed", "error": "errors", "skipped": "skipped", None: "passed"}[kind]] += 1
        if kind in ("failure", "error") and len(failures) < _MOST_FAILURES:
            where = case.get("file") or case.get("classname", "")
            message = (outcomes[kind].get("message") or "").strip() or "no message"
            failures.append(f"{where}::{case.get('name')}: {message.splitlines()[0][:200]}")


def sanitize(job: Job) -> None:
    """Every native operation under compute-sanitizer's tools. In a rehearsal: without."""
    script = BENCHMARKS / "sanitize_ops.py"
    if job.dry_run:
        status, output = job.python(script, "--device", "cpu", "--quick")
        job.figures["plain"] = last_lines(output, 1)
        if status != 0:
            raise StepFailed(last_lines(output))
        return
    tool_path = shutil.which("compute-sanitizer") or (str(_SANITIZER) if _SANITIZER.exists() else None)
    if tool_path is None:
        raise StepSkipped("compute-sanitizer is not installed here")
    faults, slowest = [], 0.0
    for number, (backend, tool, options) in enumerate(_TOOLS):
        name = f"{tool} {backend}"
        if number >= _NEEDED_TOOLS and job.left() < 1.5 * slowest:
            job.figures[name] = "no time left"
            continue
        before = job.left()
        watched = [tool_path, "--tool", tool, "--error-exitcode", str(_ERRORS_FOUND), "--print-limit", "20", *options]
        work = [sys.executable, script, *_SANITIZED[backend], "--device", "cuda", "--backend", backend]
        try:
            status, output = job.run([*watched, *work])
        except StepTimedOut:
            if number < _NEEDED_TOOLS:
                raise
            job.figures[name] = "stopped, no time left"
            break
        slowest = max(slowest, before - job.left())
        if status != 0 and "Device not supported" in output:
            raise StepSkipped("compute-sanitizer does not support this device")
        # The tool's lines begin so; where it found nothing, what the script says last is what is wrong.
        own = [line for line in output.splitlines() if line.startswith("=" * 9) == (status == _ERRORS_FOUND)]
        job.figures[name] = "clean" if status == 0 else last_lines("\n".join(own) or output, 1)
        if status != 0:
            faults.append(name)
    if faults:
        raise StepFailed(f"faults under {', '.join(faults)}")


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
    """The benchmark of an iteration of PGD."""
    results = job.folder / "attack.json"
    results.unlink(missing_ok=True)
    if job.dry_run:
        choice = ("--device", "cpu", "--width", "8", "--batch", "2", "--steps", "3", "--precision", "fp32")
        choice = (*choice, "--candidates", "loop", "ours-eager", "--budget", "30", "--threads", "1")
    else:
        built = [name for name in ("native", "triton") if name == "native" or find_spec(name) is not None]
        choice = ("--device", "cuda", "--precision", "bf16", "tf32", "--backends", *built, "--budget", _budget(job))
    document = _measured(job, "attack.py", results, choice)
    keys = ("median_ms", "images_per_second", "ratio_to_relu", "speedup_over_loop", "peak_memory")
    job.figures["iterations"] = {
        row["name"]: {key: row.get(key) for key in keys}
        for result in document["results"]
        for row in result["entries"]
        if "median_ms" in row
    }
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


def _kernels() -> tuple[str, ...]:
    return ("native", "kernel", "triton", "triton_kernel") if find_spec("triton") is not None else ("native", "kernel")


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
    job.figures["failures"] = [text.splitlines()[0][:300] for text in document["failed"][:_MOST_FAILURES]]
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
            for name, backend in {"kernel": "native", "triton_kernel": "triton"}.items()
            if "share_of_copy" in cell["candidates"].get(name, {})
        }
        if shares:
            found[f"{cell['direction']} {shape} {cell['dtype']} {cell['layout']}"] = shares
    return found


def _json_line(output: str) -> Any:
    """The last line of an output, as JSON."""
    return json.loads(output.strip().splitlines()[-1])


# A call's result is 8 files at most on some machines, and so many these are. Hence so few logs.
STEPS = {
    "build": Step(build, limit=200, least=20, log="test.log"),
    "test": Step(test, limit=200, least=60, log="test.log", needs=("build",)),
    "sanitize": Step(sanitize, limit=130, least=30, log="test.log", needs=("build",)),
    "ops": Step(ops, limit=160, least=50, log="benchmarks.log", needs=("build",)),
    "attack": Step(attack, limit=75, least=50, log="benchmarks.log", needs=("build",)),
    "training": Step(training, limit=60, least=30, log="benchmarks.log", needs=("build",)),
    # Last of those that measure: what torch.compile needs is whatever they leave.
    "activation": Step(activation, limit=75, least=30, log="benchmarks.log", needs=("build",)),
    "choices": Step(choices, limit=20, least=10, log="benchmarks.log", after=("ops",)),
}
