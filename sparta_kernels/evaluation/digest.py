"""Fingerprints of a network and of images, by which a stored run knows its own."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
from torch import Tensor, nn


def model_digest(model: nn.Module) -> str:
    """Of all that a state dict holds, of every buffer, and of the modules' kinds and settings (as they print them)."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        digest.update(f"{name} {kind} {module.extra_repr()}\n".encode())
    # Buffers once more: a state dict lacks those that are not persistent. Its other entries may be anything.
    for name, value in chain(model.state_dict().items(), model.named_buffers()):
        digest.update(f"{name}\n".encode())
        if isinstance(value, Tensor):
            _add(digest, value)
        else:
            digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()


def data_digest(*tensors: Tensor) -> str:
    """Of these tensors' values, shapes and dtypes, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(plain.view(torch.uint8).numpy().data)
