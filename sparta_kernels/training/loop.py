"""The training loop: standard or adversarial, with a checkpoint after every epoch."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import attack, data
from ..attack import checks
from ..data.files import check_writable
from ..memory import keep_freed_memory
from .checkpoint import Checkpoint, CheckpointError, build_model, read_checkpoint, read_metadata, save_checkpoint
from .schedule import learning_rate
from .settings import Settings


class TrainingDiverged(ArithmeticError):
    """The loss or a weight is no longer a finite number; the checkpoint of the last good epoch is kept."""


@dataclass(frozen=True)
class Batch:
    """A training step that is done. `error` is on the images trained on, adversarial or not."""

    epoch: int
    number: int
    batches: int
    images: int
    loss: float
    error: float


@dataclass(frozen=True)
class Epoch:
    """An epoch that is done and stored.

    Attributes:
        epoch: its number, from 1.
        loss, error: mean over the images trained on (adversarial ones in adversarial training), while
            training.
        clean_error: share of the test images misclassified after the epoch; by the average of the weights, where
            one is kept.
        robust_error: the same of the first test images under attack; None where that was not asked for.
        images_per_second: of the epoch's training.
        learning_rate: of its last step.
    """

    epoch: int
    loss: float
    error: float
    clean_error: float
    images_per_second: float
    learning_rate: float
    robust_error: float | None = None


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
) -> list[Epoch]:
    """Train a network and store it after every epoch.

    The attack sees the network in eval mode, the update in train mode. The order of the images depends on
    (seed, epoch) alone, an image's attack on (seed, its index, epoch): a run that was stopped and resumed
    ends with the very weights, bit for bit, of one that was not (same machine and thread count). The process keeps
    the memory that it frees meanwhile (`sparta_kernels.keep_freed_memory`).

    Args:
        settings: what to train, and how.
        checkpoint: the file to write after every epoch, atomically.
        root: folder with the data set's files, where it needs one.
        resume: go on from `checkpoint`, whose settings must be the same.
        overwrite: start again although `checkpoint` exists.
        device: where to train.
        save_every: seconds from one checkpoint to the next inside an epoch; None for none there.
        robust_images: how many of the first test images are attacked after each epoch, with the settings' attack (with
            attack "none": the papers' test attack, preset "sparta"); more than there are: all.
        on_batch, on_epoch: called after each.

    Returns:
        All epochs, those before a resume included.

    Raises:
        FileExistsError: `checkpoint` exists, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: there is nothing to resume, or no folder to write to.
        CheckpointError: the file to resume is damaged or has other settings.
        TrainingDiverged: the loss or a weight is not finite; the last good checkpoint is kept.
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
    device, path = checks.device(where, device), Path(checkpoint)
    if resume and overwrite:
        raise ValueError(f"{where}: resume and overwrite exclude each other")
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(f"{where}: checkpoint {path} exists; resume it, overwrite it, or name another")
    history: list[Epoch] = []
    previous = None
    if resume:
        previous, history = read_run(settings, path)
    check_writable(path)

    dataset = data.describe(settings.data)
    description: dict[str, Any] = {"name": settings.model, "arguments": model_arguments(settings)}
    if previous is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = build_model(**description).to(device)
    else:
        model = previous.model.to(device)
    images, labels = (part.to(device) for part in data.load(dataset.name, root, "train"))
    test_images, test_labels = (part.to(device) for part in data.load(dataset.name, root, "test"))

    optimizer = torch.optim.SGD(
        model.parameters(),
        settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    if previous is not None:
        for name, parameter in model.named_parameters():
            if name in previous.momentum:
                optimizer.state[parameter]["momentum_buffer"] = previous.momentum[name].to(device)

    prepared = attack.prepare(model.eval())
    for number in range(len(history) + 1, settings.epochs + 1):
        start = time.perf_counter()
        loss, error, rate = _epoch(model, prepared, optimizer, images, labels, settings, number, on_batch)
        seconds = time.perf_counter() - start
        _check_finite(model, number)
        clean_error = _error(model, test_images, test_labels, settings.batch_size)
        history.append(Epoch(number, loss, error, clean_error, len(images) / seconds, rate))
        momentum = {
            name: optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in model.named_parameters()
            if optimizer.state[parameter].get("momentum_buffer") is not None
        }
        metadata: dict[str, Any] = {
            "model": description,
            "settings": settings.as_dict(),
            "epoch": number,
            "history": [asdict(epoch) for epoch in history],
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        save_checkpoint(path, model, momentum, metadata)
        if on_epoch is not None:
            on_epoch(history[-1])
    return history


def read_run(settings: Settings, checkpoint: str | os.PathLike[str]) -> tuple[Checkpoint, list[Epoch]]:
    """The stored run that `train(settings, checkpoint, resume=True)` goes on from, and its epochs.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged or has other settings.
    """
    previous = read_checkpoint(checkpoint)
    different = _differences(settings.as_dict(), previous.metadata["settings"])
    if different:
        raise CheckpointError(f"checkpoint {checkpoint}: cannot resume with other settings: {different}")
    try:
        return previous, [Epoch(**epoch) for epoch in previous.metadata["history"]]
    except TypeError as problem:
        raise CheckpointError(f"checkpoint {checkpoint}: its history is damaged ({problem})") from problem


def finished(checkpoint: str | os.PathLike[str], settings: Settings) -> bool:
    """Whether there is a checkpoint of a run with these very settings, and all its epochs are done.

    Raises:
        CheckpointError: there is a file, but it is damaged, or not a checkpoint of this package.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"finished: settings must be a Settings, got {type(settings).__name__}")
    if not Path(checkpoint).exists():
        return False
    metadata = read_metadata(checkpoint)
    return metadata["epoch"] == settings.epochs and not _differences(settings.as_dict(), metadata["settings"])


def model_arguments(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of the network that these settings describe."""
    dataset = data.describe(settings.data)
    return {
        "num_classes": dataset.classes,
        "activation": settings.activation,
        "sites": settings.sites,
        "width": settings.width,
        "in_channels": dataset.shape[0],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


def _epoch(
    model: nn.Module,
    prepared: attack.Prepared,
    optimizer: torch.optim.SGD,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    number: int,
    on_batch: Callable[[Batch], None] | None,
) -> tuple[float, float, float]:
    """One pass over the training images: mean loss, mean error and the last learning rate."""
    preset = None
    if settings.attack != "none":
        preset = attack.preset(settings.attack, settings.eps, settings.attack_steps)
    # A generator of its own for each epoch: nothing but the epoch's number need be stored to resume. The odd
    # constant keeps (seed, epoch) and (seed + 1, epoch - 1) apart.
    generator = torch.Generator().manual_seed((settings.seed + number * 0x9E3779B97F4A7C15) % 2**63)
    count = math.ceil(len(images) / settings.batch_size)
    batches = torch.randperm(len(images), generator=generator).to(images.device).tensor_split(count)
    from_clean = (torch.rand(count, generator=generator) < (preset.clean_start if preset else 0)).tolist()

    total_loss, total_wrong, rate = 0.0, 0, 0.0
    for i, rows in enumerate(batches):
        x, y = images[rows].float() / 255, labels[rows]
        if preset is not None:
            prepared.refresh()
            try:
                x = attack.perturb(
                    prepared,
                    x,
                    y,
                    eps=preset.eps,
                    step_size=preset.step_size,
                    steps=preset.steps,
                    seed=settings.seed,
                    indices=rows,
                    random_start=not from_clean[i],
                    restart=number,
                )
            except attack.NotFinite as error:
                raise TrainingDiverged(f"training: in epoch {number}, batch {i + 1} of {count}: {error}") from error
        model.train()
        rate = learning_rate(settings, (number - 1) * count + i, count)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(f"training: the loss is {value} in epoch {number}, batch {i + 1} of {count}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wrong = int((logits.detach().argmax(1) != y).sum())
        total_loss, total_wrong = total_loss + value * len(rows), total_wrong + wrong
        if on_batch is not None:
            on_batch(Batch(number, i + 1, count, len(rows), value, wrong / len(rows)))
    return total_loss / len(images), total_wrong / len(images), rate


@torch.no_grad()
def _error(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of the images that the network, in eval mode, gets wrong."""
    model.eval()
    wrong = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        wrong += int((model(x.float() / 255).argmax(1) != y).sum())
    return wrong / len(images)


def _check_finite(model: nn.Module, number: int) -> None:
    """The last update of an epoch can ruin the weights with no loss to show it: never store such."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingDiverged(f"training: {name} is not finite after epoch {number}")


def _differences(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Which settings differ, in words."""
    keys = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    return ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in keys)
