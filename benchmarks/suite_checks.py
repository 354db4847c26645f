"""The device suite's checks: whether the module builds, its tests pass, and no kernel strays in memory.

In a rehearsal a CPU is in the GPU's place.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from building import build_commands
from origin import ROOT
from suite_runner import MOST_FAILURES, Job, StepFailed, StepSkipped, StepTimedOut, last_lines

_SANITIZED_OPERATIONS = Path(__file__).with_name("sanitize_ops.py")
_WORKERS = 8  # processes that test at once: each takes its own share of the GPU's memory
_HANGS = 90.0  # seconds after which a test is taken to hang
_GIVING_UP = 15.0  # seconds that pytest-xdist waits for a process that hangs, before the report is written
# Several test at once; and that a property fails is enough, without a search for the smallest example.
_FOR_TESTS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HYPOTHESIS_PROFILE": "mutants"}
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


def probe(job: Job) -> dict[str, Any]:
    """The versions and the GPU that the steps will find."""
    status, output = job.python("-c", _PROBE, limit=120)
    if status != 0:
        raise StepFailed(f"torch does not work here: {last_lines(output)}")
    found: dict[str, Any] = _json_line(output)
    return found


def build(job: Job) -> None:
    """Compile the module: in place for this GPU, or in a rehearsal elsewhere for the CPU."""
    if job.dry_run:
        folder, target, archs = job.scratch / "build", job.scratch / "installed", None
    else:
        folder, target, archs = ROOT / "build" / "device-suite", ROOT, job.machine["capability"].replace(".", "")
    for command in build_commands(ROOT, folder, target, archs):
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
        if kind in ("failure", "error") and len(failures) < MOST_FAILURES:
            where = case.get("file") or case.get("classname", "")
            message = (outcomes[kind].get("message") or "").strip() or "no message"
            failures.append(f"{where}::{case.get('name')}: {message.splitlines()[0][:200]}")


def sanitize(job: Job) -> None:
    """Every native operation under compute-sanitizer's tools. In a rehearsal: without."""
    if job.dry_run:
        status, output = job.python(_SANITIZED_OPERATIONS, "--device", "cpu", "--quick")
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
        work = [sys.executable, _SANITIZED_OPERATIONS, *_SANITIZED[backend], "--device", "cuda", "--backend", backend]
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


def _json_line(output: str) -> Any:
    """The last line of an output, as JSON."""
    return json.loads(output.strip().splitlines()[-1])
