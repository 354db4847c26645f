"""CUDA graphs, captured on a stream of their own in a shared memory pool; and the cleanup after a failed capture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

_Found = TypeVar("_Found")


class Capture:
    """Captures CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # Its own: torch's default one belongs to the device that captured first.
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run on the stream of the captures."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                run()
            here.wait_stream(self._stream)

    def __call__(self, run: Callable[[], _Found]) -> Callable[[], _Found]:
        """Capture `run`; the function returned replays it on the same memory and returns the same outputs."""
        with torch.cuda.device(self._device):
            graph, outputs = capture(run, self._stream, self._pool)

        def replay() -> _Found:
            graph.replay()
            return outputs

        return replay


def capture(
    run: Callable[[], _Found], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, _Found]:
    """Capture what `run` does on the current device, in that memory pool or its own; also return `run`'s result.

    Raises:
        RuntimeError: torch or the driver refused the capture. Later captures remain possible.
    """
    here = torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads (data loaders, NCCL) may do what a capturing thread may not.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            return graph, run()
    except RuntimeError:
        _end_failed(here, stream, pool)
        raise


def _end_failed(here: torch.cuda.Stream, stream: torch.cuda.Stream, pool: Any) -> None:
    """Clean up what torch up to 2.12 leaves behind when the driver invalidates a capture.

    The capture's stream is then still current, and allocator and generator still wait for its end: every later capture,
    `empty_cache` and random number would raise.
    """
    torch.cuda.set_stream(here)
    torch.cuda.synchronize()
    with suppress(RuntimeError):  # it is not waiting
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        torch._C._cuda_releasePool(stream.device.index, pool)
    something = torch.zeros(1, device=stream.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        something.add_(1)  # a capture that succeeds is the end of all of them for the random numbers
