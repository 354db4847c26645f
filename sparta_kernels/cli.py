"""The command `sparta`: what is installed, training, robust evaluation, and the papers' tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ._version import __version__
from .commands import data, evaluate, info, options, reproduce, train
from .interrupts import as_ctrl_c
from .memory import keep_freed_memory

_HELP = "Train, attack and evaluate robust networks with the SPARTA activation."

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=_HELP)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sparta {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(info.info)
app.command(cls=options.Grouped)(train.train)
app.command(cls=options.Grouped)(evaluate.evaluate)
app.command()(reproduce.reproduce)
app.add_typer(data.app, name="data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 a bad argument (one line says which), 130 Ctrl-C.

    SIGTERM and SIGHUP end it as Ctrl-C does, with status 143 and 129. Where nobody reads what it prints any more, as
    in ``sparta info | head -1``, it ends quietly with 141, a run in training with its last step stored.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started it; what is for standard error would go to the other
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with as_ctrl_c() as came:
        try:
            status = _status(arguments)
        except (BrokenPipeError, SystemExit):  # Click makes the second of the first
            status = options.UNREAD
            _write_nowhere()
    if status == options.INTERRUPTED and came:
        status = 128 + came[0]  # what a shell reports for a program that a signal ended
    sys.exit(status)


def _write_nowhere() -> None:
    """Have what closed pipes were not given lost, where Python would write it at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):  # not what Click puts in their place
        if stream is None:
            continue
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _status(arguments: Sequence[str] | None) -> int | None:
    """Run the command line; the exit status, None for 0."""
    try:
        with keep_freed_memory():
            status: int | None = app(args=arguments, prog_name="sparta", standalone_mode=False)
            sys.stdout.flush()  # a full disk, too, is told here
    except typer.Abort:
        status = options.INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, say: arguments were checked before
        options.say(str(error))
        status = options.FAILED
    except Exception as error:
        failure = options.machine_failure(error)
        if failure is not None:
            options.say(failure)
            status = options.FAILED
        # Older Typer raises Click's exceptions, newer its own; both know their message and exit status.
        elif not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        else:
            message = error.format_message()
            if message.startswith("Usage"):
                print(message, file=sys.stderr)
            else:
                options.say(" ".join(message.split()))
            status = error.exit_code
    return status


if __name__ == "__main__":
    main()
