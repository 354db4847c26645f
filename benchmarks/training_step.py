"""Measure a training step of ResNet-18: its time and its peak memory, with SPARTA and with ReLU.

    python benchmarks/training_step.py --batch 32 128 --json training_step.json

A step is forward, backward and SGD with momentum, on images of 3x32x32, in float32 or under autocast to bfloat16.
Prints a table and writes one JSON file, after every round.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import device_timing
import timing
import torch
import torch.nn.functional as F
from memory import peak_of_tensors
from ops_options import check_device, check_file, check_threads, count
from rich.console import Console
from rich.table import Table

from sparta_kernels import keep_freed_memory
from sparta_kernels.nn import resnet18
from sparta_kernels.nn import sparta as sparta_module
from sparta_kernels.report import megabytes, save_json

FAILED, INTERRUPTED = 1, 130

CANDIDATES = {
    "relu": "ReLU at the sites",
    "sparta": "SPARTA, whose hidden tensors are made again in backward",
    "sparta-plain": "SPARTA as torch's autograd keeps it, with our gate",
}
MEMORY_OVER_RELU = 1.25
_MEMORY = (
    "peak_tensors: bytes of tensors at once at most, weights, momentum and gradients among them, libraries' scratch "
    "memory not. held: weights, momentum and buffers alone"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 1 failed, 130 Ctrl-C. A bad argument exits with 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _read(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.backends.cudnn.allow_tf32 = False  # everybody computes in the dtype that is asked for
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        **timing.provenance("benchmarks/training_step.py", arguments, device_timing.describe() if on_gpu else None),
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "candidates": CANDIDATES,
        "memory": _MEMORY,
        "complete": False,
        "results": [],
        "failed": [],
        "bars": [],
    }
    status = 0
    try:
        with keep_freed_memory() as kept:
            document["freed_memory_kept"] = kept.reason or True
            for batch in options.batch:
                try:
                    _measure(options, batch, document)
                except (RuntimeError, MemoryError) as error:
                    document["failed"].append(f"batch {batch}: {_short_of_memory(error)}")
        document["complete"] = not document["failed"]
        _save(options.json, document)
    except torch.AcceleratorError as error:
        document["failed"].append(f"{str(error).splitlines()[0]}; nothing on the GPU works any more")
        _save(options.json, document)
    except KeyboardInterrupt:
        print("training_step.py: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except OSError as error:
        print(f"training_step.py: {error}", file=sys.stderr)
        status = FAILED
    _print(document)
    for failure in document["failed"]:
        print(f"training_step.py: {failure}", file=sys.stderr)
    return status or (FAILED if document["failed"] else 0)


def _short_of_memory(error: Exception) -> str:
    """What to say of it. Any other error is raised again."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return text
    raise error


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training_step.py", description="Measure a training step of ResNet-18.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=count, nargs="+", default=[32, 128], metavar="N", help="images (default: 32 and 128)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: by autocast (default: %(default)s)")
    add("--width", type=count, default=64, metavar="N", help="channels of the first group (default: 64)")
    add("--rounds", type=count, default=7, metavar="N", help="steps of each (default: 7)")
    add("--channels-last", action="store_true", help="images and weights in this layout")
    add("--threads", type=count, default=torch.get_num_threads(), metavar="N")
    add("--json", metavar="FILE", help="write the results here, after every round")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    check_threads(parser, options.threads)
    check_file(parser, options.json)
    return options


class _Training:
    """One network and its optimiser, which take steps on the same images."""

    def __init__(self, options: argparse.Namespace, batch: int, candidate: str) -> None:
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.plain, self.bf16 = candidate == "sparta-plain", options.dtype == "bf16"
        model = resnet18(activation="relu" if candidate == "relu" else "sparta", width=options.width)
        self.model = model.train().to(options.device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        self.images = torch.rand(batch, 3, 32, 32, device=options.device).contiguous(memory_format=layout)
        self.labels = torch.randint(10, (batch,), device=options.device)

    def step(self) -> None:
        """With the gradients of the last one given up."""
        with _keeping_all() if self.plain else nullcontext():
            with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.optimizer.step()

    def prepare(self) -> None:
        """Give up the gradients: no part of what is timed."""
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of weights, momentum and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values() if value is not None]
        return sum(tensor.nbytes for tensor in tensors)


@contextmanager
def _keeping_all() -> Iterator[None]:
    """SPARTA by its layers, one by one."""
    before = sparta_module.attention_in_training
    sparta_module.attention_in_training = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        sparta_module.attention_in_training = before


def _measure(options: argparse.Namespace, batch: int, document: dict[str, Any]) -> None:
    """Everybody's memory, one after the other; then their steps, in turns."""
    result: dict[str, Any] = {"batch": batch, "entries": []}
    document["results"].append(result)
    trainings: dict[str, _Training] = {}
    for name in CANDIDATES:
        _tell(f"batch {batch}: {name} warms up")
        try:
            trainings[name], row = _warm_up(options, batch, name)
        except (RuntimeError, MemoryError) as error:  # the others may need less
            document["failed"].append(f"batch {batch}: {name}: {_short_of_memory(error)}")
        else:
            result["entries"].append(row)
        _save(options.json, document)
    order, names = random.Random(0), list(trainings)
    for turn in range(options.rounds):
        _tell(f"batch {batch}: round {turn + 1} of {options.rounds}")
        order.shuffle(names)
        for name in names:
            trainings[name].prepare()
            start = _now(options.device)
            trainings[name].step()
            row = next(row for row in result["entries"] if row["candidate"] == name)
            row["step_ms"].append(1e3 * (_now(options.device) - start))
        _save(options.json, document)


def _warm_up(options: argparse.Namespace, batch: int, candidate: str) -> tuple[_Training, dict[str, Any]]:
    """Steps until all is there that stays, and one more whose memory is told."""
    training = _Training(options, batch, candidate)
    for _ in range(2):
        training.prepare()
        training.step()
    training.prepare()
    held = training.held()
    peak = held + peak_of_tensors(training.step, options.device)
    return training, {"candidate": candidate, "held": held, "peak_tensors": peak, "step_ms": []}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _save(path: str | None, document: dict[str, Any]) -> None:
    document["bars"] = []
    for result in document["results"]:
        rows = {row["candidate"]: row for row in result["entries"]}
        for row in rows.values():
            if row["step_ms"]:
                row |= timing.summary([1e-3 * sample for sample in row["step_ms"]]).as_dict()
            if "median_ms" in row and "median_ms" in rows.get("relu", {}):
                row["ratio_to_relu"] = row["median_ms"] / rows["relu"]["median_ms"]
        if {"relu", "sparta"} <= rows.keys():
            value = rows["sparta"]["peak_tensors"] / rows["relu"]["peak_tensors"]
            name = f"memory of a training step, SPARTA / ReLU, {document['settings']['dtype']}, batch {result['batch']}"
            passed = value <= MEMORY_OVER_RELU
            bar = {"name": name, "value": value, "relation": "<=", "limit": MEMORY_OVER_RELU, "passed": passed}
            document["bars"].append(bar)
    if path is not None:
        save_json(path, document)


def _print(document: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    title = f"A training step of ResNet-18, {document['settings']['dtype']}, {document['device']['name']}"
    made = Table(title=title, title_justify="left")
    for heading in ("batch", "", "ms", "p20", "p80", "/ relu", "peak memory", "/ relu"):
        made.add_column(heading, justify="right", no_wrap=True)
    for result in document["results"]:
        relu = next((row for row in result["entries"] if row["candidate"] == "relu"), None)
        for row in result["entries"]:
            times = [f"{row[key]:.1f}" if key in row else "" for key in ("median_ms", "p20_ms", "p80_ms")]
            ratio = f"{row['ratio_to_relu']:.2f}" if "ratio_to_relu" in row else ""
            beside = "" if relu is None else f"{row['peak_tensors'] / relu['peak_tensors']:.2f}"
            memory = megabytes(row["peak_tensors"])
            made.add_row(str(result["batch"]), row["candidate"], *times, ratio, memory, beside)
    console.print(made)
    for bar in document["bars"]:
        verdict = "pass" if bar["passed"] else "FAIL"
        console.print(f"{verdict} {bar['name']}: {bar['value']:.2f} {bar['relation']} {bar['limit']:g}")


if __name__ == "__main__":
    sys.exit(main())
