"""Whether torchrun started this process, and as which one of how many."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Launch:
    """This process's number among all, and among those on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def here() -> Launch:
    """How this process was started: alone, unless by torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return Launch()
    return Launch(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """torch.distributed's group of these processes, where there are several."""
    if here().count == 1:
        yield
        return
    # Processes wait for the slowest at the end, which may have a batch of an hour more to do.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    with warnings.catch_warnings():
        # A convolution of one channel lies in memory as two sets of strides tell; torch takes them for two layouts.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield
    dist.destroy_process_group()  # not after an error: it would wait for the others


def cores() -> int:
    """CPU cores for this process, where those on the machine share them out."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // here().local_count)
