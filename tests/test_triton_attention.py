"""The attention network's Triton kernels, in the interpreter: against plain torch in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from attention_case import AttentionCase, check_backward, check_forward, pixels_first, unpacked
from cases import assert_same_bits, lay
from conftest import GuardedTorch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import AttentionWeights, backends

pytest.importorskip("triton")

from sparta_kernels.backends import layout, triton
from sparta_kernels.backends.triton import attention_plan

interpreted = pytest.mark.skipif("cpu" not in backends.DEVICES["triton"], reason="needs TRITON_INTERPRET=1")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STORED = ("contiguous", "channels_last")
SLICED = ("sliced_n", "sliced_c", "sliced_n_channels_last", "sliced_c_channels_last")
LAYOUTS = (*STORED, *SLICED, "permuted", "stepped")
# Of a sample: divisors of a tile, several tiles, neither.
SIZES = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (1, 128), (1, 3), (7, 7), (9, 10), (5, 40))


@st.composite
def cases(draw: st.DrawFn) -> AttentionCase:
    extents = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 24, 33, 64, 70])
    return AttentionCase(
        shape=(draw(st.sampled_from([1, 2, 3, 9])), draw(extents), *draw(st.sampled_from(SIZES))),
        hidden=draw(extents),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        gradient_layout=draw(st.sampled_from(STORED)),
        dynamic=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 1e-3])),
        seed=draw(st.integers(0, 2**16)),
    )


@interpreted
@given(case=cases(), keep=st.booleans())
def test_against_float64(case, keep):
    bits = check_forward(attention_plan, case, keep).bits
    check_backward(attention_plan, case, bits)


@interpreted
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_way_that_tiles_meet_samples(size, dynamic):
    for dtype, stored in ((torch.float32, "contiguous"), (torch.float16, "channels_last")):
        case = AttentionCase((3, 20, *size), 24, dtype, stored, stored, dynamic)
        check_backward(attention_plan, case, check_forward(attention_plan, case).bits)


@interpreted
@pytest.mark.parametrize("site", [(64, 64, 8), (256, 256, 4), (512, 256, 4), (130, 256, 5)], ids=str)
def test_the_widths_of_networks(site):
    channels, hidden, side = site
    case = AttentionCase((5, channels, side, side), hidden, torch.bfloat16, "channels_last", "channels_last")
    check_backward(attention_plan, case, check_forward(attention_plan, case).bits)


def _rows(tiling, *more: bool) -> list[tuple[torch.dtype, attention_plan.AttentionTiling]]:
    """All that the table has for 256 hidden channels, each with a dtype of those that it is for."""
    found = {}
    for dtype, planar, total, arch in itertools.product(DTYPES, (True, False), (2**8, 2**20), (80, 90, 100, 120)):
        found[tiling(total, 64, 256, *((dtype, planar) if more else (dtype.itemsize,)), arch)] = dtype
    return [(dtype, row) for row, dtype in found.items()]


@interpreted
@pytest.mark.parametrize(("dtype", "row"), _rows(attention_plan.attention_forward_tiling))
def test_forward_by_every_row_of_the_table(dtype, row, monkeypatch):
    monkeypatch.setattr(attention_plan, "attention_forward_tiling", lambda *_: row)
    check_forward(attention_plan, AttentionCase((2, 60, 9, 9), 200, dtype))


@interpreted
@pytest.mark.parametrize(("dtype", "row"), _rows(attention_plan.attention_backward_tiling, True))
def test_backward_by_every_row_of_the_table(dtype, row, monkeypatch):
    monkeypatch.setattr(attention_plan, "attention_backward_tiling", lambda *_: row)
    for planar in (True, False):
        layout_ = "contiguous" if planar else "channels_last"
        check_backward(attention_plan, AttentionCase((2, 60, 9, 9), 200, dtype, gradient_layout=layout_))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_halves(dtype, monkeypatch):
    before = attention_plan.attention_backward_tiling
    halved = lambda *extents: before(*extents)._replace(together=False)  # noqa: E731
    monkeypatch.setattr(attention_plan, "attention_backward_tiling", halved)
    for dynamic in (True, False):
        check_backward(attention_plan, AttentionCase((3, 20, 7, 7), 70, dtype, dynamic=dynamic))


@interpreted
def test_gradients_are_those_of_autograd():
    """With bits of forward's own, and in float32, which leaves no doubt about them."""
    case = AttentionCase((3, 12, 5, 7), 20, torch.float32)
    x, weights = case.inputs()
    _, _, v1, v6 = case.gradients()
    ga = case.gradients()[1]
    double = x.double().requires_grad_()
    pixels = double.flatten(2).transpose(1, 2)
    w1, w3, b1, b3 = (part.double() for both in (weights.w13, weights.b13) for part in both.chunk(2))
    h1, h3 = (pixels @ w1.t() + b1).relu(), (pixels @ w3.t() + b3).relu()
    assert weights.w6 is not None
    assert weights.b6 is not None
    h6 = (h3 @ weights.w6.double().t() + weights.b6.double()).relu()
    loss = ((h3 @ weights.w4.double()) * ga.double().flatten(1)).sum()
    loss = loss + (h1.sum(1) * v1).sum() + (h6.sum(1) * v6).sum()
    (want,) = torch.autograd.grad(loss, double)
    packed = triton.pack_attention(weights, torch.float32)
    bits = attention_plan.hidden_forward(x, packed, 20, True)[3]
    gx = torch.zeros_like(x)
    attention_plan.hidden_backward_(gx, ga, v1, v6, bits, packed, 20)
    torch.testing.assert_close(gx.double(), want, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_channel_and_kernel_follow_from_the_means(dynamic):
    case = AttentionCase((3, 12, 5, 7), 20, torch.float32, dynamic=dynamic)
    x, weights = case.inputs()
    gx, ga, *_ = case.gradients()
    packed = triton.pack_attention(weights, torch.float32)
    a, channel, kernel, mean1, mean6, bits = triton.attention_forward(x, packed, 20, True)
    inner = attention_plan.hidden_forward(x, packed, 20, True)
    assert_same_bits(a, inner.a)
    assert torch.equal(bits, inner.bits)
    torch.testing.assert_close(channel, inner.mean1 @ weights.w2.t() + weights.b2)
    if dynamic:
        torch.testing.assert_close(kernel, inner.mean6 @ weights.w7 + weights.b7)
    else:
        assert mean6 is None
        assert torch.equal(kernel, weights.b7.expand(3))
        assert kernel.data_ptr() != packed[7].data_ptr()
    assert_same_bits(mean1, inner.mean1)

    gchannel, gkernel = torch.randn(3, 12), torch.randn(3)
    want, got = gx.clone(), gx.clone()
    v6 = torch.outer(gkernel, weights.w7) / 35 if dynamic else None
    attention_plan.hidden_backward_(want, ga, gchannel @ weights.w2 / 35, v6, bits, packed, 20)
    triton.attention_backward_(got, ga, gchannel, gkernel, bits, packed, 20)
    torch.testing.assert_close(got, want)

    # Of a sum: written over its first part.
    skip, first = torch.randn(x.shape), x.clone()
    summed = triton.attention_forward(first, packed, 20, True, skip)
    assert torch.equal(first, x + skip)
    for one, other in zip(summed, triton.attention_forward(first, packed, 20, True), strict=True):
        assert one is other is None or torch.equal(one, other)


@interpreted
def test_gradients_that_float16_does_not_reach_down_to():
    """v1 and v6 are of a whole image, divided by its pixels."""
    case = AttentionCase((3, 20, 7, 7), 24, torch.float16)
    packed = triton.pack_attention(case.inputs()[1], torch.float16)
    gx, *gradients = case.gradients()
    bits = attention_plan.hidden_forward(case.inputs()[0], packed, 24, True)[3]
    results = []
    for scale in (1.0, 2.0**-12):
        got = torch.zeros_like(gx)
        attention_plan.hidden_backward_(got, *(g * 2.0**-14 * scale for g in gradients), bits, packed, 24)
        results.append(got.double() / scale)
    assert results[0].abs().max() < 2.0**-8
    # What is left is the rounding of gx itself, to multiples of 2^-24.
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=2.0**-12)
    assert results[1].abs().max() > 0


# ---- values that are no numbers ----------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_pixel_and_its_image(value, dtype):
    case = AttentionCase((4, 20, 3, 5), 24, dtype)
    x, weights = case.inputs()
    packed = triton.pack_attention(weights, dtype)
    clean = attention_plan.hidden_forward(x, packed, 24, True)
    x[2, 7, 1, 1] = value
    got = attention_plan.hidden_forward(x, packed, 24, True)
    w1, w3 = weights.w13.double().chunk(2)
    b1, b3 = weights.b13.double().chunk(2)
    pixels = pixels_first(x)[2]
    sums1, sums3 = pixels @ w1.t() + b1, pixels @ w3.t() + b3
    # A NaN passes a ReLU, as it does in torch: relu(nan) is nan, and so does its gradient.
    passing = unpacked(got[3], 24)[:, 2, 6]
    assert torch.equal(passing[:2], ~(torch.stack([sums1[6], sums3[6]]) <= 0))
    near = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True, "check_dtype": False}
    a = sums3.relu() @ weights.w4.double() + weights.b4.double()
    torch.testing.assert_close(got[0][2].flatten(), a, **near)
    assert not got[0][2, 0, 1, 1].isfinite()
    torch.testing.assert_close(got[1][2], sums1.relu().mean(0), **near)
    sums6 = sums3.relu() @ weights.w6.double().t() + weights.b6.double()
    assert torch.equal(passing[2], ~(sums6[6] <= 0))
    assert torch.equal(got[2][2].isfinite(), sums6.relu().mean(0).isfinite())
    elsewhere = torch.tensor([0, 1, 3])
    for one, other in zip(got[:3], clean[:3], strict=True):
        assert_same_bits(one[elsewhere], other[elsewhere])
    assert torch.equal(got[3][elsewhere], clean[3][elsewhere])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_selects(value, dtype):
    """What does not pass is 0, even if it is no number; what passes reaches all channels of its image."""
    case = AttentionCase((3, 20, 3, 5), 24, dtype)
    packed = triton.pack_attention(case.inputs()[1], dtype)
    gx, ga, v1, v6 = case.gradients()
    v1[1, 5] = v6[1, 6] = ga[1, 0, 2, 2] = value
    for passing in (0, 255):
        bits = torch.full((3, 15, 3, 4), passing, dtype=torch.uint8)
        bits[..., 3] = 0
        got = gx.clone()
        attention_plan.hidden_backward_(got, ga, v1, v6, bits, packed, 24)
        if passing == 0:
            assert_same_bits(got, gx)
        else:
            assert got[[0, 2]].isfinite().all()
            assert not got[1].isfinite().any()


# ---- how it is called --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("shape", [(0, 20, 4, 4), (3, 20, 0, 4)], ids=str)
def test_nothing_to_do(shape):
    case = AttentionCase(shape, 24, torch.float32)
    result = check_forward_shapes(case)
    gx, ga, v1, v6 = case.gradients()
    attention_plan.hidden_backward_(
        gx, ga, v1, v6, result[3], triton.pack_attention(case.inputs()[1], torch.float32), 24
    )
    assert gx.shape == shape


def check_forward_shapes(case: AttentionCase) -> tuple[Tensor, ...]:
    x, weights = case.inputs()
    result = attention_plan.hidden_forward(x, triton.pack_attention(weights, case.dtype), case.hidden, True)
    samples, _, height, width = case.shape
    assert result[0].shape == (samples, 1, height, width)
    assert result[1].shape == result[2].shape == (samples, case.hidden)
    assert result[1].isnan().all()  # as the mean of nothing is
    assert result[3].shape == (samples, height * width, 3, 4)
    return result


@interpreted
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (10, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written_and_nothing_beside_it(size, dtype, monkeypatch):
    guarded = GuardedTorch()
    for module in (layout, attention_plan):
        monkeypatch.setattr(module, "torch", guarded)
    for stored in STORED:
        case = AttentionCase((5, 20, *size), 24, dtype, stored, stored)
        check_backward(attention_plan, case, check_forward(attention_plan, case).bits)
    guarded.check()


@interpreted
@pytest.mark.parametrize("stored", STORED)
def test_the_same_bits_every_time_and_in_both_layouts(stored):
    case = AttentionCase((9, 20, 7, 7), 24, torch.bfloat16, stored, stored)
    plain = AttentionCase((9, 20, 7, 7), 24, torch.bfloat16)
    for other in (case, plain):
        first, second = (check_forward(attention_plan, one) for one in (case, other))
        for one, another in zip(first[:3], second[:3], strict=True):
            assert_same_bits(one, another)
        assert torch.equal(first.bits, second.bits)
        assert_same_bits(
            check_backward(attention_plan, case, first.bits), check_backward(attention_plan, other, first.bits)
        )


@interpreted
def test_a_sample_is_what_it_is_alone():
    """Up to the order of sums: tiles begin elsewhere."""
    case = AttentionCase((7, 20, 7, 7), 24, torch.float32)
    x, weights = case.inputs()
    packed = triton.pack_attention(weights, torch.float32)
    together = attention_plan.hidden_forward(x, packed, 24, True)
    for n in range(7):
        alone = attention_plan.hidden_forward(x[n : n + 1], packed, 24, True)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[n : n + 1], other)


@interpreted
def test_small_tensors_of_other_dtypes_and_strides():
    case = AttentionCase((3, 20, 5, 5), 24, torch.float32)
    packed = triton.pack_attention(case.inputs()[1], torch.float32)
    gx, ga, v1, v6 = case.gradients()
    bits = attention_plan.hidden_forward(case.inputs()[0], packed, 24, True)[3]
    want = gx.clone()
    rounded = [g.bfloat16() for g in (ga, v1, v6)]
    attention_plan.hidden_backward_(want, *(g.float() for g in rounded), bits, packed, 24)
    spread = [torch.stack([g, torch.full_like(g, math.nan)], -1)[..., 0] for g in rounded]
    attention_plan.hidden_backward_(gx, *spread, bits, packed, 24)
    assert_same_bits(gx, want)


@interpreted
def test_a_gradient_with_gaps_is_written_back():
    case = AttentionCase((3, 20, 5, 6), 24, torch.float32, gradient_layout="sliced_w")
    check_backward(attention_plan, case)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@interpreted
def test_what_is_unfit_and_why():
    x = torch.zeros(2, 3, 4, 4)
    assert triton.attention_unfit(x, 256) is None
    assert triton.attention_unfit(x.bfloat16(), 1) is None
    assert "not for float64" in triton.attention_unfit(x.double(), 16)
    assert "not for int64" in triton.attention_unfit(x.long(), 16)
    assert "hidden must be from 1 to 256, got 257" in triton.attention_unfit(x, 257)
    assert "hidden must be" in triton.attention_unfit(x, 0)
    assert "no channels" in triton.attention_unfit(x[:, :0], 16)
    assert "no kernels for meta" in triton.attention_unfit(empty(2, 3, 4, 4), 16)
    assert "pixels" in triton.attention_unfit(x[:1, :, :1, :1].expand(2**15, 3, 2**15, 2), 16)


def test_what_is_unfit_on_a_gpu(monkeypatch):
    def why(dtype: torch.dtype) -> str | None:
        x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(2, 64, 4, 4))
        return triton.attention_unfit(x, 64)

    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert "allow_tf32" in why(torch.float32)
        assert why(torch.bfloat16) is why(torch.float16) is None
        assert "not for float64" in why(torch.float64)
        matmul.allow_tf32 = True
        assert why(torch.float32) is None
        capability[0] = 7
        assert "compute capability 8.0" in why(torch.bfloat16)
    finally:
        matmul.allow_tf32 = before


def test_weights_are_packed_with_zeros_around():
    shapes = ((48, 70), (48,), (24,), (1,), (70, 24), (70,), (1,), (24, 24), (24,), (24,))
    weights = AttentionWeights(*(torch.ones(shape) for shape in shapes))
    w13, b13, w4, b4, w13t, w2, b2, b7, w6, b6, w6t, w7 = triton.pack_attention(weights, torch.bfloat16)
    assert w13.shape == (64, 128)
    assert w13.sum() == 48 * 70
    assert w13[24:32].abs().max() == w13[56:].abs().max() == w13[:, 70:].abs().max() == 0
    assert torch.equal(w13t, w13.t())
    assert torch.equal(w6t, w6.t())
    assert w6.shape == (32, 32)
    assert all(tensor.is_contiguous() for tensor in (w13t, w6t))
    assert {tensor.dtype for tensor in (w13, w13t, w6, w6t)} == {torch.bfloat16}
    assert {tensor.dtype for tensor in (b13, w4, b4, b6, w2, b2, b7, w7)} == {torch.float32}
    assert b13.sum() == 48
    assert len(triton.pack_attention(weights._replace(w6=None, b6=None, w7=None), torch.bfloat16)) == 8
    # They stay what they are when the weights change.
    for name, tensor in (("b4", b4), ("w2", w2), ("b2", b2), ("b7", b7), ("w7", w7)):
        assert tensor.data_ptr() != getattr(weights, name).data_ptr()


# ---- the table ---------------------------------------------------------------------------------------------


@given(
    total=st.integers(1, 2**20),
    channels=st.one_of(st.integers(1, 600), st.sampled_from([1, 16, 17, 64])),
    hidden=st.one_of(st.integers(1, 256), st.sampled_from([1, 16, 128, 129])),
    dtype=st.sampled_from(DTYPES),
    planar=st.booleans(),
    arch=st.sampled_from([80, 86, 89, 90, 100, 120]),
)
def test_steps_divide_what_is_padded(total, channels, hidden, dtype, planar, arch):
    wide, high = attention_plan.padded_channels(channels), attention_plan.padded_hidden(hidden)
    assert channels <= wide < channels + max(16, channels, 64)
    assert hidden <= high < max(17, 2 * hidden)
    forward = attention_plan.attention_forward_tiling(total, wide, high, dtype.itemsize, arch)
    backward = attention_plan.attention_backward_tiling(total, wide, high, dtype, planar, arch)
    for tiling, depth, chunk in ((forward, wide, high), (backward, high, wide)):
        assert depth % tiling.depth == chunk % tiling.chunk == 0
        numbers = (tiling.pixels, tiling.depth, tiling.chunk)
        assert all(number >= 16 and number & (number - 1) == 0 for number in numbers)
        assert tiling.together or high >= 32  # a half of it is still a factor's extent


def test_nothing_is_left_to_finish_where_tiles_have_whole_samples():
    shapes = ((48, 64), (48,), (24,), (1,), (64, 24), (64,), (1,), (24, 24), (24,), (24,))
    weights = AttentionWeights(*(empty(*shape) for shape in shapes))
    packed = triton.pack_attention(weights, torch.bfloat16)
    for side, launches in ((1, 1), (4, 1), (7, 2), (8, 1), (16, 2), (32, 2)):
        x = empty(512, 64, side, side, dtype=torch.bfloat16)
        planned, result = attention_plan.plan_attention_forward(x, packed, 24, True, 90)
        assert len(planned) == launches, side
        # Never one tile an image where an image is smaller than that.
        tile = attention_plan.attention_forward_tiling(x.numel() // 64, 64, 32, 2, 90).pixels
        assert planned[0].programs == -(-512 * side * side // tile)
        assert result.bits.shape == (512, side * side, 3, 4)


@interpreted
def test_layouts_are_read_where_they_lie():
    """Slices in N and C cost no copy."""
    x = torch.zeros(3, 20, 5, 5)
    for name in (*STORED, *SLICED):
        laid = lay(x, name)
        planar = layout.is_planar(laid.shape, laid.stride())
        assert attention_plan._strides(laid, planar)[0] is laid, name
