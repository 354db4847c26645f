"""A few cells of ops.py under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Here one candidate runs after the other, so that what else the machine does meets them unequally: good for
following one machine over time. Comparing is ops.py's work.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

import gates
import pytest
import timing


@pytest.mark.parametrize("name", ["copy", "native", "kernel", "eager"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", list(gates.LAYOUTS))
@pytest.mark.parametrize("image", [(64, 32, 32), (512, 4, 4)], ids=lambda image: "x".join(map(str, image)))
def test_gate(benchmark: Any, image: tuple[int, int, int], layout: str, direction: str, name: str) -> None:
    case = gates.Case((32, *image), "fp32", layout)
    count = 1 if benchmark.disabled else timing.inputs_needed(case.size)
    inputs = gates.make_inputs(case, count)
    candidate = gates.make_candidate(name)
    gates.check(name, candidate, inputs)
    call = getattr(candidate, direction)(inputs)
    indices = itertools.cycle(range(count))
    alive: deque[Any] = deque(maxlen=count)  # see timing.interleave

    def keep(output: Any) -> None:
        alive.append(output)

    benchmark.group = f"{case} {direction}"
    benchmark.pedantic(
        lambda index: keep(call(index)),
        setup=lambda: ((next(indices),), {}),
        rounds=50,
        warmup_rounds=count + 2,
    )
    assert alive
