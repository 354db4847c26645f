"""The result of a command as one JSON document: written whole, read by people and by the plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from ..data.files import write_atomically
from ..machine import device_name


def document(
    command: str,
    *,
    settings: Mapping[str, Any],
    results: Any,
    device: str,
    seed: int | None,
    build: Mapping[str, Any],
) -> dict[str, Any]:
    """Results together with everything needed to get them again.

    Args:
        command: what made them, such as "evaluate".
        settings: its settings.
        results: what came out, as JSON can hold it.
        device: where it ran, such as "cpu".
        seed: of its randomness.
        build: what `sparta_kernels.build_info()` says.
    """
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {"type": device, "name": device_name(device), "threads": torch.get_num_threads()},
        "seed": seed,
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "build": dict(build),
        "results": results,
    }


def as_json(content: Any) -> str:
    """`content` as indented JSON with a final line feed; NaN and infinity become strings."""
    return json.dumps(_plain(content), indent=1, allow_nan=False, default=str) + "\n"


def save_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` to `path` as JSON, whole or not at all. OSError if it cannot be written."""
    write_atomically(path, as_json(content).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
