"""The machine that a result comes from."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The CPU's model, such as "AMD EPYC 9B45", or its architecture where the system does not say."""
    try:
        for line in _CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def device_name(device: str | torch.device) -> str:
    """The model of the GPU or CPU that computes there."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
