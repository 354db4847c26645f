"""Measure an iteration of PGD on ResNet-18: forward, gradient of the images, step.

    python benchmarks/attack.py --device cuda --json attack.json

SPARTA by every backend takes turns with ReLU. Prints a table and writes one JSON file, also where it is interrupted.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import device_timing
import timing
import torch
import torch.nn.functional as F
from gates import WrongResult
from ops_options import count, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparta_kernels import attack, backends, use_backend
from sparta_kernels.data.files import check_writable
from sparta_kernels.evaluation.memory import PeakMemory
from sparta_kernels.nn import resnet18
from sparta_kernels.report import megabytes, save_json

FAILED = 1  # a wrong result, or a full disk
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended

EPS, STEP = 16 / 255, 1 / 255
CLASSES = 10
CANDIDATES = {
    "native": "SPARTA, the compiled kernels",
    "triton": "SPARTA, the Triton kernels",
    "reference": "SPARTA in eager PyTorch",
    "relu": "ReLU in SPARTA's places",
}
PRECISIONS = {
    "fp32": "everything in float32 (convolutions as torch has them by default: TF32 on a GPU)",
    "bf16": "the network in bfloat16, images and steps in float32",
}
TIMED = (
    "an iteration of sparta_kernels.attack.pgd, from one call of its `progress` to the next: loss, gradient of the "
    "images, step, forward pass. The first and the last iteration of a run are left out; a sample is the mean of the "
    "others. On a GPU between two events in its queue"
)
_TOLERANCES = {"fp32": 0.02, "bf16": 0.2}  # of the norm: TF32 and bfloat16 differ in the order of their sums
_ROUNDS = 7
_FEWEST_ROUNDS = 3
_FIRST = 15.0  # seconds that a precision is taken to need at least before one has been measured


@dataclass(frozen=True)
class Workload:
    """What is attacked, in one precision: the images, their labels, and a network with either activation."""

    images: Tensor
    labels: Tensor
    networks: dict[str, nn.Module]

    def network(self, candidate: str) -> nn.Module:
        return self.networks["relu" if candidate == "relu" else "sparta"]


class InBfloat16(nn.Module):
    """A network that computes in bfloat16, whatever the images are in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.bfloat16())


class Clock:
    """Marks where an attack has got to, and tells the time between two marks: of the host, or of a GPU's queue."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self, _: int) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def iteration(self) -> float:
        """Seconds of an iteration, but for the first and the last."""
        start, end = self.marks[1], self.marks[-2]
        if self.cuda:
            torch.cuda.synchronize()
        whole = 1e-3 * start.elapsed_time(end) if self.cuda else end - start
        return whole / (len(self.marks) - 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True  # for all candidates alike; their shapes never change
    else:
        timing.use_allocator("keep")
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/attack.py", arguments, device_timing.describe() if on_gpu else None),
        "settings": {name: value for name, value in vars(options).items() if name != "json"}
        | {"eps": EPS, "step_size": STEP, "image": [3, 32, 32], "network": "resnet18", "cudnn_benchmark": on_gpu},
        "candidates": {name: CANDIDATES[name] for name in options.candidates},
        "precisions": {name: PRECISIONS[name] for name in options.precision},
        "timed": TIMED,
        "complete": False,
        "results": [],
        "failed": [],
        "not_measured": [],
    }
    status = 0
    try:
        _measure(options, document, started)
        document["complete"] = not document["not_measured"] and not document["failed"]
    except KeyboardInterrupt:
        print("attack.py: interrupted", file=sys.stderr)
        status = INTERRUPTED
    try:
        _save(options.json, document)
    except OSError as error:
        print(f"attack.py: {error}", file=sys.stderr)
        status = FAILED
    for failure in document["failed"]:
        print(f"attack.py: {failure}", file=sys.stderr)
    if document["results"]:
        _print(document)
    return status or (FAILED if document["failed"] else 0)


def _measure(options: argparse.Namespace, document: dict[str, Any], started: float) -> None:
    end = None if options.budget is None else started + options.budget
    needed = _FIRST
    for number, precision in enumerate(options.precision):
        begun = time.monotonic()
        if end is not None and begun + needed > end:
            document["not_measured"].append(f"{precision}: no time left")
            continue
        # What is left is shared among the precisions that are still to come.
        until = None if end is None else begun + (end - begun) / (len(options.precision) - number)
        try:
            found, enough = _measure_precision(options, precision, until, document["failed"])
            document["results"].append(found)
            needed = enough - begun
        except torch.OutOfMemoryError as error:
            document["not_measured"].append(f"{precision}: {str(error).splitlines()[0]}")
        except torch.AcceleratorError as error:
            what = f"{precision}: {str(error).splitlines()[0]}; nothing on the GPU works any more"
            document["failed"].append(what)
            return
        _save(options.json, document)


def _measure_precision(
    options: argparse.Namespace, precision: str, until: float | None, failed: list[str]
) -> tuple[dict[str, Any], float]:
    """Check the candidates, see how much memory they take, and time them in turns.

    Returns:
        What was found, and when the fewest rounds that are worth something were done.
    """
    device = torch.device(options.device)
    workload = make_workload(options, precision)
    candidates, memory = [], {}
    for name in options.candidates:
        try:
            check(name, workload, precision)
            _turn(name, workload, options.steps)  # warms up: convolutions are tuned, kernels compiled
        except (torch.AcceleratorError, torch.OutOfMemoryError):  # after the first nothing on the GPU works any more
            raise
        except Exception as error:  # whatever it is: the others are measured all the same
            wrong = isinstance(error, WrongResult)
            failed.append(str(error) if wrong else f"{precision}: {name}: {type(error).__name__}: {error}")
            continue
        peak = PeakMemory(device)
        _turn(name, workload, options.steps)
        memory[name] = peak.bytes()
        candidates.append(name)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    shuffled = list(candidates)
    enough = 0.0
    for turn in range(_ROUNDS):
        if turn == _FEWEST_ROUNDS:
            enough = time.monotonic()
        if enough and until is not None and time.monotonic() > until:
            break
        order.shuffle(shuffled)
        for name in shuffled:
            samples[name].append(_turn(name, workload, options.steps))
    times = {name: timing.summary(samples[name]).as_dict() for name in candidates}
    for name, row in times.items():
        row |= {"images_per_second": 1e3 * options.batch / row["median_ms"], "peak_memory": memory[name]}
        if "relu" in times:
            row["ratio_to_relu"] = row["median_ms"] / times["relu"]["median_ms"]
        if "reference" in times:
            row["speedup_over_reference"] = times["reference"]["median_ms"] / row["median_ms"]
    found = {"precision": precision, "layout": options.layout, "batch": options.batch, "candidates": times}
    return found, enough


def make_workload(options: argparse.Namespace, precision: str) -> Workload:
    """Networks with the same random weights, in eval mode, and random images."""
    layout = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}[options.layout]
    networks = {}
    for activation in ("sparta", "relu"):
        torch.manual_seed(0)
        network: nn.Module = resnet18(num_classes=CLASSES, activation=activation, width=options.width)
        if precision == "bf16":
            network = InBfloat16(network)
        networks[activation] = network.eval().to(options.device, memory_format=layout)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator)
    return Workload(images.to(options.device), labels.to(options.device), networks)


def check(name: str, workload: Workload, precision: str) -> None:
    """Compare a backend's logits and gradient of the images with the reference's.

    Raises:
        WrongResult: it says which of them is wrong and by how much.
    """
    if name in ("reference", "relu"):
        return

    def computed(backend: str) -> tuple[Tensor, Tensor]:
        leaf = workload.images.clone().requires_grad_()
        with use_backend(backend):
            logits = workload.network(name)(leaf).float()
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, workload.labels, reduction="sum"), leaf)
        return logits.detach(), gradient

    for what, got, wanted in zip(("logits", "gradient"), computed(name), computed("reference"), strict=True):
        error = float((got - wanted).norm() / wanted.norm())
        if not error <= _TOLERANCES[precision]:  # NaN is wrong too
            raise WrongResult(
                f"{precision}: {name} computes a wrong {what}: its distance from the reference's is {error:.2g} of "
                f"that one's norm, allowed {_TOLERANCES[precision]:g}"
            )


def _turn(name: str, workload: Workload, steps: int) -> float:
    """One attack; seconds of an iteration."""
    clock = Clock(workload.images.device)
    run: Callable[..., Any] = partial(attack.pgd, eps=EPS, step_size=STEP, steps=steps, progress=clock.mark)
    with use_backend("auto" if name == "relu" else name):
        run(workload.network(name), workload.images, workload.labels)
    return clock.iteration()


def _save(path: str | None, document: dict[str, Any]) -> None:
    if path is not None:
        save_json(path, document)


def table(document: dict[str, Any]) -> Table:
    """A row for each precision and candidate."""
    settings = document["settings"]
    title = f"PGD iteration, ResNet-18, batch {settings['batch']}, {settings['layout']}, {document['device']['name']}"
    found = Table(title=title, title_justify="left")
    found.add_column("precision")
    found.add_column("candidate")
    for heading in ("ms", "p20", "p80", "images/s", "/ relu", "reference /", "peak memory"):
        found.add_column(heading, justify="right", no_wrap=True)
    for result in document["results"]:
        for name, times in result["candidates"].items():
            found.add_row(
                result["precision"],
                name,
                *(f"{times[key]:.2f}" for key in ("median_ms", "p20_ms", "p80_ms")),
                f"{times['images_per_second']:.0f}",
                *(f"{times[key]:.2f}" if key in times else "" for key in ("ratio_to_relu", "speedup_over_reference")),
                megabytes(times["peak_memory"]),
            )
    return found


def _print(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for missing in document["not_measured"]:
        console.print(f"not measured: {missing}")
    console.print(table(document))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="attack.py", description="Measure an iteration of PGD on ResNet-18, by every backend and with ReLU."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=count, metavar="N", help="images (default: 8; on a GPU 512)")
    add("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    add("--layout", choices=("nchw", "channels_last"), default="channels_last")
    add("--candidates", nargs="+", choices=CANDIDATES, help="default: all that can run here")
    add("--width", type=count, default=64, metavar="N", help="channels of the network's first group (default: 64)")
    add("--steps", type=count, default=8, metavar="N", help="iterations of a run, at least 3 (default: 8)")
    add("--threads", type=count, metavar="N", help="of the CPU")
    add("--json", metavar="FILE", help="write the results here")
    add("--budget", type=seconds, metavar="SECONDS", help="use about so much time; what it does not do for is listed")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no NVIDIA GPU here that torch can use")
    if options.steps < 3:
        parser.error(f"argument --steps: must be at least 3, got {options.steps}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    options.batch = options.batch or (512 if options.device == "cuda" else 8)
    able = [name for name in CANDIDATES if _able(name, options.device)]
    for name in options.candidates or ():
        if name not in able:
            parser.error(f"argument --candidates: {name} has no kernels for {options.device} here")
    options.candidates = [name for name in able if name in (options.candidates or able)]
    options.precision = list(dict.fromkeys(options.precision))
    if options.json is not None:
        try:
            check_writable(options.json)
        except OSError as error:
            parser.error(f"argument --json: {error}")
    return options


def _able(candidate: str, device: str) -> bool:
    return candidate in ("reference", "relu") or device in backends.DEVICES.get(candidate, ())


if __name__ == "__main__":
    sys.exit(main())
