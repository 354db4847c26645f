"""Clean and PGD-K errors of a network, all K from one trajectory; stored after every batch, shared by processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import attack
from .._version import __version__
from ..attack import Prepared, checks
from ..backends import choose, use_backend
from ..data.files import check_writable
from ..machine import device_name
from ..memory import keep_freed_memory
from ..processes import Processes
from . import result
from .batch_size import BatchSize, find_batch_size
from .batches import Attacker
from .digest import data_digest, model_digest
from .outcomes import Outcomes
from .result import Evaluation
from .run import Progress, run
from .store import Store, keeping


@keep_freed_memory()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float = 1 / 255,
    steps: int = 50,
    report_at: Iterable[int] | None = None,
    targeted: bool = True,
    restarts: int = 1,
    precision: str | None = None,
    engine: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    backend: str = "auto",
    parity_images: int = 256,
    parity_tolerance: float = 1.0,
    outcomes: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Evaluate a network on clean images and under the PGD attack of `attack.pgd`.

    All batches have the same size; the last is padded with copies of its first image, whose results are dropped.
    Rounding depends on the batch size and the number of threads. For equal ones results are the same bit for bit,
    however often a run is stopped and resumed, and however many processes share it. (On a GPU a network's own
    operations may still add in any order; convolutions are made to add in a fixed one.)

    The process keeps the memory that it frees meanwhile (`sparta_kernels.keep_freed_memory`). Where
    torch.distributed has a process group, its processes share the batches: each must call this with the same
    arguments (but its own device), and gets the whole result.

    Args:
        model: in eval mode; takes images in [0, 1], returns (N, classes) logits. It is prepared (`attack.prepare`)
            unless it already is.
        images: (N, C, H, W) with N >= 1; uint8 (divided by 255), or float32 in [0, 1].
        labels: (N,), any integer dtype.
        eps, step_size, steps, report_at, targeted, restarts, seed, engine: as in `attack.pgd`; eps and step_size
            are in pixel units.
        precision: of the gradients, one of `attack.PRECISIONS`. None: "fp32", or what the model was prepared for.
            Predictions, also of clean images, are always computed in fp32.
        batch_size: most images in a batch. None: that of the resumed run, else as many as help and fit in memory
            (`find_batch_size`), in equal batches.
        indices: (N,) indices of the images in their data set, which determine the attack's randomness. None: 0..N-1.
        backend: what computes this package's operations: "auto", "reference", "native", ...
        parity_images: number of first images that are attacked in fp32 too, to compare another precision with it. 0 for
            none.
        parity_tolerance: how many percentage points the errors may differ there at the last reported iterate; the
            result tells whether they do (`Parity.passed`).
        outcomes: a file (.npz) for every image's outcome, see `Outcomes`; rewritten as a whole after each batch. With
            several processes, each writes its own beside it until all are done.
        resume: continue from that file, if it exists; its settings, the model's weights and the images must be the
            same.
        overwrite: start anew although the file exists.
        progress: called at the start, after each model pass, and after each batch.

    Returns:
        An `Evaluation`.

    Raises:
        FileExistsError: `outcomes` exists, and neither `resume` nor `overwrite` is set.
        BlockingIOError: another process is using `outcomes`; the message tells which.
        OutcomesError: `outcomes` cannot be resumed: it is damaged, or of another run.
        OSError: it cannot be written.
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    where = "evaluate"
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        images = images.float() / 255
    checks.model(where, model, images)
    images = checks.images(where, images)
    if not len(images):
        raise ValueError(f"{where}: images must hold at least one image, got shape {tuple(images.shape)}")
    labels = checks.integers(where, "labels", labels, images)
    eps, step_size = checks.pixels(where, "eps", eps), checks.step(where, "step_size", step_size)
    steps = checks.integer(where, "steps", steps, low=1)
    reported = checks.iterates(where, report_at, steps)
    checks.flag(where, "targeted", targeted)
    restarts = checks.integer(where, "restarts", restarts, low=1)
    precision = _precision(where, model, precision)
    checks.choice(where, "engine", engine, attack.ENGINES)
    if batch_size is not None:
        batch_size = checks.integer(where, "batch_size", batch_size, low=1)
    seed = checks.seed(where, seed)
    if indices is None:
        indices = torch.arange(len(images), device=images.device)
    indices = checks.integers(where, "indices", indices, images)
    if int(indices.min()) < 0:
        raise ValueError(f"{where}: indices must be >= 0, got {int(indices.min())}")
    if not isinstance(backend, str):
        raise TypeError(f"{where}: backend must be a string, got {type(backend).__name__}")
    computed = choose(images.device, backend, f"{where}: backend").backend
    parity_images = checks.integer(where, "parity_images", parity_images, low=0)
    parity_images = 0 if precision == "fp32" else min(parity_images, len(images))
    tolerance = checks.real(
        where, "parity_tolerance", parity_tolerance, "at least 0 (percentage points)", low=0.0, high=100.0
    )
    checks.flag(where, "resume", resume)
    checks.flag(where, "overwrite", overwrite)
    checks.callback(where, "progress", progress)
    processes = Processes(images.device)
    path = _path(where, outcomes, resume=resume, overwrite=overwrite)
    kept = keeping(path, resume=resume, overwrite=overwrite, processes=processes)

    options = {"eps": eps, "step_size": step_size, "seed": seed, "targeted": targeted, "restarts": restarts}
    with kept as store, use_backend(backend), _repeatable():
        prepared = model if isinstance(model, Prepared) else attack.prepare(model, precision=precision)
        classes = checks.logits(where, prepared.exact(images[:1]), 1).shape[1]
        checks.within(where, "labels", labels, classes)
        attacker = Attacker(prepared, images, labels, indices, steps, reported, engine, options)
        batch = _batch_size(batch_size, store, attacker, processes)
        settings: dict[str, Any] = {}
        if outcomes is not None:
            settings = options | {
                "images": len(images),
                "data": data_digest(images, labels, indices),
                "model": model_digest(prepared.model),
                "steps": steps,
                "report_at": list(reported),
                "precision": precision,
                "engine": engine,
                "batch_size": batch.images,
                "parity_images": parity_images,
                "backend": computed,
                "device": device_name(images.device),
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
                "sparta_kernels": __version__,
            }
        known = Outcomes.none_yet(
            settings,
            index=indices.cpu().numpy(),
            label=labels.cpu().numpy(),
            report_at=reported,
            steps=steps,
            parity=parity_images,
        )
        store.take_up(known)
        done = run(attacker, batch, known, store, processes, progress)
    clean_error, robust_errors = result.errors(done.outcomes)
    loss_mean, loss_std = result.losses(done.outcomes)
    return Evaluation(
        images=len(images),
        clean_error=clean_error,
        errors=robust_errors,
        target_success=result.target_success(done.outcomes) if targeted else {},
        attacked=done.attacked,
        images_per_second=done.attacked / done.seconds if done.attacked else None,
        seconds=done.seconds,
        peak_memory=done.peak_memory,
        loss_mean=loss_mean,
        loss_std=loss_std,
        restarts=restarts,
        precision=precision,
        engine=done.engine,
        engine_reason=done.engine_reason,
        batch=batch,
        threads=torch.get_num_threads(),
        processes=processes.count,
        parity=result.parity(done.outcomes, tolerance),
    )


@contextmanager
def _repeatable() -> Iterator[None]:
    """Disable cuDNN's algorithms whose order of summation is not deterministic."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _precision(where: str, model: nn.Module, value: object) -> str:
    """The precision requested, which a prepared model must have."""
    if isinstance(model, Prepared):
        if value not in (None, model.precision):
            raise ValueError(
                f"{where}: precision must be that of the prepared model, {model.precision!r}, or None, got {value!r}"
            )
        return model.precision
    return "fp32" if value is None else checks.choice(where, "precision", value, attack.PRECISIONS)


def _path(where: str, value: object, *, resume: bool, overwrite: bool) -> Path | None:
    """The outcomes' file, if it can be written."""
    if value is None:
        for name, flag in {"resume": resume, "overwrite": overwrite}.items():
            if flag:
                raise ValueError(f"{where}: {name} must be False where outcomes is None, got True")
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{where}: outcomes must be a path or None, got {value!r}")
    if resume and overwrite:
        raise ValueError(f"{where}: resume must be False where overwrite is True, got True")
    return check_writable(value)


def _batch_size(given: int | None, store: Store, attacker: Attacker, processes: Processes) -> BatchSize:
    """The batch size requested, else the resumed run's, else the best."""
    count = len(attacker.images)
    if given is not None:
        return BatchSize(min(given, count), "as asked for" if given <= count else "all images")
    stored = (store.settings or {}).get("batch_size")
    if isinstance(stored, int) and 1 <= stored <= count:
        return BatchSize(stored, "as before it was resumed")
    device = attacker.images.device
    sharers = processes.count if device.type == "cpu" else 1
    found = find_batch_size(attacker.trial, count, device, processes.count, sharers=sharers)
    return BatchSize(processes.first(found.images), found.reason)
