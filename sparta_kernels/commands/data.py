"""`sparta data`: the data sets' files and facts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .. import data, report
from ..data import fetch as downloads
from . import options
from .options import Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Download data sets, and show what they are.")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"Data set: {', '.join(downloads.FILES)}.")],
    root: Annotated[Path, typer.Option(help="Folder to put its files into; made where there is none.")],
    url: Annotated[
        str | None, typer.Option(help="Take them from here instead: a folder with these files, or one of them.")
    ] = None,
) -> None:
    """Download a data set's files and check them.

    What was cut off goes on where it stopped.
    """
    if name not in downloads.FILES:
        raise typer.BadParameter(f"must be one of {', '.join(downloads.FILES)}, got {name!r}", param_hint="NAME")
    with options.naming_the_option():
        wanted = downloads.files(name, url)
    console = options.console(None)
    if not wanted:
        console.print(f"{name} come with scikit-learn: there is nothing to fetch")
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {root}: {error.strerror}", param_hint="--root") from error
    try:
        for file in wanted:
            path = root / file.name
            if downloads.is_there(file, root):
                console.print(f"{path} is there already, and whole", soft_wrap=True)
                continue
            if path.exists():
                options.say(f"{path} is not {file.name} as published and will be replaced")
            with _bar(file) as on_progress:
                downloads.download(file, root, on_progress)
            console.print(f"{path}: {file.size / 1e6:.1f} MB, checksum right", soft_wrap=True)
    except KeyboardInterrupt:
        options.end(f"interrupted; {downloads.kept(file, root)}", options.INTERRUPTED)


@app.command()
def info(json_file: Json = None) -> None:
    """Show the data sets, their files, and where these come from."""
    options.check_outputs([("--json", options.file(json_file))])
    facts = [_facts(dataset) for dataset in data.DATASETS.values()]
    shown = {}
    for row in facts:
        channels, height, width = row["shape"]
        changes = [f"crop {row['crop']}"] if row["crop"] else []
        files = [f"{file['name']} ({file['bytes'] / 1e6:.0f} MB)" for file in row["files"]]
        shown[row["name"]] = {
            "classes": row["classes"],
            "training": f"{row['train_images']} images",
            "test": f"{row['test_images']} images",
            "size": f"{height}x{width}, {'colour' if channels == 3 else 'grey'}",
            "augmentation": [*changes, "flip"] if row["flip"] else changes,
            "files": files or "come with scikit-learn",
        }
    console = options.console(json_file)
    console.print(report.facts_table(shown, "Data sets"))
    console.print(
        "`sparta data fetch NAME --root DIR` downloads the files from where their authors publish them.", soft_wrap=True
    )
    options.save(json_file, facts)


def _facts(dataset: data.Dataset) -> dict[str, Any]:
    files = [
        {"name": file.name, "url": file.url, "bytes": file.size, "sha256": file.sha256}
        for file in downloads.FILES[dataset.name]
    ]
    return {**{key: value for key, value in vars(dataset).items() if key != "read"}, "files": files}


@contextmanager
def _bar(file: downloads.File) -> Iterator[downloads.OnProgress]:
    """A bar on the terminal, if there is one, with the rate and the time that is left."""
    console = options.progress_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(file.name, total=file.size, start=False)
        started = False

        def on_progress(_: downloads.File, done: int) -> None:
            nonlocal started
            if not started:  # what was there before says nothing of the rate
                progress.update(task, completed=done)
                progress.start_task(task)
                started = True
            progress.update(task, completed=done)

        yield on_progress
