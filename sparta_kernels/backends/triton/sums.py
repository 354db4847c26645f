"""What adds up the parts of a sum that several programs have left."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparta_kernels.backends.triton.arithmetic import bound, read, sum_over, write
from sparta_kernels.backends.triton.launch import Launch, ceil_div, power_above, work_types


@triton.jit
def add_up(sums, total, width, parts, blocks, WIDTH: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    """total[n] = the sum of sums[n,part] over the parts, in a fixed order: `width` numbers, WIDTH a program."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)[None, :]
    found = tl.full([PARTS, WIDTH], 0.0, ACC)
    for first in range(0, bound(parts), PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        found += read(sums + (n * parts + part) * width + at, (part < parts) & (at < width), ACC)
    write(total + n * width + at, sum_over(found, 0)[None, :], at < width)


def plan_sums(sums: Tensor, total: Tensor) -> Launch:
    """The launch that writes over (N, ...) `total` the sums of (N, parts, ...) `sums` along the parts."""
    samples, parts = sums.shape[:2]
    width = total.numel() // samples
    columns = min(64, power_above(width))
    blocks = ceil_div(width, columns)
    arguments = (sums, total, width, parts, blocks, columns, min(1024 // columns, power_above(parts)))
    return Launch(add_up, samples * blocks, (*arguments, work_types(sums.dtype)[1]))
