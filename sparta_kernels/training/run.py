"""A network in training: the state that a checkpoint holds, and how it is stored and restored."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import data
from ..interrupts import uninterrupted
from .checkpoint import Checkpoint, CheckpointError, build_model, read_checkpoint, read_metadata, save_checkpoint
from .history import Epoch, Position
from .schedule import INDEPENDENT_OF_EPOCHS
from .settings import Settings
from .transfer import freeze_sparta, transfer


class TrainingDiverged(ArithmeticError):
    """The loss or a weight is no longer finite; the last good checkpoint is kept."""


class Run:
    """A run that begins, or resumes from what was read.

    Attributes:
        settings: as given.
        model: the network that learns.
        optimizer: SGD on those of its parameters that require a gradient.
        ema: the moving average of the network's state; None without one.
        scaler: of the loss, for fp16; it does nothing otherwise.
        memory_format: of the network's weights, and so of its images.
        history: the completed epochs.
        position: progress within the next one.
    """

    def __init__(self, settings: Settings, device: torch.device, previous: Checkpoint | None) -> None:
        self.settings = settings
        self.description: dict[str, Any] = {"name": settings.model, "arguments": model_arguments(settings)}
        self.memory_format = training_format(device, settings.precision)
        self.history: list[Epoch] = []
        self.position = Position()
        self.sparta_digest = ""
        if previous is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.model: nn.Module = build_model(**self.description)
            if settings.sparta_from:
                transfer(self.model, settings.sparta_from, settings.freeze_sparta)
                self.sparta_digest = _digest(settings.sparta_from)
        else:
            self.model = previous.model
            if settings.freeze_sparta:
                freeze_sparta(self.model)
        self.model.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(
            learning,
            settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
            # Measured on a CPU: half of the time in one memory format, more than the plain one's in the other.
            fused=True if self.memory_format == torch.contiguous_format else None,
        )
        self.ema: AveragedModel | None = None
        if settings.ema:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        if previous is not None:
            self._restore(previous)
        self._stored = self._place()  # when it was stored, or read
        self._whole: tuple[int, int] | None = self._stored  # None while it changes

    def _restore(self, previous: Checkpoint) -> None:
        metadata = previous.metadata
        self.history, self.position = recorded(metadata)
        self.sparta_digest = metadata.get("sparta_digest", "")
        for name, parameter in self.model.named_parameters():
            if name in previous.momentum:
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(previous.momentum[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        if self.ema is not None and previous.ema:
            self.ema.module.load_state_dict(previous.ema)
            self.ema.n_averaged.fill_(1)  # the first update would copy
        if self.scaler.is_enabled() and metadata.get("scaler"):
            self.scaler.load_state_dict(metadata["scaler"])

    @property
    def tested(self) -> nn.Module:
        """The network whose errors are reported: with an EMA, the averaged one."""
        return self.model if self.ema is None else self.ema.module

    @staticmethod
    def statistics(model: nn.Module) -> list[Tensor]:
        """BatchNorm's running statistics, which each process updates from its own share of the images."""
        return [buffer for buffer in model.buffers() if buffer.is_floating_point()]

    @property
    def unsaved(self) -> bool:
        """Whether there are steps that are not stored yet, and all of them are complete."""
        return self._whole == self._place() != self._stored

    @contextmanager
    def change(self) -> Iterator[None]:
        """A block that changes the run. Ctrl-C waits for its end; a block that an error cuts short is never stored."""
        self._whole = None
        with uninterrupted():
            yield
            self._whole = self._place()

    def end_epoch(self, epoch: Epoch) -> None:
        """Record a completed epoch."""
        with self.change():
            self.history.append(epoch)
            self.position = Position()

    def check_finite(self) -> None:
        """Refuse weights that are not finite: the last update can ruin them before any loss shows it.

        Raises:
            TrainingDiverged: one is not finite.
        """
        tensors = self._tensors()
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
        for name, good in zip(tensors, finite, strict=True):
            if not good:
                done, step = self._place()
                when = f"step {step} of epoch {done + 1}" if step else f"epoch {done}"
                raise TrainingDiverged(f"training: {name} is not finite after {when}")

    def store(self, path: Path) -> None:
        """Write the run's current state, unless it is no longer finite.

        Raises:
            TrainingDiverged: a weight is not finite; the old file is untouched.
            OSError: the file cannot be written.
        """
        self.check_finite()
        metadata: dict[str, Any] = {
            "model": self.description,
            "settings": self.settings.as_dict(),
            "epoch": len(self.history),
            "position": asdict(self.position),
            "history": [asdict(epoch) for epoch in self.history],
            "scaler": self.scaler.state_dict(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        if self.sparta_digest:
            metadata["sparta_digest"] = self.sparta_digest
        ema = None if self.ema is None else self.ema.module.state_dict()
        with uninterrupted():
            save_checkpoint(path, self.model, self._momentum(), metadata, ema)
            self._stored = self._place()

    def _place(self) -> tuple[int, int]:
        """Completed epochs, and completed steps of the next one."""
        return len(self.history), self.position.step

    def _momentum(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {
            name: state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if parameter in state and state[parameter].get("momentum_buffer") is not None
        }

    def _tensors(self) -> dict[str, Tensor]:
        ema = {} if self.ema is None else self.ema.module.state_dict()
        return dict(
            chain(
                self.model.state_dict().items(),
                ((f"momentum of {name}", value) for name, value in self._momentum().items()),
                ((f"average of {name}", value) for name, value in ema.items()),
            )
        )


def training_format(device: torch.device, precision: str) -> torch.memory_format:
    """The memory format to train in: channels_last in bf16 and fp16.

    In 16 bits, an update of a ResNet-18 on 32x32 pixels then takes 0.9 of the time on a CPU (Zen 5, batch 32); for GPUs
    cuDNN advises it. In fp32 an update would take 0.9 of the time on a CPU too (0.98 for a whole step with PGD-10), but
    torch's BatchNorm sums less accurately in channels_last (see `nn.recomputed`).
    """
    return torch.channels_last if precision in ("bf16", "fp16") else torch.contiguous_format


def read_run(settings: Settings, checkpoint: str | os.PathLike[str]) -> tuple[Checkpoint, list[Epoch]]:
    """The stored run that `train(settings, checkpoint, resume=True)` would continue, and its epochs.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged or has other settings. `epochs` may be larger, though, with the schedules
            "milestones" and "constant", which do not depend on it, and `sparta_from` may have been moved.
    """
    previous = read_checkpoint(checkpoint)
    different = _differences(settings, previous.metadata)
    if _only_goes_on(settings, previous.metadata["settings"].get("epochs")):
        different.pop("epochs", None)
    if different:
        words = ", ".join(different.values())
        raise CheckpointError(f"checkpoint {checkpoint}: cannot resume with other settings: {words}")
    try:
        return previous, recorded(previous.metadata)[0]
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"checkpoint {checkpoint}: its history is damaged ({problem})") from problem


def recorded(metadata: dict[str, Any]) -> tuple[list[Epoch], Position]:
    """The completed epochs in a checkpoint's metadata, and the progress within the next one."""
    history = [Epoch(**epoch) for epoch in metadata["history"]]
    position = Position(**metadata.get("position", {}))
    if len(history) != metadata["epoch"]:
        raise ValueError(f"{len(history)} epochs, of {metadata['epoch']}")
    if not isinstance(position.step, int) or position.step < 0:
        raise ValueError(f"step {position.step!r}")
    numbers = [*astuple(position), *chain.from_iterable(map(astuple, history))]
    wrong = [number for number in numbers if not isinstance(number, (int, float, NoneType))]
    if wrong or (position.step and not position.seconds > 0):
        raise ValueError(f"{wrong[0]!r} for a number" if wrong else f"{position.seconds} seconds")
    return history, position


def finished(checkpoint: str | os.PathLike[str], settings: Settings) -> bool:
    """Whether the checkpoint exists, has exactly these settings, and all its epochs are done.

    Raises:
        CheckpointError: there is a file, but it is damaged, or not a checkpoint of this package.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"finished: settings must be a Settings, got {type(settings).__name__}")
    if not Path(checkpoint).exists():
        return False
    metadata = read_metadata(checkpoint)
    return metadata["epoch"] == settings.epochs and not _differences(settings, metadata)


def model_arguments(settings: Settings) -> dict[str, Any]:
    """The keyword arguments for the network of these settings."""
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


def _differences(settings: Settings, metadata: dict[str, Any]) -> dict[str, str]:
    """The settings in which a stored run differs, in words. One that it does not have yet had its default."""
    new, old = settings.as_dict(), Settings().as_dict() | metadata["settings"]
    different = {}
    for key in sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key)):
        if key == "sparta_from" and _is_the_file(settings.sparta_from, metadata.get("sparta_digest")):
            continue
        different[key] = f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
    if "epochs" in different:
        independent = settings.schedule in INDEPENDENT_OF_EPOCHS
        different["epochs"] += f" ({'it can only be raised' if independent else 'its learning rates depend on it'})"
    return different


def _is_the_file(path: str, digest: str | None) -> bool:
    """Whether this is the file that SPARTA was copied from, which may have been moved since."""
    try:
        return bool(path and digest) and _digest(path) == digest
    except OSError:
        return False


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _only_goes_on(settings: Settings, epochs: Any) -> bool:
    """Whether a run planned for `epochs` epochs has taken the same steps so far as these settings prescribe."""
    return settings.schedule in INDEPENDENT_OF_EPOCHS and isinstance(epochs, int) and settings.epochs >= epochs
