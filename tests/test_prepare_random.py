"""attack.prepare: the same function of the images, of networks that are drawn by lot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from prepare_case import assert_same_function, outputs, settle
from torch import Tensor, nn

from sparta_kernels.nn import Sparta

C = 4  # channels of every feature map

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(C, C, 3, padding=1),
    "grouped": lambda: nn.Conv2d(C, C, 3, padding="same", groups=2, bias=False),
    "dilated": lambda: nn.Conv2d(C, C, 3, padding=2, dilation=2),
    "reflect": lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(C, C, 3, padding=1),
    "norm": lambda: nn.BatchNorm2d(C),
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "relu6_": lambda: nn.ReLU6(inplace=True),
    "dropout": nn.Dropout,
    "sparta": lambda: Sparta(C),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "scaled": lambda a, b: torch.add(a, b, alpha=0.5),
    "add_": lambda a, b: (a * 1).add_(b),
    "over": lambda a, b: a.__iadd__(b),
    "gate": lambda a, b: a * torch.sigmoid(b),
    "relu-of-sum": lambda a, b: F.relu(a + b),
    "function_": lambda a, b: F.relu(a, inplace=True),
    "halves": lambda a, b: torch.cat([part.relu() for part in a.chunk(2, 1)], 1),
    "flat": lambda a, b: F.relu(a.flatten(1)).view(b.shape),
    "centred": lambda a, b: a - b.mean(1, keepdim=True),
}
Step = tuple[str, int, int]


class Drawn(nn.Module):
    """Each step computes a feature map of earlier ones, which are counted back from the last."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.stem, self.head, self.steps = nn.Conv2d(3, C, 3, padding=1), nn.Linear(C, 5), steps
        self.layers = nn.ModuleDict({f"{i}": LAYERS[kind]() for i, (kind, _, _) in enumerate(steps) if kind in LAYERS})

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for i, (kind, back, further) in enumerate(self.steps):
            a, b = maps[-1 - back % len(maps)], maps[-1 - further % len(maps)]
            maps.append(self.layers[f"{i}"](a) if kind in LAYERS else FUNCTIONS[kind](a, b))
        return self.head(sum(maps[-3:]).mean((2, 3)))  # type: ignore[union-attr]


STEPS = st.lists(st.tuples(st.sampled_from([*LAYERS, *FUNCTIONS]), st.integers(0, 3), st.integers(0, 3)), max_size=12)


@example([("conv", 0, 0), ("norm", 0, 0), ("add", 0, 1), ("relu6_", 1, 0), ("relu", 1, 0), ("gate", 0, 1)])
@given(STEPS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_same_function(steps):
    torch.manual_seed(0)
    model, images = settle(Drawn(steps)), torch.rand(2, 3, 5, 6)
    try:
        outputs(model, images)
    except RuntimeError:  # something is written over that its gradient needs
        assume(False)
    assert_same_function(model, images, tolerance=1e-9)
