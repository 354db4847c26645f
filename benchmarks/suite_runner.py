"""How the device suite runs a step: commands in process groups of their own, under a limit, with a log."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from origin import ROOT

MOST_FAILURES = 20  # of a step that are told in full
_GRACE = 5.0  # seconds for a command to save what it has, once it is told to stop
_LAST_WORDS = 2.0  # seconds that killed processes have to disappear, before nobody waits for them any more
_LONGEST_LOG = 4 * 2**20  # bytes; of a longer one the two ends are kept
_CUDA = Path("/usr/local/cuda/bin")


class StepFailed(Exception):
    """A step found something wrong; the message says what."""


class StepSkipped(Exception):
    """A step cannot be done here; the message says why."""


class StepTimedOut(Exception):
    """A step's time was up."""


@dataclass
class Job:
    """One step while it runs.

    Attributes:
        folder: where results are kept.
        scratch: where anything may be written; gone afterwards.
        log: what the commands print.
        deadline: when the step must be over, on `time.monotonic`'s clock.
        dry_run: whether a CPU is in the GPU's place.
        machine: what `probe` found.
        figures: what the step found out, so far.
        commands: what was run, so far.
    """

    folder: Path
    scratch: Path
    log: Path
    deadline: float
    dry_run: bool
    machine: Mapping[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(
        self, command: Sequence[str | Path], limit: float | None = None, grace: float = _GRACE, **variables: str
    ) -> tuple[int, str]:
        """Run a command in the checkout until it ends; its exit status and what it printed.

        Raises:
            StepTimedOut: the deadline, or `limit` seconds, came first, and then `grace` seconds for the command to save
                what it has. Nothing of it runs any more.
        """
        parts = [str(part) for part in command]
        self.commands.append(shlex.join([*(f"{key}={value}" for key, value in variables.items()), *parts]))
        end = self.deadline if limit is None else min(self.deadline, time.monotonic() + limit)
        with self.log.open("ab") as log:
            log.write(f"$ {self.commands[-1]}\n".encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                parts,
                cwd=ROOT,
                env={**environment(self.dry_run), **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise StepTimedOut(f"{Path(parts[0]).name} was stopped at its limit") from None
            finally:
                stop(process, grace)
        with self.log.open("rb") as log:
            log.seek(start)
            return process.returncode, log.read().decode(errors="replace")

    def python(
        self, *arguments: str | Path, limit: float | None = None, grace: float = _GRACE, **variables: str
    ) -> tuple[int, str]:
        """Run this interpreter with these arguments."""
        return self.run([sys.executable, *arguments], limit, grace, **variables)


def stop(process: subprocess.Popen[bytes], grace: float = _GRACE) -> None:
    """End what is left of a command: ask its whole group, and kill it where that takes too long."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):  # the workers of one that has ended are in its group still
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + _LAST_WORDS
        while time.monotonic() < end:  # nobody can wait for a grandchild, only look whether it is there
            os.killpg(process.pid, 0)
            time.sleep(0.01)


def environment(dry_run: bool = False, root: Path = ROOT) -> dict[str, str]:
    """The variables that every command gets: the checkout in `root` first, compilers within reach."""
    found = dict(os.environ)
    tools = [str(Path(sys.executable).parent), found.get("PATH", ""), str(_CUDA) if _CUDA.is_dir() else ""]
    found["PATH"] = os.pathsep.join(filter(None, tools))
    # Where the module is built in place; not whatever else is installed here.
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), found.get("PYTHONPATH", "")]))
    found["PYTHONUNBUFFERED"] = "1"
    if dry_run:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def execute(step: Callable[[Job], None], job: Job) -> tuple[str, str | None]:
    """Run a step; its status and, unless it passed, why."""
    try:
        step(job)
    except StepSkipped as reason:
        return "skipped", str(reason)
    except StepTimedOut as reason:
        return "timed out", str(reason)
    except StepFailed as reason:
        return "failed", str(reason)
    except Exception as error:  # a mistake in the suite must not cost the other steps
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        shorten(job.log)
    return "passed", None


def shorten(log: Path) -> None:
    """Cut the middle out of a log that has become too long."""
    if not log.exists() or log.stat().st_size <= _LONGEST_LOG:
        return
    content = log.read_bytes()
    half = _LONGEST_LOG // 2
    cut = f"\n... {len(content) - 2 * half} bytes left out ...\n".encode()
    log.write_bytes(content[:half] + cut + content[-half:])


def last_lines(text: str, count: int = 3) -> str:
    """The last lines of an output that say something, in one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-400:]
