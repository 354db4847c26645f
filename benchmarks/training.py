"""Measure adversarial training of ResNet-18: `sparta_kernels.training.train`, and the same loop in plain PyTorch.

    python benchmarks/training.py --batch 32 --json training.json

`train` itself runs, on noise of CIFAR-10's shape, and between its steps the others take theirs. A step is a whole one:
the attack (PGD-10), forward, backward and SGD. Prints a table and writes one JSON file, after every round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import device_timing
import timing
import torch
from attack_report import has_amx
from ops_options import check_device, check_file, check_threads, count
from other_process import OtherProcess, OtherProcessFailed
from rich.console import Console
from rich.table import Table
from training_eager import Eager, noise

from sparta_kernels import attack, data, training
from sparta_kernels.attack.prepare import PRECISIONS_ON_CPU
from sparta_kernels.report import save_json

FAILED, INTERRUPTED = 1, 130
EPOCH = 50_000  # CIFAR-10's training images
CANDIDATES = {
    "ours": "sparta_kernels.training.train, which keeps the memory that it frees",
    "eager": "the same loop in plain PyTorch with the reference activation, in fp32, with glibc's defaults",
    "eager-low": "the same under autocast, in the precision of ours",
}
_OVER_EAGER = {"cpu": {"fp32": 1.25, "bf16": 2.5}, "cuda": {"fp32": 2.5, "bf16": 2.5}}
_WARM_UP = 2  # steps


class _Enough(Exception):
    """As many rounds as were asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _read(arguments)
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/training.py", arguments, device_timing.describe() if on_gpu else None),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "candidates": CANDIDATES,
        "amx": has_amx(),
        "complete": False,
        "results": [],
        "failed": [],
        "bars": [],
    }
    status = 0
    try:
        for batch in options.batch:
            for precision in options.precision:
                for activation in options.activation:
                    _Cell(options, document, batch, precision, activation).measure()
        document["complete"] = True
        _save(options.json, document)
    except KeyboardInterrupt:
        print("training.py: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except (OtherProcessFailed, training.TrainingDiverged, torch.AcceleratorError, OSError) as error:
        document["failed"].append(str(error).splitlines()[0])
        print(f"training.py: {document['failed'][0]}", file=sys.stderr)
        _save(options.json, document)
        status = FAILED
    _print(document)
    return status


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.py", description="Measure adversarial training of ResNet-18.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=count, nargs="+", default=[32], metavar="N", help="images in a batch (default: 32)")
    add("--precision", choices=attack.PRECISIONS, nargs="+", default=["fp32", "bf16"], help="default: fp32 and bf16")
    add("--activation", nargs="+", default=["sparta", "relu"], metavar="NAME", help="default: sparta and relu")
    add("--width", type=count, default=64, metavar="N", help="channels of the first group (default: 64)")
    add("--steps", type=count, default=10, metavar="N", help="of the attack (default: 10)")
    add("--rounds", type=count, default=5, metavar="N", help="steps of each (default: 5)")
    add("--ours", action="store_true", help="measure ours alone")
    add("--threads", type=count, default=torch.get_num_threads(), metavar="N")
    add("--json", metavar="FILE", help="write the results here, after every round")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    low = [name for name in options.precision if name not in PRECISIONS_ON_CPU]
    if low and options.device == "cpu":
        parser.error(f"argument --precision: {low[0]} needs a GPU")
    if min(options.batch) < 3:
        parser.error(f"argument --batch: must be at least 3, got {min(options.batch)}")
    check_threads(parser, options.threads)
    for activation in options.activation:
        try:
            training.build_model("resnet18", {"activation": activation, "width": 1})
        except (TypeError, ValueError) as error:
            parser.error(f"argument --activation: {error}")
    check_file(parser, options.json)
    return options


class _Cell:
    """A batch size, a precision and an activation: everybody's steps, in turns."""

    def __init__(
        self, options: argparse.Namespace, document: dict[str, Any], batch: int, precision: str, activation: str
    ) -> None:
        self.options, self.document = options, document
        self.settings = training.Settings(
            data="cifar10",
            activation=activation,
            width=options.width,
            batch_size=batch,
            precision=precision,
            attack="xie2019",
            attack_steps=options.steps,
            learning_rate=0.01,
            epochs=1,
        )
        wanted = ["ours"]
        if not options.ours:
            wanted += ["eager"] if precision == "fp32" else ["eager", "eager-low"]
        self.row: dict[str, Any] = {"batch": batch, "precision": precision, "activation": activation}
        self.row["entries"] = [{"candidate": name, "step_ms": []} for name in wanted]
        document["results"].append(self.row)

    def measure(self) -> None:
        """Train, and interrupt it when there is enough."""
        options, rounds = self.options, self.options.rounds + _WARM_UP
        described = data.DATASETS["cifar10"]
        found = noise(self.settings.batch_size, described.classes)
        repeated = tuple(part.repeat(rounds, *(1,) * (part.dim() - 1)) for part in found)
        data.DATASETS["cifar10"] = dataclasses.replace(described, read=lambda root, split: repeated)
        self._tell("warming up")
        other = None
        try:
            if not options.ours:
                other = OtherProcess(Eager, self.settings, options.threads, options.device)
                for precision in self._others().values():
                    for _ in range(_WARM_UP):
                        other.call("step", precision)
            with tempfile.TemporaryDirectory() as folder:
                self._train(Path(folder), other)
        finally:
            data.DATASETS["cifar10"] = described
            if other is not None:
                other.close()

    def _others(self) -> dict[str, str]:
        """The candidates beside ours, and the precision of each."""
        precisions = {"eager": "fp32", "eager-low": self.settings.precision}
        return {row["candidate"]: precisions[row["candidate"]] for row in self.row["entries"][1:]}

    def _train(self, folder: Path, other: OtherProcess | None) -> None:
        start, done = time.perf_counter(), 0

        def on_batch(batch: training.Batch) -> None:
            nonlocal start, done
            if self.options.device == "cuda":
                torch.cuda.synchronize()
            seconds, done = time.perf_counter() - start, done + 1
            if done > _WARM_UP:
                rows = {row["candidate"]: row["step_ms"] for row in self.row["entries"]}
                rows["ours"].append(1e3 * seconds)
                for name, precision in self._others().items():
                    rows[name].append(1e3 * other.call("step", precision))  # type: ignore[union-attr]
                self._tell(f"round {done - _WARM_UP} of {self.options.rounds}")
                _save(self.options.json, self.document)
            if done == _WARM_UP + self.options.rounds:
                raise _Enough
            start = time.perf_counter()

        with contextlib.suppress(_Enough):
            path = folder / "run.safetensors"
            training.train(self.settings, path, device=self.options.device, save_every=None, on_batch=on_batch)

    def _tell(self, text: str) -> None:
        row = self.row
        print(f"batch {row['batch']}, {row['precision']}, {row['activation']}: {text}", file=sys.stderr, flush=True)


def _save(path: str | None, document: dict[str, Any]) -> None:
    for result in document["results"]:
        rows = [row for row in result["entries"] if row["step_ms"]]  # ours first
        for row in rows:
            row |= timing.summary([1e-3 * sample for sample in row["step_ms"]]).as_dict()
            row["images_per_second"] = 1e3 * result["batch"] / row["median_ms"]
            row["epoch_seconds"] = 1e-3 * row["median_ms"] * math.ceil(EPOCH / result["batch"])
            row["over_ours"] = row["median_ms"] / rows[0]["median_ms"]
    document["bars"] = [bar for result in document["results"] for bar in _bars(result, document)]
    if path is not None:
        save_json(path, document)


def _bars(result: dict[str, Any], document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What SPARTA's step is held to; `passed` is None where this machine is not meant."""
    precision, on_gpu = result["precision"], document["settings"]["device"] == "cuda"
    limit = _OVER_EAGER["cuda" if on_gpu else "cpu"].get(precision)
    # A GPU's users have the lower precisions without us; a CPU's, whose autocast gains little, have float32.
    beside = "eager-low" if on_gpu and precision != "fp32" else "eager"
    for row in result["entries"]:
        if row["candidate"] == beside and "over_ours" in row and limit and result["activation"] == "sparta":
            yield {
                "name": f"{beside} / ours, a step of training, {precision}, batch {result['batch']}",
                "value": row["over_ours"],
                "relation": ">=",
                "limit": limit,
                "passed": row["over_ours"] >= limit if on_gpu or precision == "fp32" or document["amx"] else None,
            }


def _print(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    title = f"A step of adversarial training (PGD-{document['settings']['steps']}), {document['device']['name']}"
    made = Table(title=title, title_justify="left")
    for heading in ("batch", "precision", "activation", "", "ms", "p20", "p80", "images/s", "/ ours", "epoch"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in document["results"]:
        for row in result["entries"]:
            if "median_ms" in row:
                figures = [f"{row[key]:.0f}" for key in ("median_ms", "p20_ms", "p80_ms", "images_per_second")]
                keys = [str(result[key]) for key in ("batch", "precision", "activation")]
                ratio, epoch = f"{row['over_ours']:.2f}", f"{row['epoch_seconds']:.0f} s"
                made.add_row(*keys, row["candidate"], *figures, ratio, epoch)
    console.print(made)
    for bar in document["bars"]:
        verdict = {True: "pass", False: "FAIL", None: "not meant here (needs AMX)"}[bar["passed"]]
        console.print(f"{verdict} {bar['name']}: {bar['value']:.2f} {bar['relation']} {bar['limit']:g}")


if __name__ == "__main__":
    sys.exit(main())
