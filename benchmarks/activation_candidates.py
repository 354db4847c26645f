"""What `activation.py` measures: SPARTA as an attack runs it, and who computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gates import DTYPES, LAYOUTS, SHAPES, Call, Case, Copy, Inputs, WrongResult, repeat
from memory import peak_of_tensors
from torch import Tensor, nn

from sparta_kernels import reference, use_backend
from sparta_kernels.nn import Sparta
from sparta_kernels.nn.frozen import Form

CANDIDATES = {
    "copy": "y.copy_(x), y allocated before",
    "relu": "torch.relu and its gradient",
    "products": "the matrix products alone, by torch's 1x1 convolutions (on a GPU torch.matmul): conv1 and conv3 "
    "joined, conv6, and their way back; nothing in between",
    "eager": "nn.Sparta in eval mode, its weights frozen, in the dtype; backend reference",
    "compile": "torch.compile(fullgraph=True, dynamic=False) of the same",
    "ours": "what attack.prepare makes of it: BatchNorm folded, nn.FrozenSparta",
}
# The largest distance from the reference, of the reference's norm, beside twice that of eager PyTorch in the dtype:
# sums in another order differ, and a ReLU near 0 may then pass a gradient or not.
_TOLERANCES = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 3e-3, "fp64": 1e-10}
_MOST_OF_EAGER = 4  # times the above: the largest distance of eager itself, and what it may add to others' at most
_CHECKED = 16  # samples of a batch, evenly spread: in eval mode none depends on another. All are compared with eager's
_EACH = 0.2  # the largest distance of a sample from eager's: far above rounding, far below another sample's values


def make_sparta(channels: int, device: str) -> Sparta:
    """The activation in float32 and eval mode, frozen, its BatchNorms as if trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sparta = Sparta(channels)
        for norm in (sparta.bn1, sparta.bn3, sparta.bn6):
            nn.init.normal_(norm.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    return sparta.eval().requires_grad_(False).to(device)


def make_inputs(case: Case, count: int, device: str = "cpu") -> Inputs:
    """Sets of x, and of y's gradient."""
    return repeat(case, count, device, lambda images, random: (images(*case.shape),))


class Products:
    """The products of the activation, each on tensors of its own."""

    def both(self, inputs: Inputs) -> Call:
        case, (x, *_) = inputs.case, inputs.leaves[0]
        channels, hidden = case.shape[1], min(256, case.shape[1])
        like = {"dtype": x.dtype, "device": x.device}
        w13, w6 = torch.randn(2 * hidden, channels, **like), torch.randn(hidden, hidden, **like)  # type: ignore[call-overload]
        # What is multiplied after the first product stands for h3, G6, and G1 and G3 joined.
        joined = torch.randn(case.shape[0], 2 * hidden, *case.shape[2:], **like)  # type: ignore[call-overload]
        joined = joined.contiguous(memory_format=LAYOUTS[case.layout])
        half = joined[:, :hidden].contiguous(memory_format=LAYOUTS[case.layout])
        images = [leaf[0].detach() for leaf in inputs.leaves]
        multiply = _product(case.layout) if x.device.type == "cuda" else _convolution

        def call(index: int) -> tuple[Tensor, ...]:
            forward = multiply(images[index], w13), multiply(half, w6)
            return *forward, multiply(half, w6.t()), multiply(joined, w13.t())

        return call


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None])


def _product(layout: str) -> Callable[[Tensor, Tensor], Tensor]:
    if layout == "nchw":
        return lambda x, weight: torch.matmul(weight, x.flatten(2))
    return lambda x, weight: torch.mm(x.permute(0, 2, 3, 1).flatten(0, 2), weight.t())


class Whole:
    """A differentiable function of x: called, and the gradient of x taken."""

    def __init__(self, make: Callable[[Case, str], Callable[[Tensor], Tensor]], backend: str = "reference") -> None:
        self.make, self.backend = make, backend
        self.notes: dict[str, Any] = {}
        self._made: dict[Case, Callable[[Tensor], Tensor]] = {}

    def both(self, inputs: Inputs) -> Call:
        device = str(inputs.leaves[0][0].device)
        if inputs.case not in self._made:
            self._made[inputs.case] = self.make(inputs.case, device)
        function, backend = self._made[inputs.case], self.backend

        def call(index: int) -> tuple[Tensor, Tensor]:
            (x,), gy = inputs.leaves[index], inputs.grads[index]
            with use_backend(backend):
                y = function(x)
                (gx,) = torch.autograd.grad(y, x, gy)
            return y.detach(), gx

        return call


def _eager(case: Case, device: str) -> Callable[[Tensor], Tensor]:
    return make_sparta(case.shape[1], device).to(DTYPES[case.dtype], memory_format=LAYOUTS[case.layout])


def _compiled(case: Case, device: str) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()  # else a ninth shape would not be compiled any more
    return torch.compile(_eager(case, device), fullgraph=True, dynamic=False)


def _ours(case: Case, device: str) -> Callable[[Tensor], Tensor]:
    return make_sparta(case.shape[1], device).prepare_for_attack(Form(DTYPES[case.dtype], LAYOUTS[case.layout]))


def make_candidate(name: str, backend: str = "auto") -> Any:
    """The candidate of this name, ours by that backend; compiled ones compile when first called."""
    if name == "copy":
        return _Copy()
    if name == "products":
        return Products()
    if name == "relu":
        return Whole(lambda case, device: torch.relu)
    if name == "eager":
        return Whole(_eager)
    return Whole(_compiled) if name == "compile" else Whole(_ours, backend)


class _Copy(Copy):
    both = Copy.forward


def check(name: str, candidate: Any, inputs: Inputs) -> None:
    """Compare y and x's gradient on the first set of inputs with the reference; note the memory of a call.

    A few samples with the reference in float64, and all of them with eager PyTorch in the dtype.

    Raises:
        WrongResult: it says which result is wrong and by how much.
    """
    if not isinstance(candidate, Whole):
        return
    first = inputs.first()
    call = candidate.both(first)
    found = call(0)
    (x,), gy = first.leaves[0], first.grads[0]
    picked = torch.linspace(0, len(gy) - 1, min(len(gy), _CHECKED)).long().to(gy.device)
    right = _right(name, x.detach()[picked].double(), gy[picked].double())
    eager = found if name in ("relu", "eager") else Whole(_eager).both(first)(0)  # nobody else computes these two
    for what, value, wanted, near in zip(("y", "gradient"), found, right, eager, strict=True):
        as_it_likes = name == "compile"  # torch.compile may choose another layout
        if value.dtype != x.dtype or value.shape != x.shape or not (as_it_likes or value.stride() == x.stride()):
            raise WrongResult(f"{inputs.case}: {name} gives a {what} of another dtype, shape or layout than x")
        wrong = f"{inputs.case}: {name} computes a wrong {what}"
        tolerance = _TOLERANCES[inputs.case.dtype]
        most, rounding = _MOST_OF_EAGER * tolerance, _distance(near[picked], wanted)
        if not rounding <= most:  # NaN is wrong too
            blamed = wrong if near is value else f"{inputs.case}: {name} cannot be checked, eager's {what} is wrong"
            raise WrongResult(f"{blamed}: {_far(rounding, most, 'the reference')}")
        if near is value:
            continue
        error, allowed = _distance(value[picked], wanted), tolerance + 2 * rounding
        if not error <= allowed:
            raise WrongResult(f"{wrong}: {_far(error, allowed, 'the reference')}")
        error, allowed = _distance(value, near), allowed + rounding
        if not error <= allowed:
            raise WrongResult(f"{wrong}: {_far(error, allowed, 'eager')}")
        bad = _bad_samples(value, near)
        if bad:
            raise WrongResult(f"{wrong}: over {_EACH:g} of the norm from eager's in samples {bad[:5]}")
    candidate.notes["memory"] = peak_of_tensors(lambda: call(0), gy.device.type)


def _right(name: str, x: Tensor, gy: Tensor) -> Sequence[Tensor]:
    """y and gx in float64."""
    x.requires_grad_()
    weights = make_sparta(x.shape[1], str(x.device)).double().state_dict() if name != "relu" else {}
    y = torch.relu(x) if name == "relu" else reference.sparta(x, weights)
    return y.detach(), *torch.autograd.grad(y, x, gy)


def _distance(value: Tensor, right: Tensor) -> float:
    """The norm of their difference, of the right one's norm."""
    difference, norm = _norms(value, right)
    return float(difference.norm() / norm.norm())


def _bad_samples(value: Tensor, right: Tensor) -> list[int]:
    difference, norm = _norms(value, right)
    return [int(index) for index in (~(difference <= _EACH * norm)).nonzero()]


def _norms(value: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Of the difference and of the right one, for each sample; a few at a time, as they are made float64."""
    parts = list(zip(value.split(_CHECKED), right.split(_CHECKED), strict=True))
    differences = [(one.double() - other.double()).flatten(1).norm(dim=1) for one, other in parts]
    return torch.cat(differences), torch.cat([other.double().flatten(1).norm(dim=1) for _, other in parts])


def _far(error: float, allowed: float, other: str) -> str:
    return f"its distance from {other}'s is {error:.2g} of that one's norm, allowed {allowed:.2g}"


class Operation:
    """The whole activation, as `ops.py` measures operations; ours is by `backend`."""

    candidates = tuple(CANDIDATES)
    make_inputs = staticmethod(make_inputs)
    check = staticmethod(check)

    def __init__(self, backend: str) -> None:
        self.make_candidate = partial(make_candidate, backend=backend)


def cases(
    batches: Sequence[int],
    shapes: Sequence[tuple[int, int, int, int]] | None,
    dtypes: Sequence[str],
    layouts: Sequence[str],
) -> list[Case]:
    """The four sites at these batch sizes, or these shapes, in every dtype and layout."""
    shapes = shapes or [(batch, *image) for batch in batches for image in SHAPES]
    return [
        Case(shape, dtype, layout, "activation")
        for shape in dict.fromkeys(shapes)
        for dtype in dict.fromkeys(dtypes)
        for layout in dict.fromkeys(layouts)
    ]
