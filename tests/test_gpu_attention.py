"""The attention network's Triton kernels on a GPU: right at the sizes that are used, repeatable, on any stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch
from attention_case import AttentionCase, check_backward, check_forward, pixels_first
from cases import assert_same_bits
from torch import Tensor

from sparta_kernels import backends

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

SITES = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 7, 7), (64, 56, 56), (20, 5, 9)]
LAYOUTS = ["contiguous", "channels_last"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # float32 is tf32 here, or nothing
    try:
        with torch.device("cuda"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if torch.cuda.memory_reserved() > 2**30:  # other processes test on this GPU too
        torch.cuda.empty_cache()


@pytest.fixture
def kernels():
    if "cuda" not in backends.DEVICES.get("triton", ()):
        pytest.skip("triton has no kernels for GPUs in this installation")
    return import_module("sparta_kernels.backends.triton.attention_plan")


def case_of(batch: int, site: tuple[int, int, int], dtype: torch.dtype, layout: str, **options) -> AttentionCase:
    return AttentionCase((batch, *site), min(256, site[0]), dtype, layout, layout, **options)


# ---- right at the sizes that are used ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("batch", [1, 70])
def test_the_sites_of_networks(kernels, batch, site, layout, dtype):
    """Sums against float64; gradients from forward's own bits. 70: as many as make the larger tiles, at most sites."""
    case = case_of(batch, site, dtype, layout)
    assert kernels.attention_unfit(case.inputs()[0], case.hidden) is None
    tf32 = dtype == torch.float32
    check_backward(kernels, case, check_forward(kernels, case, tf32=tf32).bits, tf32=tf32)


@pytest.mark.parametrize("site", [(512, 4, 4), (512, 7, 7)], ids=str)
def test_the_largest_tiles(kernels, site):
    case = case_of(1100, site, torch.bfloat16, "channels_last")
    check_backward(kernels, case, check_forward(kernels, case).bits)


@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced_n", "sliced_c", "sliced_c_channels_last", "permuted"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_layouts_and_odd_extents(kernels, layout, dynamic):
    for dtype in DTYPES:
        for hidden in (1, 24, 70, 200):
            case = AttentionCase((5, 33, 7, 9), hidden, dtype, layout, "contiguous", dynamic)
            tf32 = dtype == torch.float32
            check_backward(kernels, case, check_forward(kernels, case, tf32=tf32).bits, tf32=tf32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", SITES[:4], ids=str)
def test_gradients_are_those_of_autograd(kernels, site, layout):
    """In float64, but where rounding decided a bit: so nearly everywhere, and nearly in size."""
    case = case_of(9, site, torch.bfloat16, layout)
    x, weights = case.inputs()
    _, ga, v1, v6 = case.gradients()
    double = pixels_first(x).requires_grad_()
    w1, w3, b1, b3 = (part.double() for both in (weights.w13, weights.b13) for part in both.chunk(2))
    h1, h3 = (double @ w1.t() + b1).relu(), (double @ w3.t() + b3).relu()
    h6 = (h3 @ weights.w6.double().t() + weights.b6.double()).relu()
    loss = ((h3 @ weights.w4.double()) * ga.double().flatten(1)).sum() + (h1.sum(1) * v1).sum() + (h6.sum(1) * v6).sum()
    (want,) = torch.autograd.grad(loss, double)
    packed = kernels.pack_attention(weights, case.dtype)
    bits = kernels.hidden_forward(x, packed, case.hidden, True)[3]
    gx = torch.zeros_like(x)
    kernels.hidden_backward_(gx, ga, v1, v6, bits, packed, case.hidden)
    difference = (pixels_first(gx) - want).norm() / want.norm()
    assert difference < 0.02


def test_what_is_not_finite_stays_in_its_image(kernels):
    """A compiled maximum may drop a NaN: relu(nan) is nan."""
    for dtype in DTYPES:
        case = case_of(5, (64, 8, 8), dtype, "contiguous")
        x, weights = case.inputs()
        packed = kernels.pack_attention(weights, dtype)
        clean = kernels.hidden_forward(x, packed, case.hidden, True)
        x[2, 7, 1, 1] = torch.nan
        got = kernels.hidden_forward(x, packed, case.hidden, True)
        assert got[0][2, 0, 1, 1].isnan()
        assert got[1][2].isnan().all()
        assert got[2][2].isnan().all()
        assert (got[3][2, 9] == 255).all()
        others = torch.tensor([0, 1, 3, 4])
        for one, other in zip(got, clean, strict=True):
            assert torch.equal(one[others], other[others])


def test_float32_is_for_those_who_allow_tf32(kernels):
    x = torch.zeros(2, 64, 4, 4)
    assert kernels.attention_unfit(x, 64) is None
    torch.backends.cuda.matmul.allow_tf32 = False
    assert "allow_tf32" in kernels.attention_unfit(x, 64)


# ---- repeatable, on any stream, in a graph -----------------------------------------------------------------


def both(kernels, case: AttentionCase) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """A function of tensors that runs forward and backward, and those tensors."""
    x, weights = case.inputs()
    packed = kernels.pack_attention(weights, case.dtype)

    def function(x: Tensor, *gradients: Tensor) -> list[Tensor]:
        *results, bits = kernels.hidden_forward(x, packed, case.hidden, True)
        gx = gradients[0].clone()
        kernels.hidden_backward_(gx, *gradients[1:], bits, packed, case.hidden)
        return [*results, gx]

    return function, [x, *case.gradients()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_same_bits_every_time(kernels, site, dtype):
    """Also while another stream keeps the machine busy, so that programs run in another order."""
    function, inputs = both(kernels, case_of(70, site, dtype, "channels_last"))
    want = function(*inputs)
    other = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(other):
            torch.randn(2048, 2048) @ torch.randn(2048, 2048)
        for got, wanted in zip(function(*inputs), want, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.parametrize("site", [(64, 8, 8), (64, 7, 7)], ids=str)
def test_work_is_queued_on_the_current_stream(kernels, site):
    """The inputs are there only when that stream has come so far; any other stream would read zeros."""
    function, inputs = both(kernels, case_of(5, site, torch.bfloat16, "contiguous"))
    want = function(*inputs)
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*late)  # all is compiled by now, and this stream's allocator has memory
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(300_000_000)
        for empty, value in zip(late, inputs, strict=True):
            empty.copy_(value)
        got = function(*late)
        assert not stream.query(), "the call has waited for the GPU"
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("site", [(64, 8, 8), (64, 7, 7)], ids=str)
def test_a_captured_graph_is_replayed_on_other_values(kernels, site):
    function, inputs = both(kernels, case_of(5, site, torch.bfloat16, "contiguous"))
    static = [t.clone(memory_format=torch.preserve_format) for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*static)
    for factor in (1, 2):
        changed = [t * factor for t in inputs]
        want = function(*changed)
        for old, new in zip(static, changed, strict=True):
            old.copy_(new)
        for output in captured:
            output.fill_(0)
        graph.replay()
        for got, wanted in zip(captured, want, strict=True):
            assert_same_bits(got, wanted, f"times {factor}")


def test_nothing_but_the_results_is_allocated(kernels):
    """Where tiles have whole samples: no hidden tensor, and no sums to be finished."""
    case = case_of(128, (128, 8, 8), torch.bfloat16, "channels_last")
    x, weights = case.inputs()
    packed = kernels.pack_attention(weights, case.dtype)
    results = kernels.hidden_forward(x, packed, case.hidden, True)
    size = sum(t.nbytes for t in results)
    del results
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = kernels.hidden_forward(x, packed, case.hidden, True)
    stats = torch.cuda.memory_stats()
    before = stats["requested_bytes.all.current"] - sum(t.nbytes for t in kept)
    assert stats["requested_bytes.all.peak"] - before <= size


def test_the_second_device(kernels):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = case_of(5, (64, 7, 7), torch.bfloat16, "contiguous")
    x, weights = case.inputs()
    want = kernels.hidden_forward(x, kernels.pack_attention(weights, case.dtype), case.hidden, True)
    moved = [None if t is None else t.to("cuda:1") for t in weights]
    packed = kernels.pack_attention(type(weights)(*moved), case.dtype)
    got = kernels.hidden_forward(x.to("cuda:1"), packed, case.hidden, True)
    for one, other in zip(got, want, strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.to(other.device), other)
