"""`sparta train`: a network, standard or adversarially."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import backends, data, report, training
from . import launch, options
from .options import DataName, Device, Eps, Json, Root, Seed, Threads


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
        Any, typer.Option(parser=options.integers, metavar="EPOCHS", help="Epochs after which it drops to a tenth.")
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
    if launch.here().count > 1:
        options.end("train: one process trains a network; start it without torchrun", options.FAILED)
    place = options.device(device, threads)
    options.check_backend(backend, place)
    options.check_outputs([("CHECKPOINT", checkpoint), ("--json", options.file(json_file))])
    if resume and overwrite:
        raise typer.BadParameter("cannot be combined with --overwrite", param_hint="--resume")
    if checkpoint.exists() and not resume and not overwrite:
        raise typer.BadParameter(
            f"{checkpoint} exists; add --resume or --overwrite, or name another file", param_hint="CHECKPOINT"
        )
    with options.naming_the_option(name="data"):
        data.describe(data_name)
    with options.naming_the_option(name="activation"):
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
        with options.naming_the_checkpoint("CHECKPOINT"):
            training.read_run(settings, checkpoint)

    console = options.console(json_file)
    progress = training.TrainingProgress(options.progress_console(), settings)
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
        options.end(f"interrupted; {kept}", options.INTERRUPTED)
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    except training.TrainingDiverged as error:
        options.end(f"{error}; try a lower --learning-rate", options.FAILED)
    except ValueError as error:
        # The attack on it may be the first to meet what is no longer finite.
        if not re.match(r"\w+: model must \w+ finite ", str(error)):
            raise
        options.end(f"{error}; try a lower --learning-rate", options.FAILED)
    results = {"checkpoint": str(checkpoint), "history": [vars(epoch) for epoch in history]}
    # Before the line: whoever reads standard output may be gone, which ends the program.
    options.save(json_file, options.document("train", settings.as_dict(), results, place, seed))
    console.print(f"{checkpoint}: {len(history)} epochs, clean test error {report.percent(history[-1].clean_error)}")
