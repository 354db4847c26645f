"""What the tests of the attack share: a small network, images for it, and a CUDA graph pretended on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparta_kernels.attack import engines

CLASSES = 5
SETTINGS = {"eps": 16 / 255, "step_size": 2 / 255, "steps": 6}


class Net(nn.Module):
    """A small network with batch normalisation, whose forward passes can be counted and made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.linear = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, CLASSES, bias=False)
        self.calls = 0
        self.grads: list[bool] = []
        self.frozen: list[bool] = []
        self.fail_at: int | None = None
        self.failure: BaseException = RuntimeError("planted")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.grads.append(torch.is_grad_enabled() and x.requires_grad)
        self.frozen.append(not any(p.requires_grad for p in self.parameters()))
        if self.calls == self.fail_at:
            raise self.failure
        x = torch.relu(self.bn1(self.conv1(x)))
        return 8 * self.linear(self.conv2(x).amax((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.train()
    with torch.no_grad():  # statistics and weights that are not the trivial ones
        net(torch.rand(16, 3, 9, 7))
        net.bn1.weight.uniform_(0.5, 1.5)
    net.calls = 0
    net.grads, net.frozen = [], []
    return net.eval()


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(10, 3, 9, 7, generator=torch.Generator().manual_seed(1)), torch.arange(10) % CLASSES


class Recorded:
    """In `engines.Capture`'s place on a CPU: what was captured runs again, and its results go where they went first.

    Like a graph it is told nothing afterwards: what it reads are the tensors that it read first.
    """

    captures = 0

    def __init__(self, device):
        type(self).captures += 1

    def warm_up(self, run):
        run()

    def __call__(self, run):
        outputs = tuple(tensor.clone() for tensor in run())

        def replay():
            for kept, now in zip(outputs, run(), strict=True):
                kept.copy_(now)
            return outputs

        return replay


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """Attacks on a CPU may ask for the engine "graph"."""
    Recorded.captures = 0
    monkeypatch.setattr(engines, "Capture", Recorded)
    monkeypatch.setattr(engines, "choose", lambda engine, model, device: engines.Engine(engine, "asked for"))
    return Recorded
