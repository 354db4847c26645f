"""FrozenSparta, the whole activation in an attack: what it computes, refreshes in place, keeps and writes over."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import assert_same_bits, lay
from sparta_case import SHAPE, WHOLE, build, features
from torch import Tensor, nn

from sparta_kernels import use_backend
from sparta_kernels.backends import native, native_attention
from sparta_kernels.nn import Sparta
from sparta_kernels.nn.frozen import Form
from sparta_kernels.nn.frozen_sparta import FrozenSparta

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What was added to x in every call of the kernels."""
    seen: list[Tensor | None] = []
    forward = native.attention_forward

    def spy(x: Tensor, packed: list[Tensor], hidden: int, keep: bool, skip: Tensor | None = None) -> object:
        seen.append(skip)
        return forward(x, packed, hidden, keep, skip)

    monkeypatch.setattr(native, "attention_forward", spy)
    return seen


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    weights = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x).to(x.dtype)
    return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]


def plainly(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return value_and_gradient(module, x)


def assert_close(gots: tuple[Tensor, ...], wants: tuple[Tensor, ...]) -> None:
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("arguments", WHOLE, ids=str)
def test_it_is_the_function_of_its_module(arguments, calls):
    module, x = build(**arguments).eval(), features(*SHAPE)
    frozen = FrozenSparta(module, Form())
    assert_close(value_and_gradient(frozen, x), plainly(module, x))
    assert calls == [None]
    assert not list(frozen.buffers(recurse=False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # Layer by layer, where there are no kernels for the whole.
    assert_close(plainly(frozen, x), plainly(module, x))
    assert calls == [None]


def test_in_another_dtype_than_its_modules():
    module, x = build(dtype=torch.float32).eval(), features(*SHAPE, dtype=torch.float32)
    frozen = FrozenSparta(module, Form(torch.bfloat16, torch.channels_last))
    y = frozen(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


# ---- refresh -----------------------------------------------------------------------------------------------


def refresh(frozen: FrozenSparta) -> None:
    for child in frozen.children():
        child.refresh()
    frozen.refresh()


@pytest.mark.parametrize("arguments", WHOLE, ids=str)
def test_a_refresh_takes_over_everything_in_place(arguments, calls):
    module, x = build(**arguments).eval(), features(*SHAPE)
    frozen = FrozenSparta(module, Form())
    refresh(frozen)  # before there is anything to take over
    old = value_and_gradient(frozen, x)
    (packed,) = frozen._packed.values()
    places = [tensor.data_ptr() for tensor in packed.tensors]
    for _, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1.3).add_(0.1)
    assert_close(value_and_gradient(frozen, x), old)
    refresh(frozen)
    (again,) = frozen._packed.values()
    assert [tensor.data_ptr() for tensor in again.tensors] == places
    assert_close(value_and_gradient(frozen, x), plainly(module, x))
    assert len(calls) == 3


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}], ids=str)
def test_a_refresh_takes_over_every_single_one(arguments):
    module, x = build(**arguments).eval(), features(*SHAPE)
    frozen = FrozenSparta(module, Form())
    before = frozen(x)
    changing = [*module.named_parameters(), *(b for b in module.named_buffers() if b[1].is_floating_point())]
    for name, tensor in changing:
        tensor.data.add_(0.2)
        refresh(frozen)
        now = frozen(x)
        assert not torch.equal(now, before), name
        torch.testing.assert_close(now, module(x), rtol=1e-9, atol=1e-11)
        before = now


def test_copies_do_not_share_weights():
    module, x = build().eval(), features(*SHAPE)
    frozen = FrozenSparta(module, Form())
    want = frozen(x)
    twin = copy.deepcopy(frozen)
    module.conv1.weight.data.add_(1)
    refresh(frozen)
    assert not torch.equal(frozen(x), want)
    assert torch.equal(twin(x), want)


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_x_and_bits_are_kept_and_nothing_else(dynamic, summed):
    module = build(32, torch.float32, hidden=32, dynamic=dynamic).eval()
    frozen = FrozenSparta(module, Form())
    x = features(2, 32, 16, 16, dtype=torch.float32)
    skip = torch.ones_like(x).requires_grad_() if summed else None
    frozen(x)
    leaf = x.clone().requires_grad_()
    own = {w.data_ptr() for w in frozen._whole if w is not None}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        given = leaf * 1.0  # of which torch keeps nothing
        frozen(given, skip)
    kept = {t.data_ptr(): t for t in saved if t.data_ptr() not in own}
    assert kept.pop(given.data_ptr()).shape == x.shape
    bits = 2 * 256 * (3 if dynamic else 2) * 4
    small = 4 * (2 * 256 + 2 * 32 + 2)  # spatial, channel, kernel
    assert sum(t.numel() * t.element_size() for t in kept.values()) == bits + small
    assert 7 * (bits + small) < x.numel() * x.element_size()


# ---- a sum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_x_and_skip_in_one_pass(layout, calls):
    module, x = build(share=2).eval(), lay(features(*SHAPE), layout)
    skip = lay(features(*SHAPE).roll(1, 0), layout)
    frozen = FrozenSparta(module, Form())
    want = plainly(module, x + skip)
    first, second = x.clone().requires_grad_(), skip.clone().requires_grad_()
    written = first * 1
    y = frozen(written, second)
    weights = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    grads = torch.autograd.grad((y * weights).sum(), [first, second])
    assert_same_bits(written.detach(), x + skip)
    assert_close((y, grads[0]), want)
    assert_same_bits(grads[0], grads[1])
    assert calls[0] is second


@pytest.mark.parametrize("other", ["dtype", "stride", "shape", "number"])
def test_a_skip_that_is_not_alike(other, calls):
    module, x = build().eval(), features(*SHAPE)
    skip = {
        "dtype": lambda: features(*SHAPE).float(),
        "stride": lambda: features(*SHAPE).contiguous(memory_format=torch.channels_last),
        "shape": lambda: features(6, 1, 1),
        "number": lambda: 0.5,
    }[other]()
    want = module(x + skip)
    assert_close((FrozenSparta(module, Form())(x.clone(), skip),), (want,))
    assert all(given is None for given in calls)


def test_a_sum_with_gaps():
    module, x = build().eval(), lay(features(*SHAPE), "sliced_c")
    skip = lay(features(*SHAPE).roll(1, 0), "sliced_c")
    want = module(x + skip)
    assert_close((FrozenSparta(module, Form())(x, skip),), (want,))


def test_the_second_derivative():
    module, x = build().eval(), features(*SHAPE).requires_grad_()
    frozen = FrozenSparta(module, Form())
    (gx,) = torch.autograd.grad(frozen(x).square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(gx.square().sum(), x)
    (gx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    assert_close((got,), torch.autograd.grad(gx.square().sum(), x))
    y = frozen(x * 1, torch.ones_like(x))
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_for_two_readers(whole, summed):
    module, x = build().eval(), features(*SHAPE)
    frozen, skip = FrozenSparta(module, Form()), features(*SHAPE).roll(1, 0) if summed else None
    total = x + skip if summed else x
    want = plainly(lambda x: 3 * module(x), total)

    def both(x: Tensor) -> Tensor:
        first, second = frozen(x * 1, skip, twice=True)
        assert first.data_ptr() == second.data_ptr()
        return first + 2 * second

    assert_close(value_and_gradient(both, x) if whole else plainly(both, x), want)


# ---- layers that are not as Sparta makes them --------------------------------------------------------------

OTHERS: dict[str, Callable[[Sparta], object]] = {
    "norm": lambda m: setattr(m, "bn1", nn.BatchNorm2d(6, affine=False).double().eval()),
    "bias": lambda m: m.conv1.register_parameter("bias", None),
    "stride": lambda m: setattr(m, "conv1", nn.Conv2d(6, 6, 1, stride=2).double()),
    "padding": lambda m: setattr(m, "conv1", nn.Conv2d(6, 6, 1, padding=1).double()),
    "kernel size": lambda m: setattr(m, "conv1", nn.Conv2d(6, 6, 3, padding=1).double()),
}


@pytest.mark.parametrize("other", OTHERS)
def test_replaced_layers(other):
    module, x = build().eval(), features(*SHAPE)
    OTHERS[other](module)
    assert_close(value_and_gradient(FrozenSparta(module, Form()), x), plainly(module, x))


def test_a_change_of_dtype_reaches_the_packed_weights(monkeypatch):
    frozen, forward = FrozenSparta(build(dtype=torch.float32).eval(), Form()), native.attention_forward
    frozen(features(*SHAPE, dtype=torch.float32))

    def checked(x: Tensor, packed: list[Tensor], *rest: object) -> object:
        assert native_attention._Packed(*packed).b13.dtype == x.dtype  # or the kernel would read behind their end
        return forward(x, packed, *rest)

    monkeypatch.setattr(native, "attention_forward", checked)
    assert frozen.double()(features(*SHAPE)).dtype == torch.float64
