"""The gate to be measured: its inputs, the candidates that compute it, and the check that they compute it.

Candidates and inputs serve other operations too (`small.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sparta_kernels import backends, reference, sparta_gate

SHAPES = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CANDIDATES = {
    "copy": "y.copy_(x), y allocated before",
    "native": "the operation, by the compiled kernels",
    "kernel": "the compiled kernel that the operation calls, without its checks, dispatcher and autograd",
    "triton": "the operation, by the Triton kernels",
    "triton_kernel": "what the operation calls there, without its checks, dispatcher and autograd",
    "eager": "plain PyTorch; the gate is torch.relu(x) * torch.sigmoid(kernel * spatial * channel), in x's dtype",
    "compile": "torch.compile of the same",
}
KERNELS = {"kernel": "native", "triton_kernel": "triton"}  # the bare kernels, and whose they are

Call = Callable[[int], Any]

# Largest error over largest value. Eager PyTorch rounds to the dtype after every operation.
_TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2, "fp64": 1e-12}
_OUTPUTS = ("y", "gx", "gspatial", "gchannel", "gkernel")
_CHECKED = 32  # samples of a batch, evenly spread


class WrongResult(Exception):
    """A candidate does not compute the gate."""


@dataclass(frozen=True)
class Case:
    """One shape (N, C, H, W), dtype and layout of an operation, by their names here."""

    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    operation: str = "gate"

    @property
    def size(self) -> int:
        """Bytes of x."""
        samples, channels, height, width = self.shape
        return samples * channels * height * width * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        named = f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"
        return named if self.operation == "gate" else f"{self.operation} {named}"


@dataclass(frozen=True)
class Inputs:
    """Sets of x, spatial, channel and kernel (all want gradients), y's gradients, and room for copies."""

    case: Case
    leaves: Sequence[tuple[Tensor, ...]]
    grads: Sequence[Tensor]
    copies: Sequence[Tensor]

    def first(self) -> Inputs:
        """The first set alone."""
        return Inputs(self.case, self.leaves[:1], self.grads[:1], self.copies[:1])


Random = Callable[..., Tensor]  # of a shape: normally distributed, in the case's dtype, on its device


def make_inputs(case: Case, count: int, device: str = "cpu") -> Inputs:
    """`count` sets of the gate's inputs: normally distributed, the same every time, copies of the first."""
    samples, channels, height, width = case.shape

    def leaves(images: Random, random: Random) -> tuple[Tensor, ...]:
        return images(*case.shape), random(samples, 1, height, width), random(samples, channels), random(samples)

    return repeat(case, count, device, leaves)


def repeat(case: Case, count: int, device: str, leaves: Callable[[Random, Random], tuple[Tensor, ...]]) -> Inputs:
    """`count` copies of what `leaves` makes, given a maker of images in the case's layout and one of other tensors."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[case.dtype])

    def images(*shape: int) -> Tensor:
        return random(*shape).contiguous(memory_format=LAYOUTS[case.layout])

    first = leaves(images, random)
    gy = images(*first[0].shape)
    sets = [tuple(tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in first) for _ in range(count)]
    grads = [gy.clone() for _ in range(count)]
    return Inputs(case, sets, grads, [torch.zeros_like(gy) for gy in grads])  # zeros_like touches the pages


class Candidate(Protocol):
    """One way to do the work. The calls it gives take the number of a set of inputs."""

    def forward(self, inputs: Inputs) -> Call:
        """Gives y, allocating it."""

    def backward(self, inputs: Inputs) -> Call:
        """Gives the gradients of x, spatial, channel and kernel, allocating them."""


class Copy:
    """x to y, allocated before; in either direction the measure."""

    def forward(self, inputs: Inputs) -> Call:
        images = [leaf[0].detach() for leaf in inputs.leaves]
        return lambda index: inputs.copies[index].copy_(images[index])

    backward = forward


class Kernel:
    """The gate as the functions of a backend give it to the operation."""

    def __init__(self, backend: str = "native") -> None:
        self.module = backends.module(backend)

    def forward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        return lambda index: self.module.gate_forward(*leaves[index], 1)

    def backward(self, inputs: Inputs) -> Call:
        leaves = [tuple(tensor.detach() for tensor in leaf) for leaf in inputs.leaves]
        return lambda index: self.module.gate_backward(inputs.grads[index], *leaves[index], 1, [True] * 4)


class Autograd:
    """A differentiable function: called without a graph, and backward through graphs made before."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def forward(self, inputs: Inputs) -> Call:
        def call(index: int) -> Tensor:
            with torch.no_grad():
                return self.function(*inputs.leaves[index])

        return call

    def backward(self, inputs: Inputs) -> Call:
        graphs = [self.function(*leaf) for leaf in inputs.leaves]

        def call(index: int) -> tuple[Tensor, ...]:
            leaves, gy = inputs.leaves[index], inputs.grads[index]
            return torch.autograd.grad(graphs[index], leaves, gy, retain_graph=True)

        return call


def naive(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor) -> Tensor:
    """The gate as anyone would write it, in x's dtype throughout."""
    return torch.relu(x) * torch.sigmoid(kernel[:, None, None, None] * spatial * channel[:, :, None, None])


def make_candidate(name: str) -> Candidate:
    """The candidate of this name; compiled ones compile when first called."""
    if name == "copy":
        return Copy()
    if name in KERNELS:
        return Kernel(KERNELS[name])
    if name in KERNELS.values():
        return Autograd(partial(sparta_gate, backend=name))
    if name == "eager":
        return Autograd(naive)
    # A graph that is kept for many backward passes must not reuse what forward saved as room for gradients.
    import torch._functorch.config as functorch

    functorch.donated_buffer = False
    torch._dynamo.reset()  # else a ninth shape would not be compiled any more
    return Autograd(torch.compile(naive, dynamic=False, fullgraph=True))


def check(name: str, candidate: Candidate, inputs: Inputs) -> None:
    """Compare a candidate's results on the first set of inputs with the reference in float64.

    Raises:
        WrongResult: it says which result is wrong and by how much.
    """
    first = inputs.first()
    leaves, gy = first.leaves[0], first.grads[0]
    y, gradients = candidate.forward(first)(0), candidate.backward(first)(0)
    if isinstance(candidate, Copy):
        compare(inputs.case, name, ("y",), (y,), (leaves[0],))
        return
    got = [y, *gradients]
    for output, like in zip(got, (leaves[0], *leaves), strict=True):
        same = output.dtype == like.dtype and output.shape == like.shape
        layout = LAYOUTS[inputs.case.layout]
        if not same or (like is leaves[0] and not output.is_contiguous(memory_format=layout)):
            raise WrongResult(f"{inputs.case}: {name} gives another dtype, shape or layout than it got")
    picked = torch.linspace(0, len(gy) - 1, min(len(gy), _CHECKED)).long().to(gy.device)
    doubles = [leaf.detach()[picked].double() for leaf in leaves]
    expected = (reference.gate(*doubles), *reference.gate_backward(gy[picked].double(), *doubles))
    compare(inputs.case, name, _OUTPUTS, [output[picked] for output in got], expected)


def compare(case: Case, name: str, outputs: Sequence[str], got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise WrongResult where one of these outputs is not within its dtype's error of what was expected."""
    allowed = _TOLERANCES[case.dtype]
    for output, value, wanted in zip(outputs, got, expected, strict=True):
        wanted = wanted.detach().double()
        error = float((value.detach().double() - wanted).abs().max() / wanted.abs().max())
        if not error <= allowed:  # NaN is wrong too
            raise WrongResult(
                f"{case}: {name} computes a wrong {output}: largest error / largest value is {error:.2g}, "
                f"allowed {allowed:.0e}"
            )
