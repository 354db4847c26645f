"""The processes that share work: one, or those of torch.distributed's process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from .claims import claimed
from .interrupts import Held, uninterrupted

Work = TypeVar("Work")


class Processes:
    """This process, number `rank` of `count`. Every method but `share` must be called by all of them.

    Args:
        device: of tensors that NCCL sends.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self._device = 0, 1, device
        self._held = Held()
        if dist.is_available() and dist.is_initialized():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            if "gloo" in dist.get_backend():
                self._device = torch.device("cpu")

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """This process's share of `work`."""
        return work[self.rank :: self.count]

    @contextmanager
    def claim(self, path: Path | None) -> Iterator[None]:
        """Claim a file, if any, for all processes for the duration of the block: process 0 does it (`claimed`)."""
        if path is None or self.rank > 0:
            yield
            return
        with claimed(path):
            yield

    def wait(self) -> None:
        """Wait for all processes."""
        self.largest(0.0)

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """With several processes, defer Ctrl-C within the block: one that left alone would leave the others waiting."""
        if self.count == 1:
            yield
            return
        with uninterrupted() as self._held:
            yield

    def leave_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt in all processes if one has deferred it; call it between pieces of work."""
        if self.count > 1 and self.total(len(self._held)):
            self._held.deliver()
            raise KeyboardInterrupt

    def first(self, number: int) -> int:
        """Process 0's `number`."""
        return int(self._reduce(torch.tensor(number if self.rank == 0 else 0), "SUM"))

    def total(self, number: int) -> int:
        """The sum over all."""
        return int(self._reduce(torch.tensor(number), "SUM"))

    def largest(self, number: float) -> float:
        """The largest of all."""
        return float(self._reduce(torch.tensor(number, dtype=torch.float64), "MAX"))

    def sums(self, numbers: torch.Tensor) -> list[float]:
        """The sums of these numbers, (n,), over all processes in float64; the host waits for them here."""
        numbers = numbers.double()
        if self.count > 1:
            numbers = numbers.to(self._device)
            dist.all_reduce(numbers)
        return numbers.tolist()

    def copy_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy process 0's values into tensors of one dtype, in place."""
        if self.count == 1 or not tensors:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors]).to(self._device)
        dist.broadcast(together, 0)
        for tensor, values in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view(tensor.shape))

    def combine(self, array: np.ndarray) -> np.ndarray:
        """Combine an array of which every element is 0 in all processes but one, bit for bit."""
        if self.count == 1:
            return array
        # Floats as integers: 0.0 and -0.0 do not add up to -0.0.
        numbers = array.view({np.dtype(bool): np.uint8, np.dtype(np.float32): np.int32}.get(array.dtype, array.dtype))
        combined: np.ndarray = self._reduce(torch.from_numpy(numbers.copy()), "SUM").numpy()
        return combined.view(array.dtype)

    def _reduce(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        if self.count == 1:
            return tensor
        tensor = tensor.to(self._device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor.cpu()
