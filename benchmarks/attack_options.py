"""The options of `attack.py`, and the entries that they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
from attack_candidates import LIBRARIES, OURS, THEIRS, Entry, missing
from ops_options import check_device, check_file, count, seconds

from sparta_kernels import attack, backends

_CANDIDATES = (*THEIRS, *OURS)
_FEW = ("loop", "ours-eager", "ours-graph")  # on a GPU: what needs no compiler's time
_PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "tf32", "fp32")}


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Entry]]:
    """The options that these arguments give, complete, and the entries to measure. A bad argument exits with 2."""
    parser = argparse.ArgumentParser(
        prog="attack.py",
        description="Measure an iteration of PGD on ResNet-18: ours, a plain loop, torch.compile, other libraries.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=count, nargs="+", metavar="N", help="images (default: 32; on a GPU 512)")
    add("--activation", nargs="+", choices=("sparta", "relu"), default=["sparta", "relu"])
    add(
        "--precision",
        nargs="+",
        choices=attack.PRECISIONS,
        help="default: fp32 bf16; on a GPU bf16 tf32 fp32. Other libraries run in fp32 alone, on a GPU in tf32",
    )
    few = ", ".join(_FEW)
    add("--candidates", nargs="+", choices=("all", *_CANDIDATES), help=f"default: all; on a GPU {few}")
    add("--backends", nargs="+", choices=backends.NAMES, default=["auto"], help="of ours (default: auto)")
    add("--width", type=count, default=64, metavar="N", help="channels of the network's first group (default: 64)")
    add("--steps", type=count, default=5, metavar="N", help="iterations of a run, at least 3 (default: 5)")
    add("--rounds", type=count, default=7, metavar="N", help="runs of each entry (default: 7)")
    add("--row", action="store_true", help="time clean + PGD-10 + PGD-30 + PGD-50 too, at the first batch")
    add("--breakdown", action="store_true", help="profile where the time of ours goes too")
    add("--threads", type=count, metavar="N", help="of the CPU")
    add("--json", metavar="FILE", help="write the results here, after every round")
    add("--resume", action="store_true", help="go on from FILE")
    add("--budget", type=seconds, metavar="SECONDS", help="use about so much time; what it does not do for is listed")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if options.steps < 3:
        parser.error(f"argument --steps: must be at least 3, got {options.steps}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    options.batch = list(dict.fromkeys(options.batch or [512 if options.device == "cuda" else 32]))
    options.precision = list(dict.fromkeys(options.precision or _PRECISIONS[options.device]))
    for precision in options.precision:
        if options.device == "cpu" and precision not in _PRECISIONS["cpu"]:
            parser.error(f"argument --precision: {precision} needs a GPU")
    for backend in options.backends:
        if backend not in ("auto", "reference") and options.device not in backends.DEVICES.get(backend, ()):
            parser.error(f"argument --backends: {backend} has no kernels for {options.device} here")
    options.missing = _choose(parser, options)
    if options.resume and options.json is None:
        parser.error("argument --resume: needs --json FILE")
    check_file(parser, options.json)
    if options.resume and not os.path.exists(options.json):
        parser.error(f"argument --resume: there is no {options.json}")
    return options, _entries(options)


def _choose(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Fill in the candidates; returns what of "all" cannot run here, and why."""
    asked = options.candidates or (_FEW if options.device == "cuda" else ["all"])
    impossible = {name: reason for name in _CANDIDATES if (reason := missing(name, options.device))}
    for name in asked:
        if name in impossible and options.candidates:
            parser.error(f"argument --candidates: {name}: {impossible[name]}")
    wanted = _CANDIDATES if "all" in asked else asked
    options.candidates = [name for name in _CANDIDATES if name in wanted and name not in impossible]
    return [f"{name}: {reason}" for name, reason in impossible.items() if name in wanted]


def _entries(options: argparse.Namespace) -> list[Entry]:
    """In the order of their importance: where time is short, the last ones are not measured."""
    plain = "tf32" if options.device == "cuda" else "fp32"  # what a user of the libraries has by torch's defaults
    return [
        Entry(activation, precision, candidate, backend)
        for precision in options.precision
        for activation in options.activation
        for candidate in options.candidates
        for backend in (options.backends if candidate in OURS else ("",))
        if candidate not in LIBRARIES or precision == plain
    ]
