"""One command for a GPU machine: build, test, sanitize, measure.

    python benchmarks/device_suite.py --out DIR
    python benchmarks/device_suite.py --out DIR --only rivals,batches

Every step runs under its own limit and all of them in less than nine minutes. DIR/suite.json is written after each; a
second call does what is still to be done. `--dry-run` rehearses the steps where there is no GPU, in as much time as the
CPU there needs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import origin
import suite_report
from suite_checks import is_built, probe
from suite_runner import Job, StepFailed, StepTimedOut, execute
from suite_steps import STEPS

FAILED = 1  # a step failed or timed out
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

LIMIT = 540.0  # seconds for everything
REHEARSAL_LIMIT = 3600.0  # the same where nobody counts them: on a CPU, which may be busy with other work too
_RESERVE = 10.0  # of it, to write the summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; its exit status: 0 all passed or skipped for a reason, 1 not so, 130 Ctrl-C.

    A bad argument exits with 2.
    """
    started = time.monotonic()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.limit is None:
        options.limit = REHEARSAL_LIMIT if options.dry_run else LIMIT
    folder = _folder(parser, options.out)
    if options.commit is not None:
        os.environ["SPARTA_COMMIT"] = options.commit
    # A shell may have told background processes to ignore Ctrl-C, and they their children; here it must end them.
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _run(parser, options, arguments, folder, started)
    except KeyboardInterrupt:  # before the first step
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(
    parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str], folder: Path, started: float
) -> int:
    deadline = started + options.limit - _RESERVE
    with tempfile.TemporaryDirectory(prefix="device-suite-") as scratch:
        place = Path(scratch)
        try:
            machine = probe(Job(folder, place, place / "probe.log", deadline, options.dry_run, {}))
        except (StepFailed, StepTimedOut) as error:
            parser.error(str(error))
        if not options.dry_run and machine["device"] is None:
            parser.error("there is no NVIDIA GPU here that torch can use; --dry-run rehearses the steps without one")
        document: dict[str, Any] = {
            "command": " ".join(["benchmarks/device_suite.py", *arguments]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": origin.commit(),
            "tree": origin.tree(),
            "dry_run": options.dry_run,
            "machine": machine,
            "limit": options.limit,
            "seconds": 0.0,
            "complete": False,
            "steps": {},
        }
        if not options.fresh:
            document["steps"] = _earlier(folder / "suite.json", document)
        asked = options.only or [name for name, step in STEPS.items() if options.dry_run or not step.by_name]
        if _is_missing(options.dry_run) and any("build" in STEPS[name].needs for name in asked):
            asked = ["build", *asked]
        todo = _todo(asked, document["steps"], again=options.only is not None, dry_run=options.dry_run)
        for name in STEPS:
            if name not in asked:
                document["steps"].setdefault(name, {"status": "skipped", "reason": "not asked for", "seconds": 0.0})
        # The limits share a GPU's time out among all the steps. A few that are asked for get more, and so does a
        # rehearsal, whose seconds say nothing.
        whole = sum(STEPS[name].limit for name in todo)
        roomy = bool(todo) and (options.only is not None or options.dry_run)
        stretch = max(1.0, (deadline - time.monotonic()) / whole) if roomy else 1.0
        status = 0
        try:
            for number, name in enumerate(todo):
                later = sum(STEPS[other].least for other in todo[number + 1 :])
                job = Job(folder, place, folder / STEPS[name].log, 0.0, options.dry_run, machine)
                _do(name, job, deadline, later, stretch * STEPS[name].limit, document)
                _save(folder, document, started)
        except KeyboardInterrupt:
            status = INTERRUPTED
        document["complete"] = status == 0
        _save(folder, document, started)
    print(suite_report.summary(document), flush=True)
    bad = [name for name in asked if document["steps"].get(name, {}).get("status") not in ("passed", "skipped")]
    return status or (FAILED if bad else 0)


def _earlier(path: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call found, of the same sources on the same machine."""
    try:
        before = json.loads(path.read_text())
        same = all(before[name] == now[name] for name in ("tree", "dry_run", "machine"))
        return {name: step for name, step in before["steps"].items() if same and name in STEPS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _todo(asked: Sequence[str], steps: Mapping[str, Any], again: bool, dry_run: bool) -> list[str]:
    """The steps to run: what is asked for `again`, else what has not passed, and what is made from that."""
    todo: list[str] = []
    new: set[str] = set()  # of them, those that may find something else than before
    for name in STEPS:
        passed = steps.get(name, {}).get("status") == "passed"
        renewed = any(other in new for other in (*STEPS[name].needs, *STEPS[name].after))
        if name not in asked:
            continue
        if again or renewed or not passed:
            new.add(name)
        if name in new or (name == "build" and _is_missing(dry_run)):
            todo.append(name)
    return todo


def _is_missing(dry_run: bool) -> bool:
    """Whether the module is not in place, on a machine that has only just begun, say."""
    return not dry_run and not is_built()


def _do(name: str, job: Job, deadline: float, later: float, limit: float, document: dict[str, Any]) -> None:
    """Run a step and put what came of it into the document, even where Ctrl-C ends it.

    It may take `limit` seconds, and until `deadline`, less the seconds that `later` steps need at least.
    """
    step, begun = STEPS[name], time.monotonic()
    left = deadline - begun
    found: dict[str, Any] = {"status": "failed", "reason": "interrupted"}
    broken = [need for need in step.needs if document["steps"].get(need, {}).get("status") in ("failed", "timed out")]
    document["steps"][name] = found
    if name == next(other for other in STEPS if STEPS[other].log == step.log):  # the first of those that share it
        job.log.unlink(missing_ok=True)
    try:
        if broken:
            found |= {"status": "skipped", "reason": f"{broken[0]} did not pass"}
        elif left < step.least:
            found |= {"status": "timed out", "reason": f"not begun: it needs {step.least:.0f} s, {left:.0f} were left"}
        else:
            job.deadline = begun + min(limit, max(left - later, step.least))
            print(f"{name} ... (at most {job.left():.0f} s)", flush=True)
            status, reason = execute(step.do, job)
            found |= {"status": status, "reason": reason}
    finally:
        found["seconds"] = round(time.monotonic() - begun, 1)
        found |= {"log": job.log.name, "commands": job.commands, "figures": job.figures}
        print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)


def _save(folder: Path, document: dict[str, Any], started: float) -> None:
    """Write suite.json, whole or not at all."""
    document["seconds"] = round(time.monotonic() - started, 1)
    temporary = folder / "suite.json.part"
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(folder / "suite.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="device_suite.py", description="Build, test, sanitize and measure on a machine with an NVIDIA GPU."
    )
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="where suite.json, the logs and the results are kept")
    add(
        "--only",
        type=_steps,
        metavar="STEP,STEP",
        help=f"run these steps, though they may have passed: {', '.join(STEPS)}",
    )
    add("--fresh", action="store_true", help="forget what earlier calls found")
    add("--dry-run", action="store_true", help="rehearse the steps on a CPU, with little work")
    add(
        "--limit",
        type=_seconds,
        metavar="SECONDS",
        help=f"for everything (default: {LIMIT:g}, or {REHEARSAL_LIMIT:g} for a rehearsal)",
    )
    add("--commit", metavar="HASH", help="what the sources are, where there is no repository to ask")
    return parser


def _steps(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f"must name steps among {', '.join(STEPS)}, got {name!r}")
    return names


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not _RESERVE < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above {_RESERVE:g}, got {text!r}")
    return number


def _folder(parser: argparse.ArgumentParser, name: str) -> Path:
    """The folder of this name, made where there is none."""
    folder = Path(name).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        parser.error(f"argument --out: cannot write in {name}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main())
