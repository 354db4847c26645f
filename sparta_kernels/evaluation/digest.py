"""Fingerprints of a network and of images, by which a stored run knows its own."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def model_digest(model: nn.Module) -> str:
    """Of all that a state dict holds, and of the kinds of modules: networks without weights of their own differ too."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__}\n".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\n".encode())
        _add(digest, tensor)
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
