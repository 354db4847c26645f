"""Measure an iteration of PGD on ResNet-18: ours by every engine, a plain loop, torch.compile, and other libraries.

    python benchmarks/attack.py --batch 32 128 256 --row --breakdown --json attack.json

Everybody attacks the same images, from the same start towards the same targets, in turns. Prints tables and writes one
JSON file, after every round; `--resume` goes on from it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import attack_options
import attack_report
import device_timing
import timing
import torch
from attack_breakdown import PARTS, breakdown
from attack_candidates import COMPILED, EPS, OURS, ROW, STEP, THEIRS, Entry, Settings, WrongResult
from attack_sides import Sides
from other_process import OtherProcessFailed
from rich.console import Console

from sparta_kernels import keep_freed_memory
from sparta_kernels.report import save_json

FAILED = 1  # a wrong result, or a full disk
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

TIMED = (
    "an iteration (forward, gradient of the images, step), from the beginning of one forward pass to that of the next, "
    "for ours from one call of `progress` to the next. The first and the last of a run are left out; a sample is the "
    "mean of the others. On a GPU between two events in its queue"
)
MEMORY = (
    "what one run holds beyond what was held before it: on a CPU resident memory of the process, on a GPU torch's "
    "tensors. peak_memory is all that was held"
)
ALLOCATOR = "ours under keep_freed_memory; the others under glibc's defaults in a process of their own (on a CPU)"
_FEWEST_ROUNDS = 3
_WARM_UP = 0.6  # of a budget: what it does not do for is not measured
_ROW_ROUNDS = 3
_ROWED = ("torchattacks", *OURS)
# Of what a plain loop does to the loss: a rounded gradient, or another library's order of operations.
_AS_GOOD = (0.8, 1.25)


class Broken(RuntimeError):
    """Nothing on the GPU works any more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, entries = attack_options.read(arguments)
    on_gpu = options.device == "cuda"
    torch.backends.cudnn.benchmark |= on_gpu  # for all candidates alike; their shapes never change
    settings = Settings(options.device, options.width, options.steps, options.threads)
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/attack.py", arguments, device_timing.describe() if on_gpu else None),
        "settings": {**settings.__dict__, "eps": EPS, "step_size": STEP, "image": [3, 32, 32], "network": "resnet18"},
        "amx": attack_report.has_amx(),
        "candidates": {name: words for name, words in (THEIRS | OURS).items() if name in options.candidates},
        "timed": TIMED,
        "memory": MEMORY,
        "allocator": ALLOCATOR,
        "parts": PARTS,
        "complete": False,
        "results": [],
        "bars": [],
        "failed": [],
        "not_measured": list(options.missing),
        "resumed": [],
    }
    if options.resume:
        _resume(options.json, document)
    run = _Run(options, document, started)
    status = 0
    try:
        with ExitStack() as stack:
            document["freed_memory_kept"] = stack.enter_context(keep_freed_memory()).reason or True
            for number, batch in enumerate(options.batch):
                run.measure(settings, batch, entries, len(options.batch) - number)
        document["complete"] = not document["failed"] and len(document["not_measured"]) == len(options.missing)
    except KeyboardInterrupt:
        print("attack.py: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except (Broken, OtherProcessFailed, torch.AcceleratorError, OSError) as error:  # the last: a full disk
        document["failed"].append(str(error).splitlines()[0])
    try:
        run.save()
    except OSError as error:
        if str(error) not in document["failed"]:
            document["failed"].append(str(error))
    for failure in document["failed"]:
        print(f"attack.py: {failure}", file=sys.stderr)
    _print(document)
    return status or (FAILED if document["failed"] else 0)


def _resume(path: str, document: dict[str, Any]) -> None:
    """Take over what an earlier call has measured with the same settings, and where that came from."""
    try:
        with open(path) as file:
            earlier = json.load(file)
        others = {key: _differences(document[key], earlier[key]) for key in ("settings", "device")}
        results = earlier["results"]
        origin = {key: earlier[key] for key in ("command", "date", "commit", "build", "environment")}
        resumed = [*earlier["resumed"], origin]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it is no whole document of this program ({type(error).__name__}: {error})"
        raise SystemExit(f"attack.py: cannot resume {path}: {reason}") from None
    for key, words in others.items():
        if words:
            raise SystemExit(f"attack.py: cannot resume {path}: other {key}: {words}")
    document["results"], document["resumed"] = results, resumed


def _differences(ours: dict[str, Any], its: dict[str, Any]) -> str:
    """What differs, but for what changes from one moment or machine of a kind to the next."""
    keys = sorted((ours.keys() | its.keys()) - {"load_at_start", "state", "host"})
    return ", ".join(
        f"{key} was {its.get(key)!r} and is {ours.get(key)!r}" for key in keys if ours.get(key) != its.get(key)
    )


class _Run:
    """A measurement under way."""

    def __init__(self, options: Any, document: dict[str, Any], started: float) -> None:
        self.options, self.document, self.started = options, document, started
        self.end = None if options.budget is None else started + options.budget

    def measure(self, settings: Settings, batch: int, entries: Sequence[Entry], left: int) -> None:
        """All that is asked for at a batch size; `left` of them have still to be measured, this one among them."""
        result = self._result(batch)
        asked = {str(entry): entry for entry in entries}
        known = {row["name"]: row for row in result["entries"]}
        begun = time.monotonic()
        until = None if self.end is None else begun + (self.end - begun) / left
        lacking = [name for name in asked if len(known.get(name, {}).get("iteration_ms", ())) < self.options.rounds]
        in_row = self._in_row(batch, asked, result)
        parts = [name for name in asked if asked[name].candidate in OURS and name not in result["breakdown"]]
        if not (lacking or in_row or (parts and self.options.breakdown)):
            return
        with Sides(settings, batch, entries) as sides:
            ready: list[str] = []
            for names in self._phases(asked):
                now = time.monotonic()
                warm_until = None if until is None else now + _WARM_UP * (until - now)
                new = [name for name in names if self._warm_up(sides, result, asked[name], warm_until)]
                new = self._as_good(sides, result, asked, new)
                if not new:
                    continue
                self._rounds(sides, result, asked, new, ready, until)
                self._row(sides, result, asked, [name for name in new if name in in_row])
                if self.options.breakdown:
                    for name in [name for name in new if name in parts]:
                        self._tell(f"batch {batch}: profile of {name}")
                        result["breakdown"].setdefault(name, breakdown(sides.here, asked[name]))
                        self.save()
                ready += new

    def _phases(self, asked: dict[str, Entry]) -> list[list[str]]:
        """What is measured together. Where time is short, compiling must not cost the others theirs: it comes last."""
        late = [] if self.end is None else [name for name, entry in asked.items() if entry.candidate in COMPILED]
        return [[name for name in asked if name not in late], late]

    def _in_row(self, batch: int, asked: dict[str, Entry], result: dict[str, Any]) -> list[str]:
        """Those whose row has to be timed, torchattacks first."""
        if not self.options.row or batch != self.options.batch[0]:
            return []
        able = [name for name, entry in asked.items() if entry.activation == "sparta" and entry.candidate in _ROWED]
        known = [row["name"] for row in result["row"]]
        return sorted((name for name in able if name not in known), key=lambda name: asked[name].candidate in OURS)

    def save(self) -> None:
        """Write what there is."""
        for result in self.document["results"]:
            attack_report.add_figures(result)
        self.document["bars"] = attack_report.bars(self.document)
        if self.options.json is not None:
            save_json(self.options.json, self.document)

    def _result(self, batch: int) -> dict[str, Any]:
        for result in self.document["results"]:
            if result["batch"] == batch:
                return result
        result = {"batch": batch, "entries": [], "row": [], "breakdown": {}}
        self.document["results"].append(result)
        return result

    def _warm_up(self, sides: Sides, result: dict[str, Any], entry: Entry, until: float | None) -> bool:
        """Whether the entry can be timed."""
        name = f"batch {result['batch']}: {entry}"
        if until is not None and time.monotonic() > until:
            self.document["not_measured"].append(f"{name}: no time left")
            return False
        self._tell(f"{name}: warms up")
        try:
            found = sides.call("warm_up", entry)
        except torch.OutOfMemoryError as error:
            self.document["not_measured"].append(f"{name}: {str(error).splitlines()[0]}")
            return False
        except torch.AcceleratorError as error:
            raise Broken(f"{name}: {str(error).splitlines()[0]}; nothing on the GPU works any more") from None
        except Exception as error:  # whatever it is: the others are measured all the same
            wrong = isinstance(error, WrongResult)
            self.document["failed"].append(
                f"batch {result['batch']}: {error}" if wrong else f"{name}: {type(error).__name__}: {error}"
            )
            return False
        row = next((row for row in result["entries"] if row["name"] == str(entry)), None)
        if row is None:
            row = {"name": str(entry), **entry._asdict(), "iteration_ms": [], "iteration_faults": []}
            result["entries"].append(row)
        row |= found
        return True

    def _as_good(self, sides: Sides, result: dict[str, Any], asked: dict[str, Entry], ready: list[str]) -> list[str]:
        """Those that move the loss as far as a plain loop, the one in fp32 if it was run."""
        rows = {row["name"]: row for row in result["entries"]}
        loops = sorted((row for row in rows.values() if row["candidate"] == "loop"), key=_inexact)
        kept = []
        for name in ready:
            loop = next((row for row in loops if row["activation"] == asked[name].activation), None)
            if loop is not None:
                start = sides.here.start_loss(asked[name].activation)
                share = (start - rows[name]["loss"]) / (start - loop["loss"])
                if not _AS_GOOD[0] <= share <= _AS_GOOD[1]:
                    self.document["failed"].append(
                        f"batch {result['batch']}: {name} moves the loss {share:.2f} times as far as the plain loop"
                    )
                    continue
            kept.append(name)
        result["entries"] = [row for row in result["entries"] if row["name"] in kept or row["name"] not in ready]
        return kept

    def _rounds(
        self,
        sides: Sides,
        result: dict[str, Any],
        asked: dict[str, Entry],
        new: list[str],
        earlier: list[str],
        until: float | None,
    ) -> None:
        """Time the new ones, and those of an earlier phase beside them once more."""
        rows = {row["name"]: row for row in result["entries"]}
        order = random.Random(0)
        for turn in range(1, self.options.rounds + 1):
            if turn > _FEWEST_ROUNDS and until is not None and time.monotonic() > until:
                break
            left = [name for name in new if len(rows[name]["iteration_ms"]) < turn]
            if not left:
                continue
            left += earlier
            self._tell(f"batch {result['batch']}: round {turn} of {self.options.rounds}")
            order.shuffle(left)
            for name in left:
                seconds, faults = sides.call("turn", asked[name])
                rows[name]["iteration_ms"].append(1e3 * seconds)
                rows[name]["iteration_faults"].append(faults)
            self.save()

    def _row(self, sides: Sides, result: dict[str, Any], asked: dict[str, Entry], names: list[str]) -> None:
        """Clean, PGD-10, PGD-30 and PGD-50: by torchattacks one by one, by ours in one go."""
        samples: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(1, _ROW_ROUNDS + 1) if names else ():
            self._tell(
                f"batch {result['batch']}: clean + {' + '.join(f'PGD-{k}' for k in ROW)}, {turn} of {_ROW_ROUNDS}"
            )
            for name in names:
                samples[name].append(sides.call("row", asked[name]))
        rows = list(result["row"])
        rows += [{"name": name, **asked[name]._asdict(), **timing.summary(samples[name]).as_dict()} for name in names]
        library = next((row for row in rows if row["candidate"] == "torchattacks"), None)
        for row in rows if library is not None else ():
            row["speedup_over_torchattacks"] = library["median_ms"] / row["median_ms"]
        result["row"] = rows
        self.save()

    def _tell(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.0f} s] {text}", file=sys.stderr, flush=True)


def _inexact(row: dict[str, Any]) -> int:
    return ("fp32", "tf32", "fp16", "bf16").index(row["precision"])


def _print(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for missing in document["not_measured"]:
        console.print(f"not measured: {missing}")
    for result in document["results"]:
        console.print(attack_report.iterations_table(result, document["device"]["name"]))
        for key, table in (("row", attack_report.row_table), ("breakdown", attack_report.breakdown_table)):
            if result[key]:
                console.print(table(result))
    if document["bars"]:
        console.print(attack_report.bars_table(document))


if __name__ == "__main__":
    sys.exit(main())
