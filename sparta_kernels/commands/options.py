"""Options that several commands have, their checks, and where results go."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from typer.core import TyperCommand

from .. import backends, build_info, data, report, training
from ..attack import checks
from ..data.files import check_writable
from . import launch

FAILED = 1
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
UNREAD = 141  # and for one that ended when the reader of its output had gone (SIGPIPE)


def fraction(text: str) -> float:
    """A number, or a fraction such as 16/255."""
    try:
        over, _, under = text.partition("/")
        number = float(over) / float(under) if under else float(text)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"must be a number or a fraction such as 16/255, got {text!r}") from None
    if not math.isfinite(number):
        raise typer.BadParameter(f"must be finite, got {text!r}")
    return number


def integers(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"must be integers such as 30,60, got {text!r}") from None


def pixels(help: str) -> Any:
    return typer.Option(
        parser=fraction, metavar="NUMBER", help=f"{help}, in pixel units.", rich_help_panel="The attack"
    )


class Grouped(TyperCommand):
    """A command whose help lists options under the headings that `rich_help_panel` gives them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


DataName = Annotated[
    str, typer.Option("--data", help=f"Data set: {', '.join(data.DATASETS)}.", rich_help_panel="Images")
]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the data set's files, as `sparta data fetch` leaves them; digits need none.",
        rich_help_panel="Images",
    ),
]
Eps = Annotated[Any, pixels("Radius of the attack")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.", rich_help_panel="The machine")
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, ...; by torchrun, cuda is a GPU for each process.",
        rich_help_panel="The machine",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="CPU threads, of each process; by default as many as cores.",
        rich_help_panel="The machine",
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Save the result as JSON here; - prints it.",
        rich_help_panel="What is stored and shown",
    ),
]


@contextmanager
def naming_the_option(**options: str) -> Iterator[None]:
    """Turn "somewhere: name must ..." into a message about --name, or the option `options` gives for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        match = re.fullmatch(r"\w+: (?:each of )?(\w+) (must.*)", str(error), flags=re.DOTALL)
        if match is None:
            raise typer.BadParameter(str(error)) from error
        option = options.get(match[1], match[1]).replace("_", "-")
        raise typer.BadParameter(match[2], param_hint=f"--{option}") from error


def device(name: str, threads: int | None) -> torch.device:
    """The device called `name`, and as many CPU threads as asked for."""
    started = launch.here()
    if started.count > 1 and re.fullmatch(r"cuda:\d+", name):
        raise typer.BadParameter(
            f"must be cuda under torchrun, which is a GPU for each process, got {name!r}", param_hint="--device"
        )
    with naming_the_option():
        # torch's functions take its own "cuda" for the current device, but cannot make it the current one.
        device = checks.device("sparta", f"cuda:{started.local_rank}" if name == "cuda" else name)
    if threads is None and started.count > 1:  # torchrun's own default is one
        threads = launch.cores()
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_backend(name: str, device: torch.device) -> None:
    try:
        backends.choose(device, name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from error


def check_outputs(outputs: Iterable[tuple[str, Path | None]], inputs: Sequence[tuple[str, Path]] = ()) -> None:
    """Refuse files, by option, that cannot be written or are one another or an input, before the work."""
    taken = list(inputs)
    for option, path in outputs:
        if path is None:
            continue
        for other, file in taken:
            if same_file(path, file):
                raise typer.BadParameter(f"must not be the file of {other}, got {path}", param_hint=option)
        taken.append((option, path))
        try:
            check_writable(path)
        except OSError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error


def same_file(one: Path, other: Path) -> bool:
    """Whether these are one file, there already (perhaps by two names) or to be."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def naming_the_checkpoint(argument: str) -> Iterator[None]:
    """Turn a file that is no checkpoint into a message about `argument`."""
    try:
        yield
    except (training.CheckpointError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=argument) from error


def load(name: str, root: Path | None, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A split of a data set, or a message about --data."""
    try:
        return data.load(name, root, split)
    except (ImportError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error


def document(command: str, settings: Any, results: Any, device: torch.device, seed: int) -> dict[str, Any]:
    return report.document(
        command, settings=settings, results=results, device=str(device), seed=seed, build=build_info()
    )


def file(json_file: str | None) -> Path | None:
    """The file that --json names, if any."""
    return None if json_file in (None, "-") else Path(json_file)


class _Console(Console):
    """One whose reader may go: Rich would end the program from wherever it is, and without standard output."""

    def on_broken_pipe(self) -> None:
        """Called where the error is handled: it goes on, as with a Rich that does not know this method."""
        raise


def console(json_file: str | None) -> Console:
    """Where tables go: standard output, unless the JSON has it to itself."""
    return _Console(stderr=json_file == "-", highlight=False, markup=False, emoji=False, quiet=launch.here().rank > 0)


def progress_console() -> Console:
    return _Console(stderr=True, markup=False, emoji=False, quiet=launch.here().rank > 0)


def save(json_file: str | None, content: Any) -> None:
    if launch.here().rank > 0:
        return
    if json_file == "-":
        print(report.as_json(content), end="")
    elif json_file is not None:
        report.save_json(json_file, content)


def machine_failure(error: BaseException) -> str | None:
    """What to say of memory that ran out, a compiler that failed, a process that is gone; None for any other error."""
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return f"{reason}; try a smaller --batch-size"
    # By its name: importing torch._dynamo takes seconds.
    if any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__):
        return f"torch.compile failed: {reason}; try --engine eager"
    if isinstance(error, RuntimeError) and any(words in reason for words in ("by peer", "ncclRemoteError")):
        return "another process has ended; what it said tells why"
    return None


def say(message: str) -> None:
    """One line on standard error."""
    rank = launch.here().rank
    print(f"sparta{f' (process {rank})' if rank else ''}: {message}", file=sys.stderr)


def end(message: str, status: int) -> NoReturn:
    say(message)
    raise typer.Exit(status)
