"""add_relu and add_relu_fork: bit for bit PyTorch's relu(a + b) and its gradient, with one bit an element kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, LAYOUTS, assert_same_bits, here, lay, random, thread_counts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import use_backend
from sparta_kernels.backends import native
from sparta_kernels.ops import add_relu, add_relu_fork

raw = torch.ops.sparta_kernels
NAN, INF = math.nan, math.inf
WITHOUT_GAPS = ("contiguous", "channels_last", "permuted", "shifted", "shifted_channels_last")
# Around the 64 elements that a CPU's thread takes at a time, a CUDA warp's 256, a Triton program's 1024 to 4096.
SHAPES = [
    *(
        (2, 3, 5, 7),
        (1, 1, 1, 1),
        (3, 1, 4, 4),
        (2, 17, 1, 3),
        (1, 4, 4, 4),
        (1, 1, 5, 13),
        (1, 3, 16, 16),
        (2, 5, 8, 32),
    ),
    *((3, 2, 11, 13), (1, 9, 43, 17), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)),
]


def values(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers, zeros of both signs, the smallest numbers, inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    numbers, info = random(generator, *shape), torch.finfo(dtype)
    special = (0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 4, info.max, INF, -INF, NAN)
    for number, value in enumerate(special):
        where = here(torch.rand(shape, generator=generator, device="cpu") < 0.04)
        numbers[where] = value if number % 2 else -value
    return numbers.to(dtype)


def assert_y(got: Tensor, want: Tensor, backend: str) -> None:
    """The sign of zero is the processor's: relu(-0.0) is -0.0 in torch on a CPU and 0.0 on a GPU."""
    on_cpu = backend != "triton" and got.device.type == "cpu"
    assert_same_bits(*((got, want) if on_cpu else (got + 0.0, want + 0.0)), "y")


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def torchs(a: Tensor, b: Tensor | None, gradient: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y and the gradient of a, by PyTorch."""
    a = leaf(a)
    y = F.relu(a if b is None else a + b)
    return y.detach(), None if gradient is None else torch.autograd.grad(y, a, gradient)[0]


class Placed(torch.autograd.Function):
    """A copy that lies in memory as it is told, and is no view of anything."""

    @staticmethod
    def forward(ctx, tensor: Tensor, layout: str) -> Tensor:
        laid = lay(tensor, layout)
        plain = torch.empty(0, dtype=laid.dtype)
        return plain.set_(laid.untyped_storage(), laid.storage_offset(), laid.shape, laid.stride())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


# ---- values and gradients ----------------------------------------------------------------------------------


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    own=st.sampled_from(WITHOUT_GAPS),
    two=st.booleans(),
    inplace=st.booleans(),
    arriving=st.sampled_from([(1,), (1, 1), (1, 0), (0, 1)]),  # gradients: more than one place is a fork's
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_torchs(backend, shape, dtype, layouts, own, two, inplace, arriving, seed):
    a, b, *gradients = (lay(values(seed + i, shape, dtype), how) for i, how in enumerate(layouts))
    arrived = [g for g, there in zip(gradients, arriving, strict=False) if there]
    leaves = [leaf(t) for t in ((a, b) if two else (a,))]
    want, gradient = torchs(a, b if two else None, sum(arrived[1:], arrived[0]))

    inputs = [Placed.apply(leaves[0], own) if inplace else leaves[0], *leaves[1:]]
    kept = [t.detach().clone() for t in leaves]
    function = add_relu if len(arriving) == 1 else add_relu_fork
    outputs = function(*inputs, inplace=inplace, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert (outputs[0] is inputs[0]) == inplace
    for y in outputs:
        assert y.data_ptr() == outputs[0].data_ptr()
        assert y.stride() == torch.empty_like(inputs[0]).stride()
        assert_y(y.detach(), want, backend)
    used = [y for y, there in zip(outputs, arriving, strict=True) if there]
    for got in torch.autograd.grad(used, leaves, arrived):
        assert_same_bits(got, gradient, "gradient")
    for tensor, before in zip(leaves, kept, strict=True):
        assert_same_bits(tensor.detach(), before, "an input")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("two", [True, False])
def test_every_pair_of_special_values(backend, dtype, two):
    info = torch.finfo(dtype)
    special = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, info.tiny, -info.tiny, info.max, info.smallest_normal / 2, 1 / 3]
    first, second = torch.tensor(list(itertools.product(special, repeat=2)), dtype=dtype).T.contiguous()
    for count in (144, 9, 8, 1):
        a, b = leaf(first[:count].clone()), second[:count].clone()
        for incoming in (torch.ones_like(b), torch.full_like(b, NAN), torch.full_like(b, INF), b.flip(0)):
            want, gradient = torchs(a, b if two else None, incoming)
            y = add_relu(a, b if two else None, backend=backend)
            assert_y(y.detach(), want, backend)
            assert_same_bits(torch.autograd.grad(y, a, incoming)[0], gradient, "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(backend, dtype):
    """Both sums: against float64's, which is exact, rounded."""
    a, b, g, h = (random(torch.Generator().manual_seed(i), 5000).to(dtype) for i in range(4))
    a = leaf(a)
    outputs = add_relu_fork(a, b, backend=backend)
    assert_y(outputs[0].detach(), (a.detach().double() + b.double()).relu().to(dtype), backend)
    passed = (g.double() + h.double()).to(dtype) * (outputs[0].detach() > 0)
    assert torch.equal(torch.autograd.grad(outputs, a, (g, h))[0], passed)


@pytest.mark.parametrize("shape", [(), (3,), (70,), (5, 13), (2, 3, 5), (2, 3, 2, 5, 3)], ids=str)
def test_any_number_of_dimensions(backend, shape):
    a, b, g = (values(i, shape, torch.float32) for i in range(3))
    want, gradient = torchs(a, b, g)
    y = add_relu(leaf(a), b, backend=backend)
    assert_y(y.detach(), want, backend)
    leaves = leaf(a)
    assert_same_bits(torch.autograd.grad(add_relu(leaves, b, backend=backend), leaves, g)[0], gradient)


def test_it_is_the_reference_that_autograd_differentiates():
    a, b, g = (values(i, (2, 3, 5, 7), torch.float32) for i in range(3))
    want, gradient = torchs(a, b, g + g)
    a = leaf(a)
    for inplace in (False, True):
        with use_backend("reference"):
            outputs = add_relu_fork(a * 1 if inplace else a, b, inplace=inplace)
        assert_same_bits(outputs[1].detach(), want)
        assert_same_bits(torch.autograd.grad(outputs, a, (g, g))[0], gradient)


@pytest.mark.parametrize("way", ["both", "a", "b"])
def test_one_gradient_serves_both(backend, way):
    a, b = (values(i, (2, 3, 5, 7), torch.float32).requires_grad_(way in ("both", name)) for i, name in enumerate("ab"))
    y = add_relu(a, b, backend=backend)
    gradient = torchs(a.detach(), b.detach(), torch.ones_like(a))[1]
    y.sum().backward()  # whose gradient is expanded
    for tensor, name in ((a, "a"), (b, "b")):
        assert (tensor.grad is not None) == (way in ("both", name))
        if tensor.grad is not None:
            assert_same_bits(tensor.grad, gradient)


def test_b_may_be_a(backend):
    a = values(1, (2, 3, 5, 7), torch.float32)
    want = torchs(a, a, None)[0]
    assert_y(add_relu(a, a, backend=backend), want, backend)
    assert_y(add_relu(a, a, inplace=True, backend=backend), want, backend)


@pytest.mark.parametrize("layout", ["shifted", "shifted_channels_last"])
def test_nothing_beside_a_is_written(backend, layout):
    a = lay(values(1, (2, 3, 5, 7), torch.float32), layout)
    whole = torch.as_strided(a, (a.untyped_storage().nbytes() // 4,), (1,), 0)
    add_relu(a, inplace=True, backend=backend)
    assert whole[0].isnan()
    assert whole[1:].nan_to_num(0.0).min() == 0


# ---- what is kept, what is written -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 8, 8), (1, 1, 1, 1), (0, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_w", "expanded_n"])
@pytest.mark.parametrize("function", [add_relu, add_relu_fork])
def test_one_bit_an_element_is_all_that_is_kept(backend, shape, layout, function):
    a, b = (leaf(lay(values(i, shape, torch.float32), layout)) for i in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function(a, b, backend=backend)
        y = y[0] if isinstance(y, tuple) else y
    (bits,) = kept
    assert bits.dtype == torch.uint8
    assert bits.untyped_storage().nbytes() == -(-y.numel() // 8)
    in_memory = y.detach().as_strided((y.numel(),), (1,))  # the order of the bits is memory's
    packed = np.packbits((~(in_memory <= 0)).cpu().numpy(), bitorder="little")
    assert bits.cpu().numpy().tolist() == packed.tolist()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("function", [add_relu, add_relu_fork])
def test_nothing_is_kept_where_no_gradient_is_wanted(function, inplace, monkeypatch):
    kept = []
    name = "relu_forward_" if inplace else "relu_forward"
    computed = getattr(native, name)
    monkeypatch.setattr(native, name, lambda a, b, keep: kept.append(keep) or computed(a, b, keep))
    a, b = values(1, (2, 3, 5, 7), torch.float32), values(2, (2, 3, 5, 7), torch.float32)
    want = torchs(a, b, None)[0]
    for wanted, grad_mode in ((False, True), (True, False), (True, True)):
        with torch.set_grad_enabled(grad_mode):
            y = function(a.clone(), b.clone().requires_grad_(wanted), inplace=inplace, backend="native")
        y = y[0] if isinstance(y, tuple) else y
        assert_same_bits(y.detach(), want)
        assert y.requires_grad == (wanted and grad_mode)
    with torch.inference_mode():
        y = function(a.clone(), b, inplace=inplace, backend="native")
        assert_same_bits(y[0] if isinstance(y, tuple) else y, want)
    assert kept == [False, False, True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_element_is_written_and_none_beside(backend, guarded, dtype):
    for shape in SHAPES:
        a, b, g, h = (random(torch.Generator().manual_seed(i), *shape).to(dtype) for i in range(4))
        a = leaf(a)
        for other in (None, b):
            want, gradient = torchs(a, other, g + h)
            outputs = add_relu_fork(a, other, backend=backend)
            assert_y(outputs[0].detach(), want, backend)
            assert_same_bits(torch.autograd.grad(outputs, a, (g, h))[0], gradient)
    guarded()


@pytest.mark.parametrize("elements", [200_003, 8 * 32768])
def test_the_same_for_any_number_of_threads_and_every_time(backend, elements):
    a, b, g, h = (values(i, (elements,), torch.float32) for i in range(4))
    a = leaf(a)
    want, gradient = torchs(a, b, g + h)
    for threads in (*thread_counts(backend), 1):
        torch.set_num_threads(threads)
        outputs = add_relu_fork(a, b, backend=backend)
        assert_y(outputs[0].detach(), want, backend)
        assert_same_bits(torch.autograd.grad(outputs, a, (g, h))[0], gradient, f"{threads} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("more", [0, 77])
def test_results_larger_than_the_cache(cpu_backend, dtype, more, monkeypatch):
    """Written past it."""
    size = (2 << 25) // dtype.itemsize + more
    a, b, g, h = (torch.randn(size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4))
    a = leaf(a)
    want, gradient = torchs(a, b, g + h)
    outputs = add_relu_fork(a, b, backend=cpu_backend)
    assert torch.equal(outputs[0], want)
    assert torch.equal(torch.autograd.grad(outputs, a, (g, h))[0], gradient)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(large_zeros):
    a = large_zeros(2**31 + 64 + 5, dtype=torch.bfloat16, outputs=1)
    g = large_zeros(2**31 + 64 + 5, dtype=torch.bfloat16, outputs=1)
    a[-69:], g[-69:] = values(1, (69,), torch.bfloat16), values(2, (69,), torch.bfloat16)
    a[5], g[3:7] = 2.0, 3.0
    want, gradient = torchs(a[-69:], None, g[-69:])
    bits = raw._relu_forward_(a, None, True, "native")
    assert_same_bits(a[-69:], want)
    assert bits[0] == 32
    assert bits[1:-10].count_nonzero() == 0
    gx = raw._relu_backward(g, None, bits, a.stride(), "native")
    assert_same_bits(gx[-69:], gradient)
    assert gx[:9].tolist() == [0, 0, 0, 0, 0, 3.0, 0, 0, 0]


# ---- autograd and its relatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("function", [add_relu, add_relu_fork])
def test_derivatives_of_first_and_second_order(cpu_backend, function):
    a, b = (random(torch.Generator().manual_seed(i), 2, 3, 4, 5).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda *t: function(*t, backend=cpu_backend), (a, b))
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, backend=cpu_backend), (a, b))


def test_the_gradient_of_a_gradient(backend):
    """Through the incoming gradients alone: by itself relu has none."""
    a, x = (leaf(values(i, (3, 5, 7), torch.float32).nan_to_num(1.0, 2.0, -2.0)) for i in range(2))

    def second(y: Tensor, y2: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad((y * x.sin()).sum() + (y2 * x.cos()).sum(), a, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)

    y = F.relu(a)
    for got, want in zip(second(*add_relu_fork(a, backend=backend)), second(y, y), strict=True):
        torch.testing.assert_close(got, want)


def test_autograd_notices_a_write_into_what_was_saved():
    a, scale = (leaf(values(i, (2, 3, 4), torch.float32)) for i in range(2))
    product = a * 1
    loss = (product * scale).sum()  # keeps the product
    add_relu(product, inplace=True, backend="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    y, _ = add_relu_fork(a * 1, inplace=True, backend="native")
    (y * scale).sum().backward()
    assert a.grad is not None


def test_a_write_into_a_view_reaches_its_base(backend):
    base = leaf(values(1, (4, 70), torch.float32))
    whole = base * 1
    add_relu(whole[1:3], inplace=True, backend=backend)
    want = base.detach().clone()
    want[1:3].relu_()
    assert_y(whole.detach(), want, backend)
    gradient = torch.autograd.grad(whole, base, torch.ones_like(whole))[0]
    mask = torch.ones_like(want)
    mask[1:3] = torchs(base[1:3].detach(), None, mask[1:3])[1]
    assert_same_bits(gradient, mask)


def test_gradients_in_batches():
    a, b = (leaf(values(i, (3, 5), torch.float32)) for i in range(2))
    many = random(torch.Generator().manual_seed(3), 4, 3, 5).float()
    y, want = add_relu(a, b, backend="native"), F.relu(a + b)
    for got, wanted in zip(
        torch.autograd.grad(y, (a, b), many, is_grads_batched=True),
        torch.autograd.grad(want, (a, b), many, is_grads_batched=True),
        strict=True,
    ):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_transforms_of_torch_func(inplace):
    a, b = (random(torch.Generator().manual_seed(i), 4, 3, 5).float() for i in range(2))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda a, b: function(a * 2, b).square().sum()

    own = loss(lambda a, b: sum(add_relu_fork(a, b, inplace=inplace, backend="native")))
    plain = loss(lambda a, b: 2 * F.relu(a + b))
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1)),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1))),
        lambda f: torch.func.jacfwd(torch.func.grad(f)),
    ):
        for got, want in zip(transform(own)(a, b), transform(plain)(a, b), strict=True):
            torch.testing.assert_close(got, want)


def test_forward_mode_is_refused():
    a = values(1, (3, 5), torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
        with pytest.raises(NotImplementedError, match="forward mode"):
            add_relu(dual, backend="native")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_w", "expanded_n"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, dtype):
    a, b, g = (lay(random(torch.Generator().manual_seed(i), 2, 3, 5, 4).to(dtype), layout) for i in range(3))
    for keep, other in itertools.product((True, False), (b, None)):
        torch.library.opcheck(raw._relu_forward.default, (a, other, keep, "native"))
        if layout in WITHOUT_GAPS:
            torch.library.opcheck(raw._relu_forward_.default, (a.clone(), other, keep, "native"))
    y, bits = raw._relu_forward(a, b, True, "native")
    for other in (None, b):
        torch.library.opcheck(raw._relu_backward.default, (g, other, bits, y.stride(), "native"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_takes_it_whole(compiler, layout, dynamic, monkeypatch):
    """And both gradients of a fork arrive in one call."""
    torch._dynamo.reset()
    arrived = []
    computed = native.relu_backward
    monkeypatch.setattr(native, "relu_backward", lambda *t: arrived.append(t[1] is not None) or computed(*t))

    def block(a: Tensor, b: Tensor) -> Tensor:
        y, shortcut = add_relu_fork(2 * a, b, inplace=True, backend="native")
        return add_relu(y.sin() * 3, shortcut, backend="native").cos()

    def plainly(a: Tensor, b: Tensor) -> Tensor:
        y = F.relu(2 * a + b)
        return F.relu(y.sin() * 3 + y).cos()

    compiled = torch.compile(block, fullgraph=True, backend=compiler, dynamic=dynamic)
    for samples in (2, 5) if dynamic else (2,):
        a, b = (
            random(torch.Generator().manual_seed(i), samples, 3, 5, 7).float().contiguous(memory_format=layout)
            for i in range(2)
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(a, b), plainly(a, b))
        a, b = leaf(a), leaf(b)
        arrived.clear()
        got, want = compiled(a, b), plainly(a, b)
        torch.testing.assert_close(got, want)
        for mine, torchs_own in zip(
            torch.autograd.grad(got.sum(), (a, b)), torch.autograd.grad(want.sum(), (a, b)), strict=True
        ):
            torch.testing.assert_close(mine, torchs_own)
        assert arrived == [False, True]
    torch._dynamo.reset()


# ---- wrong calls -------------------------------------------------------------------------------------------

SHAPE = (2, 3, 5, 4)
WRONG = {
    "no tensor": ({"a": [1.0]}, TypeError, r": a must be a tensor, got list"),
    "integers": ({"a": torch.ones(SHAPE, dtype=torch.int32)}, TypeError, r": a must have one of the dtypes float64, "),
    "sparse": ({"a": torch.ones(3, 4).to_sparse(), "b": None}, TypeError, r": a must be a strided tensor"),
    "b is a number": ({"b": 1.0}, TypeError, r": b must be a tensor, got float"),
    "b of integers": ({"b": torch.ones(SHAPE, dtype=torch.uint8)}, TypeError, r": b must have one of the dtypes"),
    "another dtype": (
        {"b": torch.ones(SHAPE, dtype=torch.float64)},
        TypeError,
        r": b must have a's dtype torch.float32, got torch.float64",
    ),
    "to be broadcast": (
        {"b": torch.ones(3, 1, 1)},
        ValueError,
        r": b must have shape of a = \(2, 3, 5, 4\), got \(3, 1, 1\)",
    ),
    "another device": (
        {"b": torch.ones(SHAPE, device="meta")},
        ValueError,
        r": b must be on cpu like the first tensor, got meta",
    ),
    "no bool": ({"inplace": 1}, TypeError, r": inplace must be a bool, got int"),
    "unknown backend": ({"backend": "cudnn"}, ValueError, r": backend must be one of auto, .* got 'cudnn'"),
    "no backend": ({"backend": 3}, TypeError, r": backend must be a string, got int"),
    "a leaf": (
        {"a": torch.ones(SHAPE, requires_grad=True), "inplace": True},
        ValueError,
        r": a must not be a leaf that requires a gradient where inplace is True",
    ),
    "gaps": (
        {"a": torch.ones(2, 3, 5, 8)[..., ::2], "inplace": True},
        ValueError,
        r": a must lie in memory without gaps where inplace is True, got strides \(120, 40, 8, 2\)",
    ),
    "expanded": (
        {"a": torch.ones(1, 3, 5, 4).expand(SHAPE), "inplace": True},
        ValueError,
        r": a must lie in memory without gaps where inplace is True, got strides \(0, 20, 4, 1\)",
    ),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("function", [add_relu, add_relu_fork], ids=lambda function: function.__name__)
@pytest.mark.parametrize(("given_wrong", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(function, backend, given_wrong, error, message, monkeypatch):
    for name in ("relu_forward", "relu_forward_"):
        monkeypatch.setattr(native, name, lambda *_: pytest.fail("a kernel ran"))
    arguments = {"a": -torch.ones(SHAPE), "b": torch.zeros(SHAPE), "backend": backend, **given_wrong}
    with pytest.raises(error, match=f"^{function.__name__}{message}"):
        function(**arguments)
    if isinstance(arguments["a"], Tensor) and arguments["a"].layout == torch.strided:
        assert arguments["a"]._version == 0


def test_a_neighbour_is_not_overwritten():
    whole = values(1, (100,), torch.float32)
    before = whole.clone()
    with pytest.raises(ValueError, match="add_relu: b must not overlap with a where inplace is True"):
        add_relu(whole[:90], whole[10:], inplace=True, backend="native")
    assert_same_bits(whole, before)


def test_two_results_cannot_be_written_over_a_view():
    a = leaf(values(1, (4, 5), torch.float32))
    with pytest.raises(ValueError, match="add_relu_fork: a must not be a view where inplace is True"):
        add_relu_fork((a * 1)[1:], inplace=True, backend="native")
    with torch.no_grad():
        add_relu_fork((a * 1)[1:], inplace=True, backend="native")
    for function in (add_relu, add_relu_fork):
        with pytest.raises(
            ValueError, match="a must not be a view of a leaf that requires a gradient where inplace is"
        ):
            function(a[1:], inplace=True, backend="native")


def test_meta_tensors_have_shapes():
    a = torch.empty(SHAPE, device="meta").to(memory_format=torch.channels_last)
    y = add_relu(a, a, backend="native")
    assert (y.shape, y.stride(), y.device.type) == (a.shape, a.stride(), "meta")


def test_fake_tensors_go_through_the_raw_operations():
    """As whoever traces eager code sees it: also what is written in place."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = torch.empty(SHAPE).requires_grad_(), torch.empty(SHAPE)
        y, y2 = add_relu_fork(a * 1, b, inplace=True, backend="native")
        (gradient,) = torch.autograd.grad((y, y2), a, (b, b))
    assert y.shape == y2.shape == gradient.shape == SHAPE
