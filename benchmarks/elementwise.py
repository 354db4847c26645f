"""Activations to be measured: swish_relu, smooth_relu and dyrelu, as `gates.py` has the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gates import KERNELS, Autograd, Call, Candidate, Case, Copy, Inputs, Random, compare, repeat
from torch import Tensor

from sparta_kernels import backends, dyrelu, reference, smooth_relu, swish_relu

_B = 20.0  # smooth_relu's b, as training begins
_LINES = 3  # of dyrelu


def _smooth_plainly(x: Tensor, b: Tensor) -> Tensor:
    beta = b * b
    positive = torch.relu(x)
    return positive - torch.log(beta * positive + 1) / beta


def _dyrelu_plainly(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    a, b = (small.permute(2, 0, 1)[..., None, None] for small in (slopes, intercepts))
    return (a * x + b).max(0).values


def _swish_leaves(case: Case, images: Random, random: Random) -> tuple[Tensor, ...]:
    return (images(*case.shape),)


def _smooth_leaves(case: Case, images: Random, random: Random) -> tuple[Tensor, ...]:
    return images(*case.shape), random(1).fill_(_B)


def _dyrelu_leaves(case: Case, images: Random, random: Random) -> tuple[Tensor, ...]:
    """In steps so coarse that no dtype rounds a line: every candidate finds the same one the largest."""
    small = [random(*case.shape[:2], _LINES).mul_(2).round_().clamp_(-4, 4).div_(2) for _ in range(2)]
    return images(*case.shape).mul_(4).round_().clamp_(-16, 16).div_(4), *small


@dataclass(frozen=True)
class Activation:
    """One of them: its name, which its backend functions begin with, and what it is compared with."""

    name: str
    leaves: Callable[[Case, Random, Random], tuple[Tensor, ...]]
    names: tuple[str, ...]  # of the outputs: y, and the leaves' gradients
    operation: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    plain: Callable[..., Tensor]

    def make_inputs(self, case: Case, count: int, device: str = "cpu") -> Inputs:
        """Sets of x and its parameters."""
        return repeat(case, count, device, partial(self.leaves, case))

    def make_candidate(self, name: str) -> Candidate:
        """The activation by the candidate of this name."""
        if name == "copy":
            return Copy()
        if name in KERNELS:
            return _Kernel(KERNELS[name], self)
        return Autograd(self.plain if name == "eager" else partial(self.operation, backend=name))

    def check(self, name: str, candidate: Candidate, inputs: Inputs) -> None:
        """Compare with the reference in float64; raises WrongResult."""
        if isinstance(candidate, Copy):
            return
        first = inputs.first()
        y, gradients = candidate.forward(first)(0), candidate.backward(first)(0)
        doubles = [leaf.detach().double().requires_grad_() for leaf in first.leaves[0]]
        expected = self.reference(*doubles)
        wanted = torch.autograd.grad(expected, doubles, first.grads[0].double())
        compare(inputs.case, name, self.names, (y, *gradients), (expected, *wanted))


class _Kernel:
    """An activation as the functions of a backend give it to the operation."""

    def __init__(self, backend: str, activation: Activation) -> None:
        module = backends.module(backend)
        self._forward = getattr(module, f"{activation.name}_forward")
        self._backward = getattr(module, f"{activation.name}_backward")

    def forward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        return lambda index: self._forward(*leaves[index])

    def backward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        if len(leaves[0]) == 1:
            return lambda index: (self._backward(inputs.grads[index], *leaves[index]),)
        wanted = [True] * len(leaves[0])
        return lambda index: self._backward(inputs.grads[index], *leaves[index], wanted)


SWISH_RELU = Activation(
    "swish_relu",
    _swish_leaves,
    ("y", "gx"),
    swish_relu,
    reference.swish_relu,
    lambda x: torch.relu(x) * torch.sigmoid(x),
)
SMOOTH_RELU = Activation(
    "smooth_relu", _smooth_leaves, ("y", "gx", "gb"), smooth_relu, reference.smooth_relu, _smooth_plainly
)
DYRELU = Activation(
    "dyrelu", _dyrelu_leaves, ("y", "gx", "gslopes", "gintercepts"), dyrelu, reference.dyrelu, _dyrelu_plainly
)
