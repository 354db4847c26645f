"""The options of `ops.py`: what they are, and what of them cannot be done here."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Sequence

import device_timing
import gates
import small
import timing
import torch

from sparta_kernels import backends
from sparta_kernels.data.files import check_writable

_BUFFERS = 15  # of x's size, that the hungriest loop holds for each input: inputs, graphs, the last outputs
_BATCHES = {"cpu": [128], "cuda": [128, 512, 1024, 4096]}


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[gates.Case]]:
    """The options that these arguments give, complete, and the cases to measure. A bad argument exits with 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _fill_in(parser, options)
    cases = [
        case
        for operation in options.operation
        for case in small.cases(operation, options.batch, options.shape, options.dtype, options.layout)
    ]
    check(parser, options, cases)
    return options, cases


def inputs(options: argparse.Namespace, case: gates.Case) -> int:
    """How many inputs to rotate."""
    room = device_timing.ring_bytes() if options.device == "cuda" else None
    count: int = options.inputs or timing.inputs_needed(case.size, room)
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ops.py", description="Measure the operations against copy, eager PyTorch and torch.compile."
    )
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the results here")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--operation",
        nargs="+",
        choices=small.OPERATIONS,
        help="what to measure (default: the gate on a CPU, all on a GPU)",
    )
    add("--batch", nargs="+", type=count, metavar="N", help="batch sizes (default: 128; on a GPU also 512, 1024, 4096)")
    add("--shape", nargs="+", type=shape, metavar="N,C,H,W", help="these shapes in place of the usual")
    add("--dtype", nargs="+", choices=gates.DTYPES, help="default: fp32 and bf16; of images fp32")
    add("--layout", nargs="+", choices=gates.LAYOUTS, help="of the gate's x (default: both)")
    add(
        "--candidates",
        nargs="+",
        choices=gates.CANDIDATES,
        help="; ".join(f"{name}: {meaning}" for name, meaning in gates.CANDIDATES.items()),
    )
    add("--threads", type=count, default=torch.get_num_threads(), metavar="N")
    add(
        "--quick",
        action="store_true",
        help="a look in under a minute: short loops, and compile only where --candidates names it",
    )
    add("--seconds", type=seconds, help="time for each loop (default: 3; 0.3 with --quick; 0.2 on a GPU)")
    add("--inputs", type=count, metavar="N", help="inputs to rotate (default: past the last-level cache)")
    add(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="end by about then, and list what has not been measured; on a GPU the most important cells come first",
    )
    allocators = "; ".join(f"{name}: {meaning}" for name, meaning in timing.ALLOCATORS.items())
    add("--allocator", choices=timing.ALLOCATORS, default="keep", help=f"{allocators} (default: %(default)s)")
    return parser


def _fill_in(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Settle what depends on other options and on the machine."""
    on_gpu = options.device == "cuda"
    check_device(parser, options.device)
    if options.batch and options.shape:
        parser.error("argument --shape: not allowed with argument --batch")
    options.seconds = options.seconds or (0.3 if options.quick else 0.2 if on_gpu else 3.0)
    options.rounds = 5 if options.quick else 7 if on_gpu else 10
    options.batch = options.batch or _BATCHES[options.device]
    asked = options.operation or (list(small.OPERATIONS) if on_gpu else ["gate"])
    options.operation = [name for name in small.OPERATIONS if name in asked]
    able = [name for name in gates.CANDIDATES if _able(name, options.device)]
    for name in options.candidates or ():
        if name not in able:
            parser.error(f"argument --candidates: {name} has no kernels for {options.device} here")
    asked = options.candidates or [name for name in able if _usual(name, options)]
    options.candidates = [name for name in able if name in asked]


def _able(candidate: str, device: str) -> bool:
    backend = gates.KERNELS.get(candidate, candidate)
    return backend not in gates.KERNELS.values() or device in backends.DEVICES.get(backend, ())


def _usual(candidate: str, options: argparse.Namespace) -> bool:
    """Whether it is measured without being named: on a CPU, Triton is only interpreted."""
    if gates.KERNELS.get(candidate, candidate) == "triton":
        return options.device == "cuda"
    return candidate != "compile" or not options.quick


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, cases: Sequence[gates.Case]) -> None:
    """Refuse what could not be done, before anything is."""
    check_threads(parser, options.threads)
    compiler = os.environ.get("CXX", "g++")  # as torch.compile looks for it
    if "compile" in options.candidates and shutil.which(compiler) is None:
        parser.error(
            f"argument --candidates: compile needs a C++ compiler, and {compiler} is not here; "
            "install it, set CXX, or name other candidates"
        )
    check_file(parser, options.json)
    if options.device == "cuda":  # there, a case for which memory is short is left out when that shows
        return
    needed, largest = max((_BUFFERS * case.size * inputs(options, case), str(case)) for case in cases)
    available = timing.available_memory()
    if available is not None and needed > available:
        parser.error(
            f"{largest} needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free; "
            "choose a smaller --batch or --shape"
        )


def check_threads(parser: argparse.ArgumentParser, threads: int) -> None:
    """Refuse more threads than there are CPUs."""
    cpus = os.cpu_count() or 1
    if threads > cpus:
        parser.error(f"argument --threads: must be at most {cpus} (CPUs here), got {threads}")


def check_file(parser: argparse.ArgumentParser, path: str | None) -> None:
    """Refuse a file that --json names and that cannot be written."""
    if path is None:
        return
    try:
        check_writable(path)
    except OSError as error:
        parser.error(f"argument --json: {error}")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Refuse a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no NVIDIA GPU here that torch can use")


def count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, int, int, int]:
    """Four extents, for argparse."""
    try:
        samples, channels, height, width = (count(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"must be four integers of at least 1, such as 128,64,32,32, got {text!r}"
        ) from None
    return samples, channels, height, width


def seconds(text: str) -> float:
    """A positive number, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number
