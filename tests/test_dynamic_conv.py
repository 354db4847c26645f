"""dynamic_conv's values and gradients: every backend and instruction set against the reference in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, ConvCase, assert_near, assert_same_bits, conv_cases, interpreted, random, thread_counts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import backends, dynamic_conv, reference

NAMES = ("gspatial", "gkernel")


def gradients(gy: Tensor, spatial: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
    """By autograd over the reference."""
    leaves = [spatial.detach().requires_grad_(), kernel.detach().requires_grad_()]
    return torch.autograd.grad(reference.dynamic_conv(*leaves), leaves, gy)


def magnitudes(gy: Tensor, spatial: Tensor, kernel: Tensor) -> list[Tensor]:
    """Of the output and the two gradients: every product counted as positive."""
    positive = spatial.double().abs(), kernel.double().abs()
    return [reference.dynamic_conv(*positive), *gradients(gy.double().abs(), *positive)]


def check(case: ConvCase, backend: str, wanted: tuple[bool, bool] = (True, True)) -> None:
    inputs, gy = case.inputs(), case.gradient()
    exact = [t.double() for t in inputs]
    sizes = magnitudes(gy, *inputs)
    output = dynamic_conv(*inputs, backend=backend)
    want, plain = reference.dynamic_conv(*exact), reference.dynamic_conv(*inputs)
    assert_near(output, want, plain, sizes[0], case.dtype, "output")
    assert output.is_contiguous()
    got = torch.ops.sparta_kernels._conv_backward(gy, *inputs, list(wanted), backend)
    compared = zip(got, gradients(gy.double(), *exact), gradients(gy, *inputs), sizes[1:], strict=True)
    for name, asked, tensors in zip(NAMES, wanted, compared, strict=True):
        if asked:
            assert_near(*tensors, case.dtype, name)
        else:
            assert tensors[0].shape == (0,)


# ---- values ------------------------------------------------------------------------------------------------


@given(case=conv_cases(), wanted=st.tuples(st.booleans(), st.booleans()))
def test_values_and_gradients(backend, case, wanted):
    check(case, backend, wanted)


@given(case=conv_cases())
def test_every_output_is_written_and_nothing_beside_it(backend, guarded, case):
    check(case, backend)
    guarded()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_larger_batch(backend, dtype):
    check(ConvCase((40, 33, 31), 3, dtype, torch.float32), backend)


def test_against_a_convolution_with_a_group_for_every_sample(backend):
    spatial, kernel = ConvCase((3, 6, 5), 3, torch.float64, torch.float64).inputs()
    want = F.conv2d(spatial.transpose(0, 1), kernel[:, None], padding=1, groups=3).transpose(0, 1)
    torch.testing.assert_close(dynamic_conv(spatial, kernel, backend=backend), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_size_1_is_a_product(backend, dtype):
    spatial, kernel = ConvCase((3, 6, 5), 1, dtype, dtype).inputs()
    got = dynamic_conv(spatial, kernel, backend=backend)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert_same_bits(got, (spatial.to(work) * kernel.to(work)[..., None]).to(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_reach_their_neighbours_and_no_further(backend, value):
    spatial, kernel = ConvCase((2, 7, 9), 3, torch.float32, torch.float32).inputs()
    spatial[1, 0, 3, 4] = value
    got = dynamic_conv(spatial, kernel, backend=backend)
    torch.testing.assert_close(got, reference.dynamic_conv(spatial, kernel), equal_nan=True)
    touched = torch.zeros_like(got, dtype=torch.bool)
    touched[1, 0, 2:5, 3:6] = True
    assert torch.equal(~got.isfinite(), touched)


def test_the_gradient_of_a_sum_has_no_strides(backend):
    inputs = [t.requires_grad_() for t in ConvCase((2, 6, 5), 3, torch.float32, torch.float32).inputs()]
    dynamic_conv(*inputs, backend=backend).sum().backward()
    wants = gradients(torch.ones(2, 1, 6, 5), *inputs)
    for tensor, want in zip(inputs, wants, strict=True):
        torch.testing.assert_close(tensor.grad, want)


def test_the_same_bits_every_time_and_for_any_number_of_threads(backend):
    case = ConvCase((4 if interpreted(backend) else 40, 33, 31), 5, torch.float32, torch.float32)
    inputs, gy = case.inputs(), case.gradient()

    def everything() -> list[Tensor]:
        grads = torch.ops.sparta_kernels._conv_backward(gy, *inputs, [True, True], backend)
        return [dynamic_conv(*inputs, backend=backend), *grads]

    torch.set_num_threads(1)
    wants = everything()
    for threads in thread_counts(backend):
        torch.set_num_threads(threads)
        for got, want in zip(everything(), wants, strict=True):
            assert_same_bits(got, want, f"{threads} threads")


# ---- what is asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=2)), ids=str)
def test_needs_input_grad_reaches_the_kernel(monkeypatch, needed):
    module = backends.module("native")
    conv_backward, seen, saved = module.conv_backward, [], []

    def spy(*arguments):
        seen.append(tuple(arguments[-1]))
        return conv_backward(*arguments)

    monkeypatch.setattr(module, "conv_backward", spy)
    inputs = ConvCase((2, 6, 5), 3, torch.float32, torch.float32).inputs()
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(need)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = dynamic_conv(*inputs, backend="native")
    if not any(needed):
        assert not output.requires_grad
        assert not saved
        return
    output.sum().backward()
    assert seen == [needed]
    assert tuple(t.grad is not None for t in inputs) == needed


# ---- derivatives -------------------------------------------------------------------------------------------


def gradient_inputs(size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [random(generator, 2, 1, 3, 4).requires_grad_(), random(generator, 2, size, size).requires_grad_()]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradcheck(backend, size):
    fast = interpreted(backend)
    assert torch.autograd.gradcheck(lambda *t: dynamic_conv(*t, backend=backend), gradient_inputs(size), fast_mode=fast)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradgradcheck(size):
    assert torch.autograd.gradgradcheck(lambda *t: dynamic_conv(*t, backend="native"), gradient_inputs(size))


def test_third_order():
    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        loss = dynamic_conv(*tensors, backend="native").pow(3).sum()
        return torch.autograd.grad(loss, tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(first, gradient_inputs(3), fast_mode=True)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_partial_double_backward(needed):
    """Whichever of gy, spatial and kernel need a gradient."""
    tensors = [
        random(torch.Generator().manual_seed(6), 2, 1, 3, 4),
        *(t.detach() for t in gradient_inputs(3)),
    ]

    def second(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        differentiated = [t for t in leaves[1:] if t.requires_grad]
        if not differentiated:
            return []
        output = dynamic_conv(*leaves[1:], backend=backend)
        first = torch.autograd.grad(output, differentiated, leaves[0], create_graph=True)
        asked = [t for t in leaves if t.requires_grad]
        loss = sum((g + 1).square().sum() for g in first) + sum(0 * t.sum() for t in asked)
        return list(torch.autograd.grad(loss, asked))

    for got, want in zip(second("native"), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
