"""The Triton backend's own: its launch table, what the interpreter cannot see, and shapes that the table divides."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FLOATS, ConvCase, GateCase, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparta_kernels import backends, dynamic_conv, reference

pytest.importorskip("triton")

from sparta_kernels.backends import triton
from sparta_kernels.backends.triton import launch, pointwise_plan

ROOT = Path(__file__).resolve().parent.parent
SITES = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4))
interpreted = pytest.mark.skipif("cpu" not in backends.DEVICES["triton"], reason="needs TRITON_INTERPRET=1")


def empty(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def gate_tensors(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    share: int = 1,
    small: torch.dtype = torch.float32,
    kernel: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, spatial, channel, kernel, with no memory behind them."""
    n, c, h, w = shape
    spatial = empty(n, 1, -(-h // share), -(-w // share), dtype=small)
    kernels = empty(n, dtype=small) if kernel else None
    return empty(*shape, dtype=dtype, channels_last=channels_last), spatial, empty(n, c, dtype=small), kernels


# ---- the table ---------------------------------------------------------------------------------------------

counts = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 500, 512, 1024, 4097, 2**20]))
extents = st.one_of(
    st.integers(1, 70), st.sampled_from([255, 256, 257, 784, 1023, 1024, 1025, 3136, 4096, 77357, 2**20])
)
itemsizes = st.sampled_from([2, 4, 8])


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@given(samples=counts, rows=extents, cols=extents, itemsize=itemsizes)
def test_forward_tiles_are_of_a_size_that_fits(samples, rows, cols, itemsize):
    tiling = launch.gate_forward_tiling(samples, rows, cols, itemsize)
    tile = (tiling.samples, tiling.rows, tiling.cols)
    assert all(map(is_power_of_two, tile))
    elements = tiling.samples * tiling.rows * tiling.cols
    assert elements * itemsize <= 64 * 32 * tiling.warps
    # Less than half of a tile's rows and columns lie outside, but where a tile has several rows of a narrow matrix.
    assert launch.ceil_div(cols, tiling.cols) * tiling.cols < 2 * cols or tiling.cols <= 256
    assert tiling.rows < 2 * rows


@given(samples=counts, rows=extents, cols=extents, itemsize=itemsizes, planar=st.booleans(), plain=st.booleans())
def test_backward_parts_make_up_a_sample(samples, rows, cols, itemsize, planar, plain):
    tiling = launch.gate_backward_tiling(samples, rows, cols, itemsize, planar, plain)
    assert all(map(is_power_of_two, (tiling.samples, tiling.rows, tiling.cols, tiling.fold)))
    assert (tiling.row_parts - 1) * tiling.rows_in_part < rows <= tiling.row_parts * tiling.rows_in_part
    assert (tiling.col_parts - 1) * tiling.cols < cols <= tiling.col_parts * tiling.cols
    assert tiling.rows % tiling.fold == 0
    assert tiling.rows < 2 * tiling.rows_in_part
    assert tiling.samples == 1 or tiling.row_parts * tiling.col_parts == 1
    if tiling.even:
        assert samples % tiling.samples == rows % tiling.rows == cols % tiling.cols == 0
        assert rows == tiling.row_parts * tiling.rows_in_part
        assert tiling.rows_in_part % tiling.rows == 0
    if tiling.samples > 1:
        assert rows <= tiling.rows
        assert cols <= tiling.cols
    # Sums over rows of 1024 columns, or of 512 in float64, are as many as are kept.
    assert tiling.cols * itemsize <= 4096
    if samples >= 512 or rows * cols <= 16384:
        assert tiling.row_parts == 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("samples", [128, 512, 1024])
def test_the_sites_of_a_network_take_one_launch(samples, site, dtype, channels_last):
    tensors = gate_tensors((samples, *site), dtype, channels_last)
    assert len(triton.plan_gate_forward(*tensors, 1)[0]) == 1
    (backward,) = triton.plan_gate_backward(tensors[0], *tensors, 1, [True] * 4)[0]
    assert backward.programs == samples


def test_few_samples_are_divided_and_finished_by_a_second_launch():
    tensors = gate_tensors((2, 64, 32, 32))
    first, second = triton.plan_gate_backward(tensors[0], *tensors, 1, [True] * 4)[0]
    assert first.programs >= 32
    assert second.kernel.__name__ == "gate_finish"
    # What every part has by itself is finished by the first: here gspatial, for the parts differ in pixels.
    gradients = triton.plan_gate_backward(tensors[0], *tensors, 1, [True] * 4)[2]
    assert first.arguments[6].shape == gradients[0].shape
    assert second.arguments[4] is None


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_what_is_not_wanted_is_not_allocated(wanted):
    tensors = gate_tensors((2, 64, 32, 32), share=2)
    launches, gx, gradients = triton.plan_gate_backward(tensors[0], *tensors, 2, list(wanted))
    assert [gx is not None, *(g is not None for g in gradients)] == list(wanted)
    assert len(launches) == (0 if not any(wanted) else 2 if any(wanted[1:]) else 1)


def test_the_attack_is_compiled_without_contraction():
    images, indices = empty(2, 3, 8, 8), torch.empty(2, dtype=torch.int64, device="meta")
    launches = [
        *triton.plan_pgd_step(images, images, images, 0.1, 0.1, 0.0, 1.0),
        *triton.plan_pgd_start(images, images, indices, 0.1, 0, 0, 0.0, 1.0),
    ]
    assert [entry.options["enable_fp_fusion"] for entry in launches] == [False, False]


def test_too_many_pixels_are_refused():
    spatial = empty(1, 1, 2**16, 2**15)
    with pytest.raises(ValueError, match=r"dynamic_conv: spatial must have at most 2\*\*31 - 2\*\*12 pixels"):
        triton.plan_conv_forward(spatial, empty(1, 3, 3))


# ---- what the interpreter cannot see -----------------------------------------------------------------------

_COMPILE = """
import sys
sys.path[:0] = [{tests!r}, {benchmarks!r}]
from compiled import _Target
from triton.runtime import driver
driver.set_active(_Target(90))
from test_triton import launches_of_every_kind
for name, launch in launches_of_every_kind():
    try:
        compiled = launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)
    except Exception as error:
        sys.exit(f"{{name}}: {{launch.kernel.__name__}}: {{error}}")
    contracted = "fma.rn" in compiled.asm["ptx"]
    if contracted and not launch.fused:
        sys.exit(f"{{name}}: {{launch.kernel.__name__}} has fused products and sums")
    print(name, launch.kernel.__name__, "fused" if contracted else "")
"""


def launches_of_every_kind():
    """Every branch of every kernel: layouts, cells, parts, absent tensors, and extents of 1 (constants to Triton)."""
    from compiled import attention_launches

    def gate(shape, share, wanted, **options):
        tensors = gate_tensors(shape, share=share, **options)
        kernel = tensors[3] is not None
        yield from triton.plan_gate_forward(*tensors, share)[0]
        yield from triton.plan_gate_backward(tensors[0], *tensors, share, [*wanted[:3], wanted[3] and kernel])[0]

    everything = (True,) * 4
    bf16, fp64 = torch.bfloat16, torch.float64
    cases = {
        "even": gate((4, 8, 8, 8), 1, everything),
        "even, channels_last": gate((4, 8, 8, 8), 1, everything, channels_last=True, kernel=False),
        "uneven": gate((3, 5, 7, 7), 2, everything, dtype=bf16),
        "uneven, channels_last": gate((3, 5, 7, 7), 2, everything, dtype=bf16, channels_last=True),
        "parts": gate((1, 64, 40, 40), 1, everything, dtype=bf16, small=bf16),
        "parts, channels_last": gate((1, 1100, 5, 7), 1, everything, channels_last=True),
        "parts, share": gate((2, 100, 20, 20), 3, everything, kernel=False),
        "gx alone": gate((2, 8, 4, 4), 1, (True, False, False, False)),
        "gkernel alone": gate((2, 8, 4, 4), 1, (False, False, False, True), dtype=fp64, channels_last=True),
        "gchannel alone": gate((1, 64, 40, 40), 2, (False, False, True, False), dtype=fp64, small=fp64),
        "one": gate((1, 1, 1, 1), 1, everything),
    }
    for name, launches in cases.items():
        yield from ((f"gate, {name}", entry) for entry in launches)
    for shape, size, dtype in (((2, 1, 9, 9), 3, bf16), ((1, 1, 1, 1), 1, fp64), ((1, 1, 600, 90), 5, torch.float32)):
        spatial, kernel = empty(*shape, dtype=dtype), empty(shape[0], size, size)
        yield from ((f"conv {shape}", entry) for entry in triton.plan_conv_forward(spatial, kernel)[0])
        backward = triton.plan_conv_backward(spatial, spatial, kernel, [True, True])[0]
        yield from ((f"conv {shape}", entry) for entry in backward)
    for shape, dtype, channels_last in (
        ((2, 3, 9, 9), bf16, True),
        ((1, 1, 1, 1), fp64, False),
        ((4, 3, 32, 32), None, False),
    ):
        images = empty(*shape, dtype=dtype or torch.float32, channels_last=channels_last)
        indices = torch.empty(shape[0], dtype=torch.int64, device="meta")
        step = triton.plan_pgd_step(images, images, images, 1.0, 0.5, 0.0, 1.0)
        start = triton.plan_pgd_start(images, images, indices, 0.5, 1, 0, 0.0, 1.0)
        yield from ((f"pgd {shape}", entry) for entry in step + start)
        bits = torch.empty(-(-images.numel() // 8), dtype=torch.uint8, device="meta")
        for other in (None, images):
            launches = [
                *triton.plan_relu_forward(images, other, images, True)[0],
                *triton.plan_relu_forward(images, other, empty(*shape, dtype=images.dtype), False)[0],
                *triton.plan_relu_backward(images, other, bits, images.stride())[0],
            ]
            yield from ((f"relu {shape}", entry) for entry in launches)
    for shape, lines, dtype, channels_last in (
        ((2, 16, 8, 8), 3, bf16, False),
        ((2, 16, 8, 8), 1, fp64, True),
        ((3, 5, 7, 7), 8, torch.float32, False),
        ((3, 5, 7, 7), 2, torch.float16, True),
        ((1, 2, 200, 300), 4, bf16, True),  # pixels in parts
        ((1, 1, 1, 1), 1, torch.float32, False),
    ):
        x, b = empty(*shape, dtype=dtype, channels_last=channels_last), empty(1)
        small = empty(*shape[:2], lines)
        launches = [
            *triton.plan_swish_relu_forward(x)[0],
            *triton.plan_swish_relu_backward(x, x)[0],
            *triton.plan_smooth_relu_forward(x, b)[0],
            *triton.plan_smooth_relu_backward(x, x, b, [True, True])[0],
            *triton.plan_smooth_relu_backward(x, x, b, [True, False])[0],
            *triton.plan_dyrelu_forward(x, small, small)[0],
            *triton.plan_dyrelu_backward(x, x, small, small, [True] * 3)[0],
            *triton.plan_dyrelu_backward(x, x, small, small, [False, True, False])[0],
        ]
        yield from ((f"activations {shape}", entry) for entry in launches)
    for shape, hidden, dtype, layout, dynamic in (
        ((3, 20, 5, 5), 24, bf16, "planar", True),  # samples straddle tiles
        ((3, 20, 4, 4), 24, torch.float16, "channels_last", True),
        ((2, 64, 16, 16), 256, torch.float16, "planar", False),
        ((70, 1, 1, 1), 1, torch.float32, "planar", True),
        ((1, 1, 8, 8), 16, bf16, "planar", False),
    ):
        for keep in (True, False):
            launches = attention_launches(shape, hidden, dtype, layout, 90, dynamic, keep)
            yield from ((f"attention {shape}", entry) for entry in launches)


def test_every_branch_compiles():
    """The interpreter takes what the compiler refuses: a name of two types, a method of a constant."""
    code = _COMPILE.format(tests=str(ROOT / "tests"), benchmarks=str(ROOT / "benchmarks"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {line.split()[-1] for line in done.stdout.splitlines()}
    assert "fused" in kernels, "contraction is never seen, so that its absence says nothing"
    names = ("gate_forward", "gate_backward", "gate_finish", "conv_correlate", "conv_grad_kernel", "conv_finish")
    names += ("pgd_step", "pgd_start", "relu_forward", "relu_backward")
    names += ("swish_relu_forward", "swish_relu_backward", "smooth_relu_forward", "smooth_relu_backward", "add_up")
    names += ("dyrelu_forward", "dyrelu_backward")
    for name in (*names, "attention_forward", "attention_finish", "attention_backward"):
        assert f" {name} " in done.stdout, name


# ---- samples in parts --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((1, 600, 8, 8), 1),  # planar: pixels are too few, so that channels are divided too
        ((1, 600, 8, 8), 3),
        ((2, 1100, 5, 5), 1),  # channels_last: more channels than are kept sums of
        ((2, 1100, 5, 5), 2),
    ],
    ids=str,
)
def test_parts_of_a_sample_are_added_up(shape, share, channels_last):
    from test_gate import check

    layout = "channels_last" if channels_last else "contiguous"
    case = GateCase(shape, torch.float32, (torch.float32,) * 3, share, layout, layout)
    tensors = gate_tensors(shape, channels_last=channels_last, share=share)
    assert len(triton.plan_gate_backward(tensors[0], *tensors, share, [True] * 4)[0]) == 2
    check(case, "triton")


@interpreted
def test_samples_that_share_a_program_are_their_own():
    """Each is what it is alone, and none is left out: 70 samples, not a multiple of those in a program."""
    case = GateCase((70, 3, 2, 2), torch.float32, (torch.float32,) * 3)
    inputs, gy = case.inputs(), case.gradient()
    assert launch.gate_backward_tiling(70, 3, 4, 4, True, True).samples > 1
    y = triton.gate_forward(*inputs, 1)
    grads = triton.gate_backward(gy, *inputs, 1, [True] * 4)
    for n in (0, 1, 37, 69):
        alone = [t[n : n + 1] for t in inputs]
        assert_same_bits(y[n : n + 1], triton.gate_forward(*alone, 1), f"y, {n}")
        for got, want in zip(grads, triton.gate_backward(gy[n : n + 1], *alone, 1, [True] * 4), strict=True):
            torch.testing.assert_close(got[n : n + 1], want)


@interpreted
def test_parts_of_a_large_map_are_added_up():
    from test_dynamic_conv import check

    case = ConvCase((2, 600, 90), 3, torch.float32, torch.float32)
    spatial, kernel = empty(2, 1, 600, 90), empty(2, 3, 3)
    backward = triton.plan_conv_backward(spatial, spatial, kernel, [False, True])[0]
    assert [entry.kernel.__name__ for entry in backward] == ["conv_grad_kernel", "conv_finish"]
    check(case, "triton")


@interpreted
def test_programs_take_several_stretches_where_there_are_many(monkeypatch):
    monkeypatch.setattr(pointwise_plan, "_PARTS", 2)
    x, gy = (torch.randn(1, 7, 30, 31, generator=torch.Generator().manual_seed(i)) for i in range(2))
    b = torch.tensor(1.5)
    launches, _ = triton.plan_smooth_relu_backward(gy, x, b, [True, True])
    assert [entry.programs for entry in launches] == [2, 1]
    got = triton.smooth_relu_backward(gy, x, b, [True, True])
    for one, other in zip(got, reference.smooth_relu_backward(gy, x, b), strict=True):
        torch.testing.assert_close(one, other)


@interpreted
def test_an_infinite_tap_reaches_what_it_does_in_the_reference():
    """Forward it makes NaNs of the zeros around the map; backward there is nothing around it."""
    spatial, kernel = ConvCase((1, 4, 5), 3, torch.float32, torch.float32).inputs()
    kernel[0, 0, 2] = torch.inf
    spatial.requires_grad_()
    want = reference.dynamic_conv(spatial, kernel)
    (gradient,) = torch.autograd.grad(want.sum(), spatial)
    got = dynamic_conv(spatial, kernel, backend="triton")
    torch.testing.assert_close(got, want, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), spatial)[0], gradient, equal_nan=True)
    assert want.isnan().any()
    assert not gradient.isnan().any()
