"""The command `sparta`: what is installed, training, and robust evaluation."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from . import backends, build_info, data, report, training
from .attack import checks
from .data.files import check_writable
from .evaluation import evaluate as evaluate_model
from .nn import ResNet

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

FAILED = 1
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def _fraction(text: str) -> float:
    """A number, or a fraction such as 16/255."""
    try:
        over, _, under = text.partition("/")
        number = float(over) / float(under) if under else float(text)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"must be a number or a fraction such as 16/255, got {text!r}") from None
    if not math.isfinite(number):
        raise typer.BadParameter(f"must be finite, got {text!r}")
    return number


def _integers(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"must be integers such as 30,60, got {text!r}") from None


def _pixels(help: str) -> Any:
    return typer.Option(parser=_fraction, metavar="NUMBER", help=f"{help}, in pixel units.")


DataName = Annotated[str, typer.Option("--data", help=f"Data set: {', '.join(data.DATASETS)}.")]
Root = Annotated[Path | None, typer.Option(help="Folder with the data set's files, where it needs one.")]
Eps = Annotated[Any, _pixels("Radius of the attack")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; by default as many as cores.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Save as JSON here; - prints it.")]


@app.command()
def info(json_file: Json = None) -> None:
    """Show versions, devices, and the backend that each operation would use."""
    _check_outputs({"--json": _file(json_file)})
    facts = build_info()
    _console(json_file).print(report.facts_table(facts, title="sparta_kernels"))
    _save(json_file, facts)


@app.command()
def train(
    checkpoint: Annotated[Path, typer.Argument(help="File to write after every epoch (.safetensors).")],
    data_name: DataName = "digits",
    root: Root = None,
    model: Annotated[str, typer.Option(help=f"Network: {', '.join(training.MODELS)}.")] = "resnet18",
    activation: Annotated[str, typer.Option(help="What stands at the sites, such as sparta.")] = "sparta",
    sites: Annotated[str, typer.Option(help="Groups and blocks whose last ReLU it replaces.")] = "G1234.B2",
    width: Annotated[int, typer.Option(min=1, max=4096, help="Channels of the first group.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 90,
    batch_size: Annotated[int, typer.Option(min=3, help="Images in a batch, at most.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 0.1,
    schedule: Annotated[str, typer.Option(help=f"Its course: {', '.join(training.SCHEDULES)}.")] = "milestones",
    milestones: Annotated[
        Any, typer.Option(parser=_integers, metavar="EPOCHS", help="Epochs after which it drops to a tenth.")
    ] = "30,60",
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 1e-4,
    attack: Annotated[
        str, typer.Option(help=f"Images to train on: {', '.join(training.ATTACKS)} (none: as they are).")
    ] = "xie2019",
    eps: Eps = "16/255",
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of that attack.")] = 10,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from CHECKPOINT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again though CHECKPOINT exists.")] = False,
    backend: Annotated[str, typer.Option(help=f"What computes: {', '.join(backends.NAMES)}.")] = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Train a network, standard or adversarially, and store it after every epoch."""
    place = _device(device, threads)
    _check_backend(backend, place)
    _check_outputs({"CHECKPOINT": checkpoint, "--json": _file(json_file)})
    if resume and overwrite:
        raise typer.BadParameter("cannot be combined with --overwrite", param_hint="--resume")
    if checkpoint.exists() and not resume and not overwrite:
        raise typer.BadParameter(
            f"{checkpoint} exists; add --resume or --overwrite, or name another file", param_hint="CHECKPOINT"
        )
    with _naming_the_option(name="data"):
        data.describe(data_name)
    with _naming_the_option(name="activation"):
        settings = training.Settings(
            data=data_name,
            model=model,
            activation=activation,
            sites=sites,
            width=width,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            milestones=milestones,
            momentum=momentum,
            weight_decay=weight_decay,
            attack=attack,
            eps=eps,
            attack_steps=attack_steps,
            seed=seed,
        )
        with torch.device("meta"):  # to see whether it can be, without the memory and the time
            training.build_model(settings.model, training.model_arguments(settings))
    if resume:
        with _naming_the_checkpoint("CHECKPOINT"):
            training.read_run(settings, checkpoint)

    console = _console(json_file)
    progress = training.TrainingProgress(_progress_console(), settings)
    try:
        with backends.use_backend(backend), progress:
            history = training.train(
                settings,
                checkpoint,
                root=root,
                resume=resume,
                overwrite=overwrite,
                device=place,
                on_batch=progress.batch,
                on_epoch=progress.epoch,
            )
    except KeyboardInterrupt:
        stored = progress.epochs or resume
        kept = f"the last whole epoch is in {checkpoint}" if stored else "nothing was written"
        _end(f"interrupted; {kept}", INTERRUPTED)
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    except training.TrainingDiverged as error:
        _end(f"{error}; try a lower --learning-rate", FAILED)
    console.print(
        f"{checkpoint}: {len(history)} epochs, clean test error {report.percent(history[-1].clean_error)}",
        highlight=False,
    )
    results = {"checkpoint": str(checkpoint), "history": [vars(epoch) for epoch in history]}
    _save(json_file, _document("train", settings.as_dict(), results, place, seed))


@app.command()
def evaluate(
    checkpoints: Annotated[list[Path], typer.Argument(help="Networks that `sparta train` stored.")],
    data_name: DataName = "digits",
    root: Root = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack; 10, 30 and 50 are reported.")] = 50,
    eps: Eps = "16/255",
    step_size: Annotated[Any, _pixels("Step of the attack")] = "1/255",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    backend: Annotated[
        list[str] | None, typer.Option(help=f"What computes, once for each: {', '.join(backends.NAMES)}.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss at every iteration here (.png, .pdf).")] = None,
) -> None:
    """Evaluate networks on clean test images and under targeted PGD, all iterations from one run."""
    place = _device(device, threads)
    chosen = backend or ["auto"]
    for name in chosen:
        _check_backend(name, place)
    with _naming_the_option():
        checks.pixels("evaluate", "eps", eps)
        checks.step("evaluate", "step_size", step_size)
    if plot is not None:
        try:
            report.check_plot(plot)
        except (ValueError, ImportError) as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from error
    _check_outputs({"--json": _file(json_file), "--plot": plot}, inputs=checkpoints)
    with _naming_the_option(name="data"):
        dataset = data.describe(data_name)
    models = _load_models(checkpoints, dataset, place)
    try:
        images, labels = (part.to(place) for part in data.load(data_name, root, "test"))
    except (ImportError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error

    results = []
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=_progress_console(),
        ) as bars:
            for name, (path, network) in models.items():
                for backend_name in chosen:
                    used = backends.choose(place, backend_name).backend
                    label = used if used == backend_name else f"{backend_name} ({used})"
                    task = bars.add_task(f"{name}, {label}", total=None)
                    found = evaluate_model(
                        network,
                        images,
                        labels,
                        eps=eps,
                        step_size=step_size,
                        steps=steps,
                        batch_size=batch_size,
                        seed=seed,
                        backend=backend_name,
                        progress=partial(_advance, bars, task),
                    )
                    row = {"model": name, "checkpoint": str(path), "backend": label}
                    results.append(row | found.as_dict())
    except KeyboardInterrupt:
        _end("interrupted; nothing was written", INTERRUPTED)
    settings = {
        "data": data_name,
        "split": "test",
        "images": len(images),
        "eps": eps,
        "step_size": step_size,
        "steps": steps,
        "batch_size": batch_size,
    }
    title = f"{len(images)} {data_name} test images, eps {eps * 255:g}/255, step {step_size * 255:g}/255"
    _console(json_file).print(report.evaluation_table(results, title))
    document = _document("evaluate", settings, results, place, seed)
    _save(json_file, document)
    if plot is not None:
        report.plot_losses(plot, document)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 a bad argument (one line says which), 130 Ctrl-C."""
    try:
        status = app(args=arguments, prog_name="sparta", standalone_mode=False)
    except typer.Abort:
        status = INTERRUPTED
    except OSError as error:  # a full disk, say: arguments were checked before
        print(f"sparta: {error}", file=sys.stderr)
        status = FAILED
    except Exception as error:
        # Older Typer raises Click's exceptions, newer its own; both know their message and exit status.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        message = error.format_message()
        line = message if message.startswith("Usage") else f"sparta: {' '.join(message.split())}"
        print(line, file=sys.stderr)
        status = error.exit_code
    sys.exit(status)


@contextmanager
def _naming_the_option(**options: str) -> Iterator[None]:
    """Turn "somewhere: name must ..." into a message about --name, or the option `options` gives for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        match = re.fullmatch(r"\w+: (?:each of )?(\w+) (must.*)", str(error), flags=re.DOTALL)
        if match is None:
            raise typer.BadParameter(str(error)) from error
        option = options.get(match[1], match[1]).replace("_", "-")
        raise typer.BadParameter(match[2], param_hint=f"--{option}") from error


def _device(name: str, threads: int | None) -> torch.device:
    """The device called `name`, and as many CPU threads as asked for."""
    with _naming_the_option():
        device = checks.device("sparta", name)
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def _check_backend(name: str, device: torch.device) -> None:
    try:
        backends.choose(device, name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from error


def _check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path] = ()) -> None:
    """Refuse files, by option, that cannot be written or are one another or an input, before the work."""
    taken = [("CHECKPOINTS", path) for path in inputs]
    for option, path in outputs.items():
        if path is None:
            continue
        for other, file in taken:
            if _same_file(path, file):
                raise typer.BadParameter(f"must not be the file of {other}, got {path}", param_hint=option)
        taken.append((option, path))
        try:
            check_writable(path)
        except OSError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error


def _same_file(one: Path, other: Path) -> bool:
    """Whether these are one file, there already (perhaps by two names) or to be."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def _naming_the_checkpoint(argument: str) -> Iterator[None]:
    """Turn a file that is no checkpoint into a message about `argument`."""
    try:
        yield
    except (training.CheckpointError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=argument) from error


def _load_models(paths: Sequence[Path], dataset: data.Dataset, device: torch.device) -> dict[str, tuple[Path, ResNet]]:
    """The networks in these files, by a short name of each; all must fit the data set."""
    models: dict[str, tuple[Path, ResNet]] = {}
    stems = [path.stem for path in paths]
    for path in paths:
        with _naming_the_checkpoint("CHECKPOINTS"):
            model, _ = training.load_checkpoint(path, device)
        shape = (model.in_channels, model.linear.out_features)
        if shape != (dataset.shape[0], dataset.classes):
            raise typer.BadParameter(
                f"{dataset.name} has {dataset.shape[0]} channels and {dataset.classes} classes, "
                f"but {path} was trained for {shape[0]} and {shape[1]}",
                param_hint="--data",
            )
        models[path.stem if stems.count(path.stem) == 1 else str(path)] = (path, model)
    return models


def _document(command: str, settings: Any, results: Any, device: torch.device, seed: int) -> dict[str, Any]:
    return report.document(
        command, settings=settings, results=results, device=str(device), seed=seed, build=build_info()
    )


def _file(json_file: str | None) -> Path | None:
    """The file that --json names, if any."""
    return None if json_file in (None, "-") else Path(json_file)


def _console(json_file: str | None) -> Console:
    """Where tables go: standard output, unless the JSON has it to itself."""
    return Console(stderr=json_file == "-", highlight=False)


def _advance(bars: Progress, task: TaskID, done: int, total: int) -> None:
    bars.update(task, completed=done, total=total)


def _progress_console() -> Console:
    return Console(stderr=True)


def _save(json_file: str | None, content: Any) -> None:
    if json_file == "-":
        print(report.as_json(content), end="")
    elif json_file is not None:
        report.save_json(json_file, content)


def _end(message: str, status: int) -> NoReturn:
    print(f"sparta: {message}", file=sys.stderr)
    raise typer.Exit(status)


if __name__ == "__main__":
    main()
