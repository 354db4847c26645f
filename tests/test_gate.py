"""sparta_gate's values and gradients: every backend and instruction set against the reference in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from cases import (
    FLOATS,
    GateCase,
    assert_near,
    assert_same_bits,
    gate_cases,
    interpreted,
    lay,
    magnitudes,
    random,
    thread_counts,
    to_double,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import backends, reference, sparta_gate

NAMES = ("gx", "gspatial", "gchannel", "gkernel")


def forward_backward(
    case: GateCase, backend: str, gy: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], Tensor]:
    """y, the gradients, the inputs, gy."""
    inputs = [None if t is None else t.requires_grad_() for t in case.inputs()]
    gy = case.gradient() if gy is None else gy
    y = sparta_gate(*inputs, share=case.share, backend=backend)
    given_inputs = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, given_inputs, gy))
    return (
        y.detach(),
        [None if t is None else next(found) for t in inputs],
        [None if t is None else t.detach() for t in inputs],
        gy,
    )


def check(case: GateCase, backend: str, gy: Tensor | None = None) -> None:
    """Values, dtypes, shapes and strides of one call and its gradients."""
    y, grads, inputs, gy = forward_backward(case, backend, gy)
    exact, share = to_double(inputs), case.share
    sizes = magnitudes(inputs, gy, share)
    want, plain = reference.gate(*exact, share), reference.gate(*inputs, share)
    assert_near(y, want, plain, sizes[0], case.dtype, "y")
    wants = reference.gate_backward(gy.double(), *exact, share)
    plains = reference.gate_backward(gy, *inputs, share)
    for name, got, want, plain, size in zip(NAMES, grads, wants, plains, sizes[1:], strict=True):
        if want is None or plain is None:
            assert got is None
        else:
            assert got is not None
            assert_near(got, want, plain, size, case.dtype, name)
    strides = torch.empty_like(inputs[0]).stride()
    assert y.stride() == strides
    assert grads[0] is not None
    assert grads[0].stride() == strides


# ---- values ------------------------------------------------------------------------------------------------


@given(case=gate_cases())
def test_values_and_gradients(backend, case):
    check(case, backend)


@given(case=gate_cases())
def test_every_output_is_written_and_nothing_beside_it(backend, guarded, case):
    check(case, backend)
    guarded()


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float64, "contiguous"),
        (torch.float32, "contiguous"),
        (torch.float32, "sliced_c_channels_last"),  # a row is longer than its columns
        (torch.bfloat16, "sliced_c"),
        (torch.float16, "channels_last"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((2, 3, 301, 257), 1),  # several chunks a sample, the last one shorter
        ((2, 3, 301, 257), 4),  # chunks are whole bands of cells
        ((1, 300, 20, 37), 3),
        ((3, 129, 7, 7), 1),  # P = 49
        ((5, 64, 1, 1), 1),
        ((2, 1, 64, 64), 8),
    ],
    ids=str,
)
def test_sums_over_many_chunks(backend, shape, share, dtype, layout):
    if interpreted(backend):  # whose samples have several parts too
        shape = {(2, 3, 301, 257): (2, 3, 101, 57), (1, 300, 20, 37): (1, 200, 20, 21)}.get(shape, shape)
    check(GateCase(shape, dtype, (torch.float32,) * 3, share, layout, layout), backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_of_a_sum_has_no_strides(backend, layout):
    case = GateCase((2, 5, 6, 7), torch.float32, (torch.float32,) * 3, 2, layout)
    inputs = [t.requires_grad_() for t in case.inputs()]
    sparta_gate(*inputs, share=2, backend=backend).sum().backward()
    wants = reference.gate_backward(torch.ones(case.shape), *(t.detach() for t in inputs), 2)
    for name, tensor, want in zip(NAMES, inputs, wants, strict=True):
        torch.testing.assert_close(tensor.grad, want, msg=lambda m, name=name: f"{name}: {m}")


@given(
    case=gate_cases(),
    wanted=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_only_what_is_wanted_is_computed(backend, guarded, case, wanted):
    inputs, gy = case.inputs(), case.gradient()
    wanted[3] &= inputs[3] is not None
    arguments = (gy, *inputs, case.share, wanted, backend)
    got = torch.ops.sparta_kernels._gate_backward(*arguments)
    wants = reference.gate_backward(gy.double(), *to_double(inputs), case.share)
    plains = reference.gate_backward(gy, *inputs, case.share)
    sizes = magnitudes(inputs, gy, case.share)[1:]
    for name, want, *compared in zip(NAMES, wanted, got, wants, plains, sizes, strict=True):
        if want:
            assert_near(*compared, case.dtype, name)
        else:
            assert compared[0].shape == (0,), name
    guarded()


# ---- what is asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_needs_input_grad_reaches_the_kernel(monkeypatch, needed):
    module = backends.module("native")
    seen = []

    def spy(*arguments):
        seen.append(list(arguments[-1]))
        return gate_backward(*arguments)

    gate_backward = module.gate_backward
    monkeypatch.setattr(module, "gate_backward", spy)
    inputs = GateCase((2, 3, 4, 4), torch.float32, (torch.float32,) * 3).inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = sparta_gate(*(t.requires_grad_(need) for t, need in zip(inputs, needed, strict=True)), backend="native")
    if not any(needed):
        assert not y.requires_grad
        assert not saved
        return
    # The inputs and nothing else: neither phi nor the mask nor y is kept.
    addresses = [t.data_ptr() for t in inputs]
    assert sorted(t.data_ptr() for t in saved) == sorted(addresses)
    y.sum().backward()
    assert seen == [list(needed)]
    assert [t.grad is not None for t in inputs] == list(needed)


def test_nothing_is_saved_without_grad_mode():
    inputs = [t.requires_grad_() for t in GateCase((2, 3, 4, 4), torch.float32, (torch.float32,) * 3).inputs()]
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        assert not sparta_gate(*inputs, backend="native").requires_grad
    assert not saved


# ---- special values ----------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


def combinations(dtype: torch.dtype, small: torch.dtype) -> list[Tensor]:
    """x, gy, spatial, channel, kernel of every combination, one a sample: shapes (M,)."""
    tiny = torch.finfo(dtype).smallest_normal
    axes = (
        [NAN, INF, -INF, 0.0, -0.0, 1.5, -1.5, tiny, -tiny],
        [NAN, INF, -INF, 0.0, 1.5],
        [NAN, INF, -INF, 0.0, 1.0, -200.0, 200.0, 1e4, -1e4],
        [NAN, INF, 0.0, 1.0, -1.0],
        [1.0, -0.5, INF],
    )
    grid = torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)
    return [column.to(kind) for column, kind in zip(grid.T, (dtype, dtype, small, small, small), strict=True)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("extents", [(1, 1, 1), (1, 1, 21), (21, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_inf_and_zeros_travel_as_in_the_reference(backend, dtype, extents, layout):
    """Every combination in a sample of its own, so that each sum is over copies of one term."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    thinned = slice(None, None, 7 if interpreted(backend) and extents != (1, 1, 1) else 1)  # each value meets each
    x, gy, spatial, channel, kernel = (t[thinned] for t in combinations(dtype, small))
    # Where phi rounds to 1, torch takes 1 - phi as 0, and an infinite gy * x times that as NaN. Here 1 - phi is what it
    # is, and the gradient of a factor infinite; in neither is it finite.
    saturated = (x * gy).isinf() & (x > 0) & (torch.sigmoid(kernel * spatial * channel) == 1)
    c, h, w = extents
    x, gy = (lay(t[:, None, None, None].expand(-1, c, h, w), layout) for t in (x, gy))
    spatial, channel = spatial[:, None, None, None].expand(-1, 1, h, w), channel[:, None].expand(-1, c)
    inputs = [t.detach().requires_grad_() for t in (x, spatial, channel, kernel)]
    y = sparta_gate(*inputs, backend=backend)
    grads = torch.autograd.grad(y, inputs, gy)
    wants = reference.gate_backward(gy, x, spatial, channel, kernel)
    compared = {"y": (y.detach(), reference.gate(x, spatial, channel, kernel))}
    compared |= {name: pair for name, *pair in zip(NAMES, grads, wants, strict=True)}
    for name, (got, want) in compared.items():
        eps = max(torch.finfo(got.dtype).eps, torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6)
        if name not in ("y", "gx"):
            assert not got[saturated].isfinite().any(), name
            got, want = got[~saturated], want[~saturated]
        torch.testing.assert_close(
            got, want, rtol=eps, atol=1e-30, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(backend, dtype, layout):
    """All 65536, NaN of every payload too, with a phi of exactly 1: reading and writing must lose nothing."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(4, 64, 16, 16)
    x = lay(x, layout)
    y = sparta_gate(x, torch.full((4, 1, 16, 16), 200.0), torch.ones(4, 64), backend=backend)
    want = torch.relu(x.float())
    if dtype == torch.bfloat16:
        # The processor's own rounding may take what lies below the normal numbers for 0.
        want = torch.where((y == 0) & (want < torch.finfo(dtype).smallest_normal), 0.0, want)
    assert_same_bits(y.abs(), want.abs().to(dtype))  # the sign of relu(-0.0) is anybody's


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x3FFFFF, -0x7FFFFF], ids=hex)
def test_a_nan_of_any_payload_stays_one(backend, bits):
    x = torch.full((2, 3, 4, 5), bits, dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    assert sparta_gate(x, torch.zeros(2, 1, 4, 5), torch.ones(2, 3), backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_phi_from_one_end_to_the_other(backend, dtype):
    """z from -800 to 800: no NaN, no jump, 0 and 1 at the ends."""
    z = torch.linspace(-800, 800, 4001, dtype=torch.float64)
    x = torch.ones(1, 1, 1, len(z), dtype=dtype)
    spatial = z.to(torch.float64 if dtype == torch.float64 else torch.float32).view(1, 1, 1, -1)
    phi = sparta_gate(x, spatial, torch.ones(1, 1, dtype=torch.float64), backend=backend).flatten().double()
    assert phi[0] <= torch.finfo(torch.float32).tiny
    assert phi[-1] == 1
    assert (phi.diff() >= -torch.finfo(dtype).eps).all()
    want = torch.sigmoid(spatial.double().flatten())
    relative = 100 * 2.0**-24 if dtype == torch.float32 else max(1e-5, torch.finfo(dtype).eps)
    normal = want > torch.finfo(dtype).smallest_normal
    assert ((phi - want).abs() <= relative * want)[normal].all()
    assert (phi[~normal] <= 2 * torch.finfo(dtype).smallest_normal).all()


# ---- repeatable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "share"), [((3, 40, 33, 31), 1), ((1, 2, 300, 311), 4), ((64, 512, 4, 4), 1)])
def test_the_same_bits_every_time_and_for_any_number_of_threads(backend, shape, share, layout, dtype):
    if interpreted(backend):
        shape = {(1, 2, 300, 311): (1, 2, 100, 101), (64, 512, 4, 4): (5, 512, 4, 4)}.get(shape, shape)
    case = GateCase(shape, dtype, (torch.float32,) * 3, share, layout, layout)
    torch.set_num_threads(1)
    y, grads, *_ = forward_backward(case, backend)
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        again, grads_again, *_ = forward_backward(case, backend)
        assert_same_bits(again, y, f"y, {threads} threads")
        for name, got, want in zip(NAMES, grads_again, grads, strict=True):
            assert_same_bits(got, want, f"{name}, {threads} threads")


def test_a_sample_does_not_depend_on_its_batch(backend):
    case = GateCase((5, 9, 6, 7), torch.float32, (torch.float32,) * 3)
    x, spatial, channel, kernel = case.inputs()
    y = sparta_gate(x, spatial, channel, kernel, backend=backend)
    for n in range(5):
        one = sparta_gate(*(t[n : n + 1] for t in (x, spatial, channel, kernel)), backend=backend)
        assert_same_bits(one, y[n : n + 1])


@pytest.mark.parametrize(
    ("image", "share", "layout", "dtype"),
    [
        ((64, 32, 32), 1, "contiguous", torch.float32),
        ((64, 32, 32), 1, "channels_last", torch.bfloat16),
        ((64, 32, 32), 1, "contiguous", torch.float64),
        ((16, 64, 96), 2, "contiguous", torch.bfloat16),  # several chunks a sample
        ((16, 64, 96), 2, "channels_last", torch.float32),
        ((512, 4, 4), 1, "contiguous", torch.float32),
        ((512, 4, 4), 1, "contiguous", torch.bfloat16),  # rows that are half a cache line
        ((24, 30, 31), 1, "contiguous", torch.float16),  # rows that are nothing whole
        ((21, 30, 31), 1, "channels_last", torch.float16),
    ],
    ids=str,
)
def test_results_as_large_as_the_cache(cpu_backend, image, share, layout, dtype):
    """They are written past it: the same bits as when the samples come one by one."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    cache = int(size.read_text().rstrip("K\n")) * 1024 if size.exists() else 2**25
    samples = 1 + cache // (math.prod(image) * dtype.itemsize)
    if cache > 2**28:
        pytest.skip(f"the last-level cache has {cache / 2**20:.0f} MiB")
    small = GateCase((3, *image), dtype, (torch.float32,) * 3, share, layout, layout)
    y, grads, inputs, gy = forward_backward(small, cpu_backend)
    part = torch.arange(samples) % 3
    large = [t[part] for t in inputs]
    gy = gy[part]
    assert large[0].stride()[1:] == inputs[0].stride()[1:]
    assert_same_bits(sparta_gate(*large, share=share, backend=cpu_backend), y[part], "y")
    got = torch.ops.sparta_kernels._gate_backward(gy, *large, share, [True] * 4, cpu_backend)
    for name, grad, want in zip(NAMES, got, grads, strict=True):
        assert_same_bits(grad, want[part], name)


# ---- derivatives -------------------------------------------------------------------------------------------


def gradient_inputs(layout: str, kernel: bool, share: int) -> list[Tensor]:
    """Float64, and x away from relu's corner."""
    generator = torch.Generator().manual_seed(5)
    x = random(generator, 2, 3, 3, 3)
    x = lay(x + 0.2 * x.sign(), layout)
    extent = -(-3 // share)
    small = [random(generator, 2, 1, extent, extent), random(generator, 2, 3), random(generator, 2)]
    return [t.requires_grad_() for t in (x, *small[: 2 + kernel])]


gradient_cases = pytest.mark.parametrize(
    ("layout", "kernel", "share"),
    [
        ("contiguous", True, 1),
        ("contiguous", False, 1),
        ("channels_last", True, 2),
        ("channels_last", False, 2),
    ],
)


@gradient_cases
def test_gradcheck(backend, layout, kernel, share):
    inputs = gradient_inputs(layout, kernel, share)
    fast = interpreted(backend)
    assert torch.autograd.gradcheck(lambda *t: sparta_gate(*t, share=share, backend=backend), inputs, fast_mode=fast)


@gradient_cases
def test_gradgradcheck(layout, kernel, share):
    inputs = gradient_inputs(layout, kernel, share)
    assert torch.autograd.gradgradcheck(lambda *t: sparta_gate(*t, share=share, backend="native"), inputs)


def test_third_order():
    inputs = gradient_inputs("contiguous", True, 2)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        y = sparta_gate(*tensors, share=2, backend="native")
        return torch.autograd.grad(y.square().sum(), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, inputs, fast_mode=True)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5))[1:], ids=str)
def test_partial_double_backward(needed):
    """Whichever of gy, x, spatial, channel and kernel need a gradient."""
    inputs = [t.detach() for t in gradient_inputs("contiguous", True, 2)]
    gy = random(torch.Generator().manual_seed(6), 2, 3, 3, 3)

    def second(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(need) for t, need in zip([gy, *inputs], needed, strict=True)]
        gradient, *tensors = leaves
        differentiated = [t for t in tensors if t.requires_grad]
        if not differentiated:  # a gradient with respect to gy alone: the backward pass is linear in it
            return []
        y = sparta_gate(*tensors, share=2, backend=backend)
        first = torch.autograd.grad(y, differentiated, gradient, create_graph=True)
        loss = sum(((g + 1) ** 2).sum() for g in first)
        asked = [t for t in leaves if t.requires_grad]
        found = torch.autograd.grad(loss, asked, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, asked, strict=True)]

    for got, want in zip(second("native"), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_double_backward_of_a_function_of_one_tensor():
    """Where the gate's inputs are computed from each other, each must still get its own part."""
    x = random(torch.Generator().manual_seed(7), 2, 3, 4, 4)

    def curvature(backend: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        y = sparta_gate(leaf, leaf.mean(1, keepdim=True), leaf.mean((2, 3)), leaf.sum((1, 2, 3)), backend=backend)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    torch.testing.assert_close(curvature("native"), curvature("reference"), rtol=1e-10, atol=1e-10)


# ---- more than 2^31 elements -------------------------------------------------------------------------------

FAR = 2**31 + 72  # elements; a signed 32-bit index would be negative


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 3, 7), (1, 2, 3, 7)], ids=["samples", "rows"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_past_2_to_the_31(backend, monkeypatch, shape, channels_last):
    """Two samples or two rows that far apart, in every image tensor: memory reserved, and hardly any used."""
    if channels_last:
        shape = (shape[0], 7, 1, 1 + shape[1] // 2)
        stride = (FAR, 1, FAR, FAR)
    else:
        stride = (FAR, FAR, 7, 1)
    try:
        memory = [torch.empty(FAR + 64, dtype=torch.bfloat16) for _ in range(4)]
    except RuntimeError:
        pytest.skip("the machine reserves no more memory")

    def far(place: int) -> Tensor:
        return memory[place].as_strided(shape, stride)

    class FarTorch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty_like(self, model):
            return far(next(outputs)) if model.dim() == 4 and model.stride() == stride else torch.empty_like(model)

    layout = "channels_last" if channels_last else "contiguous"
    case = GateCase(shape, torch.bfloat16, (torch.float32,) * 3, 1, layout, layout)
    near, spatial, channel, kernel = case.inputs()
    x, gy = far(0).copy_(near), far(1).copy_(case.gradient())
    outputs = iter([2, 3])
    monkeypatch.setattr("sparta_kernels.backends.layout.torch", FarTorch())
    y = torch.ops.sparta_kernels._gate_forward(x, spatial, channel, kernel, 1, backend)
    grads = torch.ops.sparta_kernels._gate_backward(gy, x, spatial, channel, kernel, 1, [True] * 4, backend)
    monkeypatch.undo()
    if not channels_last:
        assert y.stride() == grads[0].stride() == stride
    assert_same_bits(y, sparta_gate(near, spatial, channel, kernel, backend=backend))
    wants = torch.ops.sparta_kernels._gate_backward(
        case.gradient(), near, spatial, channel, kernel, 1, [True] * 4, backend
    )
    for name, got, want in zip(NAMES, grads, wants, strict=True):
        assert_same_bits(got, want, name)


@pytest.fixture
def huge(large_zeros, request) -> tuple[Tensor, ...]:
    """x, spatial, channel, kernel of more than 2^31 elements: zeros, but for rows of the last image."""
    x = large_zeros(33, 64, 1024, 1024, dtype=torch.bfloat16, channels_last=request.param, outputs=1)
    assert x.numel() > 2**31
    generator = torch.Generator().manual_seed(8)
    x[-1, :, -3:] = random(generator, 64, 3, 1024).to(x.dtype)
    small = torch.zeros(33, 1, 1024, 1024), torch.zeros(33, 64), torch.zeros(33)
    for tensor in small:
        tensor[-1] = random(generator, *tensor.shape[1:])
    return x, *small


@pytest.mark.slow
@pytest.mark.parametrize("huge", [True], ids=["channels_last"], indirect=True)
def test_forward_past_2_to_the_31_elements(huge):
    y = sparta_gate(*huge, backend="native")
    want = sparta_gate(*(t[-1:] for t in huge), backend="native")
    assert want.count_nonzero() > 0
    assert_same_bits(y[-1:], want)
    assert y[-2].count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("huge", [False], ids=["contiguous"], indirect=True)
def test_backward_past_2_to_the_31_elements(huge):
    grads = torch.ops.sparta_kernels._gate_backward(huge[0], *huge, 1, [True] * 4, "native")
    last = [t[-1:] for t in huge]
    wants = torch.ops.sparta_kernels._gate_backward(last[0], *last, 1, [True] * 4, "native")
    for name, grad, want in zip(NAMES, grads, wants, strict=True):
        assert want.count_nonzero() > 0, name
        assert_same_bits(grad[-1:], want, name)
        assert grad[-2].count_nonzero() == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slope_where_phi_is_near_one(backend: str, dtype: torch.dtype) -> None:
    """1 - phi is small there, and must not be what rounding left of a difference."""
    logits = torch.tensor([-60.0, -10.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0])
    x = torch.ones(len(logits), 3, 4, 5, dtype=dtype)
    spatial = logits[:, None, None, None].expand(-1, 1, 4, 5)
    channel = torch.ones(len(logits), 3, requires_grad=True)
    sparta_gate(x, spatial, channel, backend=backend).backward(torch.ones_like(x))
    phi = torch.sigmoid(logits.double())
    want = (20 * logits * phi * torch.sigmoid(-logits.double()))[:, None].expand(-1, 3)
    error = (channel.grad / want - 1).abs().max()
    assert error < (4e-4 if dtype != torch.float32 else 5e-6), error
