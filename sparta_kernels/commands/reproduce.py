"""`sparta reproduce`: the papers' tables and figures, ours beside theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import attack, backends, data, evaluation, papers, report, training
from ..attack import checks
from ..attack.prepare import PRECISIONS_ON_CPU
from ..papers import Need, Plan, Run, Runs
from . import launch, options
from .options import Device, Json, Seed, Threads

_NAMES = papers.experiments()


def reproduce(
    experiments: Annotated[
        list[str], typer.Argument(metavar="EXPERIMENTS", help=f"What: {', '.join(_NAMES)}; or all.")
    ],
    root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder with the data sets' files (sparta data fetch).")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A try of minutes: digits for every data set, narrow networks, few epochs; not comparable.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for runs and results; quick ones in its folder quick.")] = Path(
        "runs/papers"
    ),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images; by default 90, quick 4.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=3, help="Images in a training batch, at most.")] = 128,
    preset: Annotated[
        str | None,
        typer.Option(
            "--attack",
            help=f"Adversarial training: {', '.join(attack.PRESETS)}; by default sparta, as stated, quick xie2019.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help=f"Of training and the attack's gradients: {', '.join(attack.PRECISIONS)}.")
    ] = "fp32",
    seed: Seed = 0,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Train each network so often, with seeds from --seed on.")
    ] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Work on these runs alone: names as --list tells, * and ? match. Repeatable."
        ),
    ] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="List the runs and how far they are; do nothing.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report what is there; - stands for the rest.")
    ] = False,
    backend: Annotated[str, typer.Option(help=f"What computes: {', '.join(backends.NAMES)}.")] = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Reproduce a table or figure of the papers.

    Trains and attacks the networks that it needs, and shows ours beside theirs. Runs are kept, and shared between
    tables. Stop it at any moment: the same command goes on.
    """
    if launch.here().count > 1:
        options.end(
            "reproduce: start it without torchrun; several processes may share --out, each with its own --device",
            options.FAILED,
        )
    place = options.device(device, 1 if quick and threads is None else threads)
    options.check_backend(backend, place)
    names = _experiments(experiments)
    plan = _plan(
        quick, place, epochs=epochs, batch_size=batch_size, attack=preset, precision=precision, seed=seed, seeds=seeds
    )
    folder = out / "quick" if quick else out
    runs = Runs(folder / "runs", plan)
    wanted = papers.needs(names, plan)
    console = options.console(json_file)
    with _naming_the_folder():
        if list_runs:
            console.print(_list(wanted, runs, names))
            return
        chosen = {} if report_only else _chosen(wanted, only)
        left = {run: need for run, need in chosen.items() if not runs.state(run, need).done}
        _check(folder, root, {run.data for run in left}, json_file)

        problems: dict[Run, str] = {}
        if left:
            progress = papers.RunsProgress(options.progress_console(), runs, left)
            try:
                with progress:
                    problems = papers.work(runs, left, root=root, device=place, backend=backend, progress=progress)
            except KeyboardInterrupt:
                done = sum(runs.state(run, need).done for run, need in wanted.items())
                options.end(
                    f"interrupted; {done} of {len(wanted)} runs are done, and the same command goes on",
                    options.INTERRUPTED,
                )
            except (ImportError, data.DataError) as error:
                raise typer.BadParameter(str(error), param_hint="--data-root") from error

        def test_images(name: str) -> tuple[Tensor, Tensor]:
            return options.load(name, root, "test")

        results = [papers.write(name, runs, folder, device=place, images=test_images) for name in names]
    settings = asdict(plan) | {"experiments": names, "milestones": plan.milestones}
    content = [
        {"name": result.name, "files": [str(file) for file in result.files]} | result.content for result in results
    ]
    options.save(json_file, options.document("reproduce", settings, content, place, seed))
    _show(console, results)
    for run, problem in problems.items():
        options.say(f"{run.name}: {problem}")
    if problems:
        raise typer.Exit(options.FAILED)


def _experiments(given: Iterable[str]) -> list[str]:
    """Names of tables and figures, each once; "all" is all of them."""
    names: list[str] = []
    for name in given:
        if name != "all" and name not in _NAMES:
            raise typer.BadParameter(f"must be {', '.join(_NAMES)} or all, got {name!r}", param_hint="EXPERIMENTS")
        names += _NAMES if name == "all" else [name]
    return list(dict.fromkeys(names))


def _plan(quick: bool, device: torch.device, **changes: Any) -> Plan:
    with options.naming_the_option():
        precisions = attack.PRECISIONS if device.type == "cuda" else PRECISIONS_ON_CPU
        checks.choice("reproduce", "precision", changes["precision"], precisions)
        given = {name: value for name, value in changes.items() if value is not None}
        return papers.quick_plan(**given) if quick else Plan(**given)


@contextmanager
def _naming_the_folder() -> Iterator[None]:
    """Turn a file in --out that is damaged, or of something else, into a message about --out."""
    try:
        yield
    except (training.CheckpointError, evaluation.OutcomesError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


def _chosen(wanted: dict[Run, Need], only: list[str] | None) -> dict[Run, Need]:
    """Those whose names fit one of `only`, and the sources of their SPARTA."""
    if not only:
        return wanted
    for pattern in only:
        if not any(fnmatchcase(run.name, pattern) for run in wanted):
            raise typer.BadParameter(f"must name a run, see --list, got {pattern!r}", param_hint="--only")
    fitting = [run for run in wanted if any(fnmatchcase(run.name, pattern) for pattern in only)]
    sources = {run.source for run in fitting}
    return {run: need for run, need in wanted.items() if run in fitting or run in sources}


def _check(folder: Path, root: Path | None, needed: set[str], json_file: str | None) -> None:
    """Refuse, before the work, what would fail after it: folders, files, pictures, data that are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.check_plot(folder / "table.png")
    except OSError as error:
        raise typer.BadParameter(f"cannot make {folder}: {error.strerror}", param_hint="--out") from error
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="EXPERIMENTS") from error
    options.check_outputs([("--out", folder / "table.md"), ("--json", options.file(json_file))])
    for name in sorted(needed):
        if root is None and name != "digits":
            raise typer.BadParameter(
                f"must be the folder with {name} (sparta data fetch {name} --root DIR gets it), or take --quick",
                param_hint="--data-root",
            )
        try:
            data.load(name, root, "test")
        except (ImportError, OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--data-root") from error


def _list(wanted: dict[Run, Need], runs: Runs, names: list[str]) -> Table:
    title = f"runs of {', '.join(names)} in {runs.folder}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("epochs left", justify="right", no_wrap=True)
    left = 0
    for run, need in wanted.items():
        state = runs.state(run, need)
        words = "done" if state.done else "missing"
        if not state.done and not state.epochs and runs.checkpoint(run).exists():
            words = "in its first epoch"
        elif not state.done and 0 < state.epochs < run.epochs:
            words = f"epoch {state.epochs} of {run.epochs}"
        elif not state.done and state.epochs:
            words = f"trained, {state.images} images evaluated"
        left += run.epochs - state.epochs
        table.add_row(run.name, words, str(run.epochs - state.epochs))
    table.add_section()
    table.add_row(f"{len(wanted)} runs", "", str(left))
    return table


def _show(console: Console, results: list[papers.Result]) -> None:
    for result in results:
        for shown in result.shown:
            console.print(shown, soft_wrap=isinstance(shown, str))
        for note in result.notes:
            console.print(f"  {note}", soft_wrap=True)
        console.print(f"  in {', '.join(map(str, result.files))}\n", soft_wrap=True)
