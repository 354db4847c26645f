"""Checkpoints: one safetensors file per run, with weights, their average, momentum and JSON metadata, and no code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .. import nn as networks
from ..attack import checks
from ..data.files import write_atomically
from ..nn import ResNet
from .settings import MODELS

FORMAT = "sparta_kernels checkpoint 1"
WEIGHTS = ("auto", "last", "ema")


class CheckpointError(ValueError):
    """A file that is not an intact checkpoint of this package; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        metadata: the description of the run.
        model: the network in eval mode, with the weights after the last update.
        momentum: SGD's, by parameter name; empty in a run without.
        ema: the moving average of the network's state, by name; empty in a run without.
    """

    metadata: dict[str, Any]
    model: ResNet
    momentum: dict[str, Tensor]
    ema: dict[str, Tensor]


def build_model(name: str, arguments: dict[str, Any]) -> ResNet:
    """Build the network called `name`, "resnet18" or "resnet34", with these keyword arguments.

    Raises:
        TypeError, ValueError: the name is unknown, or the network does not take an argument.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model: ResNet = getattr(networks, name)(**arguments)
    return model


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    momentum: dict[str, Tensor],
    metadata: dict[str, Any],
    ema: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint atomically: the file at `path` is either the old one or the complete new one.

    Args:
        model: its `state_dict` is stored as `model.*`.
        momentum: SGD's momentum of each parameter by its name, stored as `momentum.*`.
        metadata: JSON-serialisable, with at least the keys that `load_checkpoint` describes.
        ema: the average of that state, stored as `ema.*`.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"momentum.{name}": tensor for name, tensor in momentum.items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in (ema or {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "metadata": json.dumps(metadata, allow_nan=False)}
    write_atomically(path, save(tensors, header))


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint and check that its tensors are those of the network it describes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or not a checkpoint of this package.
    """
    path = _existing(path)
    with _opened(path) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    metadata = _metadata(path, header)
    weights = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    momentum = {name[9:]: tensor for name, tensor in tensors.items() if name.startswith("momentum.")}
    ema = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("ema.")}

    description = metadata["model"]
    try:
        # Without memory, until it is known that the file really holds a network of the size that it describes.
        with torch.device("meta"):
            model = build_model(description["name"], description["arguments"])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last two: sizes past all bounds
        raise CheckpointError(f"checkpoint {path}: describes no known network ({error})") from error
    _match(path, "model", weights, model.state_dict())
    parameters = dict(model.named_parameters())
    # A run without momentum stores none, and one with frozen parameters none for them.
    _match(path, "momentum", momentum, {name: parameters[name] for name in parameters if name in momentum})
    if ema:
        _match(path, "ema", ema, model.state_dict())
    model.to_empty(device="cpu").load_state_dict(weights)
    return Checkpoint(metadata, model.eval(), momentum, ema)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint's metadata, without its tensors. Errors as in `read_checkpoint`."""
    path = _existing(path)
    with _opened(path) as file:
        return _metadata(path, file.metadata() or {})


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", weights: str = "auto"
) -> tuple[ResNet, dict[str, Any]]:
    """Load the network in a checkpoint, in eval mode on `device`, and its metadata.

    Args:
        path: the file.
        device: where to put the network.
        weights: "last" (those after the last update), "ema" (their moving average) or "auto": the average if the run
            kept one.

    Returns:
        The model, and a dict: `model` (`name`, `arguments`), `settings`, `epoch` (how many are done), `history`
        (a dict for each epoch), `versions`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or not a checkpoint of this package.
        TypeError, ValueError: there is no such device, or the run kept no average.
    """
    place = checks.device("load_checkpoint", device)
    checks.choice("load_checkpoint", "weights", weights, WEIGHTS)
    checkpoint = read_checkpoint(path)
    if weights == "ema" and not checkpoint.ema:
        raise ValueError(f"load_checkpoint: weights must be 'auto' or 'last': {path} keeps no average, got 'ema'")
    if weights != "last" and checkpoint.ema:
        checkpoint.model.load_state_dict(checkpoint.ema)
    return checkpoint.model.to(place), checkpoint.metadata


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        problem = "it is not a file" if path.exists() else "there is no such file"
        raise FileNotFoundError(f"checkpoint {path}: {problem}")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path}: damaged, or not a safetensors file ({error})") from error


def _metadata(path: Path, header: dict[str, str]) -> dict[str, Any]:
    given = header.get("format", "")
    if given != FORMAT and given.startswith(FORMAT.rstrip("0123456789")):
        raise CheckpointError(f"checkpoint {path}: of another version of this package: {given!r}, here {FORMAT!r}")
    if given != FORMAT:
        raise CheckpointError(f"checkpoint {path}: a safetensors file, but not written by `sparta train`")
    try:
        metadata = json.loads(header["metadata"])
        description = metadata["model"]
        kinds = {"settings": dict, "history": list, "epoch": int}
        wrong = [name for name, kind in kinds.items() if not isinstance(metadata[name], kind)]
        if wrong or not isinstance(description["name"], str) or not isinstance(description["arguments"], dict):
            raise TypeError(", ".join(wrong) or "model")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: its description is damaged ({error})") from error
    checked: dict[str, Any] = metadata
    return checked


def _match(path: Path, kind: str, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse tensors whose names, shapes or dtypes are not those of the model described."""
    names = sorted(given.keys() ^ wanted.keys())
    if names:
        state = "missing" if names[0] in wanted else "unknown"
        raise CheckpointError(f"checkpoint {path}: {state} tensor {kind}.{names[0]} ({len(names)} names do not match)")
    for name, tensor in given.items():
        expected = wanted[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"checkpoint {path}: {kind}.{name} must be {expected.dtype} {tuple(expected.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
