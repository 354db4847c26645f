"""`sparta evaluate`: networks on clean images and under attack."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import TextColumn, TimeRemainingColumn

from .. import attack, backends, data, evaluation, report, training
from ..attack import checks
from ..attack.prepare import PRECISIONS_ON_CPU
from ..nn import ResNet
from . import launch, options
from .options import DataName, Device, Eps, Json, Root, Seed, Threads

_SECONDS_BETWEEN_LINES = 10


_test_images = partial(typer.Option, rich_help_panel="Images")
_attack = partial(typer.Option, rich_help_panel="The attack")
_precision = partial(typer.Option, rich_help_panel="Precision")
_machine = partial(typer.Option, rich_help_panel="The machine")
_stored = partial(typer.Option, rich_help_panel="What is stored and shown")


def _images(text: str) -> int | None:
    """A number of images, or None for "auto"."""
    try:
        number = None if text == "auto" else int(text)
    except ValueError:
        number = 0
    if number is not None and number < 1:
        raise typer.BadParameter(f"must be an integer >= 1 or auto, got {text!r}")
    return number


def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINTS", help="Networks that `sparta train` stored.")
    ],
    weights: Annotated[
        str,
        typer.Option(
            help=f"Of the networks: {', '.join(training.WEIGHTS)} (auto: the average, ema, if the run kept one)."
        ),
    ] = "auto",
    data_name: DataName = "digits",
    root: Root = None,
    limit: Annotated[int | None, _test_images(min=1, help="Take only so many of the first test images.")] = None,
    preset: Annotated[
        str, _attack(help=f"Which paper's step size: {', '.join(attack.PRESETS)} (1/255; max(1/255, eps/steps)).")
    ] = "sparta",
    steps: Annotated[int, _attack(min=1, help="Steps of the attack.")] = 50,
    report_at: Annotated[
        Any,
        _attack(
            parser=options.integers,
            metavar="STEPS",
            help="When errors are reported, rising; by default 10, 30, 50 as far as there are, and the last.",
        ),
    ] = None,
    eps: Eps = "16/255",
    step_size: Annotated[Any, options.pixels("Step of the attack, instead of the preset's")] = None,
    untargeted: Annotated[
        bool, _attack("--untargeted", help="Drive images away from their class, not to another one.")
    ] = False,
    restarts: Annotated[int, _attack(min=1, max=2**24, help="Attacks on each image, of which the worst counts.")] = 1,
    precision: Annotated[
        str, _precision(help=f"Of the gradients: {', '.join(attack.PRECISIONS)}. Predictions are fp32.")
    ] = "fp32",
    engine: Annotated[str, _machine(help=f"What runs the attack: {', '.join(attack.ENGINES)}.")] = "auto",
    batch_size: Annotated[
        Any,
        _machine(parser=_images, metavar="IMAGES", help="Images in a batch; auto: what memory holds and helps."),
    ] = "auto",
    parity_images: Annotated[
        int, _precision(min=0, help="First images on which another precision is compared with fp32; 0: none.")
    ] = 256,
    parity_tolerance: Annotated[
        float, _precision(min=0, max=100, help="How far the errors may differ there, in percentage points.")
    ] = 1.0,
    backend: Annotated[
        list[str] | None, _machine(help=f"What computes, once for each: {', '.join(backends.NAMES)}.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    outcomes: Annotated[
        Path | None,
        _stored(
            metavar="PATH",
            help="Keep every image's outcome here, after each batch: FILE.npz for one network and backend, "
            "a folder with one file for each otherwise.",
        ),
    ] = None,
    resume: Annotated[bool, _stored("--resume", help="Go on from what --outcomes holds.")] = False,
    overwrite: Annotated[bool, _stored("--overwrite", help="Begin anew though --outcomes exists.")] = False,
    json_file: Json = None,
    plot: Annotated[Path | None, _stored(help="Draw the loss at every iteration here (.png, .pdf).")] = None,
) -> None:
    """Test networks on clean images and under PGD.

    One attack gives the errors at all iterations that are reported.

    By torchrun, several processes share the images: torchrun --standalone --no-python --nproc-per-node 2 sparta
    evaluate ...
    """
    place = options.device(device, threads)
    chosen = list(dict.fromkeys(backend or ["auto"]))
    for name in chosen:
        options.check_backend(name, place)
    with options.naming_the_option(name="preset"):
        preset_step = attack.preset(preset, eps, steps).step_size
        step_size = checks.step("evaluate", "step_size", preset_step if step_size is None else step_size)
        reported = checks.iterates("evaluate", report_at, steps)
        on_gpu = place.type == "cuda"
        checks.choice("evaluate", "precision", precision, attack.PRECISIONS if on_gpu else PRECISIONS_ON_CPU)
        checks.choice("evaluate", "engine", engine, tuple(e for e in attack.ENGINES if on_gpu or e != "graph"))
    if plot is not None:
        try:
            report.check_plot(plot)
        except (ValueError, ImportError) as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from error
    runs = _runs(checkpoints, chosen, outcomes)
    kept = [] if outcomes is None else _check_outcomes(outcomes, [run.outcomes for run in runs], resume, overwrite)
    options.check_outputs(
        [("--json", options.file(json_file)), ("--plot", plot), *(("--outcomes", path) for path in kept)],
        inputs=[("CHECKPOINTS", path) for path in checkpoints],
    )
    if outcomes is None and (resume or overwrite):
        raise typer.BadParameter("needs --outcomes", param_hint="--resume" if resume else "--overwrite")
    if resume and overwrite:
        raise typer.BadParameter("cannot be combined with --overwrite", param_hint="--resume")
    with options.naming_the_option(name="data"):
        dataset = data.describe(data_name)
    models = {path: _load_model(path, dataset, place, weights) for path in checkpoints}
    images, labels = (part[:limit].to(place) for part in options.load(data_name, root, "test"))
    if outcomes is not None and len(runs) > 1:
        outcomes.mkdir(exist_ok=True)

    settings = {
        "weights": weights,
        "data": data_name,
        "split": "test",
        "images": len(images),
        "preset": preset,
        "eps": eps,
        "step_size": step_size,
        "steps": steps,
        "report_at": reported,
        "targeted": not untargeted,
        "restarts": restarts,
        "precision": precision,
        "engine": engine,
        "batch_size": batch_size or "auto",
        "parity_images": parity_images,
        "parity_tolerance": parity_tolerance,
    }
    results: list[dict[str, Any]] = []

    def document() -> dict[str, Any]:
        return options.document("evaluate", settings, results, place, seed)

    try:
        with launch.process_group(place):
            for run in runs:
                used = backends.choose(place, run.backend).backend
                label = used if used == run.backend else f"{run.backend} ({used})"
                display = _Display(f"{run.model}, {label}", len(images))
                with _ending(run, display, len(results)), display:
                    found = evaluation.evaluate(
                        models[run.checkpoint],
                        images,
                        labels,
                        eps=eps,
                        step_size=step_size,
                        steps=steps,
                        report_at=reported,
                        targeted=not untargeted,
                        restarts=restarts,
                        precision=precision,
                        engine=engine,
                        batch_size=batch_size,
                        seed=seed,
                        backend=run.backend,
                        parity_images=parity_images,
                        parity_tolerance=parity_tolerance,
                        outcomes=run.outcomes,
                        resume=resume,
                        overwrite=overwrite,
                        progress=display.show,
                    )
                row = {"model": run.model, "checkpoint": str(run.checkpoint), "backend": label}
                results.append(row | found.as_dict())
                if json_file != "-":
                    options.save(json_file, document())
    finally:  # whatever ends a later evaluation, those before it are told
        if results:
            _show(document(), json_file, plot)
    failed = [row for row in results if row["parity"] and not row["parity"]["passed"]]
    if failed and launch.here().rank > 0:
        raise typer.Exit(options.FAILED)  # process 0 says why
    if failed:
        options.end(
            f"parity: {precision} differs from fp32 by more than {parity_tolerance:g} percentage points on "
            + ", ".join(f"{row['model']} with {row['backend']}" for row in failed),
            options.FAILED,
        )


def _show(document: dict[str, Any], json_file: str | None, plot: Path | None) -> None:
    """Draw and print what was found; the table last, since whoever reads it may be gone, which ends the program."""
    if json_file == "-":
        options.save(json_file, document)
    try:
        if plot is not None and launch.here().rank == 0:
            report.plot_losses(plot, document)
    finally:
        console, results = options.console(json_file), document["results"]
        console.print(report.evaluation_table(results, report.evaluation_title(document["settings"]), console.width))
        for line in report.evaluation_notes(results):
            console.print(line, soft_wrap=True)


@dataclass(frozen=True)
class _Run:
    """One network with one backend: its short name, and the file for its outcomes, if they are kept."""

    checkpoint: Path
    model: str
    backend: str
    outcomes: Path | None


def _runs(checkpoints: Sequence[Path], chosen: Sequence[str], outcomes: Path | None) -> list[_Run]:
    """What there is to evaluate. With several runs `outcomes` is a folder, of files NETWORK.BACKEND.npz."""
    stems = [path.stem for path in checkpoints]
    several = len(checkpoints) * len(chosen) > 1
    if outcomes is not None and several == (outcomes.suffix == ".npz"):
        allowed = "a folder for several networks or backends" if several else "a file .npz for one network and backend"
        raise typer.BadParameter(f"must be {allowed}, got {outcomes}", param_hint="--outcomes")
    runs: list[_Run] = []
    for number, path in enumerate(checkpoints, 1):
        unique = stems.count(path.stem) == 1
        for name in chosen:
            file = f"{path.stem if unique else f'{path.stem}-{number}'}.{name}.npz"
            kept = outcomes / file if outcomes is not None and several else outcomes
            for run in runs:
                if kept is not None and kept == run.outcomes:
                    raise typer.BadParameter(
                        f"would have one file for {run.checkpoint} and {path}: {kept}; rename a network",
                        param_hint="--outcomes",
                    )
            runs.append(_Run(path, path.stem if unique else str(path), name, kept))
    return runs


def _check_outcomes(outcomes: Path, files: Sequence[Path | None], resume: bool, overwrite: bool) -> list[Path]:
    """The paths that must be writable now; files that exist are only for --resume and --overwrite."""
    paths = [path for path in files if path is not None]
    for path in paths:
        found = evaluation.stored(path)
        if found and not resume and not overwrite:
            raise typer.BadParameter(
                f"{found[0]} exists; add --resume or --overwrite, or name another", param_hint="--outcomes"
            )
    if outcomes in paths or outcomes.is_dir():
        return paths
    if outcomes.exists():
        raise typer.BadParameter(f"must be a folder, got the file {outcomes}", param_hint="--outcomes")
    return [outcomes]  # the folder, yet to be made


@contextmanager
def _ending(run: _Run, display: _Display, before: int) -> Iterator[None]:
    """End with a message where the evaluation itself cannot go on; `before`: how many had been done."""
    try:
        yield
    except KeyboardInterrupt:
        started = launch.here()
        if started.rank > 0:
            raise typer.Exit(options.INTERRUPTED) from None
        kept = f"nothing of {display.name} was written" if before else "nothing was written"
        if run.outcomes is not None and started.count > 1:
            kept = f"what was stored is in {run.outcomes} and beside it; go on with --resume"
        elif run.outcomes is not None and run.outcomes.exists():
            kept = (
                f"{display.images} of {display.count} images of {run.model} are in {run.outcomes}; go on with --resume"
            )
        options.end(f"interrupted; {kept}", options.INTERRUPTED)
    except evaluation.OutcomesError as error:
        raise typer.BadParameter(str(error), param_hint="--outcomes") from error
    except ValueError as error:
        # A network that gives NaN, say: only running it tells.
        if not re.match(r"\w+: model must ", str(error)):
            raise
        options.end(f"{run.checkpoint}: {error}", options.FAILED)
    except Exception as error:
        failure = options.machine_failure(error)
        if failure is None:
            raise
        options.end(f"{display.name}: {failure}", options.FAILED)


class _Display:
    """A bar over the model passes of one evaluation, with its speed and errors so far.

    Where standard error is no terminal, a line now and then.
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.images = name, count, 0
        console = options.progress_console()
        self._bars = report.progress_bars(console, TextColumn("ETA"), TimeRemainingColumn())
        self._task = self._bars.add_task(name, total=None, state="")
        self._told = False
        self._last_line = 0.0

    def __enter__(self) -> _Display:
        return self  # drawn once there is something to tell: a run that is refused has one line, the reason

    def __exit__(self, *error: object) -> None:
        if self._told and self._bars.console.is_terminal:
            self._bars.stop()

    def show(self, progress: evaluation.Progress) -> None:
        """A model pass is done."""
        if not self._told:
            self._told = True
            if self._bars.console.is_terminal:
                self._bars.start()
            size, reason = progress.batch
            self._bars.console.print(f"batches of {size} images ({reason})", highlight=False, soft_wrap=True)
        self.images = progress.images
        state = ""
        if progress.clean_error is not None and progress.robust_error is not None:
            state = f"clean {report.percent(progress.clean_error)} robust {report.percent(progress.robust_error)}"
        if progress.images_per_second is not None:
            state += f" {progress.images_per_second:.3g} images/s"
        self._bars.update(self._task, completed=progress.done, total=progress.total, state=state)
        late = time.monotonic() > self._last_line + _SECONDS_BETWEEN_LINES
        if not self._bars.console.is_terminal and (late or 0 < progress.total == progress.done):
            self._last_line = time.monotonic()
            known = f"{self.name}: {self.images} of {self.count} images, {progress.done} of {progress.total} passes"
            self._bars.console.print(" ".join([known, *state.split()]), soft_wrap=True)


def _load_model(path: Path, dataset: data.Dataset, device: torch.device, weights: str) -> ResNet:
    """The network in this file, which must fit the data set."""
    with options.naming_the_option(), options.naming_the_checkpoint("CHECKPOINTS"):
        model, _ = training.load_checkpoint(path, device, weights)
    shape = (model.in_channels, model.linear.out_features)
    if shape != (dataset.shape[0], dataset.classes):
        raise typer.BadParameter(
            f"{dataset.name} has {dataset.shape[0]} channels and {dataset.classes} classes, "
            f"but {path} was trained for {shape[0]} and {shape[1]}",
            param_hint="--data",
        )
    return model
