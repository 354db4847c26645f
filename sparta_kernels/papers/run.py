"""Trains and evaluates what is missing, run by run; after any interruption the same call resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import attack, data, evaluation, training
from ..backends import use_backend
from .experiments import Need, Run
from .progress import RunsProgress
from .runs import Runs


def work(
    runs: Runs,
    wanted: Mapping[Run, Need],
    *,
    root: Path | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    progress: RunsProgress | None = None,
) -> dict[Run, str]:
    """Train and evaluate every run as far as needed and not done yet.

    Args:
        runs: the folder that keeps them.
        wanted: what is needed of each, sources first (`experiments.needs`).
        root: folder with the data sets' files.
        device, backend: what computes.
        progress: receives progress.

    Returns:
        For every run that could not be finished, why: its loss was not finite, or another process is using it.

    Raises:
        CheckpointError, OutcomesError: a file in the folder is damaged or of another run.
        ImportError, OSError, ValueError: as `data.load` and `training.train`.
    """
    problems: dict[Run, str] = {}
    tests: dict[str, tuple[Tensor, Tensor]] = {}
    for run, need in wanted.items():
        if runs.state(run, need).done:
            continue
        if run.source in problems:
            problems[run] = f"{run.source.name}, which it takes SPARTA from, is not there"
            continue
        try:
            with runs.claimed(run):
                if progress is not None:
                    progress.run(run, need)
                _train(runs, run, root, device, backend, progress)
                if need is not Need.TRAINED:
                    if run.data not in tests:
                        test = data.load(run.data, root, "test")
                        tests = {run.data: (test[0][: runs.plan.images], test[1][: runs.plan.images])}
                    _evaluate(runs, run, need, tests[run.data], device, backend, progress)
        except (training.TrainingDiverged, attack.NotFinite, BlockingIOError) as error:
            problems[run] = str(error)
    return problems


def _train(
    runs: Runs,
    run: Run,
    root: Path | None,
    device: torch.device | str,
    backend: str,
    progress: RunsProgress | None,
) -> None:
    path = runs.checkpoint(run)
    if runs.epochs_done(run) == run.epochs:
        return
    for need in (Need.CLEAN, Need.ATTACKED):  # left by a network that is there no more
        runs.outcomes(run, need).unlink(missing_ok=True)
    source = None if run.source is None else runs.checkpoint(run.source).resolve()
    with use_backend(backend):
        training.train(
            run.settings(source),
            path,
            root=root,
            resume=path.exists(),
            device=device,
            on_batch=None if progress is None else progress.batch,
        )


def _evaluate(
    runs: Runs,
    run: Run,
    need: Need,
    test: tuple[Tensor, Tensor],
    device: torch.device | str,
    backend: str,
    progress: RunsProgress | None,
) -> None:
    path = runs.outcomes(run, need)
    model, _ = training.load_checkpoint(runs.checkpoint(run), device)
    images, labels = (part.to(device) for part in test)

    def evaluate(resume: bool) -> None:
        evaluation.evaluate(
            model,
            images,
            labels,
            **runs.attack(run, need),
            # Of the quick plan's few images one batch; else what memory holds.
            batch_size=runs.plan.images,
            backend=backend,
            outcomes=path,
            resume=resume,
            overwrite=not resume,
            progress=None if progress is None else progress.evaluated,
        )

    try:
        evaluate(resume=True)
    except evaluation.OutcomesError:  # of another number of threads, say: minutes of work, and never mixed up
        evaluate(resume=False)
