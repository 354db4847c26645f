"""The gate's gradients for gy + gy2, of a y that two read: the CPU's own kernel against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FLOATS, LAYOUTS, GateCase, assert_near, assert_same_bits, gate_cases, magnitudes, to_double
from conftest import GuardedTorch
from hypothesis import given
from hypothesis import strategies as st

from sparta_kernels import reference
from sparta_kernels.backends import layout, native

raw = torch.ops.sparta_kernels
NAMES = ("gx", "gspatial", "gchannel", "gkernel")
FLOAT32 = (torch.float32,) * 3


@given(case=gate_cases(), second_layout=st.sampled_from(LAYOUTS))
def test_of_a_sum(cpu_backend, monkeypatch, case, second_layout):
    """And every output is written, and nothing beside it."""
    if case.small_dtypes[2] is None:
        case = replace(case, small_dtypes=(*case.small_dtypes[:2], torch.float32))
    inputs, gy = case.inputs(), case.gradient()
    gy2 = replace(case, seed=case.seed + 7, gradient_layout=second_layout).gradient()
    guarded = GuardedTorch()
    with monkeypatch.context() as patched:
        for module in (layout, native):
            patched.setattr(module, "torch", guarded)
        got = raw._gate_backward_of_sum(gy, gy2, *inputs, case.share, cpu_backend)
    guarded.check()
    want = reference.gate_backward(gy.double() + gy2.double(), *to_double(inputs), case.share)
    plain = reference.gate_backward(gy + gy2, *inputs, case.share)
    sizes = magnitudes(inputs, gy.double().abs() + gy2.double().abs(), case.share)[1:]
    for name, *compared in zip(NAMES, got, want, plain, sizes, strict=True):
        assert_near(*compared, case.dtype, name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", ["contiguous", "channels_last"])
def test_of_a_sum_with_nothing(cpu_backend, stored, dtype):
    """In float32 and float64, where the sum is no rounding, bit for bit: of a sum that has several chunks too."""
    for shape, share in (((2, 5, 7, 9), 1), ((1, 3, 70, 301), 2)):
        case = GateCase(shape, dtype, FLOAT32, share, stored, stored)
        inputs, gy = case.inputs(), case.gradient()
        want = raw._gate_backward(gy, *inputs, share, [True] * 4, cpu_backend)
        for one, other in ((gy, torch.zeros_like(gy)), (torch.zeros_like(gy), gy), (gy / 2, gy / 2)):
            for name, got, wanted in zip(
                NAMES, raw._gate_backward_of_sum(one, other, *inputs, share, cpu_backend), want, strict=True
            ):
                if dtype.itemsize == 2:  # half of the smallest number is none
                    torch.testing.assert_close(got, wanted)
                else:
                    assert_same_bits(got + 0.0, wanted + 0.0, name)


@pytest.mark.parametrize("stored", ["contiguous", "channels_last", "permuted", "sliced_c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(stored, dtype):
    case = GateCase((2, 3, 5, 4), dtype, FLOAT32, 2, stored, stored)
    arguments = case.gradient(), 2 * case.gradient(), *case.inputs(), 2, "native"
    torch.library.opcheck(raw._gate_backward_of_sum.default, arguments)
