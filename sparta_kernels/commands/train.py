"""`sparta train`: a network, standard or adversarially."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import attack as attacks
from .. import backends, data, report, training
from ..attack import checks
from ..attack.prepare import PRECISIONS_ON_CPU
from ..nn import ACTIVATIONS
from . import launch, options, run_files
from .options import DataName, Device, Eps, Json, Root, Seed, Threads

_PAPERS = training.Settings()
# The headings of --help.
_images = partial(typer.Option, rich_help_panel="Images")
_network = partial(typer.Option, rich_help_panel="The network")
_update = partial(typer.Option, rich_help_panel="Learning")
_loss = partial(typer.Option, rich_help_panel="The loss")
_attack = partial(typer.Option, rich_help_panel="The attack")
_machine = partial(typer.Option, rich_help_panel="The machine")
_stored = partial(typer.Option, rich_help_panel="What is stored and shown")


def train(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="File for the network and all that is needed to go on."),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=run_files.configure,
            metavar="FILE",
            help="Take options from this TOML file, such as a run stores; those given here too go first.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from CHECKPOINT, with the settings that it began with.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again though CHECKPOINT exists.")] = False,
    data_name: DataName = _PAPERS.data,
    root: Root = None,
    augment: Annotated[
        bool, _images("--augment/--no-augment", help="Crop and flip training images as is usual for the data set.")
    ] = _PAPERS.augment,
    model: Annotated[str, _network(help=f"Network: {', '.join(training.MODELS)}.")] = _PAPERS.model,
    activation: Annotated[
        str,
        _network(help=f"What stands at the sites, with options as in sparta:share=2: {', '.join(ACTIVATIONS)}."),
    ] = _PAPERS.activation,
    sites: Annotated[str, _network(help="Groups and blocks whose last ReLU it replaces.")] = _PAPERS.sites,
    width: Annotated[int, _network(min=1, max=4096, help="Channels of the first group.")] = _PAPERS.width,
    sparta_from: Annotated[
        str, _network(metavar="FILE", help="Begin with the SPARTA activations of this checkpoint, site by site.")
    ] = _PAPERS.sparta_from,
    freeze_sparta: Annotated[
        bool, _network("--freeze-sparta/--no-freeze-sparta", help="Leave those as they are.")
    ] = _PAPERS.freeze_sparta,
    epochs: Annotated[
        int, _update(min=1, help="Passes over the training images; --resume may raise it (milestones, constant).")
    ] = _PAPERS.epochs,
    batch_size: Annotated[
        int, _update(min=3, help="Images in a batch, of all processes together, at most.")
    ] = _PAPERS.batch_size,
    learning_rate: Annotated[float, _update(help="The highest learning rate.")] = _PAPERS.learning_rate,
    schedule: Annotated[str, _update(help=f"Its course: {', '.join(training.SCHEDULES)}.")] = _PAPERS.schedule,
    milestones: Annotated[
        Any,
        _update(parser=options.integers, metavar="EPOCHS", help="Epochs after which it drops to a tenth."),
    ] = "30,60",
    warmup: Annotated[int, _update(min=0, help="Epochs over which it first rises in a line.")] = _PAPERS.warmup,
    momentum: Annotated[float, _update(help="Momentum of SGD.")] = _PAPERS.momentum,
    nesterov: Annotated[
        bool, _update("--nesterov/--no-nesterov", help="Nesterov's form of momentum.")
    ] = _PAPERS.nesterov,
    weight_decay: Annotated[float, _update(help="Weight decay of SGD.")] = _PAPERS.weight_decay,
    ema: Annotated[
        float, _update(help="Decay of a moving average of the weights, which is then tested; 0: none.")
    ] = _PAPERS.ema,
    loss: Annotated[str, _loss(help=f"Loss: {', '.join(training.LOSSES)}.")] = _PAPERS.loss,
    trades_beta: Annotated[float, _loss(help="Weight of the robust part of TRADES.")] = _PAPERS.trades_beta,
    label_smoothing: Annotated[
        float, _loss(help="Share of the target spread over all classes.")
    ] = _PAPERS.label_smoothing,
    attack: Annotated[
        str, _attack(help=f"Images to train on: {', '.join(training.ATTACKS)} (none: as they are).")
    ] = _PAPERS.attack,
    eps: Eps = "16/255",
    attack_steps: Annotated[int, _attack(min=1, help="Steps of that attack.")] = _PAPERS.attack_steps,
    robust_images: Annotated[
        int, _attack(min=0, help="First test images that are attacked in the same way after every epoch.")
    ] = 0,
    seed: Seed = _PAPERS.seed,
    device: Device = "cpu",
    threads: Threads = None,
    backend: Annotated[str, _machine(help=f"What computes: {', '.join(backends.NAMES)}.")] = "auto",
    precision: Annotated[
        str, _machine(help=f"Of attack and update: {', '.join(attacks.PRECISIONS)} (tf32, fp16: on a GPU).")
    ] = _PAPERS.precision,
    save_every: Annotated[
        float, _stored(min=0, metavar="SECONDS", help="Store inside an epoch after so long; 0: only at its end.")
    ] = 600,
    log_dir: Annotated[
        Path | None, _stored(metavar="FOLDER", help="Write events for TensorBoard and metrics.csv here.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Train a network, normally or adversarially.

    It is stored after every epoch. Stop it by Ctrl-C or SIGTERM at any moment: it stores its last step, and --resume
    goes on from there.

    Beside CHECKPOINT, NAME.safetensors, say, NAME.toml keeps the options, for --config, and NAME.csv has a line for
    each epoch. By torchrun, several processes share every batch: torchrun --standalone --no-python --nproc-per-node 2
    sparta train ...
    """
    given = locals()
    place = options.device(device, threads)
    options.check_backend(backend, place)
    if resume and overwrite:
        raise typer.BadParameter("cannot be combined with --overwrite", param_hint="--resume")
    with options.naming_the_option(name="data"):
        data.describe(data_name)
    with options.naming_the_option(name="activation"):
        names = {field.name for field in dataclasses.fields(training.Settings)} - {"data"}
        settings = training.Settings(data=data_name, **{name: given[name] for name in names})
        if place.type == "cpu":
            checks.choice("train", "precision", precision, PRECISIONS_ON_CPU)
        checks.real("train", "save_every", save_every, "finite and at least 0", low=0.0, high=math.inf)
        with torch.device("meta"):  # to see whether it can be, without the memory and the time
            network = training.build_model(settings.model, training.model_arguments(settings))
    machine = ("root", "device", "threads", "backend", "robust_images", "save_every", "log_dir")
    files = run_files.RunFiles(checkpoint, log_dir, settings.as_dict() | {name: given[name] for name in machine})
    source = Path(sparta_from) if sparta_from else None
    files.check(config, source, options.file(json_file), resume, overwrite)
    history: list[training.Epoch] = []
    if resume:
        with options.naming_the_checkpoint("CHECKPOINT"):
            _, history = training.read_run(settings, checkpoint)
    elif source is not None:
        with (
            options.naming_the_option(model="sparta_from", path="sparta_from"),
            options.naming_the_checkpoint("--sparta-from"),
        ):
            training.transfer(network, source, freeze_sparta)

    console, stored = options.console(json_file), resume
    progress = training.TrainingProgress(options.progress_console(), settings)
    try:
        log = training.TrainingLog(files.tables, log_dir, history) if launch.here().rank == 0 else None
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--log-dir") from error

    def on_batch(batch: training.Batch) -> None:
        progress.batch(batch)
        if log is not None:
            log.batch(batch)

    def on_epoch(epoch: training.Epoch) -> None:
        progress.epoch(epoch)
        if log is not None:
            log.epoch(epoch)

    def on_store() -> None:
        nonlocal stored
        stored = True
        files.write_configuration()
        if log is not None:
            log.begin()

    try:
        with backends.use_backend(backend), launch.process_group(place), progress:
            history = training.train(
                settings,
                checkpoint,
                root=root,
                resume=resume,
                overwrite=overwrite,
                device=place,
                save_every=save_every or None,
                robust_images=robust_images,
                on_batch=on_batch,
                on_epoch=on_epoch,
                on_store=on_store,
            )
        if log is not None:
            log.begin()  # a run that was done before stores nothing
    except KeyboardInterrupt:
        if launch.here().rank > 0:
            raise typer.Exit(options.INTERRUPTED) from None
        options.end(f"interrupted; {_kept(checkpoint, stored)}", options.INTERRUPTED)
    except (ImportError, data.DataError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    except training.TrainingDiverged as error:
        options.end(f"{error}; try a lower --learning-rate", options.FAILED)
    except ValueError as error:
        # The attack on it may be the first to meet what is no longer finite.
        if re.match(r"\w+: model must \w+ finite ", str(error)):
            options.end(f"{error}; try a lower --learning-rate", options.FAILED)
        if not str(error).startswith("training: "):
            raise
        with options.naming_the_option():  # what only the images and the processes tell of
            raise
    finally:
        if log is not None:
            log.close()
    results = {"checkpoint": str(checkpoint), "history": [vars(epoch) for epoch in history]}
    # Before the line: whoever reads standard output may be gone, which ends the program.
    options.save(json_file, options.document("train", settings.as_dict(), results, place, seed))
    last = history[-1]
    robust = "" if last.robust_error is None else f"robust test error {report.percent(last.robust_error)}, "
    found = f"{robust}clean test error {report.percent(last.clean_error)}"
    console.print(f"{checkpoint}: {_count(len(history), 'epoch')}, {found}", soft_wrap=True)


def _kept(checkpoint: Path, stored: bool) -> str:
    """What is there of a run that was interrupted."""
    if not stored:
        return "nothing was written"
    run = training.read_metadata(checkpoint)
    steps = run.get("position", {}).get("step", 0)
    more = f" and {_count(steps, 'step')} of the next" if steps else ""
    return f"{checkpoint} holds {_count(run['epoch'], 'epoch')}{more}; go on with --resume"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
