"""The operations as citizens of torch: opcheck, compile, export, autocast, functorch, copies, threads."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import ConvCase, GateCase, assert_same_bits, random
from torch import Tensor, nn

from sparta_kernels import dynamic_conv, ops, pgd_start_, pgd_step_, reference, sparta_gate, use_backend
from sparta_kernels.backends import native
from sparta_kernels.nn import Sparta

raw = torch.ops.sparta_kernels
F32 = (torch.float32,) * 3


def gate_inputs(layout: str = "contiguous", share: int = 1, samples: int = 2, height: int = 6) -> list[Tensor]:
    case = GateCase((samples, 3, height, 4), torch.float32, F32, share, layout)
    return [t for t in case.inputs() if t is not None]


def conv_inputs(samples: int = 2, height: int = 6) -> list[Tensor]:
    return list(ConvCase((samples, height, 4), 3, torch.float32, torch.float32).inputs())


def grads_of(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The value, and the gradients of a sum of it with weights."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel()).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


# ---- opcheck -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_c", "expanded_n"])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_gate(layout, kernel, dtype):
    small = (torch.float32, torch.bfloat16, torch.float64 if kernel else None)
    case = GateCase((2, 3, 5, 4), dtype, small, 2, layout, layout)
    inputs = case.inputs()
    torch.library.opcheck(raw._gate_forward.default, (*inputs, 2, "native"))
    for wanted in ([True, True, True, kernel], [False, True, False, False], [True, False, False, False]):
        torch.library.opcheck(raw._gate_backward.default, (case.gradient(), *inputs, 2, wanted, "native"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_w", "expanded_n"])
@pytest.mark.parametrize("size", [1, 3])
def test_opcheck_of_the_convolution(layout, size):
    case = ConvCase((2, 5, 4), size, torch.bfloat16, torch.float32, layout, layout)
    inputs = case.inputs()
    torch.library.opcheck(raw._conv_forward.default, (*inputs, "native"))
    for wanted in itertools.product([False, True], repeat=2):
        torch.library.opcheck(raw._conv_backward.default, (case.gradient(), *inputs, list(wanted), "native"))


def test_opcheck_of_the_attack():
    adv, grad, clean = (torch.rand(2, 3, 5, 4) for _ in range(3))
    torch.library.opcheck(raw._pgd_step_.default, (adv, grad, clean, -0.1, 0.1, 0.0, 1.0, "native"))
    arguments = (adv, clean, torch.arange(2), 0.1, 3, 1, 0.0, 1.0, "native")
    torch.library.opcheck(raw._pgd_start_.default, arguments)


# ---- torch.compile -----------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_compile_takes_the_gate_whole(backend, compiler, layout):
    def gated(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor) -> Tensor:
        return sparta_gate(2 * x, spatial + 1, channel, kernel, share=2, backend=backend) - 1

    inputs = gate_inputs(layout, share=2)
    compiled = torch.compile(gated, fullgraph=True, backend=compiler)
    for got, want in zip(grads_of(compiled, inputs), grads_of(gated, inputs), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("operation", ["gate", "conv"])
def test_compile_with_dynamic_shapes_compiles_once(operation):
    function, make = {
        "gate": (
            lambda *t: sparta_gate(*t, share=2, backend="native"),
            lambda *e: gate_inputs("contiguous", 2, *e),
        ),
        "conv": (lambda *t: dynamic_conv(*t, backend="native"), conv_inputs),
    }[operation]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    grads_of(compiled, make(6, 13))  # of extents that differ: torch takes equal ones for one
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples, height in ((5, 9), (4, 12), (2, 30)):
            inputs = make(samples, height)
            for got, want in zip(grads_of(compiled, inputs), grads_of(function, inputs), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("fresh")
def test_compile_sees_which_inputs_need_a_gradient():
    x, spatial, channel, kernel = gate_inputs()
    compiled = torch.compile(lambda *t: sparta_gate(*t, backend="native"), fullgraph=True, backend="aot_eager")
    channel.requires_grad_()
    compiled(x, spatial, channel, kernel).sum().backward()
    wants = reference.gate_backward(torch.ones_like(x), x, spatial, channel.detach(), kernel)
    torch.testing.assert_close(channel.grad, wants[2])
    assert x.grad is spatial.grad is kernel.grad is None


@pytest.mark.usefixtures("fresh")
def test_compile_follows_use_backend(monkeypatch):
    """The choice is a constant of the compiled code: another one must compile anew, not be overlooked."""
    seen = []
    gate_forward = native.gate_forward
    monkeypatch.setattr(native, "gate_forward", lambda *t: seen.append("native") or gate_forward(*t))
    inputs = gate_inputs()  # none of which needs a gradient
    compiled = torch.compile(lambda *t: sparta_gate(*t), fullgraph=True, backend="aot_eager")
    for name, expected in (("reference", []), ("native", ["native"]), ("reference", [])):
        seen.clear()
        with use_backend(name):
            torch.testing.assert_close(compiled(*inputs), reference.gate(*inputs))
        assert seen == expected


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_takes_the_attack_whole_and_in_place(compiler):
    def attack(adv: Tensor, grad: Tensor, clean: Tensor, indices: Tensor) -> Tensor:
        pgd_start_(adv, clean, indices, 0.1, seed=1, backend="native")
        for _ in range(2):
            pgd_step_(adv, grad * adv, clean, 0.02, 0.1, backend="native")
        return adv.mean()

    tensors = [torch.rand(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5, 4), torch.arange(2)]
    adv = tensors[0].clone()
    want = attack(adv, *tensors[1:])
    got = torch.compile(attack, fullgraph=True, backend=compiler)(*tensors)
    assert_same_bits(tensors[0], adv)
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("fresh")
def test_compile_raises_what_eager_raises():
    x, spatial, channel, _ = gate_inputs()
    compiled = torch.compile(sparta_gate, backend="eager")
    with pytest.raises(ValueError, match=r"channel must have shape \(N, C\)"):
        compiled(x, spatial, channel[:, :2])


# ---- torch.export ------------------------------------------------------------------------------------------


class Both(nn.Module):
    """The gate after the convolution, as in Sparta with a kernel of 3 x 3."""

    def forward(self, x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor) -> Tensor:
        return sparta_gate(x, dynamic_conv(spatial, kernel, backend="native"), channel, backend="native")


def test_export_with_a_dynamic_batch_and_size():
    def inputs(samples: int, height: int) -> tuple[Tensor, ...]:
        x, spatial, channel, _ = gate_inputs("contiguous", 1, samples, height)
        return x, spatial, channel, conv_inputs(samples, height)[1]

    n, h = torch.export.Dim("n"), torch.export.Dim("h")
    shapes = ({0: n, 2: h}, {0: n, 2: h}, {0: n}, {0: n})
    program = torch.export.export(Both(), inputs(2, 6), dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"sparta_kernels._gate_forward.default", "sparta_kernels._conv_forward.default"} <= names
    for samples, height in ((2, 6), (5, 9)):
        got = program.module()(*inputs(samples, height))
        torch.testing.assert_close(got, Both()(*inputs(samples, height)))


def test_an_exported_program_is_saved_and_loaded():
    x, spatial, channel, _ = gate_inputs()
    inputs = x, spatial, channel, conv_inputs()[1]
    stored = io.BytesIO()
    torch.export.save(torch.export.export(Both(), inputs), stored)
    stored.seek(0)
    torch.testing.assert_close(torch.export.load(stored).module()(*inputs), Both()(*inputs))


# ---- autocast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtypes_to_the_tensors(backend, x_dtype):
    """The gate reads every dtype and sums in float32: there is nothing to cast."""
    inputs = [t.requires_grad_() for t in gate_inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparta_gate(inputs[0].to(x_dtype), *inputs[1:], backend=backend)
        out = dynamic_conv(inputs[1], conv_inputs()[1].bfloat16(), backend=backend)
    assert y.dtype == x_dtype
    assert out.dtype == torch.float32
    y.float().sum().backward()
    wants = reference.gate_backward(torch.ones_like(inputs[0]), *(t.detach() for t in inputs))
    for tensor, want in zip(inputs, wants, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "share": 2}], ids=str)
def test_autocast_of_the_module(options):
    """Convolutions in bfloat16, then the gate: its maps come in bfloat16 and its x in float32."""
    module = Sparta(6, **options)
    x = random(torch.Generator().manual_seed(1), 2, 6, 8, 8).float()
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(grads_of(module, [x]))
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# ---- torch.func --------------------------------------------------------------------------------------------


def loss(*tensors: Tensor) -> Tensor:
    return sparta_gate(*tensors, backend="native").square().sum()


def plain_loss(*tensors: Tensor) -> Tensor:
    return reference.gate(*tensors).square().sum()


def test_func_grad():
    inputs = [t.double() for t in gate_inputs()]
    every = tuple(range(4))
    for got, want in zip(
        torch.func.grad(loss, every)(*inputs), torch.func.grad(plain_loss, every)(*inputs), strict=True
    ):
        torch.testing.assert_close(got, want)
    kernel = conv_inputs()[1].double()
    got = torch.func.grad(lambda k: dynamic_conv(inputs[1], k, backend="native").square().sum())(kernel)
    want = torch.func.grad(lambda k: reference.dynamic_conv(inputs[1], k).square().sum())(kernel)
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_func_hessian_by_reverse_over_reverse():
    inputs = [t.double() for t in gate_inputs(samples=1, height=2)]
    for i in range(4):
        got = torch.func.jacrev(torch.func.jacrev(loss, i), i)(*inputs)
        want = torch.func.jacrev(torch.func.jacrev(plain_loss, i), i)(*inputs)
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, None, None), (None, 0, 1, None), (1, 1, 1, 1)], ids=str)
def test_vmap(in_dims):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 3, 4, 4), (2, 1, 4, 4), (2, 3), (2,)]
    stacked = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        full = shape if dim is None else (*shape[:dim], 5, *shape[dim:])
        stacked.append(random(generator, *full))

    def parts(index: int) -> list[Tensor]:
        return [t if d is None else t.select(d, index) for t, d in zip(stacked, in_dims, strict=True)]

    got = torch.func.vmap(lambda *t: sparta_gate(*t, backend="native"), in_dims)(*stacked)
    want = torch.stack([reference.gate(*parts(i)) for i in range(5)])
    torch.testing.assert_close(got, want)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)), in_dims)(*stacked)
    for i in range(5):
        for got, want in zip(grads, torch.func.grad(plain_loss, (0, 1, 2, 3))(*parts(i)), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap_of_the_convolution():
    spatial = random(torch.Generator().manual_seed(4), 5, 2, 1, 4, 4)
    kernel = random(torch.Generator().manual_seed(5), 2, 3, 3)
    got = torch.func.vmap(lambda s: dynamic_conv(s, kernel, backend="native"))(spatial)
    torch.testing.assert_close(got, torch.stack([reference.dynamic_conv(s, kernel) for s in spatial]))


@pytest.mark.parametrize("operation", ["gate", "dynamic_conv", "dyrelu", "swish_relu", "smooth_relu"])
def test_vmap_over_an_empty_axis(operation):
    shapes = {
        "gate": [(2, 3, 4, 4), (2, 1, 4, 4), (2, 3), (2,)],
        "dynamic_conv": [(2, 1, 4, 4), (2, 3, 3)],
        "dyrelu": [(2, 3, 4, 4), (2, 3, 2), (2, 3, 2)],
        "swish_relu": [(2, 3)],
        "smooth_relu": [(2, 3), ()],
    }[operation]
    fused = getattr(ops, operation.replace("gate", "sparta_gate"))
    inputs = [torch.empty(0, *shape) for shape in shapes]
    assert torch.func.vmap(lambda *t: fused(*t, backend="native"))(*inputs).shape == (0, *shapes[0])
    gradients = torch.func.grad(lambda *t: fused(*t, backend="native").sum(), tuple(range(len(inputs))))
    assert [g.shape for g in torch.func.vmap(gradients)(*inputs)] == [t.shape for t in inputs]


def test_vmap_of_what_writes_in_place_is_refused():
    adv = torch.rand(5, 2, 3, 4, 4)
    before = adv.clone()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for sparta_kernels::_pgd_step_"):
        torch.func.vmap(lambda a: pgd_step_(a, a, a.clone(), 0.1, 0.1, backend="native"))(adv)
    assert_same_bits(adv, before)


def test_forward_mode_is_refused():
    x, *small = gate_inputs()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: sparta_gate(x, *small, backend="native"), (x,), (x,))


# ---- tensors of other kinds --------------------------------------------------------------------------------


def test_inference_mode():
    with torch.inference_mode():
        inputs = gate_inputs()
        y = sparta_gate(*inputs, backend="native")
        adv = torch.rand(2, 3, 4, 4)
        pgd_step_(adv, torch.ones_like(adv), adv.clone(), 0.1, 0.1, backend="native")
    assert y.is_inference()
    torch.testing.assert_close(y, reference.gate(*inputs))


def test_parameters_and_tensors_with_a_negative_bit():
    x, spatial, channel, kernel = gate_inputs()
    lazily_negated = torch.complex(x, x).conj().imag
    assert lazily_negated.is_neg()
    y = sparta_gate(lazily_negated, nn.Parameter(spatial), channel, kernel, backend="native")
    torch.testing.assert_close(y, reference.gate(-x, spatial, channel, kernel))


@pytest.mark.parametrize("mode", ["once", "checkpointed"])
def test_checkpointing(mode):
    inputs = gate_inputs()
    wants = grads_of(lambda *t: sparta_gate(*t, backend="native"), inputs)

    def function(*tensors: Tensor) -> Tensor:
        if mode == "once":
            return sparta_gate(*tensors, backend="native")
        from torch.utils.checkpoint import checkpoint

        return checkpoint(lambda *t: sparta_gate(*t, backend="native"), *tensors, use_reentrant=False)

    for got, want in zip(grads_of(function, inputs), wants, strict=True):
        assert_same_bits(got, want)


def test_gradients_are_accumulated_and_the_graph_can_be_used_twice():
    inputs = [t.requires_grad_() for t in gate_inputs()]
    y = sparta_gate(*inputs, backend="native").sum()
    y.backward(retain_graph=True)
    once = [t.grad.clone() for t in inputs]
    y.backward()
    for tensor, want in zip(inputs, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * want)


def test_an_input_changed_in_place_is_noticed():
    inputs = [t.requires_grad_() for t in gate_inputs()]
    y = sparta_gate(*inputs, backend="native").sum()
    with torch.no_grad():
        inputs[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- copies and threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3}, {"dynamic": False, "share": 2}], ids=str)
def test_modules_are_copied_and_pickled_on_every_backend(backend, options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the convolutions around the gate
    module = Sparta(5, **options).double()
    x = random(torch.Generator().manual_seed(1), 2, 5, 6, 6)
    with use_backend(backend):
        want = grads_of(module, [x])
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            for got, wanted in zip(grads_of(twin, [x]), want, strict=True):
                assert_same_bits(got, wanted)


def test_a_tensor_with_a_graph_is_copied():
    y = sparta_gate(*gate_inputs(), backend="native")
    assert_same_bits(copy.deepcopy(y), y)


def test_calls_from_many_threads(backend):
    """Different work at the same time: nothing is shared between calls."""
    cases = [GateCase((3, 17, 9, 9), torch.float32, F32, 1 + seed % 2, seed=seed) for seed in range(24)]
    device = torch.get_default_device()

    def work(case: GateCase) -> list[Tensor]:
        def function(*tensors: Tensor) -> Tensor:
            return sparta_gate(*tensors, share=case.share, backend=backend)

        with device:  # the default one is a thread's own
            return grads_of(function, list(case.inputs()))

    wants = [work(case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for got, want in zip(pool.map(work, cases), wants, strict=True):
            for a, b in zip(got, want, strict=True):
                assert_same_bits(a, b)


def test_no_warning_on_the_common_path(backend):
    inputs = [t.requires_grad_() for t in gate_inputs("channels_last")]
    sparta_gate(*inputs, backend=backend).sum().backward()  # what a compiler may say is not meant
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparta_gate(*inputs, backend=backend).sum().backward()


def test_forward_mode_is_refused_not_dropped() -> None:
    x, spatial, channel = torch.randn(1, 2, 3, 3), torch.randn(1, 1, 3, 3), torch.randn(1, 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            sparta_gate(dual, spatial, channel)
        tangent = torch.autograd.forward_ad.unpack_dual(sparta_gate(dual, spatial, channel, backend="reference"))
        assert tangent.tangent is not None
