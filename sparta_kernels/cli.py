"""The command `sparta`: what is installed, training, robust evaluation, and the papers' tables."""

from __future__ import annotations

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

    SIGTERM and SIGHUP end it as Ctrl-C does, with status 143 and 129.
    """
    with as_ctrl_c() as came:
        status = _status(arguments)
    if status == options.INTERRUPTED and came:
        status = 128 + came[0]  # what a shell reports for a program that a signal ended
    sys.exit(status)


def _status(arguments: Sequence[str] | None) -> int | None:
    """Run the command line; the exit status, None for 0."""
    try:
        with keep_freed_memory():
            status: int | None = app(args=arguments, prog_name="sparta", standalone_mode=False)
    except typer.Abort:
        status = options.INTERRUPTED
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
