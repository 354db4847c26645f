"""How sparta_attention and sparta_activation are called: what is asked for, sums written over, products, opcheck."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from activation_case import FIELDS, ActivationCase, check_attention, forward, present
from cases import FLOATS, assert_same_bits, lay
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparta_kernels import AttentionWeights, backends, sparta_activation, sparta_attention, use_backend
from sparta_kernels.backends import extension, native, native_attention, products
from sparta_kernels.nn import Sparta
from sparta_kernels.ops import attention, attention_gradients
from sparta_kernels.ops.attention import activate, pack

raw = torch.ops.sparta_kernels
TF32 = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # what torch says of its own flags
FUNCTIONS = (sparta_attention, sparta_activation)
CASE = ActivationCase((3, 5, 4, 4), 9, torch.float32)


pytestmark = pytest.mark.usefixtures("one_thread")


def total(function: object, x: Tensor, weights: AttentionWeights) -> Tensor:
    """Of all results, each element with a weight of its own."""
    found = function(x, weights, backend="native")  # type: ignore[operator]
    parts = found if isinstance(found, tuple) else (found,)
    return sum((part * torch.linspace(-1, 2, part.numel()).view_as(part)).sum() for part in parts)  # type: ignore[return-value]


def never(*_: object) -> None:
    pytest.fail("nobody asks for this")


# ---- what is asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [False, True], ids=["leaves", "results"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_attack_computes_no_gradient_of_trainable_weights(function, made, monkeypatch):
    """Though they require one: as parameters, or as what a BatchNorm was folded into."""
    x, weights = CASE.leaves()
    chosen = AttentionWeights(*(2 * w for w in weights)) if made else weights
    value = total(function, x, chosen)
    with monkeypatch.context() as patched:
        patched.setattr(attention, "weight_gradients", never)
        (gx,) = torch.autograd.grad(value, x, retain_graph=True)
        if made:  # torch does not tell of leaves here, where it has to compute one of them
            value.backward(inputs=[x], retain_graph=True)
            assert_same_bits(x.grad, gx)
            x.grad = None
    value.backward()
    assert_same_bits(x.grad, gx)
    assert all(weight.grad.any() for weight in weights)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_weight_alone(function, dynamic):
    case = ActivationCase((3, 5, 4, 4), 9, torch.float32, dynamic=dynamic)
    x, weights = case.leaves()
    names = [name for name in FIELDS if getattr(weights, name) is not None]
    wants = torch.autograd.grad(total(function, x, weights), present(weights))
    for name, want in zip(names, wants, strict=True):
        x, weights = case.inputs()
        getattr(weights, name).requires_grad_()
        value = total(function, x, weights)
        value.backward()
        assert_same_bits(getattr(weights, name).grad, want, name)
        assert x.grad is None
        assert sum(weight.grad is not None for weight in present(weights)) == 1
        # One of several that could be asked for.
        weights = AttentionWeights(*(None if w is None else (2 * w.detach().requires_grad_()) / 2 for w in weights))
        (got,) = torch.autograd.grad(total(function, x, weights), getattr(weights, name))
        assert_same_bits(got, want, name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_x_without_a_gradient_costs_none(function, monkeypatch):
    x, weights = CASE.leaves()
    wants = torch.autograd.grad(total(function, x, weights), present(weights))
    monkeypatch.setattr(native, "attention_backward_", never)
    gots = torch.autograd.grad(total(function, x.detach(), weights), present(weights))
    for got, want in zip(gots, wants, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("elements", [1, 2 * 16 * 9])  # one sample at a time, and two
def test_gradients_of_weights_some_samples_at_a_time(elements, monkeypatch):
    x, weights = CASE.leaves()
    wants = torch.autograd.grad(total(sparta_activation, x, weights), present(weights))
    monkeypatch.setattr(attention_gradients, "_ELEMENTS", elements)
    gots = torch.autograd.grad(total(sparta_activation, x, weights), present(weights))
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want)


def saved_by(function: object, *arguments: object, **options: object) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*arguments, **options)  # type: ignore[operator]
    return saved


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_x_and_bits_are_all_that_is_kept(dynamic, train):
    case = ActivationCase((2, 32, 16, 16), 32, torch.float32, dynamic=dynamic)
    x, weights = case.leaves() if train else (case.inputs()[0].requires_grad_(), case.inputs()[1])
    own = {tensor.data_ptr() for tensor in (x, *present(weights))}
    saved = saved_by(sparta_activation, x, weights, backend="native")
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    more = [t for t in saved if t.data_ptr() not in own]
    bits = 2 * 256 * (3 if dynamic else 2) * 4
    means = 2 * 32 * (2 if dynamic else 1) if train else 0
    assert sum(t.numel() * t.element_size() for t in more) == bits + 4 * (2 * 256 + 2 * 32 + 2 + means)
    (kept,) = [t for t in saved if t.dtype == torch.uint8]
    assert torch.equal(kept, forward(case, x.detach(), weights)[5])


# ---- a gradient of nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_learned_kernel_does_not_depend_on_x(create_graph):
    case = ActivationCase((2, 3, 2, 2), 4, torch.float64, dynamic=False)
    x, weights = case.inputs()
    _, _, kernel = sparta_attention(x.requires_grad_(), weights, backend="native")
    if kernel.requires_grad:
        (gx,) = torch.autograd.grad(kernel.sum(), x, create_graph=create_graph, allow_unused=True)
        assert gx is None or not gx.any()


# ---- a sum that is written over its first part -------------------------------------------------------------


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("shape", [(3, 17, 5, 7), (2, 4, 16, 17), (20, 9, 3, 3)], ids=str)
def test_of_a_sum_written_over_x(cpu_backend, shape, layout, dtype, share):
    case = ActivationCase(shape, 18, dtype, layout, "sliced_c", share=share)
    x, weights = case.inputs()
    skip = lay(ActivationCase(shape, 18, dtype, seed=7).inputs()[0], layout)
    packed = pack(weights, dtype, cpu_backend)
    summed = x + skip
    want_leaf = summed.clone().requires_grad_()
    want = activate(want_leaf, weights, packed, share, cpu_backend)
    (want_gx,) = torch.autograd.grad(want, want_leaf, case.gradient())

    first, second = x.clone().requires_grad_(), skip.clone().requires_grad_()
    written = first * 1
    y = activate(written, weights, packed, share, cpu_backend, skip=second * 1)
    assert_same_bits(written.detach(), summed, "x + skip")
    assert_same_bits(y.detach(), want.detach(), "y")
    for got in torch.autograd.grad(y, [first, second], case.gradient()):
        assert_same_bits(got, want_gx)
    with torch.no_grad():
        written = x.clone()
        y = activate(written, weights, packed, share, cpu_backend, skip=skip)
    assert_same_bits(written, summed)
    assert_same_bits(y, want.detach())


@pytest.mark.parametrize("whose", ["x", "skip", "weight"])
def test_of_a_sum_the_gradient_of_one(whose):
    (x, weights), skip = CASE.inputs(), ActivationCase((3, 5, 4, 4), 9, torch.float32, seed=7).inputs()[0]
    leaf = {"x": x, "skip": skip, "weight": weights.w4}[whose].requires_grad_()
    packed = pack(weights, torch.float32, "native")
    y = activate(x * 1, weights, packed, 1, "native", skip=skip)
    (got,) = torch.autograd.grad(y, leaf, CASE.gradient())
    (want,) = torch.autograd.grad(sparta_activation(x + skip, weights, backend="native"), leaf, CASE.gradient())
    assert_same_bits(got, want)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_autograd_notices_what_is_written_over(layout):
    case = ActivationCase((3, 5, 4, 6), 9, torch.float32, layout)
    x, weights = case.inputs()
    packed, leaf = pack(weights, torch.float32, "native"), x.clone().requires_grad_()
    saved_by_exp = leaf.exp()
    version = saved_by_exp._version
    y = activate(saved_by_exp, weights, packed, 1, "native", skip=torch.ones_like(x))
    assert saved_by_exp._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    base = torch.zeros(6, 5, 4, 6)
    part = base[2:5]
    activate(part, weights, packed, 1, "native", skip=torch.ones_like(part))
    assert torch.equal(base[2:5], torch.ones(3, 5, 4, 6))
    assert not base[:2].any()
    assert not base[5:].any()
    assert base._version > 0
    with torch.inference_mode():
        inferred = x.clone()
        activate(inferred, weights, packed, 1, "native", skip=torch.ones_like(x))
        assert torch.equal(inferred, x + 1)


def test_of_a_sum_only_the_first_derivative():
    x, weights = CASE.leaves()
    y = activate(x * 1, weights, pack(weights, torch.float32, "native"), 1, "native", skip=torch.ones_like(x))
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("read", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("summed", [False, True])
def test_for_two_readers(cpu_backend, summed, read, dtype):
    case = ActivationCase((3, 17, 5, 7), 18, dtype, "channels_last", share=2)
    x, weights = case.leaves()
    packed, skip = pack(weights, dtype, cpu_backend), torch.full_like(x, 0.5) if summed else None
    pair = activate(x * 1, weights, packed, 2, cpu_backend, skip=skip, twice=True)
    assert pair[0].data_ptr() == pair[1].data_ptr()
    want = sparta_activation(x + 0.5 if summed else x, weights, share=2, backend=cpu_backend)
    factors = torch.randn(2, *case.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    leaves = [x, *present(weights)]
    gots = torch.autograd.grad(sum((pair[i] * factors[i]).sum() for i in read), leaves)
    wants = torch.autograd.grad((want * factors[list(read)].sum(0)).sum(), leaves)
    for got, wanted in zip((pair[0], pair[1], *gots), (want, want, *wants), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        for got in activate(x * 1, weights, packed, 2, cpu_backend, skip=skip, twice=True):
            assert_same_bits(got, want.detach())


# ---- the library's products --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_products_it_is_plain_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(products, "available", frozenset)
    case = ActivationCase((2, 5, 4, 4), 9, dtype, low_weights=True)
    x, weights = case.inputs()
    with use_backend("reference"):
        module = Sparta(5).to(dtype).eval()
        wants = sparta_activation(x, weights), *sparta_attention(x, weights), module(x)
    gots = sparta_activation(x, weights), *sparta_attention(x, weights), module(x)
    for got, want in zip(gots[:4], wants[:4], strict=True):
        assert_same_bits(got, want)
    torch.testing.assert_close(gots[4], wants[4])
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"backend 'native' cannot take x: native: .* no matrix products"):
            function(x, weights, backend="native")


def test_bfloat16_without_its_products_takes_float32s(cpu_backend, monkeypatch):
    monkeypatch.setattr(products, "available", lambda: frozenset({torch.float32}))
    for channels in (8, 9):
        check_attention(ActivationCase((3, channels, 7, 7), 17, torch.bfloat16), cpu_backend)
    with pytest.raises(ValueError, match=r"no matrix products .* for torch\.float64"):
        sparta_attention(*ActivationCase((1, 2, 2, 2), 3, torch.float64).inputs(), backend="native")


@TF32
@pytest.mark.parametrize("channels", [1, 7, 33])
@pytest.mark.parametrize("enabled", [True, False])
def test_odd_channels_in_bfloat16_with_and_without_onednn(cpu_backend, channels, enabled):
    with torch.backends.mkldnn.flags(enabled=enabled):
        fast = extension.kernels.isa() == "avx512_bf16" and enabled and torch.bfloat16 in products.available()
        assert native_attention._product_dtype(torch.bfloat16) == (torch.bfloat16 if fast else torch.float32)
        for stored in ("contiguous", "channels_last"):
            check_attention(ActivationCase((3, channels, 7, 7), 17, torch.bfloat16, stored), cpu_backend)


@TF32
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("first", [True, False], ids=["switched-off", "switched-on"])
def test_onednn_switched_between_forward_and_backward(cpu_backend, first, dynamic):
    """Weights that were packed for oneDNN's products serve without them too."""
    case = ActivationCase((3, 7, 5, 5), 19, torch.bfloat16, dynamic=dynamic)
    x, weights = case.leaves()
    packed = pack(weights, x.dtype, cpu_backend)

    def gradients(forward: bool, backward: bool) -> list[Tensor]:
        with torch.backends.mkldnn.flags(enabled=forward):
            y = activate(x, weights, packed, 1, cpu_backend)
        with torch.backends.mkldnn.flags(enabled=backward):
            return [y.detach(), *torch.autograd.grad(y, [x, *present(weights)], case.gradient())]

    for got, want in zip(gradients(first, not first), gradients(True, True), strict=True):
        assert (got - want).norm() <= 0.02 * want.norm()


@TF32
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_product_that_fails_is_an_error(dtype, threads):
    case = ActivationCase((9, 6, 12, 13), 18, dtype)
    x, weights = case.inputs()
    packed = pack(weights, dtype, "native")
    bits = forward(case, x, weights)[5]
    torch.set_num_threads(threads)
    before = x.clone()
    try:
        extension.kernels.set_products((0, 0, 0, 0))
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no matrix product"):
                sparta_activation(x, weights, backend="native")
            with pytest.raises(RuntimeError, match="no matrix product"):
                raw._attention_backward_(case.gradient(), *case.gradients(), bits, packed.tensors, 18, "native")
    finally:
        products.available.cache_clear()
        assert dtype in products.available()
    assert_same_bits(x, before)
    check_attention(case, "native")


def test_a_backend_says_why_it_cannot_take_x():
    if "cpu" not in backends.DEVICES.get("triton", ()):
        pytest.skip("Triton's kernels do not run here")
    x, weights = ActivationCase((1, 2, 2, 2), 3, torch.float64).inputs()
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=rf"{function.__name__}: backend 'triton' cannot take x: .*float64"):
            function(x, weights, backend="triton")
    x, weights = ActivationCase((1, 2, 2, 2), 300, torch.float32).inputs()
    with pytest.raises(ValueError, match="hidden must be from 1 to 256, got 300"):
        sparta_activation(x, weights, backend="triton")
    with use_backend("triton"), pytest.raises(ValueError, match="'triton' cannot take x"):
        sparta_activation(x, weights)


def test_the_default_device_does_not_matter(cpu_backend):
    """Weights are packed where they are."""
    x, weights = CASE.inputs()
    want = sparta_activation(x, weights, backend=cpu_backend)
    with torch.device("meta"):
        got = sparta_activation(x, weights, backend=cpu_backend)
    assert_same_bits(got, want)


def test_an_empty_batch():
    x, weights = ActivationCase((0, 5, 4, 4), 9, torch.float32).leaves()
    y = sparta_activation(x, weights, backend="native")
    assert y.shape == (0, 5, 4, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 5, 4, 4)
    found = sparta_attention(x, weights, backend="native")
    assert [f.shape for f in found] == [(0, 1, 4, 4), (0, 5), (0,)]


def test_weights_that_change_after_forward_are_noticed():
    x, weights = CASE.leaves()
    y = sparta_activation(x, weights, backend="native")
    with torch.no_grad():
        weights.w4.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_calls_from_many_threads():
    """Different work at the same time: nothing is shared between calls."""
    dtypes = torch.float64, torch.float32, torch.bfloat16
    cases = [ActivationCase((3, 17, 9, 9), 19, dtype, seed=seed) for seed in range(8) for dtype in dtypes]

    def work(case: ActivationCase) -> list[Tensor]:
        x, weights = case.leaves()
        y = sparta_activation(x, weights, backend="native")
        return [y.detach(), *torch.autograd.grad(y, [x, *present(weights)], case.gradient())]

    wants = [work(case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for gots, wanted in zip(pool.map(work, cases), wants, strict=True):
            for got, want in zip(gots, wanted, strict=True):
                assert_same_bits(got, want)


# ---- opcheck -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_c"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layout, dynamic, dtype):
    case = ActivationCase((3, 6, 5, 4), 18, dtype, layout, dynamic=dynamic)
    x, weights = case.inputs()
    packed = pack(weights, dtype, "native")
    options = packed.tensors, packed.hidden, packed.dynamic
    for keep in (True, False):
        torch.library.opcheck(raw._attention_forward.default, (x, *options, keep, "native"))
    torch.library.opcheck(raw._attention_forward_.default, (x.clone(), x.clone(), *options, True, "native"))
    bits = forward(case, x, weights)[5]
    arguments = torch.empty_like(x).copy_(case.gradient()), *case.gradients(), bits, packed.tensors, 18, "native"
    torch.library.opcheck(raw._attention_backward_.default, arguments)


@pytest.mark.parametrize("hidden", [1, 16, 19])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fakes_have_the_real_shapes(dtype, dynamic, keep, hidden):
    case = ActivationCase((3, 6, 5, 4), hidden, dtype, dynamic=dynamic)
    x, weights = case.inputs()
    packed = pack(weights, dtype, "native")
    real = forward(case, x, weights, keep)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        options = [mode.from_tensor(t) for t in packed.tensors], hidden, dynamic, keep, "native"
        fake = raw._attention_forward(mode.from_tensor(x), *options)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
