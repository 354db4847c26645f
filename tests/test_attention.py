"""sparta_attention and sparta_activation on a CPU: every instruction set against plain torch in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from activation_case import (
    FIELDS,
    SIZES,
    ActivationCase,
    activation_cases,
    check_attention,
    forward,
    network,
    present,
    unpacked,
)
from cases import FLOATS, assert_same_bits
from conftest import GuardedTorch
from hypothesis import given, settings
from torch import Tensor

from sparta_kernels import AttentionWeights, sparta_activation, sparta_attention, sparta_gate
from sparta_kernels.backends import layout, native
from sparta_kernels.ops import attention

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- values and gradients ----------------------------------------------------------------------------------


@given(case=activation_cases())
def test_attention_against_float64(cpu_backend, case):
    check_attention(case, cpu_backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_way_that_tiles_meet_samples(cpu_backend, size, dtype):
    for stored in ("contiguous", "channels_last"):
        for dynamic in (True, False):
            check_attention(ActivationCase((17, 18, *size), 17, dtype, stored, dynamic=dynamic), cpu_backend)


@pytest.mark.parametrize("site", [(64, 64, 8), (130, 256, 5), (96, 600, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_widths_of_networks(cpu_backend, site, dtype):
    channels, hidden, side = site
    check_attention(ActivationCase((2, channels, side, side), hidden, dtype, "channels_last"), cpu_backend)


def activation_grads(case: ActivationCase, backend: str) -> list[Tensor]:
    x, weights = case.leaves()
    y = sparta_activation(x, weights, share=case.share, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [x, *present(weights)], case.gradient())]


def check_activation(case: ActivationCase, backend: str) -> None:
    """The whole is its parts: bit for bit, but for x's gradient, which the whole rounds once less."""
    y, gx, *others = activation_grads(case, backend)
    x, weights = case.leaves()
    of_network, of_gate = x.detach().requires_grad_(), x.detach().requires_grad_()
    a, channel, kernel = sparta_attention(of_network, weights, backend=backend)
    spatial = a if case.share == 1 else F.avg_pool2d(a, case.share, ceil_mode=True)
    want = sparta_gate(of_gate, spatial, channel, kernel, share=case.share, backend=backend)
    first, second, *wants = torch.autograd.grad(want, [of_network, of_gate, *present(weights)], case.gradient())
    assert_same_bits(y, want.detach(), "y")
    assert y.stride() == gx.stride() == torch.empty_like(x).stride()
    for name, got, wanted in zip([n for n in FIELDS if getattr(weights, n) is not None], others, wants, strict=True):
        assert_same_bits(got, wanted, f"gradient of {name}")
    room = 2 * torch.finfo(case.dtype).eps * (first.double().abs() + second.double().abs())
    # A step of the smallest numbers, which 16-bit gradients of many pixels reach.
    room += 2 * torch.finfo(case.dtype).smallest_normal * torch.finfo(case.dtype).eps
    assert ((gx.double() - first.double() - second.double()).abs() <= room).all(), "gradient of x"


@given(case=activation_cases())
def test_activation_is_attention_and_gate(cpu_backend, case):
    check_activation(case, cpu_backend)


@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("shape", [(3, 17, 7, 5), (2, 5, 12, 13), (4, 6, 1, 1)], ids=str)
def test_in_float64_both_are_the_reference(cpu_backend, shape, dynamic, share):
    case = ActivationCase(shape, 18, torch.float64, "channels_last", dynamic=dynamic, share=share)
    got = activation_grads(case, cpu_backend)
    for want, other in zip(got, activation_grads(case, "reference"), strict=True):
        torch.testing.assert_close(want, other, rtol=1e-9, atol=1e-11)
    x, weights = case.leaves()
    leaves = [x, *present(weights)]
    found = [sparta_attention(x, weights, backend=name) for name in (cpu_backend, "reference")]
    grads = [torch.autograd.grad(f, leaves, case.gradients()) for f in found]
    for one, other in (*zip(*found, strict=True), *zip(*grads, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("given_to", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_results_that_nobody_reads(cpu_backend, given_to):
    case = ActivationCase((2, 5, 4, 4), 9, torch.float64)
    grads = []
    for name in (cpu_backend, "reference"):
        x, weights = case.leaves()
        found = sparta_attention(x, weights, backend=name)
        total = sum((found[i] * case.gradients()[i]).sum() for i in given_to)
        grads.append(torch.autograd.grad(total, [x, *present(weights)], allow_unused=True))
    for got, want in zip(*grads, strict=True):
        zero = torch.zeros(()) if got is None else torch.zeros_like(got)
        torch.testing.assert_close(zero if got is None else got, zero if want is None else want)


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("function", [sparta_attention, sparta_activation])
def test_gradcheck_and_gradgradcheck(function, dynamic, share):
    if function is sparta_attention and share > 1:
        return
    case = ActivationCase((2, 3, 2, 3), 2, torch.float64, dynamic=dynamic, seed=3)
    x, weights = case.leaves()
    options = {"share": share} if function is sparta_activation else {}

    def call(x: Tensor, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = iter(given)
        chosen = AttentionWeights(*(None if w is None else next(values) for w in weights))
        return function(x, chosen, backend="native", **options)

    assert torch.autograd.gradcheck(call, (x, *present(weights)))
    assert torch.autograd.gradgradcheck(call, (x, *present(weights)))


def test_it_can_be_differentiated_three_times():
    case = ActivationCase((2, 3, 2, 2), 4, torch.float64)
    found = []
    for name in ("native", "reference"):
        x, weights = case.leaves()
        value = sparta_activation(x, weights, backend=name).square().sum()
        for _ in range(3):
            (gx,) = torch.autograd.grad(value, x, create_graph=True)
            value = gx.square().sum()
        found.append(value.detach())
    torch.testing.assert_close(*found)


# ---- what is kept ------------------------------------------------------------------------------------------


def test_a_bit_lies_where_its_channel_is():
    case = ActivationCase((1, 2, 1, 2), 19, torch.float32)
    x, weights = case.inputs()
    x[:] = 0.0
    for mask, channel in itertools.product(range(3), (0, 1, 7, 8, 15, 16, 18)):
        chosen = [torch.full((size,), -1.0) for size in (38, 19)]
        (chosen[0][19 * mask :] if mask < 2 else chosen[1])[channel] = 1.0
        bits = forward(case, x, weights._replace(b13=chosen[0], b6=chosen[1], w6=torch.zeros(19, 19)))[5]
        want = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
        want[:, :, mask, channel // 8] = 1 << channel % 8
        assert torch.equal(bits, want)


def test_zero_does_not_pass():
    case = ActivationCase((2, 3, 2, 2), 5, torch.float32)
    x, weights = case.inputs()
    bits = forward(case, torch.zeros_like(x), AttentionWeights(*(torch.zeros_like(w) for w in weights)))[5]
    assert not bits.any()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_without_gradients_no_bits_are_kept_and_results_are_the_same(cpu_backend, dynamic):
    case = ActivationCase((3, 18, 5, 7), 17, torch.float32, dynamic=dynamic)
    x, weights = case.inputs()
    kept, other = (forward(case, x, weights, keep) for keep in (True, False))
    assert other[5].numel() == 0
    for one, another in zip(kept[:5], other[:5], strict=True):
        assert_same_bits(one, another)
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        sparta_activation(*case.leaves(), backend=cpu_backend)
    assert not saved


# ---- repeatable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 20, 23, 21), (37, 20, 4, 4)], ids=str)
def test_the_same_bits_every_time_and_for_any_number_of_threads(cpu_backend, shape, layout, dtype):
    case = ActivationCase(shape, 40, dtype, layout, layout, share=2)
    x, weights = case.inputs()
    torch.set_num_threads(1)
    want, want_raw = activation_grads(case, cpu_backend)[:2], forward(case, x, weights)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for got, wanted in zip(activation_grads(case, cpu_backend)[:2], want, strict=True):
            assert_same_bits(got, wanted, f"{threads} threads")
        for got, wanted in zip(forward(case, x, weights), want_raw, strict=True):
            assert torch.equal(got, wanted)


# ---- values that are no numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_pixel_and_its_image(cpu_backend, value, stored, dtype):
    """With 16 hidden channels, and with some that are there for the registers' sake alone."""
    for hidden in (16, 19):
        case = ActivationCase((4, 20, 3, 5), hidden, dtype, stored)
        x, weights = case.inputs()
        clean = forward(case, x, weights)
        x[2, 7, 1, 1] = value
        got = forward(case, x, weights)
        double = AttentionWeights(*(None if w is None else w.double() for w in weights))
        sums, wants = network(x.double(), double, None)
        passing = unpacked(got[5], hidden)
        assert torch.equal(passing[:2, 2, 6], torch.stack([~(s[2, 6] <= 0) for s in sums[:2]]))
        for name, one, other, want in zip(("a", "channel", "kernel"), got, clean, wants, strict=False):
            rest = torch.tensor([0, 1, 3])
            assert_same_bits(one[rest], other[rest], name)
            torch.testing.assert_close(one[2].double(), want[2], rtol=0.03, atol=0.03, equal_nan=True, msg=name)
        assert torch.equal(got[5][[0, 1, 3]], clean[5][[0, 1, 3]])
        for pixel in set(range(15)) - {6}:
            assert torch.equal(got[5][2, pixel], clean[5][2, pixel])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_selects(cpu_backend, value, dtype):
    """What does not pass is 0, even if it is no number; what passes reaches all channels of its image."""
    case = ActivationCase((3, 20, 3, 5), 24, dtype)
    packed = attention.pack(case.inputs()[1], dtype, cpu_backend)
    for index in range(3):
        before, grads = case.gradient(), case.gradients()
        grads[index][1].view(-1)[:1] = value
        for passing in (0, 255):
            bits = torch.full((3, 15, 3, 4), passing, dtype=torch.uint8)
            bits[..., 3] = 0
            got = before.clone()
            torch.ops.sparta_kernels._attention_backward_(got, *grads, bits, packed.tensors, 24, cpu_backend)
            if passing == 0:
                assert_same_bits(got, before)
            else:
                assert got[[0, 2]].isfinite().all()
                pixels = got[1].isfinite().all(0).flatten()
                assert not (got[1].isfinite().any(0).flatten() & ~pixels).any()
                assert pixels.sum() == (14 if index == 0 else 0)


def test_gradients_of_weights_select_too():
    """Where no ReLU lets an infinite gradient of a mean through, it reaches no weight before it."""
    case = ActivationCase((2, 3, 2, 2), 4, torch.float32)
    x, weights = case.inputs()
    weights = weights._replace(b13=torch.full((8,), -100.0), b6=torch.full((4,), -100.0))
    x, weights = x.requires_grad_(), AttentionWeights(*(w.requires_grad_() for w in weights))
    found = sparta_attention(x, weights, backend="native")
    leaves = [x, weights.w13, weights.b13, weights.w6, weights.b6]
    for grad in torch.autograd.grad(found, leaves, [torch.full_like(f, math.inf) for f in found]):
        assert not grad.any()


# ---- memory ------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(case=activation_cases())
def test_every_output_is_written_and_nothing_beside_it(cpu_backend, case, monkeypatch):
    guarded = GuardedTorch()
    new_empty = Tensor.new_empty

    def guarded_new(like: Tensor, *size: int, **options: torch.dtype) -> Tensor:
        return guarded._guarded(new_empty(like, *size, **options))

    with monkeypatch.context() as patched:
        for module in (layout, native):
            patched.setattr(module, "torch", guarded)
        patched.setattr(Tensor, "new_empty", guarded_new)
        check_activation(case, cpu_backend)
        guarded.check()
