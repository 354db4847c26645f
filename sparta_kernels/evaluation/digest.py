"""Digests of a network and of images, by which a stored run recognises its own."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def model_digest(model: nn.Module) -> str:
    """A digest of the state dict, of every buffer, and of the modules' types and settings (as printed)."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(f"{name} {kind} {module.extra_repr()}\n".encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}\n".encode())
        _add(digest, value)
    for name, buffer in model.named_buffers():  # a state dict lacks those that are not persistent
        digest.update(f"{name}\n".encode())
        _add(digest, buffer)
    return digest.hexdigest()


def data_digest(*tensors: Tensor) -> str:
    """A digest of these tensors' values, shapes and dtypes, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: object) -> None:
    if not isinstance(value, Tensor):  # a module's extra state may be anything
        digest.update(f"{value!r}\n".encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
    plain = value.detach().cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy().data)
