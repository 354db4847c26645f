"""swish_relu, smooth_relu and dyrelu: every backend and instruction set against formulas of their own in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import (
    FLOATS,
    LAYOUTS,
    assert_near,
    assert_same_bits,
    here,
    lay,
    lay_small,
    one_thread,
    random,
    thread_counts,
    to_double,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import backends, dyrelu, reference, smooth_relu, swish_relu

raw = torch.ops.sparta_kernels
NAN, INF = math.nan, math.inf


# ---- the formulas, as the papers write them ----------------------------------------------------------------


def plain_swish_relu(x: Tensor) -> Tensor:
    return F.silu(x).where(x > 0, 0)


def plain_smooth_relu(x: Tensor, b: Tensor) -> Tensor:
    beta = b.reshape(()) * b.reshape(())
    return (x - torch.log(beta * x.abs() + 1) / beta).where(x > 0, 0)


def plain_dyrelu(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    lines = torch.einsum("nc...,nck->nc...k", x, slopes)
    spread = *x.shape[:2], *(1,) * (x.dim() - 2), intercepts.shape[2]
    return (lines + intercepts.reshape(spread)).max(dim=-1).values


def swish_magnitudes(gy: Tensor, x: Tensor) -> list[Tensor]:
    return [F.relu(x), 1.5 * gy.abs()]


def smooth_magnitudes(gy: Tensor, x: Tensor, b: Tensor) -> list[Tensor]:
    t = b.reshape(()) ** 2 * F.relu(x)
    return [F.relu(x), gy.abs(), 2 / b.abs() ** 3 * (gy.abs() * (torch.log1p(t) + t / (1 + t))).sum().reshape(b.shape)]


def dyrelu_magnitudes(gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor) -> list[Tensor]:
    size = gy.abs()
    by_line = ((terms[..., None].flatten(2)).sum(2) for terms in (size * x.abs(), size))
    return [
        plain_dyrelu(x.abs(), slopes.abs(), intercepts.abs()),
        plain_dyrelu(size, slopes.abs(), torch.zeros_like(slopes)),
        *(sums[:, :, None].expand_as(slopes) for sums in by_line),
    ]


@dataclass(frozen=True)
class Operation:
    """One of the three, and what it is compared with."""

    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]  # differentiable by autograd
    magnitudes: Callable[..., list[Tensor]]  # of (gy, *inputs): those of y and of the gradients, see `assert_near`

    @property
    def name(self) -> str:
        return self.fused.__name__

    def __str__(self) -> str:
        return self.name

    def reference(self, *inputs: Tensor) -> Tensor:
        return getattr(reference, self.name)(*inputs)

    def reference_backward(self, gy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = getattr(reference, f"{self.name}_backward")(gy, *inputs)
        return (found,) if isinstance(found, Tensor) else found

    def raw_backward(self, *args) -> tuple[Tensor, ...]:
        found = getattr(raw, f"_{self.name}_backward")(*args)
        return (found,) if isinstance(found, Tensor) else found

    def small(self, shape: tuple[int, ...], lines: int, generator: torch.Generator) -> list[Tensor]:
        """The inputs beside x, float64."""
        if self.name == "smooth_relu":
            return [here(torch.tensor([0.3, -2.0, 20.0][lines % 3], dtype=torch.float64)).reshape((1,) * (lines % 2))]
        return [random(generator, *shape[:2], lines) for _ in range(2)] if self.name == "dyrelu" else []


SWISH = Operation(swish_relu, plain_swish_relu, swish_magnitudes)
SMOOTH = Operation(smooth_relu, plain_smooth_relu, smooth_magnitudes)
DYRELU = Operation(dyrelu, plain_dyrelu, dyrelu_magnitudes)
OPERATIONS = [SWISH, SMOOTH, DYRELU]
each = pytest.mark.parametrize("operation", OPERATIONS, ids=str)


@dataclass(frozen=True)
class Case:
    """One call and its backward pass. Hypothesis prints it; `inputs` makes the tensors."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    small_dtype: torch.dtype = torch.float32
    lines: int = 3
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    strided: bool = False  # the small tensors
    seed: int = 0

    def inputs(self, operation: Operation) -> list[Tensor]:
        """x, with zeros of both signs, and what the operation takes beside it."""
        generator = torch.Generator().manual_seed(self.seed)
        x = random(generator, *self.shape)
        x.view(-1)[1::7] = 0.0
        x.view(-1)[4::7] = -0.0
        small = [t.to(self.small_dtype) for t in operation.small(self.shape, self.lines, generator)]
        return [lay(x.to(self.dtype), self.layout), *(lay_small(t, self.strided) if t.dim() > 1 else t for t in small)]

    def gradient(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return lay(random(generator, *self.shape).to(self.dtype), self.gradient_layout)


# Around the registers' 4, 8 and 16 lanes and the cache's lines, 1 and 0, and more than one chunk of elements or pixels.
SHAPES = [
    *((2, 3, 5, 7), (1, 1, 1, 1), (3, 17, 4, 4), (2, 33, 1, 3), (1, 4, 16, 16), (2, 5, 1, 1), (1, 64, 7, 7)),
    *((3, 2, 11, 13), (1, 9, 43, 17), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)),
]
cases = st.builds(
    Case,
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(FLOATS),
    small_dtype=st.sampled_from(FLOATS),
    lines=st.sampled_from([3, 2, 1, 4, 5, 8]),
    layout=st.sampled_from(LAYOUTS),
    gradient_layout=st.sampled_from(LAYOUTS),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def forward_backward(operation: Operation, inputs: list[Tensor], gy: Tensor, backend: str) -> list[Tensor]:
    """y and the gradients."""
    inputs = leaves(inputs)
    y = operation.fused(*inputs, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, inputs, gy)]


def check(operation: Operation, inputs: list[Tensor], gy: Tensor, backend: str) -> list[Tensor]:
    """Values, dtypes, shapes and strides of one call and its gradients."""
    got = forward_backward(operation, inputs, gy, backend)
    exact = to_double(inputs)
    wants = [operation.plain(*exact), *operation.reference_backward(gy.double(), *exact)]
    yardsticks = [operation.reference(*inputs), *operation.reference_backward(gy, *inputs)]
    sizes = operation.magnitudes(gy.double(), *exact)
    for number, compared in enumerate(zip(got, wants, yardsticks, sizes, strict=True)):
        assert_near(*compared, inputs[0].dtype, f"{operation}: result {number}")
    for result in got[:2]:
        assert result.stride() == torch.empty_like(inputs[0]).stride()
    return got


# ---- the specification -------------------------------------------------------------------------------------


@each
def test_the_reference_is_the_formula_and_its_derivatives(operation):
    case = Case((3, 4, 5, 6), torch.float64, torch.float64)
    inputs, gy = leaves(case.inputs(operation)), case.gradient()
    y = operation.plain(*inputs)
    torch.testing.assert_close(operation.reference(*inputs), y, rtol=1e-12, atol=1e-14)
    for got, want in zip(operation.reference_backward(gy, *inputs), torch.autograd.grad(y, inputs, gy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_a_few_numbers_by_hand():
    x = torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    assert swish_relu(x)[0].tolist() == pytest.approx([0, 0, 1 / (1 + math.exp(-1)), 3 / (1 + math.exp(-3))], rel=1e-14)
    b = torch.tensor(2.0, dtype=torch.float64)
    assert smooth_relu(x, b)[0].tolist() == pytest.approx([0, 0, 1 - math.log(5) / 4, 3 - math.log(13) / 4], rel=1e-14)
    slopes = torch.tensor([[[1.0, 0.1]] * 4], dtype=torch.float64)  # leaky ReLU
    assert dyrelu(x, slopes, torch.zeros_like(slopes))[0].tolist() == pytest.approx([-0.1, 0.0, 1.0, 3.0], rel=1e-14)


# ---- values ------------------------------------------------------------------------------------------------


@each
@given(case=cases)
def test_values_and_gradients(backend, operation, case):
    check(operation, case.inputs(operation), case.gradient(), backend)


@each
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_output_is_written_and_nothing_beside_it(backend, guarded, operation, dtype, layout):
    for shape in SHAPES:
        case = Case(shape, dtype, layout=layout, gradient_layout=layout)
        check(operation, case.inputs(operation), case.gradient(), backend)
    guarded()


@each
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((2, 3, 101, 57), torch.float32, "contiguous"),
        ((2, 3, 101, 57), torch.float64, "channels_last"),
        ((1, 130, 25, 31), torch.bfloat16, "channels_last"),
        ((1, 130, 25, 31), torch.float16, "contiguous"),
    ],
    ids=str,
)
def test_sums_over_many_chunks_are_the_same_for_any_number_of_threads(backend, operation, shape, dtype, layout):
    if backend == "triton" and operation is DYRELU:
        shape = (1, shape[1], 13, shape[3])  # the interpreter takes its time, and has one thread
    case = Case(shape, dtype, layout=layout, gradient_layout=layout)
    inputs, gy = case.inputs(operation), case.gradient()
    torch.set_num_threads(1)
    first = check(operation, inputs, gy, backend)
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        for got, want in zip(forward_backward(operation, inputs, gy, backend), first, strict=True):
            assert_same_bits(got, want, f"{threads} threads")


@each
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_a_sum_has_no_strides(backend, operation, layout):
    inputs = leaves(Case((2, 5, 6, 7), torch.float32, layout=layout).inputs(operation))
    operation.fused(*inputs, backend=backend).sum().backward()
    wants = operation.reference_backward(torch.ones(2, 5, 6, 7), *(t.detach() for t in inputs))
    for tensor, want in zip(inputs, wants, strict=True):
        torch.testing.assert_close(tensor.grad, want)


@each
@pytest.mark.parametrize("number", range(8))
def test_only_what_is_wanted_is_computed(backend, operation, number):
    case = Case((2, 5, 6, 7), torch.float32)
    inputs, gy = case.inputs(operation), case.gradient()
    if operation is SWISH or number >= 2 ** len(inputs):
        return
    wanted = [bool(number >> i & 1) for i in range(len(inputs))]
    wants = operation.reference_backward(gy, *inputs)
    for got, want, wish in zip(operation.raw_backward(gy, *inputs, wanted, backend), wants, wanted, strict=True):
        if wish:
            torch.testing.assert_close(got, want)
        else:
            assert got.shape == (0,)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_as_large_as_the_cache(cpu_backend, operation, dtype, layout, monkeypatch):
    """They are written past it: the same bits as when they are few."""
    small = Case((2, 64, 32, 32), dtype, layout=layout, gradient_layout=layout)
    inputs, gy = small.inputs(operation), small.gradient()
    samples = 2 + (2**25) // (64 * 32 * 32 * dtype.itemsize)
    many = torch.arange(samples) % 2
    large = [t if t.numel() == 1 else t[many] for t in inputs]
    y = operation.fused(*inputs, backend=cpu_backend)
    assert_same_bits(operation.fused(*large, backend=cpu_backend), y[many], "y")
    gx = operation.raw_backward(gy, *inputs, [True] * len(inputs), cpu_backend)[0]
    got = operation.raw_backward(gy[many], *large, [True] * len(inputs), cpu_backend)[0]
    assert_same_bits(got, gx[many], "gx")


# ---- special values ----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_inf_and_zeros_travel_as_in_the_reference(backend, operation, dtype, layout):
    """Every combination in a sample of its own, so that each sum is over copies of one term."""
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.5, -1.5, tiny, -tiny], dtype=dtype)
    grads = torch.tensor([NAN, INF, -INF, 0.0, 1.5], dtype=dtype)
    x, gy = (t.flatten() for t in torch.meshgrid(values, grads, indexing="ij"))
    x, gy = (lay(t[:, None, None, None].expand(-1, 3, 2, 9), layout) for t in (x, gy))
    small = Case(tuple(x.shape), dtype, torch.float64 if dtype == torch.float64 else torch.float32).inputs(operation)[
        1:
    ]
    for get in ("y", "gx", "rest"):
        if get == "y":
            pairs = [(operation.fused(x, *small, backend=backend), operation.reference(x, *small))]
        else:
            got = operation.raw_backward(gy, x, *small, [True] * (1 + len(small)), backend)
            want = operation.reference_backward(gy, x, *small)
            pairs = list(zip(got, want, strict=True))[:1] if get == "gx" else list(zip(got, want, strict=True))[1:]
        for mine, wanted in pairs:
            eps = max(torch.finfo(mine.dtype).eps, torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-6)
            torch.testing.assert_close(mine, wanted, rtol=eps, atol=1e-30, equal_nan=True)


def test_dyrelu_takes_the_first_of_equals_and_of_nans(backend):
    def chosen(slopes: list[float], intercepts: list[float], x: float) -> list[float]:
        """gintercepts of a single element: 1 where the line was taken."""
        arguments = [torch.full((1, 1, 1, 1), x), torch.tensor([[slopes]]), torch.tensor([[intercepts]])]
        found = raw._dyrelu_backward(torch.ones(1, 1, 1, 1), *arguments, [True] * 3, backend)
        return found[2].flatten().tolist()

    assert chosen([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 3.0) == [1, 0, 0]
    assert chosen([0.0, 1.0, 1.0], [0.0, 2.0, 2.0], 3.0) == [0, 1, 0]
    assert chosen([1.0, 2.0, 3.0], [0.0, -3.0, -6.0], 3.0) == [1, 0, 0]
    assert chosen([1.0, NAN, NAN, 2.0], [0.0] * 4, 3.0) == [0, 1, 0, 0]
    assert chosen([NAN, 9.0, NAN], [0.0] * 3, 3.0) == [1, 0, 0]
    assert chosen([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5, NAN) == [1, 0, 0, 0, 0]
    assert chosen([1.0, 2.0], [0.0, 0.0], -INF) == [1, 0]
    assert chosen([-5.0], [0.0], 1.0) == [1]


@pytest.mark.parametrize("b", [0.0, 1e-30, 1e-15, 1e-8, 1e-4, -1e-4, 0.02, 1e15, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smooth_relu_from_one_limit_to_the_other(backend, b, dtype):
    """b x^2 / 2 and all its derivatives near b = 0, relu at infinity, and nothing is NaN on the way."""
    x = torch.tensor([1e-3, 0.5, 3.0, 200.0, 1e6], dtype=torch.float64).to(dtype)
    parameter = torch.tensor(b, dtype=torch.float32)
    y, gx, gb = forward_backward(SMOOTH, [x, parameter], torch.ones_like(x), backend)
    t, beta = x.double() * b * b, b * b
    series = t * (0.5 - t * (1 / 3 - t * (0.25 - t * (0.2 - t / 6))))
    if b == INF or b * b * 1e-3 > 1e20:
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(gx, torch.ones_like(x))
        assert gb.abs() <= 1e-30
        return
    if beta < 1e-38:  # below the smallest number of float32
        assert y.abs().max() <= 1e-20
        assert gb.abs() <= 1e-15
        return
    small = t < 1e-2
    exact = torch.where(small, x.double() * series, x.double() - torch.log1p(t) / beta)
    terms = torch.where(small, t * t * (0.5 - t * (2 / 3 - t * (0.75 - t * 0.8))), torch.log1p(t) - t / (1 + t))
    relative = 3e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(y.double(), exact, rtol=relative, atol=1e-37)
    torch.testing.assert_close(gx.double(), t / (1 + t), rtol=relative, atol=1e-37)
    torch.testing.assert_close(gb.double(), 2 / b * terms.sum() / beta, rtol=max(relative / 8, 1e-5), atol=0)


@pytest.mark.parametrize("b", [1e-25, 3e-20, 5e-20, 1e-19, 1e-18])
def test_smooth_relu_lies_between_0_and_relu(backend, b):
    """Also where beta is below the normal numbers and x near the largest, so that 1 / beta may be infinite."""
    x = torch.tensor([1.0, 1e30, 1e38, 2e38, 3e38])
    y = smooth_relu(x, torch.tensor(b), backend=backend)
    assert ((y >= 0) & (y <= x)).all(), y


# ---- autograd and its relatives ----------------------------------------------------------------------------


def derivable(operation: Operation, layout: str) -> list[Tensor]:
    """Float64, and x away from corners."""
    generator = torch.Generator().manual_seed(3)
    x = random(generator, 2, 3, 3, 2)
    return leaves([lay(x + 0.2 * x.sign(), layout), *operation.small((2, 3, 3, 2), 4, generator)])


@each
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives_of_first_and_second_order(cpu_backend, operation, layout):
    inputs = derivable(operation, layout)
    with one_thread():
        assert torch.autograd.gradcheck(lambda *t: operation.fused(*t, backend=cpu_backend), inputs)
        assert torch.autograd.gradgradcheck(lambda *t: operation.fused(*t, backend=cpu_backend), inputs)


@each
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_w", "expanded_n"])
def test_opcheck(operation, layout):
    case = Case((2, 3, 5, 4), torch.float32, layout=layout, gradient_layout=layout)
    inputs, gy = case.inputs(operation), case.gradient()
    torch.library.opcheck(getattr(raw, f"_{operation}_forward").default, (*inputs, "native"))
    for wanted in (True, False):
        flags = [wanted or operation is SWISH] * len(inputs)
        torch.library.opcheck(getattr(raw, f"_{operation}_backward").default, (gy, *inputs, flags, "native"))


@each
def test_compile_takes_it_whole(operation):
    torch._dynamo.reset()
    inputs = leaves(Case((2, 3, 5, 4), torch.float32).inputs(operation))

    def function(x: Tensor, *small: Tensor) -> Tensor:
        return operation.fused(2 * x, *small, backend="native").sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    got, want = compiled(*inputs), function(*inputs)
    assert_same_bits(got, want)
    gy = torch.ones_like(got)
    for mine, other in zip(torch.autograd.grad(got, inputs, gy), torch.autograd.grad(want, inputs, gy), strict=True):
        torch.testing.assert_close(mine, other)
    torch._dynamo.reset()


@each
def test_transforms_of_torch_func(operation):
    case = Case((4, 3, 5, 2), torch.float32)
    x, *small = case.inputs(operation)
    dims = (1, *(None if t.numel() == 1 else 0 for t in small))
    x, small = x[:, None], [t if t.numel() == 1 else t[:, None] for t in small]  # each sample a batch of one

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: function(*t).square().sum()

    def own(*t: Tensor) -> Tensor:
        return operation.fused(*t, backend="native")

    arguments = x.transpose(0, 1), *small
    numbers = tuple(range(len(arguments)))
    for transform in (
        lambda f: torch.func.vmap(torch.func.grad(loss(f), argnums=numbers), in_dims=dims),
        lambda f: torch.func.vmap(f, in_dims=dims),
    ):
        got, want = transform(own)(*arguments), transform(operation.plain)(*arguments)
        for mine, other in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
            torch.testing.assert_close(mine, other)


@each
def test_gradients_in_batches(operation):
    inputs = leaves(Case((2, 3, 5, 2), torch.float32).inputs(operation))
    many = random(torch.Generator().manual_seed(3), 4, 2, 3, 5, 2).float()
    y, want = operation.fused(*inputs, backend="native"), operation.plain(*inputs)
    for mine, other in zip(
        torch.autograd.grad(y, inputs, many, is_grads_batched=True),
        torch.autograd.grad(want, inputs, many, is_grads_batched=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@each
@pytest.mark.parametrize("dims", [2, 3, 5])
def test_any_number_of_axes(backend, operation, dims):
    shape = (2, 5, 3, 2, 3)[:dims]
    generator = torch.Generator().manual_seed(7)
    inputs = [t.float() for t in (random(generator, *shape), *operation.small(shape, 3, generator))]
    check(operation, inputs, random(generator, *shape).float(), backend)
    if operation is not DYRELU:
        check(operation, [inputs[0].flatten()[3], *inputs[1:]], torch.tensor(2.0), backend)


# ---- wrong calls -------------------------------------------------------------------------------------------

X, B, LINES = torch.ones(2, 3, 4, 5), torch.ones(1), torch.ones(2, 3, 4)
WRONG = {
    "swish_relu of a list": (swish_relu, ([1.0],), {}, TypeError, r"swish_relu: x must be a tensor, got list"),
    "swish_relu of integers": (swish_relu, (X.int(),), {}, TypeError, r"swish_relu: x must have one of the dtypes"),
    "swish_relu elsewhere": (swish_relu, (X,), {"backend": "cudnn"}, ValueError, r"swish_relu: backend must be one of"),
    "smooth_relu's number": (smooth_relu, (X, 20.0), {}, TypeError, r"smooth_relu: b must be a tensor, got float"),
    "smooth_relu's vector": (
        *(smooth_relu, (X, torch.ones(3)), {}, ValueError),
        r"smooth_relu: b must have one element, got shape \(3,\)",
    ),
    "smooth_relu's device": (smooth_relu, (X, B.to("meta")), {}, ValueError, r"smooth_relu: b must be on cpu"),
    "dyrelu of a vector": (
        *(dyrelu, (torch.ones(3), LINES, LINES), {}, ValueError),
        r"dyrelu: x must have shape \(N, C, ...\), got \(3,\)",
    ),
    "dyrelu's lines": (
        *(dyrelu, (X, torch.ones(2, 3, 9), torch.ones(2, 3, 9)), {}, ValueError),
        r"dyrelu: slopes must have shape \(N, C, K\) with 1 <= K <= 8, got \(2, 3, 9\)",
    ),
    "dyrelu's samples": (
        *(dyrelu, (X, LINES[:1], LINES), {}, ValueError),
        r"dyrelu: slopes must have shape \(N, C, K\) = \(2, 3, 4\), got \(1, 3, 4\)",
    ),
    "dyrelu's intercepts": (
        *(dyrelu, (X, LINES, LINES[..., :2]), {}, ValueError),
        r"dyrelu: intercepts must have shape \(N, C, K\) = \(2, 3, 4\), got \(2, 3, 2\)",
    ),
}


@pytest.mark.parametrize(("function", "arguments", "options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(function, arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        function(*arguments, **options)


@each
def test_meta_tensors_have_shapes(operation):
    inputs = [t.to("meta") for t in Case((2, 3, 5, 4), torch.bfloat16, layout="channels_last").inputs(operation)]
    y = operation.fused(*inputs, backend="native")
    assert (y.shape, y.dtype, y.stride()) == (inputs[0].shape, torch.bfloat16, inputs[0].stride())


def test_auto_takes_the_kernels(monkeypatch):
    seen = []
    for operation in OPERATIONS:
        name = f"{operation}_forward"
        monkeypatch.setattr(backends.module("native"), name, lambda x, *_, name=name: seen.append(name) or x)
        operation.fused(*Case((2, 3, 5, 4), torch.float32).inputs(operation))
    assert seen == [f"{operation}_forward" for operation in OPERATIONS]
