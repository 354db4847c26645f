"""The training loop, standard or adversarial, with checkpoints that resume exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import data
from ..attack import checks
from ..attack.prepare import PRECISIONS_ON_CPU
from ..data.files import check_writable
from ..interrupts import uninterrupted
from ..memory import keep_freed_memory
from ..processes import Processes
from .history import Batch, Epoch
from .run import Run, read_run
from .settings import Settings
from .step import Trainer
from .testing import Tester


@keep_freed_memory()
def train(
    settings: Settings,
    checkpoint: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    save_every: float | None = 600.0,
    robust_images: int = 0,
    on_batch: Callable[[Batch], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_store: Callable[[], None] | None = None,
) -> list[Epoch]:
    """Train a network and store it after every epoch, and every `save_every` seconds between.

    The attack runs on the network in eval mode, the update in train mode. The order of the images depends on
    (seed, epoch) alone, an image's augmentation and attack on (seed, its index, epoch). So a run that is stopped at any
    moment, by Ctrl-C or ``kill -9``, and then resumed, ends with the same weights, bit for bit, as one that was not (on
    a CPU; same machine and thread count).

    The last complete step is stored before an exception leaves: on Ctrl-C or another signal whose handler raises
    KeyboardInterrupt, when memory runs out, and when a file cannot be written. The process keeps the memory that it
    frees meanwhile (`sparta_kernels.keep_freed_memory`).

    Where torch.distributed has a process group, its processes train one network: each must call this with the same
    arguments (but its own device), and takes a share of every batch. In an update, BatchNorm's statistics are those of
    a process's share. Process 0 writes the checkpoint, from which all resume.

    Args:
        settings: what to train, and how.
        checkpoint: the file to write, atomically.
        root: folder with the data set's files, if it needs one.
        resume: continue from `checkpoint`, whose settings must be the same. `epochs` may be larger, though, with the
            schedules "milestones" and "constant", which do not depend on it, and `sparta_from` may have been moved.
        overwrite: start again although `checkpoint` exists.
        device: where to train.
        save_every: seconds between checkpoints within an epoch; None for none there.
        robust_images: number of first test images attacked after each epoch, with the settings' attack (with attack
            "none", the papers' test attack, preset "sparta"). All, if there are fewer.
        on_batch, on_epoch: called after each batch, and each epoch.
        on_store: called in process 0 after each write of the checkpoint.

    Returns:
        All epochs, including those before a resume.

    Raises:
        FileExistsError: `checkpoint` exists, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: there is nothing to resume, or no folder to write to.
        CheckpointError: the file to resume is damaged or has other settings.
        TrainingDiverged: the loss or a weight is not finite; the last good checkpoint is kept.
        CheckpointError, ValueError: `sparta_from` is not a checkpoint, or its SPARTA does not fit the network.
        BlockingIOError: another process is using `checkpoint`; the message tells which.
        OSError: a file cannot be written.
        TypeError, ValueError: an argument is not as above, or a setting does not fit the network.
    """
    where = "train"
    if not isinstance(settings, Settings):
        raise TypeError(f"{where}: settings must be a Settings, got {type(settings).__name__}")
    for name, value in {"checkpoint": checkpoint, **({} if root is None else {"root": root})}.items():
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{where}: {name} must be a path, got {value!r}")
    checks.flag(where, "resume", resume)
    checks.flag(where, "overwrite", overwrite)
    if save_every is not None:
        checks.real(where, "save_every", save_every, "above 0 (seconds) or None", low=0.0, high=math.inf, open_low=True)
    checks.integer(where, "robust_images", robust_images, low=0)
    checks.callback(where, "on_batch", on_batch)
    checks.callback(where, "on_epoch", on_epoch)
    checks.callback(where, "on_store", on_store)
    device, path = checks.device(where, device), Path(checkpoint)
    if device.type == "cpu" and settings.precision not in PRECISIONS_ON_CPU:
        allowed = " or ".join(map(repr, PRECISIONS_ON_CPU))
        raise ValueError(f"{where}: precision must be {allowed} on a CPU, got {settings.precision!r}")
    if resume and overwrite:
        raise ValueError(f"{where}: resume and overwrite exclude each other")
    processes = Processes(device)
    with processes.claim(path):
        if path.exists() and not (resume or overwrite):
            raise FileExistsError(f"{where}: checkpoint {path} exists; resume it, overwrite it, or name another")
        previous = read_run(settings, path)[0] if resume else None
        check_writable(path)

        images, labels = (part.to(device) for part in data.load(settings.data, root, "train"))
        tests = [part.to(device) for part in data.load(settings.data, root, "test")]
        if len(images) < 2 or not len(tests[0]):
            raise ValueError(
                f"training: data must have at least 2 training images and a test image, got {len(images)} and "
                f"{len(tests[0])} of {settings.data}"
            )
        run = Run(settings, device, previous)
        trainer = Trainer(run, images, labels, processes)
        test = Tester(run.tested, tests[0], tests[1], settings, robust_images, processes)
        writes = processes.rank == 0
        stored = time.monotonic()

        def store() -> None:
            nonlocal stored
            if not writes:
                return
            with uninterrupted():
                run.store(path)
                stored = time.monotonic()
                if on_store is not None:
                    on_store()

        def on_step(batch: Batch) -> None:
            if on_batch is not None:
                on_batch(batch)
            if save_every is not None and time.monotonic() - stored >= save_every:
                store()

        def keep_whole_steps(error: BaseException) -> None:
            try:
                if run.unsaved:
                    store()
            except Exception:
                if isinstance(error, KeyboardInterrupt):
                    raise
                # Else the first error tells more: a full disk, memory, or a GPU that will not do this either.

        with processes.leaving_together():
            try:
                while len(run.history) < settings.epochs:
                    trainer.epoch(on_step)
                    run.check_finite()
                    processes.copy_from_first(run.statistics(run.tested))
                    clean_error, robust_error = test()
                    done = run.position
                    run.end_epoch(
                        Epoch(
                            len(run.history) + 1,
                            done.loss / len(images),
                            done.wrong / len(images),
                            clean_error,
                            len(images) / done.seconds,
                            done.rate,
                            robust_error,
                            done.seconds,
                        )
                    )
                    store()
                    if on_epoch is not None:
                        on_epoch(run.history[-1])
            except (ArithmeticError, ValueError):  # what says that it diverged: the last good checkpoint is kept
                raise
            except BaseException as error:
                with uninterrupted():  # a second one may come
                    keep_whole_steps(error)
                raise
            processes.wait()  # whoever reads the file next finds it
        return run.history
