"""Sparta as one operation: when it is one, and that it is then what its layers are one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from cases import assert_same_bits
from sparta_case import SHAPE, WHOLE, build, features
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from sparta_kernels import use_backend
from sparta_kernels.nn import Sparta
from sparta_kernels.nn import sparta as sparta_module
from sparta_kernels.nn.whole import folded, is_one_operation
from sparta_kernels.ops import attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The x of every call of the one operation by a module."""
    seen: list[Tensor] = []
    operation = sparta_module.sparta_activation
    monkeypatch.setattr(sparta_module, "sparta_activation", lambda x, *w, **o: seen.append(x) or operation(x, *w, **o))
    return seen


def frozen_norms(module: Sparta) -> Sparta:
    """In training mode, but for its BatchNorms."""
    module.train()
    for layer in module.children():
        layer.train(not isinstance(layer, nn.BatchNorm2d))
    return module


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x).to(x.dtype)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


def plainly(function: Callable[..., list[Tensor]], *arguments: object) -> list[Tensor]:
    with use_backend("reference"):
        return function(*arguments)


def assert_all_close(gots: list[Tensor], wants: list[Tensor], **tolerance: float) -> None:
    for i, (got, want) in enumerate(zip(gots, wants, strict=True)):
        torch.testing.assert_close(got, want, msg=lambda m, i=i: f"{i}: {m}", **tolerance)


# ---- what it computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", [Sparta.eval, frozen_norms], ids=["eval", "frozen norms"])
@pytest.mark.parametrize("arguments", WHOLE, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_it_is_what_its_layers_are(arguments, prepare, layout, calls):
    module = prepare(build(**arguments))
    x = features(*SHAPE).contiguous(memory_format=layout)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gots = results(module, x)
    assert len(calls) == 1
    assert_all_close(gots, plainly(results, module, x), rtol=1e-9, atol=1e-11)
    assert len(calls) == 1
    names = [name for name, _ in module.named_parameters()]
    for name in ("bn1.weight", "bn3.bias", "conv1.bias", "conv2.weight"):
        assert gots[2 + names.index(name)].any(), name
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arguments", WHOLE, ids=str)
def test_in_lower_precision(arguments, dtype, calls):
    exact = build(**arguments).eval()
    module = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    x = features(*SHAPE).to(dtype)
    gots, wants, layers = results(module, x), results(exact, x.double()), plainly(results, module, x)
    assert len(calls) == 2
    for i, (got, want, plain) in enumerate(zip(gots, wants, layers, strict=True)):
        assert got.dtype == dtype
        error, theirs = (got.double() - want).norm(), (plain.double() - want).norm()
        # Of gradients a rounding may switch a whole ReLU on or off, of which there are not many here.
        assert error <= 2 * theirs + (0.15 if i else 4 * torch.finfo(dtype).eps) * want.norm()


@pytest.mark.parametrize("arguments", WHOLE, ids=str)
def test_a_penalty_on_the_gradient(arguments):
    """Second derivatives, of the parameters too."""

    def penalised(module: Sparta, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        (gx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        leaves = [x, *module.parameters()]
        found = torch.autograd.grad(gx.square().sum(), leaves, allow_unused=True)
        return [torch.zeros(()) if grad is None else grad for grad in found]

    module, x = build(**arguments).eval(), features(*SHAPE)
    assert_all_close(penalised(module, x), plainly(penalised, module, x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, calls):
    module, x = build(dtype=torch.float32).eval(), features(*SHAPE, dtype=torch.float32)

    class Again(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(module, x, use_reentrant=reentrant)

        def parameters(self) -> Iterator[nn.Parameter]:
            return module.parameters()

    wants = results(module, x)
    if not reentrant:
        gots = results(Again(), x)
    else:  # for backward() alone
        leaf = x.clone().requires_grad_()
        y = Again()(leaf)
        (y * torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x).float()).sum().backward()
        gots = [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]
    assert len(calls) == 3
    for got, want in zip(gots, wants, strict=True):
        assert_same_bits(got, want)


def test_copies(calls):
    module, x = build(hidden=19).eval(), features(*SHAPE)
    wants = results(module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(got, want) for got, want in zip(results(twin, x), wants, strict=True))
    assert len(calls) == 3


def test_an_attack_on_trainable_weights_computes_none_of_their_gradients(monkeypatch):
    module, x = build().eval(), features(*SHAPE).requires_grad_()
    (want,) = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])[:1]
    monkeypatch.setattr(attention, "weight_gradients", lambda *_: pytest.fail("nobody asks for this"))
    (got,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(got, want)
    module(x).sum().backward(inputs=[x])
    assert torch.equal(x.grad, want)


def test_only_the_last_layers_are_trained(calls):
    module, x = build().eval(), features(*SHAPE)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(("conv4", "bn6")))
    assert_all_close(results(module, x), plainly(results, module, x), rtol=1e-9, atol=1e-11)
    assert len(calls) == 1


# ---- when it is one ----------------------------------------------------------------------------------------


def affine_free(module: Sparta) -> None:
    module.bn1 = nn.BatchNorm2d(6, affine=False, eps=1e-3).double().eval()
    module.bn1.running_mean.add_(0.5)


FIT: dict[str, Callable[[Sparta], object]] = {
    "as it is": lambda m: None,
    "share": lambda m: setattr(m, "share", 2),
    "no affine parameters": affine_free,
    "another epsilon": lambda m: setattr(m.bn3, "eps", 0.3),
    "constant weights": lambda m: m.requires_grad_(False),
    "channels_last weights": lambda m: m.to(memory_format=torch.channels_last),
    "hooks on itself": lambda m: m.register_forward_hook(lambda *_: None),
}


class MyConv(nn.Conv2d):
    pass


def bare(layer: nn.Conv2d) -> None:
    layer.bias = None


UNFIT: dict[str, Callable[[Sparta], object]] = {
    "training": lambda m: m.train(),
    **{f"{name} training": lambda m, name=name: m.get_submodule(name).train() for name in ("bn1", "bn3", "bn6")},
    **{
        f"{kind} of {name}": lambda m, name=name, kind=kind: getattr(m.get_submodule(name), f"register_{kind}")(
            lambda *_: None
        )
        for name, kind in (
            *((name, "forward_hook") for name in ("conv1", "conv2", "conv3", "conv4", "conv6", "predict")),
            *((name, "forward_pre_hook") for name in ("bn1", "bn3", "bn6", "predict")),
            ("conv1", "full_backward_hook"),
            ("conv4", "full_backward_pre_hook"),
            ("conv6", "forward_pre_hook"),
        )
    },
    "parametrised convolution": lambda m: parametrizations.weight_norm(m.conv3),
    "parametrised linear layer": lambda m: parametrizations.weight_norm(m.predict),
    "replaced convolution": lambda m: setattr(m, "conv4", MyConv(6, 1, 1).double()),
    "replaced norm": lambda m: setattr(m, "bn6", nn.Identity()),
    "replaced linear layer": lambda m: setattr(m, "predict", nn.Sequential(nn.Linear(6, 1)).double()),
    "no bias": lambda m: bare(m.conv1),
    "no bias of conv2": lambda m: bare(m.conv2),
    "no bias of the linear layer": lambda m: bare(m.predict),
    "no running statistics": lambda m: setattr(m, "bn3", nn.BatchNorm2d(6, track_running_stats=False).double().eval()),
    "stride": lambda m: setattr(m, "conv1", nn.Conv2d(6, 6, 1, stride=2).double()),
    "padding": lambda m: setattr(m, "conv1", nn.Conv2d(6, 6, 1, padding=1).double()),
    "kernel size": lambda m: setattr(m, "conv1", nn.Conv2d(6, 6, 3, padding=1).double()),
    "groups": lambda m: setattr(m, "conv6", nn.Conv2d(6, 6, 1, groups=2).double()),
}


@pytest.mark.parametrize("name", [*FIT, *UNFIT])
def test_it_is_one_operation_exactly_where_it_may(name, calls):
    module, x = build().eval(), features(*SHAPE)
    (FIT | UNFIT)[name](module)
    assert is_one_operation(module, x) == (name in FIT)
    gots = results(copy.deepcopy(module), x)  # of which training changes the statistics
    assert len(calls) == (name in FIT)
    assert_all_close(gots, plainly(results, module, x), rtol=1e-9, atol=1e-11)


def test_hooks_are_called():
    module, seen = build().eval(), []
    for name in ("conv1", "bn3", "predict"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    module(features(*SHAPE))
    assert seen == ["conv1", "bn3", "predict"]


def test_hooks_of_all_modules_are_called():
    module, seen = build().eval(), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        module(features(*SHAPE))
    finally:
        handle.remove()
    assert [*map(id, seen)] == [id(layer) for layer in (*module.children(), module) if layer in seen]
    assert len(seen) == 10


@pytest.mark.parametrize("arguments", [{"kernel_size": 3}, {"kernel_size": 3, "dynamic": False}], ids=str)
def test_wider_kernels_are_layers(arguments, calls):
    module, x = build(**arguments).eval(), features(*SHAPE)
    assert_all_close(results(module, x), plainly(results, module, x), rtol=1e-9, atol=1e-11)
    assert not calls


def test_autocast_decides_for_each_layer(calls):
    module, x = build(dtype=torch.float32).eval(), features(*SHAPE, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x)
        assert not is_one_operation(module, x)
    assert not calls
    torch.testing.assert_close(got, module(x), rtol=0.05, atol=0.05)
    assert len(calls) == 1


def test_x_of_another_dtype_is_refused_as_the_layers_do(calls):
    module = build(dtype=torch.bfloat16).eval()
    with pytest.raises(RuntimeError, match="should be the same"):
        module(features(*SHAPE, dtype=torch.float32))
    assert not calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients(context: Callable[[], AbstractContextManager], calls):
    module, x = build().eval(), features(*SHAPE)
    with context():
        y = module(x)
    assert len(calls) == 1
    assert y.requires_grad == (context is nullcontext)
    torch.testing.assert_close(y.detach().clone(), plainly(results, module, x)[0])


def test_an_empty_batch(calls):
    module = build().eval()
    x = features(0, 6, 5, 7).requires_grad_()
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not calls


@pytest.mark.parametrize("arguments", WHOLE[:3], ids=str)
def test_compilers_see_layers(arguments, calls):
    torch._dynamo.reset()
    module, x = build(dtype=torch.float32, **arguments).eval(), features(*SHAPE, dtype=torch.float32)
    gots = results(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    assert not calls
    assert_all_close(gots, results(module, x), rtol=1e-4, atol=1e-4)
    program = torch.export.export(module, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("attention" in name for name in names)
    torch.testing.assert_close(program.module()(x), module(x))


def test_transforms_see_layers(calls):
    module, x = build().eval(), features(*SHAPE)
    values = dict(module.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, (x,)).square().sum()

    grads = torch.func.grad(loss)({name: value.detach() for name, value in values.items()}, x)
    each = torch.func.vmap(torch.func.grad(loss, 1), (None, 0))(values, x[:, None])
    assert not calls
    leaf = x.clone().requires_grad_()
    wants = torch.autograd.grad(module(leaf).square().sum(), [leaf, *values.values()])
    assert len(calls) == 1
    torch.testing.assert_close(each[:, 0], wants[0])
    for name, want in zip(values, wants[1:], strict=True):
        torch.testing.assert_close(grads[name], want)


def test_forward_mode_is_refused_not_dropped(calls):
    module, x = build().eval(), features(*SHAPE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            module(dual)
        with use_backend("reference"):
            assert torch.autograd.forward_ad.unpack_dual(module(dual)).tangent is not None
    assert not calls


@pytest.mark.parametrize("training", [False, True])
def test_shapes_alone(training):
    with torch.device("meta"):
        y = Sparta(6).train(training)(torch.empty(2, 6, 4, 4))
    assert y.shape == (2, 6, 4, 4)


def test_folding_is_in_float32_at_least():
    module = build(dtype=torch.bfloat16).eval()
    weights = folded(module)
    assert {w.dtype for w in (weights.w13, weights.b13, weights.w6, weights.b6)} == {torch.float32}
    exact = folded(copy.deepcopy(module).double())
    for got, want in zip(weights, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
