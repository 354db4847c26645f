"""Transfer of a trained network's SPARTA to another backbone or data set, as in the papers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..nn import Sparta
from .checkpoint import load_checkpoint

_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.act2")
_SHAPE = ("channels", "hidden", "kernel_size", "dynamic", "share")


@dataclass(frozen=True)
class Transferred:
    """What `transfer` copied.

    Attributes:
        sites: the sites copied from and to, such as "G1.B2", in the order of the network.
        model, data, epoch: network, data set and number of epochs of the run it was taken from.
    """

    sites: tuple[str, ...]
    model: str
    data: str
    epoch: int

    def __str__(self) -> str:
        return f"SPARTA at {', '.join(self.sites)} from {self.model} after {self.epoch} epochs on {self.data}"


def transfer(model: nn.Module, path: str | os.PathLike[str], freeze: bool) -> Transferred:
    """Copy every SPARTA activation of a stored network, parameters and buffers, to the same site of `model`.

    Sites are matched by group and block, so the networks may differ in depth, data set and classes: "G1234.B2" of a
    ResNet-18 goes to "G1234.B2" of a ResNet-34 (Tables 8 and 9). If the run kept averaged weights, those are copied.

    Args:
        model: a network of `sparta_kernels.nn`, or any whose SPARTA modules have the same names. It is unchanged if an
            error is raised.
        path: a checkpoint of `train`.
        freeze: freeze them while the rest learns, see `freeze_sparta`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or not a checkpoint of this package.
        ValueError: the networks do not have SPARTA, of the same shape, at the same sites.
    """
    source, run = load_checkpoint(path)
    ours, theirs = dict(_sites(model)), dict(_sites(source))
    if not theirs:
        raise ValueError(f"transfer: path must be a network with SPARTA, got {path}, which has none")
    if ours.keys() != theirs.keys():
        wanted, got = ", ".join(theirs), ", ".join(ours) or "none"
        raise ValueError(f"transfer: model must have SPARTA where {path} has, at {wanted}, got {got}")
    for site, sparta in theirs.items():
        for name in _SHAPE:
            wanted, got = (str(getattr(one, name)) for one in (sparta, ours[site]))
            if got != wanted:
                raise ValueError(f"transfer: model must have {name} {wanted} at {site}, as {path} has, got {got}")
    for site, sparta in theirs.items():
        mine = ours[site].state_dict()
        for name, tensor in sparta.state_dict().items():
            mine[name].copy_(tensor)
    if freeze:
        freeze_sparta(model)
    return Transferred(tuple(theirs), run["model"]["name"], str(run["settings"].get("data")), run["epoch"])


def freeze_sparta(model: nn.Module) -> None:
    """Freeze every SPARTA activation of `model`: no parameter requires a gradient, BatchNorms are in eval mode.

    Gradients still flow to the layers before it. ``model.train()`` would make the BatchNorms use, and update from,
    batch statistics: call `keep_frozen_in_eval` after it.
    """
    for _, sparta in _sites(model):
        sparta.requires_grad_(False)
    keep_frozen_in_eval(model)


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Put every frozen SPARTA activation in eval mode; call it after ``model.train()``."""
    for _, sparta in _sites(model):
        if not any(parameter.requires_grad for parameter in sparta.parameters()):
            sparta.eval()


def _sites(model: nn.Module) -> Iterator[tuple[str, Sparta]]:
    """Every SPARTA activation, named by group and block in a ResNet of this package, else by its module name."""
    for name, module in model.named_modules():
        if isinstance(module, Sparta):
            block = _BLOCK.fullmatch(name)
            yield f"G{block[1]}.B{int(block[2]) + 1}" if block else name, module
