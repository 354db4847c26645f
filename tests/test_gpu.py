"""What only a GPU can show. The tests of the operations themselves also run there: see `backend` in conftest.py."""

import ctypes
import gc
import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import GateCase, assert_near, assert_same_bits, lay, magnitudes, random, to_double
from torch import Tensor

from sparta_kernels import (
    attack,
    backends,
    build_info,
    dynamic_conv,
    dyrelu,
    nn,
    pgd_start_,
    pgd_step_,
    reference,
    smooth_relu,
    sparta_gate,
    swish_relu,
)
from sparta_kernels.backends import extension, native
from sparta_kernels.ops import add_relu_fork

pytestmark = pytest.mark.gpu

SITES = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 7, 7), (64, 56, 56)]
LAYOUTS = ["contiguous", "channels_last"]
NAMES = ("gx", "gspatial", "gchannel", "gkernel")
EPS, STEP = 16 / 255, 1 / 255


@pytest.fixture(params=["native", "triton"])
def backend(request) -> str:
    if "cuda" not in backends.DEVICES.get(request.param, ()):
        pytest.skip(f"{request.param} has no kernels for GPUs in this installation")
    return request.param


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield
    if torch.cuda.memory_reserved() > 2**30:  # other processes test on this GPU too
        torch.cuda.empty_cache()


def gate_inputs(
    batch: int,
    site: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """x, spatial, channel and kernel, all of that dtype, and y's gradient."""
    case = GateCase((batch, *site), dtype, (dtype,) * 3, 1, layout, layout, seed=seed)
    return list(case.inputs()), case.gradient()


def forward_backward(inputs: list[Tensor], gy: Tensor, backend: str) -> list[Tensor]:
    """y and the four gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = sparta_gate(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def busy(milliseconds: float = 200.0) -> None:
    """Keep the current stream busy for about as long."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


# ---- right at the sizes that are used ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("batch", [1, 130])
def test_the_sites_of_networks(backend, batch, site, layout, dtype):
    inputs, gy = gate_inputs(batch, site, dtype, layout)
    got = forward_backward(inputs, gy, backend)
    yardstick = forward_backward(inputs, gy, "reference")
    exact = forward_backward(to_double(inputs), gy.double(), "reference")
    sizes = magnitudes(inputs, gy, 1)
    for name, *results in zip(("y", *NAMES), got, exact, yardstick, sizes, strict=True):
        assert_near(*results, dtype, f"{name} by {backend}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_backend_on_every_device_computes_the_same(layout, dtype):
    """Adversarial images bit for bit; the gate to within what the roundings of its dtype allow."""
    here = [name for name, devices in backends.DEVICES.items() if "cuda" in devices]
    generator = torch.Generator().manual_seed(1)
    adv, grad, clean = (lay((random(generator, 33, 3, 32, 32) / 4 + 0.5).to(dtype), layout) for _ in range(3))
    grad.sub_(0.5)[:, :, ::5] = 0
    indices = torch.arange(33) * 1000003

    def attacked(device: str, name: str) -> Tensor:
        iterate, *others = (t.to(device, copy=True) for t in (adv, grad, clean, indices))
        pgd_start_(iterate, others[1], others[2], EPS, seed=2**62 + 3, restart=5, backend=name)
        for _ in range(3):
            pgd_step_(iterate, others[0], others[1], STEP, EPS, backend=name)
        return iterate

    want = attacked("cpu", "reference")
    for device, name in [("cpu", "native"), *(("cuda", name) for name in here)]:
        assert_same_bits(attacked(device, name).cpu(), want, f"{name} on {device}")

    inputs, gy = gate_inputs(9, (40, 9, 11), dtype, layout)
    on_cpu = forward_backward([t.cpu() for t in inputs], gy.cpu(), "native")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for name in here:
        for got, wanted in zip(forward_backward(inputs, gy, name), on_cpu, strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_same_bits_every_time(backend, site, dtype):
    """Also while another stream keeps the machine busy, so that blocks run in another order."""
    inputs, gy = gate_inputs(96, site, dtype)
    want = forward_backward(inputs, gy, backend)
    other = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(other):
            torch.randn(2048, 2048) @ torch.randn(2048, 2048)
        for got, wanted in zip(forward_backward(inputs, gy, backend), want, strict=True):
            assert_same_bits(got, wanted)


# ---- more than 2^31 elements -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_past_2_to_the_31_elements(backend, layout):
    shape = (33, 64, 1024, 1024)
    free, _ = torch.cuda.mem_get_info()
    if free < 7 * 2 * math.prod(shape):
        pytest.skip(f"needs {7 * 2 * math.prod(shape) / 2**30:.0f} GiB of free GPU memory")
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, gy = (torch.empty(shape, dtype=torch.bfloat16, memory_format=order).normal_() for _ in range(2))
    small = [torch.randn(33, 1, 1024, 1024), torch.randn(33, 64), torch.randn(33)]
    y = backends.module(backend).gate_forward(x, *small, 1)
    grads = backends.module(backend).gate_backward(gy, x, *small, 1, [True] * 4)
    last = [t[-1:] for t in (x, *small)]
    want = [reference.gate(*last)]
    want += torch.func.vjp(reference.gate, *last)[1](gy[-1:])
    for name, got, wanted in zip(("y", *NAMES), (y, *grads), want, strict=True):
        scale = float(wanted.double().abs().max())
        torch.testing.assert_close(got[-1:].double(), wanted.double(), rtol=2e-2, atol=2e-2 * scale, msg=name)
    del y, grads
    adv, clean = gy, x
    before = adv[-1:].clone()
    pgd_step_(adv, x, clean, STEP, 0.5, backend=backend)
    assert_same_bits(adv[-1:], reference.pgd_step(before, x[-1:], clean[-1:], STEP, 0.5), "pgd_step_")


# ---- streams, graphs, devices ------------------------------------------------------------------------------


OPERATIONS = ("gate", "gate in parts", "conv", "step", "start", "relu", "swish_relu", "smooth_relu", "dyrelu")


def differentiated(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and, for a gradient of its own values, all the inputs' gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def operations(backend: str) -> dict[str, tuple]:
    """For every operation: a function of tensors that it reads, and those tensors."""

    def step(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        return pgd_step_(adv.clone(), grad, clean, STEP, EPS, backend=backend)

    def start(clean: Tensor, indices: Tensor) -> Tensor:
        return pgd_start_(torch.empty_like(clean), clean, indices, EPS, seed=7, backend=backend)

    def conv(spatial: Tensor, kernel: Tensor) -> list[Tensor]:
        return differentiated(partial(dynamic_conv, backend=backend), spatial, kernel)

    def gate(gy: Tensor, *inputs: Tensor) -> list[Tensor]:
        return forward_backward(list(inputs), gy, backend)

    def relu(a: Tensor, b: Tensor, gradient: Tensor) -> list[Tensor]:
        a = a.detach().requires_grad_()
        outputs = add_relu_fork(a, b, backend=backend)
        return [outputs[0].detach(), *torch.autograd.grad(outputs, a, (gradient, a.detach()))]

    inputs, gy = gate_inputs(3, (24, 8, 8))
    images = [torch.rand(3, 3, 16, 16) for _ in range(3)]
    return {
        "gate": (gate, [gy, *inputs]),
        "gate in parts": (gate, [t[:1] for t in (gy, *inputs)]),
        "conv": (conv, [torch.randn(3, 1, 9, 9), torch.randn(3, 3, 3)]),
        "step": (step, images),
        "start": (start, [images[0], torch.arange(3)]),
        "relu": (relu, [image - 0.5 for image in images]),
        "swish_relu": (partial(differentiated, partial(swish_relu, backend=backend)), [images[0] - 0.5]),
        "smooth_relu": (
            partial(differentiated, partial(smooth_relu, backend=backend)),
            [images[0] - 0.5, torch.tensor(2.0)],
        ),
        "dyrelu": (
            partial(differentiated, partial(dyrelu, backend=backend)),
            [images[0] - 0.5, torch.randn(3, 3, 2), torch.randn(3, 3, 2)],
        ),
    }


def listed(result) -> list[Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_work_is_queued_on_the_current_stream(backend, operation):
    """The inputs are there only when that stream has come so far; any other stream would read zeros."""
    function, inputs = operations(backend)[operation]
    want = listed(function(*inputs))
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*late)  # all is compiled by now, and this stream's allocator has memory
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy()
        for empty, value in zip(late, inputs, strict=True):
            empty.copy_(value)
        got = listed(function(*late))
        assert not stream.query(), "the call has waited for the GPU"
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other, operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_captured_graph_is_replayed_on_other_values(backend, operation):
    function, inputs = operations(backend)[operation]
    static = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = listed(function(*static))
    for factor in (1, 2):
        changed = [t * factor for t in inputs]
        want = listed(function(*changed))
        for old, new in zip(static, changed, strict=True):
            old.copy_(new)
        for output in captured:
            output.fill_(0)
        graph.replay()
        for got, wanted in zip(captured, want, strict=True):
            assert_same_bits(got, wanted, f"{operation}, times {factor}")


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "gate in parts"])
def test_the_second_device(backend, operation):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, inputs = operations(backend)[operation]
    want = listed(function(*inputs))
    got = listed(function(*(t.to("cuda:1") for t in inputs)))  # while the first is the current one
    assert torch.cuda.current_device() == 0
    for one, other in zip(got, want, strict=True):
        assert one.device == torch.device("cuda:1")
        assert_same_bits(one.to(other.device), other, operation)


def launches(call: Callable[[], object]) -> int:
    """How many nodes a graph of the call has: kernels, copies, fills."""
    graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
    with torch.cuda.graph(graph):
        call()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw, None, ctypes.byref(count)) == 0
    return count.value


@pytest.mark.parametrize("site", [(64, 32, 32), (512, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_is_one_launch(backend, site, layout):
    inputs, gy = gate_inputs(128, site, torch.bfloat16, layout)
    module = backends.module(backend)
    for call in (
        lambda: module.gate_forward(*inputs, 1),
        lambda: module.gate_backward(gy, *inputs, 1, [True] * 4),
    ):
        call()
        assert launches(call) == 1


def test_nothing_but_the_results_is_allocated(backend):
    inputs, gy = gate_inputs(128, (64, 32, 32), torch.bfloat16)
    module, size = backends.module(backend), inputs[0].nbytes
    small = sum(t.nbytes for t in inputs[1:])
    for call in (
        lambda: module.gate_forward(*inputs, 1),
        lambda: module.gate_backward(gy, *inputs, 1, [True] * 4),
    ):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        requested = torch.cuda.memory_stats()  # before it is rounded up to the allocator's blocks
        grown = requested["requested_bytes.all.peak"] - requested["requested_bytes.all.current"]
        # The compiled kernels keep room for the sums of samples in parts, as unaligned tensors have them: 640 kB here.
        assert grown <= size + small + size // 20


# ---- torch around it ---------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()  # its graphs: one that is destroyed while another is captured breaks the capture


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile(backend, layout, mode):
    def function(*tensors: Tensor) -> Tensor:
        return torch.sin(sparta_gate(*tensors, backend=backend) * 2)

    inputs, gy = gate_inputs(4, (24, 8, 8), torch.float32, layout)
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(3):  # warmed up, recorded, replayed
        results = []
        for f in (function, compiled):
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
            y = f(*leaves)
            results.append([y.detach().clone(), *(g.clone() for g in torch.autograd.grad(y, leaves, gy))])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_an_attack_gives_what_the_reference_gives(backend, precision):
    """ResNet-18 under autocast or not: predictions agree but where rounding decides."""
    torch.manual_seed(0)
    model = nn.resnet18(10, activation="sparta", sites="G1234.B2", width=16).cuda().eval()
    images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    found = {}
    for name in (backend, "reference"):
        with backends.use_backend(name), torch.autocast("cuda", precision, enabled=precision != torch.float32):
            found[name] = attack.pgd(model, images, labels, eps=EPS, step_size=STEP, steps=5, report_at=(5,), seed=3)
    same = found[backend].predictions[5] == found["reference"].predictions[5]
    assert same.float().mean() >= 0.9


def test_auto_runs_on_the_gpu_and_says_what_it_is():
    able = [name for name, devices in backends.DEVICES.items() if "cuda" in devices]
    inputs, gy = gate_inputs(3, (24, 8, 8))
    results = {name: forward_backward(inputs, gy, name) for name in ("auto", *able)}
    for i, got in enumerate(results["auto"]):
        assert any(torch.equal(got, results[name][i]) for name in able)
    facts = build_info()["cuda"]
    if facts["built"]:
        names = [device["name"] for device in facts["devices"]]
        assert names == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


# ---- wrong calls -------------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_refused(backend):
    inputs, _ = gate_inputs(2, (3, 4, 4))
    for i, name in enumerate(("spatial", "channel", "kernel"), 1):
        mixed = [t.cpu() if j == i else t for j, t in enumerate(inputs)]
        with pytest.raises(ValueError, match=f"sparta_gate: {name} must be on cuda:0 like the first tensor, got cpu"):
            sparta_gate(*mixed, backend=backend)


def test_a_refused_launch_names_its_operation():
    if "cuda" not in native.DEVICES:
        pytest.skip("built without CUDA")
    x = torch.ones(1, 1, 4, 4)
    rows, small = (x.data_ptr(), 16, 16), (x.data_ptr(), 1)
    with pytest.raises(RuntimeError, match=r"gate_forward: .*device"):
        extension.kernels.gate_forward((1, 1, 4, 4, 1), True, 1, rows, rows, small, small, (0, 0), (1, 99, 0))
    sparta_gate(x, x, torch.ones(1, 1), backend="native")  # and the error is not left behind for the next call
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", list(itertools.product([0, 2], repeat=4)), ids=str)
def test_nothing_to_do(backend, shape):
    n, c, h, w = shape
    inputs = [torch.randn(shape), torch.randn(n, 1, h, w), torch.randn(n, c), torch.randn(n)]
    y, *grads = forward_backward(inputs, torch.randn(shape), backend)
    assert y.shape == shape
    if 0 in shape:
        assert all(not g.any() for g in grads)
    torch.cuda.synchronize()
