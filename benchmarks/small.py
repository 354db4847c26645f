"""The other operations to be measured: dynamic_conv, pgd_step_, pgd_start_ and add_relu, as `gates.py` has the gate.

And with the activations of `elementwise.py` all that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from elementwise import DYRELU, SMOOTH_RELU, SWISH_RELU, Activation
from gates import KERNELS, SHAPES, Autograd, Call, Candidate, Case, Copy, Inputs, Random, WrongResult, compare, repeat
from gates import check as check_gate
from gates import make_candidate as make_gate
from gates import make_inputs as make_gates
from torch import Tensor

from sparta_kernels import backends, dynamic_conv, pgd_start_, pgd_step_, reference
from sparta_kernels.ops import add_relu

EPS, STEP = 16 / 255, 1 / 255
_SEED = 7
_SIZE = 3  # of dynamic_conv's kernels


# ---- dynamic_conv ------------------------------------------------------------------------------------------


def make_convs(case: Case, count: int, device: str = "cpu") -> Inputs:
    """Sets of spatial and kernel."""
    samples = case.shape[0]

    def leaves(images: Random, random: Random) -> tuple[Tensor, ...]:
        return images(*case.shape), random(samples, _SIZE, _SIZE)

    return repeat(case, count, device, leaves)


class ConvKernel:
    """The convolution as the functions of a backend give it to the operation."""

    def __init__(self, backend: str) -> None:
        self.module = backends.module(backend)

    def forward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        return lambda index: self.module.conv_forward(*leaves[index])

    def backward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        return lambda index: self.module.conv_backward(inputs.grads[index], *leaves[index], [True] * 2)


def convolve_plainly(spatial: Tensor, kernel: Tensor) -> Tensor:
    """The convolution as anyone would write it: one with a group for every sample."""
    kernels = kernel[:, None]
    return F.conv2d(spatial.transpose(0, 1), kernels, padding=_SIZE // 2, groups=len(kernel)).transpose(0, 1)


def make_conv(name: str) -> Candidate:
    """The convolution by the candidate of this name."""
    if name == "copy":
        return Copy()
    if name in KERNELS:
        return ConvKernel(KERNELS[name])
    return Autograd(convolve_plainly if name == "eager" else partial(dynamic_conv, backend=name))


def check_conv(name: str, candidate: Candidate, inputs: Inputs) -> None:
    """Compare with the reference in float64; raises WrongResult."""
    first = inputs.first()
    y, gradients = candidate.forward(first)(0), candidate.backward(first)(0)
    leaves, gy = first.leaves[0], first.grads[0]
    if isinstance(candidate, Copy):
        compare(inputs.case, name, ("y",), (y,), (leaves[0],))
        return
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference.dynamic_conv(*doubles)
    wanted = torch.autograd.grad(expected, doubles, gy.double())
    compare(inputs.case, name, ("y", "gspatial", "gkernel"), (y, *gradients), (expected, *wanted))


# ---- the attack's operations, in place ---------------------------------------------------------------------


def make_steps(case: Case, count: int, device: str = "cpu") -> Inputs:
    """Sets of adv, grad and clean."""

    def leaves(images: Random, random: Random) -> tuple[Tensor, ...]:
        clean = images(*case.shape).sigmoid()
        return clean.clone(), images(*case.shape), clean

    return _frozen(repeat(case, count, device, leaves))


def make_starts(case: Case, count: int, device: str = "cpu") -> Inputs:
    """Sets of adv, clean and the images' indices."""

    def leaves(images: Random, random: Random) -> tuple[Tensor, ...]:
        clean = images(*case.shape).sigmoid()
        return torch.zeros_like(clean), clean, torch.arange(case.shape[0], device=device)

    return _frozen(repeat(case, count, device, leaves))


def _frozen(inputs: Inputs) -> Inputs:
    for leaf in inputs.leaves:
        for tensor in leaf:
            tensor.requires_grad_(False)
    return inputs


class InPlace:
    """A function that overwrites its first tensor."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def call(self, inputs: Inputs) -> Call:
        def call(index: int) -> Tensor:
            self.function(*inputs.leaves[index])
            return inputs.leaves[index][0]

        return call


class CopyImages(Copy):
    """The measure of the operations that have one direction only."""

    call = Copy.forward


def step_plainly(adv: Tensor, grad: Tensor, clean: Tensor) -> None:
    """The step as anyone would write it."""
    adv.copy_((clean + (adv - STEP * grad.sign() - clean).clamp(-EPS, EPS)).clamp(0, 1))


def make_step(name: str) -> InPlace | Copy:
    """The step by the candidate of this name."""
    if name == "copy":
        return CopyImages()
    if name == "eager":
        return InPlace(step_plainly)
    if name in KERNELS:
        step = backends.module(KERNELS[name]).pgd_step
        return InPlace(lambda adv, grad, clean: step(adv, grad, clean, -STEP, EPS, 0.0, 1.0))
    return InPlace(partial(pgd_step_, step_size=STEP, eps=EPS, backend=name))


def make_start(name: str) -> InPlace | Copy:
    """The start by the candidate of this name. Plain PyTorch would draw other numbers, and is none."""
    if name == "copy":
        return CopyImages()
    if name in KERNELS:
        start = backends.module(KERNELS[name]).pgd_start
        return InPlace(lambda adv, clean, indices: start(adv, clean, indices, EPS, _SEED, 0, 0.0, 1.0))
    return InPlace(partial(pgd_start_, eps=EPS, seed=_SEED, backend=name))


def check_step(name: str, candidate: InPlace | Copy, inputs: Inputs) -> None:
    """Compare with the reference, bit for bit (eager PyTorch: nearly); raises WrongResult."""
    _check_images(name, candidate, inputs, lambda adv, grad, clean: reference.pgd_step(adv, grad, clean, STEP, EPS))


def check_start(name: str, candidate: InPlace | Copy, inputs: Inputs) -> None:
    """The same of the start."""

    def expected(adv: Tensor, clean: Tensor, indices: Tensor) -> Tensor:
        return reference.pgd_start(clean, indices, eps=EPS, seed=_SEED)

    _check_images(name, candidate, inputs, expected)


def _check_images(name: str, candidate: InPlace | Copy, inputs: Inputs, reference_of: Callable[..., Tensor]) -> None:
    if isinstance(candidate, Copy):
        return
    leaf = tuple(tensor.clone() for tensor in inputs.leaves[0])
    wanted = reference_of(*leaf)
    got = candidate.call(Inputs(inputs.case, [leaf], [], []))(0)
    if name == "eager":  # it rounds to the dtype after every operation
        compare(inputs.case, name, ("adv",), (got,), (wanted,))
    elif not torch.equal(got, wanted):
        wrong = int((got != wanted).sum())
        raise WrongResult(f"{inputs.case}: {name} computes other images than the reference: {wrong} elements differ")


# ---- add_relu ----------------------------------------------------------------------------------------------


def make_sums(case: Case, count: int, device: str = "cpu") -> Inputs:
    """Sets of a and b."""
    return repeat(case, count, device, lambda images, random: (images(*case.shape), images(*case.shape)))


class ReluKernel:
    """relu(a + b) as the functions of a backend give it to the operation."""

    def __init__(self, backend: str) -> None:
        self.module = backends.module(backend)

    def forward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        return lambda index: self.module.relu_forward(*leaves[index], True)[0]

    def backward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        kept = [self.module.relu_forward(*leaf, True)[1] for leaf in leaves]
        stride = leaves[0][0].stride()

        def call(index: int) -> tuple[Tensor, Tensor]:
            gradient = self.module.relu_backward(inputs.grads[index], None, kept[index], stride)
            return gradient, gradient

        return call


def make_relu(name: str) -> Candidate:
    """relu(a + b) by the candidate of this name."""
    if name == "copy":
        return Copy()
    if name in KERNELS:
        return ReluKernel(KERNELS[name])
    return Autograd((lambda a, b: F.relu(a + b)) if name == "eager" else partial(add_relu, backend=name))


def check_relu(name: str, candidate: Candidate, inputs: Inputs) -> None:
    """Compare with the reference, bit for bit; raises WrongResult."""
    if isinstance(candidate, Copy):
        return
    first = inputs.first()
    got = (candidate.forward(first)(0), *candidate.backward(first)(0))
    leaves = [leaf.detach().requires_grad_() for leaf in first.leaves[0]]
    y = reference.add_relu(*leaves)
    expected = (y, *torch.autograd.grad(y, leaves, first.grads[0]))
    for what, value, wanted in zip(("y", "ga", "gb"), got, expected, strict=True):
        if not torch.equal(value, wanted):
            raise WrongResult(f"{inputs.case}: {name} computes a wrong {what}")


# ---- all of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """How an operation is made, checked, and where it is measured unless the command line says otherwise."""

    make_inputs: Callable[[Case, int, str], Inputs]
    make_candidate: Callable[[str], Any]
    check: Callable[[str, Any, Inputs], None]
    candidates: Sequence[str]
    images: Sequence[tuple[int, int, int]]  # C, H, W
    dtypes: Sequence[str]
    layouts: Sequence[str]


_ALL = ("copy", "native", "kernel", "triton", "triton_kernel", "eager", "compile")


def _activation(
    activation: Activation, images: Sequence[tuple[int, int, int]], layouts: Sequence[str] = ("nchw",)
) -> Operation:
    ways = activation.make_inputs, activation.make_candidate, activation.check
    return Operation(*ways, _ALL[:6], images, ("fp32", "bf16"), layouts)


OPERATIONS = {
    "gate": Operation(make_gates, make_gate, check_gate, _ALL, SHAPES, ("fp32", "bf16"), ("nchw", "channels_last")),
    "dynamic_conv": Operation(make_convs, make_conv, check_conv, _ALL[:6], ((1, 32, 32),), ("fp32", "bf16"), ("nchw",)),
    "pgd_step": Operation(make_steps, make_step, check_step, _ALL[:6], ((3, 32, 32),), ("fp32",), ("nchw",)),
    "pgd_start": Operation(make_starts, make_start, check_start, _ALL[:5], ((3, 32, 32),), ("fp32",), ("nchw",)),
    "add_relu": Operation(make_sums, make_relu, check_relu, _ALL[:6], ((64, 32, 32),), ("fp32", "bf16"), ("nchw",)),
    "swish_relu": _activation(SWISH_RELU, SHAPES[:1]),
    "smooth_relu": _activation(SMOOTH_RELU, SHAPES[:1]),
    "dyrelu": _activation(DYRELU, (SHAPES[0], SHAPES[3]), ("nchw", "channels_last")),
}


def cases(
    operation: str,
    batches: Sequence[int],
    shapes: Sequence[tuple[int, int, int, int]] | None,
    dtypes: Sequence[str] | None,
    layouts: Sequence[str] | None,
) -> list[Case]:
    """The cases of an operation: the usual ones, or those of these shapes, dtypes and layouts.

    The gate is measured at all batches, the others at the smallest and the largest.
    """
    usual = OPERATIONS[operation]
    if operation != "gate":
        batches = (min(batches), max(batches))
    shapes = shapes or [(batch, *image) for batch in batches for image in usual.images]
    if operation == "dynamic_conv":
        shapes = [(samples, 1, height, width) for samples, _, height, width in shapes]
    return [
        Case(shape, dtype, layout, operation)
        for shape in dict.fromkeys(shapes)
        for dtype in dict.fromkeys(dtypes or usual.dtypes)
        for layout in dict.fromkeys((layouts or usual.layouts) if len(usual.layouts) > 1 else usual.layouts)
    ]
