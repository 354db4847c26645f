"""The emulator must show a kernel's faults; and what of the CUDA kernels it alone can show on a machine without a GPU.

The operations' own tests run on the emulated kernels too: see `backend` in conftest.py.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emulator
import pytest
import torch
from cases import ConvCase, GateCase, assert_same_bits, lay
from emulator import ASCENDING, DESCENDING, build
from torch import Tensor

from sparta_kernels import dynamic_conv, pgd_start_, pgd_step_, reference, sparta_gate
from sparta_kernels.backends import extension

pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

SHUFFLED = (2, 3, 4)
EVERY_ORDER = (ASCENDING, DESCENDING, *SHUFFLED)
NAN = float("nan")


# ---- small kernels -----------------------------------------------------------------------------------------


class Failed(Exception):
    """A launch was refused, or stopped."""


class Examples(emulator.Emulator):
    """The kernels of examples.cu."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.library.run_example.restype = ctypes.c_char_p

    def run(
        self,
        name: str,
        values: Tensor,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] | None = None,
        dynamic: int = 0,
        allowed: int = -1,
        outputs: int | None = None,
    ) -> Tensor:
        """With a thread for each value by default; outputs that are not written are NaN."""
        out = torch.full((outputs or len(values),), NAN)
        dims = [(ctypes.c_uint * 3)(*three) for three in (grid, block or (len(values), 1, 1))]
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
        message = self.library.run_example(name.encode(), *addresses, *dims, ctypes.c_size_t(dynamic), allowed)
        if message:
            raise Failed(message.decode())
        return out


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples(build.example_library())


def numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32) + 0.5


@pytest.mark.parametrize("order", EVERY_ORDER)
@pytest.mark.parametrize("threads", [1, 31, 33, 96, 1024])
def test_barriers_hold_the_whole_block(examples, order, threads):
    values = numbers(3 * threads)
    want = values.view(3, threads).flip(1).flatten()
    with examples.order(order):
        assert torch.equal(examples.run("reverse", values, (3, 1, 1), (threads, 1, 1)), want)
        got = examples.run("reverse_in_dynamic_memory", values, (3, 1, 1), (threads, 1, 1), dynamic=4 * threads)
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", EVERY_ORDER)
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_a_sum_by_shuffles_and_shared_memory(examples, order, threads):
    values = numbers(2 * threads)
    with examples.order(order):
        got = examples.run("sum", values, (2, 1, 1), (threads, 1, 1)).view(2, threads)
    assert torch.equal(got[:, ::2], values.view(2, -1).sum(1, keepdim=True).expand(-1, threads // 2))
    assert torch.equal(got[:, 1::2], values.view(2, -1)[:, 1::2])


@pytest.mark.parametrize("order", EVERY_ORDER)
def test_what_lanes_tell_each_other(examples, order):
    with examples.order(order):
        table = examples.run("lanes", numbers(32), outputs=9 * 32).view(32, 9).tolist()
    for lane, row in enumerate(table):
        sources = [
            5,
            lane // 4 * 4 + 1,
            lane - 3 if lane % 8 >= 3 else lane,
            lane + 3 if lane % 8 < 5 else lane,
            lane ^ 9 if (lane ^ 9) <= lane // 8 * 8 + 7 else lane,  # into a segment before, not behind
        ]
        assert row == [*(source + 0.5 for source in sources), 7, 1, 1, 31 if lane % 2 else 0], lane


@pytest.mark.parametrize("order", EVERY_ORDER)
def test_copies_to_shared_memory_are_waited_for(examples, order):
    values = numbers(256)
    rounds = values.view(32, 2, 4)
    want = rounds[:, 0, 0] + rounds[:, 0, 3] + rounds[:, 1, 0]
    with examples.order(order):
        assert torch.equal(examples.run("fetch_ahead", values, block=(32, 1, 1), outputs=32), want)
        got = examples.run("fetch_too_far_ahead", values, block=(32, 1, 1), outputs=32)
    if order == ASCENDING:  # at once
        assert torch.equal(got, want)
    if order == DESCENDING:
        assert got.isnan().all()


def test_indices_in_three_dimensions(examples):
    grid, block = (3, 2, 4), (5, 3, 2)
    got = examples.run("indices", torch.empty(0), grid, block, outputs=24 * 30)
    assert torch.equal(got, torch.arange(24 * 30.0))


# ---- faults that another order shows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("no_barrier", 1),
        ("no_barrier_in_the_warp", 1),
        ("only_the_warp_waits", 1),
        ("blocks_read_each_other", 3),
    ],
)
def test_a_race_changes_the_result(examples, name, grid):
    values = numbers(grid * 64)
    seen = set()
    for order in EVERY_ORDER:
        with examples.order(order):
            seen.add(str(examples.run(name, values, (grid, 1, 1), (64, 1, 1)).tolist()))
    assert len(seen) > 1


def test_an_order_is_repeatable_and_a_shuffled_one_is_none_of_the_others(examples):
    seen = {}
    for order in (*EVERY_ORDER, *EVERY_ORDER):
        with examples.order(order):
            got = examples.run("no_barrier_in_the_warp", numbers(64)).isnan().tolist()
        assert seen.setdefault(order, got) == got
    assert len({str(got) for got in seen.values()}) == len(EVERY_ORDER)


# ---- faults that show at once ------------------------------------------------------------------------------


def test_shared_memory_that_nobody_wrote_is_nan(examples):
    values = numbers(64)
    got = examples.run("reads_what_nobody_wrote", values)
    assert got.isnan().nonzero().flatten().tolist() == [7]
    got = examples.run("reads_an_old_block", values, (2, 1, 1), (32, 1, 1))
    assert torch.equal(got[:32], values[:32])
    assert got[32:].isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "two_barriers",
            r"not one barrier for all: thread \(40, 0, 0\) waits at emulator/examples.cu:\d+, thread",
        ),
        ("barrier_against_shuffle", r"thread \(0, .* for a lane that does not come: thread \(3, 0, 0\) waits at"),
        ("two_shuffles", r"thread \(0, .* for a lane that does something else: thread \(16, 0, 0\) waits at"),
        ("reads_a_lane_that_returned", r"thread \(4, 0, 0\) .* reads lane 5, which takes no part"),
        ("reads_a_lane_outside_the_mask", r"thread \(0, 0, 0\) .* reads lane 16, which takes no part"),
        ("not_in_its_own_mask", r"thread \(8, 0, 0\) .* with a mask in which it is not"),
        ("too_much_shared_memory", "more than 48 kB of static __shared__ memory"),
        ("misaligned_fetch", r"thread \(0, 0, 0\): an asynchronous copy of another size or alignment"),
        ("traps", r"thread \(2, 0, 0\): __trap\(\)"),
    ],
)
def test_a_stop_names_kernel_thread_and_line(examples, name, message):
    with (
        examples.order(ASCENDING),
        pytest.raises(Failed, match=rf"^emulated CUDA: .*{name}.*, block \(0, 0, 0\): .*{message}"),
    ):
        examples.run(name, numbers(64))
    values = numbers(64)
    assert torch.equal(examples.run("reverse", values), values.flip(0)), "the next launch is as good as ever"


@pytest.mark.skipif(build.SANITIZE, reason="the sanitizer would end the process")
def test_writing_beside_shared_memory_is_noticed(examples):
    with pytest.raises(Failed, match="written beside the shared variable memory"):
        examples.run("writes_beside_shared_memory", numbers(4))


@pytest.mark.parametrize(
    "declaration", ["__shared__ float a[4], b[4];", "__shared__ Pair<int, 2> a;", "__shared__ float a[4] __align__(8);"]
)
def test_a_declaration_of_another_form_is_not_passed_over(declaration):
    with pytest.raises(ValueError, match=r"some\.cu:2: .* does not understand"):
        build.translate(f"// __shared__ in a comment\n  {declaration}\n", "some.cu")


# ---- launches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (1, 1, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((1, 1, 65536), (1, 1, 1)),
        ((2**31, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 65)),
    ],
)
def test_a_launch_that_a_device_would_refuse_is_refused(examples, grid, block):
    count = examples.last_launch().number
    with pytest.raises(Failed, match=r"^invalid configuration argument$"):
        examples.run("indices", torch.empty(0), grid, block, outputs=2048)
    assert examples.last_launch().number == count


def test_dynamic_shared_memory_above_48_kb_is_to_be_asked_for(examples):
    values = numbers(32)
    for dynamic, allowed, refused in [(49153, -1, True), (232448, 232448, False), (1, 0, True), (1, 232449, True)]:
        if refused:
            with pytest.raises(Failed, match=r"^invalid argument$"):
                examples.run("reverse_in_dynamic_memory", values, dynamic=dynamic, allowed=allowed)
        else:
            got = examples.run("reverse_in_dynamic_memory", values, dynamic=dynamic, allowed=allowed)
            assert torch.equal(got, values.flip(0))


# ---- the operations ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[emulator.Emulator]:
    with emulator.emulated_native() as found:
        yield found


GATES = [
    GateCase((3, 5, 6, 7), torch.float32, (torch.float32,) * 3, 2),
    GateCase((2, 70, 8, 8), torch.bfloat16, (torch.float32,) * 3),
    GateCase((2, 70, 8, 8), torch.bfloat16, (torch.bfloat16,) * 3, 1, "channels_last", "channels_last"),
    GateCase((1, 24, 40, 36), torch.float32, (torch.float32,) * 3, 5, "channels_last", "channels_last"),
    GateCase((1, 40, 64, 64), torch.float16, (torch.float32,) * 3),
    GateCase((2, 3, 33, 35), torch.float64, (torch.float64,) * 3),
]


def gate(case: GateCase) -> list[Tensor]:
    inputs = case.inputs()
    y = sparta_gate(*inputs, share=case.share, backend="native")
    wanted = [True] * 4
    return [y, *torch.ops.sparta_kernels._gate_backward(case.gradient(), *inputs, case.share, wanted, "native")]


def convolution() -> list[Tensor]:
    case = ConvCase((2, 33, 31), 5, torch.float32, torch.float32)
    inputs = case.inputs()
    grads = torch.ops.sparta_kernels._conv_backward(case.gradient(), *inputs, [True, True], "native")
    return [dynamic_conv(*inputs, backend="native"), *grads]


def attack() -> list[Tensor]:
    clean = torch.rand(2, 3, 17, 19, generator=torch.Generator().manual_seed(0))
    adv = pgd_start_(torch.full_like(clean, NAN), clean, torch.arange(2), 0.1, backend="native")
    return [adv.clone(), pgd_step_(adv, clean - 0.5, clean, 0.01, 0.1, backend="native")]


def relu() -> list[Tensor]:
    a, b = (torch.randn(2, 5, 17, 19, generator=torch.Generator().manual_seed(i)) for i in range(2))
    raw = torch.ops.sparta_kernels
    y, bits = raw._relu_forward(a, b, True, "native")
    return [y, raw._relu_backward(a, b, bits, y.stride(), "native"), bits.float()]


def pointwise() -> list[Tensor]:
    x, gy = (torch.randn(3, 5, 37, 41, generator=torch.Generator().manual_seed(i)) for i in range(2))
    raw, b = torch.ops.sparta_kernels, torch.tensor(1.5)
    results = [raw._swish_relu_forward(x, "native"), raw._swish_relu_backward(gy, x, [True], "native")]
    results += [raw._smooth_relu_forward(x, b, "native")]
    return [*results, *raw._smooth_relu_backward(gy, x, b, [True, True], "native")]


def largest_line(layout: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gy = (lay(torch.randn(2, 12, 70, 80, generator=generator), layout) for _ in range(2))
    small = [torch.randn(2, 12, 3, generator=generator) for _ in range(2)]
    raw = torch.ops.sparta_kernels
    grads = raw._dyrelu_backward(gy, x, *small, [True] * 3, "native")
    return [raw._dyrelu_forward(x, *small, "native"), *grads]


OPERATIONS: list[Callable[[], list[Tensor]]] = [*(lambda case=case: gate(case) for case in GATES)]
OPERATIONS += [convolution, attack, relu, pointwise]
OPERATIONS += [lambda: largest_line("contiguous"), lambda: largest_line("channels_last")]
NAMES = [*(str(c.shape) for c in GATES), "convolution", "attack", "relu", "pointwise", "dyrelu", "dyrelu last"]
EACH = pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)


@EACH
def test_results_do_not_depend_on_the_order_of_threads(cuda, operation):
    wants = operation()
    for order in EVERY_ORDER[1:]:
        with cuda.order(order):
            for got, want in zip(operation(), wants, strict=True):
                assert_same_bits(got, want, f"order {order}")


@EACH
def test_results_do_not_depend_on_the_device(cuda, operation):
    wants = operation()
    for multiprocessors in (1, 20, 148):
        cuda.set_multiprocessors(multiprocessors)
        try:
            got = operation()
        finally:
            cuda.set_multiprocessors(132)
        for one, want in zip(got, wants, strict=True):
            assert_same_bits(one, want, f"{multiprocessors} multiprocessors")


@EACH
def test_a_launch_that_fails_raises_and_leaves_no_error_behind(cuda, operation):
    count = cuda.last_launch().number
    cuda.fail_next_launch(emulator.OUT_OF_RESOURCES)
    with pytest.raises(
        RuntimeError, match=r"^(gate|conv|pgd|relu|swish_relu|dyrelu)_\w+: .*too many resources requested for launch"
    ):
        operation()
    assert cuda.last_launch().number == count
    operation()


@EACH
def test_kernels_run_on_the_given_device_and_stream(cuda, operation, monkeypatch):
    monkeypatch.setattr(extension, "place", lambda tensor: (1, 1, 0x1234))
    operation()
    assert cuda.last_launch()[-2:] == (1, 0x1234)
    assert cuda.current_device() == 0, "the caller's device must be the current one again"


def test_blocks_take_several_stretches_where_there_are_many(cuda):
    """Every block's sum is of more than one: there are 4096 parts at most, here of 512 elements a time."""
    elements = 4096 * 512 + 700
    x = torch.ones(elements + 1)[1:]  # not aligned
    x[elements // 2 :] = 2
    b = torch.tensor(1.5)
    gx, gb = torch.ops.sparta_kernels._smooth_relu_backward(x, x, b, [True, True], "native")
    want_x, want_b = reference.smooth_relu_backward(x.double(), x.double(), b.double())
    torch.testing.assert_close(gx.double(), want_x, rtol=1e-6, atol=0)
    torch.testing.assert_close(gb.double(), want_b, rtol=1e-6, atol=0)


def test_a_device_that_is_not_there(cuda, monkeypatch):
    monkeypatch.setattr(extension, "place", lambda tensor: (1, 7, 0))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        convolution()
    monkeypatch.setattr(extension, "place", lambda tensor: (1, 0, 0))
    convolution()


@pytest.mark.parametrize(
    ("operation", "shape"), [("gate", (256, 8, 32, 32, 1)), ("dyrelu", (2, 8, 56 * 56, 2))], ids=["gate", "dyrelu"]
)
def test_scratch_is_for_partial_sums_alone(cuda, operation, shape):
    """Aligned images of this shape are summed by one block a sample or row, others by several."""
    pixels = 32 * 32 if operation == "gate" else 56 * 56
    scratch = getattr(extension.kernels, f"{operation}_backward_scratch")

    def size(address: int) -> int:
        images = [(address, 8 * pixels, pixels)] * 3
        return scratch(shape, True, extension.DTYPES[torch.float32], *images)

    assert size(4096) == 0
    assert size(4100) > 0


def test_what_the_module_says_of_itself(cuda):
    info = extension.kernels.cuda_info()
    assert info["built"] is extension.kernels.with_cuda is True
    assert info["archs"] == "emulated"
    assert [device["capability"] for device in info["devices"]] == [(9, 0)] * 2
    assert extension.kernels.isa() == "baseline"


def test_nothing_is_computed_by_cpu_kernels(cuda, monkeypatch):
    monkeypatch.setattr(extension, "place", lambda tensor: (1, -1, 0))
    with pytest.raises(RuntimeError, match="has no CPU kernels"):
        convolution()


# ---- sanitizers --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reads_beside_a_tensor", "writes_beside_shared_memory"])
def test_the_sanitizer_sees_an_access_out_of_bounds(name):
    """In a process of its own, which ends there."""
    script = (
        "import ctypes, emulator.build, torch; from test_emulated_cuda import Examples, numbers;"
        "examples = Examples(emulator.build.example_library());"
        f"values = numbers(64); examples.run('reverse', values); examples.run('{name}', numbers(4))"
    )
    here = Path(__file__).parent
    command = [sys.executable, str(here / "emulator" / "sanitized.py"), "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(here)})
    assert process.returncode != 0
    assert "AddressSanitizer" in process.stderr
    assert name in process.stderr
