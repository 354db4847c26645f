"""The attention network in training mode, which keeps no hidden tensor, against the plain composition."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import one_thread
from sparta_case import CONFIGURATIONS, SHAPE, build, features
from torch import Tensor, nn

from sparta_kernels import use_backend
from sparta_kernels.nn import recomputed, resnet18, sparta


@pytest.fixture(autouse=True)
def _made_again(monkeypatch) -> None:
    """The images of these tests are small; what is kept of such is made again all the same."""
    monkeypatch.setattr(recomputed, "_FEW_PIXELS", 0)


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether each call of a Sparta took the path in question."""
    found: list[bool] = []

    def watched(module, x):
        result = recomputed.attention_in_training(module, x)
        found.append(result is not None)
        return result

    monkeypatch.setattr(sparta, "attention_in_training", watched)
    return found


@contextmanager
def plain() -> Iterator[None]:
    """The composition of torch's own operations."""
    with use_backend("reference"):
        yield


def gradients(module: nn.Module, x: Tensor, **options: object) -> dict[str, Tensor]:
    """The result and all gradients of a training step, by name."""
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y)
    leaves = {"x": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y, list(leaves.values()), weights, **options)
    return {"y": y, **dict(zip(leaves, found, strict=True))}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-8, atol: float = 1e-9) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def both(module: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training step of the module, and one of its copy in plain PyTorch."""
    other = copy.deepcopy(module)
    got = gradients(module, x)
    with plain():
        want = gradients(other, x)
    for (name, mine), its in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, its, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    return got, want


# ---- results and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_it_is_the_plain_composition(arguments, channels_last, kept, taken, monkeypatch):
    if kept:
        monkeypatch.setattr(recomputed, "_FEW_PIXELS", 35)
    x = features(*SHAPE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same(*both(build(**arguments), x))
    assert taken == [True, False]


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3, "share": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_near_as_torch_s_own(arguments, dtype, taken):
    """An error of at most twice that of the plain composition in the same dtype, beside float64."""
    module, x = build(**arguments), features(8, 6, 9, 9)
    with plain():
        right = gradients(copy.deepcopy(module), x)
    got, rounded = both(module.to(dtype), x.to(dtype))
    for name, value in right.items():
        scale = float(value.detach().abs().max())
        error, allowed = (float((found[name].double() - value).detach().abs().max()) for found in (got, rounded))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_gradcheck(arguments, taken):
    """Through the batch's statistics too."""
    module = build(channels=2, hidden=2, **arguments)
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = (features(2, 2, 2, 3).requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters()))
    with one_thread():
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, rtol=1e-3)
    assert all(taken)


@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_second_derivatives(arguments, taken):
    module, x = build(**arguments), features(*SHAPE)

    def second(model: nn.Module) -> dict[str, Tensor]:
        leaf = x.detach().requires_grad_()
        (gx,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        named = dict(model.named_parameters())
        found = torch.autograd.grad(gx.square().sum(), [leaf, *named.values()])
        return {"gx": gx.detach(), **dict(zip(["x", *named], found, strict=True))}

    with plain():
        want = second(copy.deepcopy(module))
    assert_same(second(module), want, rtol=1e-7, atol=1e-8)
    assert taken == [False, True]


def test_a_graph_that_is_kept_gives_the_same_again():
    module, x = build(), features(*SHAPE).requires_grad_()
    y = module(x).sum()
    first = torch.autograd.grad(y, [x, *module.parameters()], retain_graph=True)
    again = torch.autograd.grad(y, [x, *module.parameters()])
    assert all(map(torch.equal, first, again))


def test_what_backward_reads_must_not_change_before():
    module, x = build(), features(*SHAPE)
    y = module(x)
    with torch.no_grad():
        module.conv6.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "weights", "conv3.weight", "bn6.bias", "predict.weight", "conv2.bias"])
def test_gradients_that_nobody_wants(wanted):
    module, x = build(), features(*SHAPE)
    want = gradients(copy.deepcopy(module), x)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(wanted in ("weights", name))
    leaf = x.detach().requires_grad_(wanted == "x")
    y = module(leaf)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y))
    found = {"x": leaf, **dict(module.named_parameters())}
    for name, tensor in found.items():
        assert (tensor.grad is not None) == tensor.requires_grad, name
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, want[name])


@pytest.mark.parametrize("name", ["conv1.weight", "predict.bias"])
def test_one_trainable_weight_can_be_differentiated_twice(name):
    module = build()
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key == name)
    found = []
    for backend in ("auto", "reference"):
        leaf = module.get_parameter(name)
        with use_backend(backend):
            y = module(features(*SHAPE)).square().sum()
        (first,) = torch.autograd.grad(y, leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_outputs_that_nobody_uses(output, taken):
    """A part of the attention network alone, as a subclass might use it."""
    found = []
    module = build()
    for model in (module, copy.deepcopy(module)):
        x = features(*SHAPE).requires_grad_()
        with use_backend("reference" if found else "auto"):
            parts = recomputed.attention_in_training(model, x)
            if parts is None:
                h1, h3 = (F.relu(bn(conv(x))) for conv, bn in ((model.conv1, model.bn1), (model.conv3, model.bn3)))
                h6 = F.relu(model.bn6(model.conv6(h3)))
                parts = model.conv4(h3), model.conv2(h1).mean((2, 3)), model.predict(h6.mean((2, 3)))
            inputs = [x, *model.parameters()]
            found.append(torch.autograd.grad(parts[output].square().sum(), inputs, allow_unused=True))
    for mine, its in zip(*found, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its)


def test_nan_travels_as_in_the_plain_composition():
    x = features(*SHAPE)
    x[0, 0, 0, 0] = torch.nan
    got, want = both(build(), x)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, equal_nan=True)


def test_the_same_layer_twice():
    module = build()
    module.conv3, module.bn3 = module.conv1, module.bn1
    assert_same(*both(module, features(*SHAPE)))
    assert module.bn1.num_batches_tracked == 2


def test_layers_without_some_weights():
    module = build()
    module.bn1, module.bn6 = (nn.BatchNorm2d(6, affine=False, dtype=torch.float64) for _ in range(2))
    module.conv3 = nn.Conv2d(6, 6, 1, bias=False, dtype=torch.float64)
    module.conv2.bias = module.predict.bias = None
    assert_same(*both(module, features(*SHAPE)))


# ---- the running statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_running_statistics_move_once_a_step(momentum, tracked, taken):
    module = build()
    for name in ("bn1", "bn3", "bn6"):
        setattr(module, name, nn.BatchNorm2d(6, momentum=momentum, track_running_stats=tracked, dtype=torch.float64))
    other = copy.deepcopy(module)
    for seed in range(3):
        x = features(*SHAPE) + seed
        got = gradients(module, x)
        with plain():
            assert_same(got, gradients(other, x))
    assert taken == [True, False] * 3
    state, wanted = module.state_dict(), other.state_dict()
    assert list(state) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    if tracked:
        assert int(module.bn6.num_batches_tracked) == 3


def test_second_derivatives_leave_the_running_statistics():
    module, x = build(), features(*SHAPE).requires_grad_()
    y = module(x)
    before = {name: value.clone() for name, value in module.named_buffers()}
    torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


def test_one_value_a_channel_is_an_error_as_in_torch(taken):
    module = build()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(features(1, 6, 1, 1))
    assert module(features(1, 6, 1, 2)).shape == (1, 6, 1, 2)
    assert taken == [False, True]


@pytest.mark.parametrize("layer", ["conv1", "bn3", "conv6", "bn6", "predict"])
def test_a_forward_that_fails_counts_what_ran_before(layer, taken):
    """As the plain composition does, one of whose layers has another dtype, or a BatchNorm too few channels."""
    module = build(dtype=torch.float32)
    broken = getattr(module, layer)
    broken.weight = nn.Parameter(broken.weight.detach()[:-1] if layer.startswith("bn") else broken.weight.double())
    other = copy.deepcopy(module)
    x = features(*SHAPE, dtype=torch.float32)
    for model, backend in ((module, "auto"), (other, "reference")):
        with use_backend(backend), pytest.raises(RuntimeError):
            model(x)
    for (name, mine), its in zip(module.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, its, msg=lambda m, name=name: f"{name}: {m}")


# ---- where the plain composition is taken ------------------------------------------------------------------


def _norm(module):
    module.bn3 = nn.GroupNorm(2, 6, dtype=torch.float64)


def _sync(module):
    module.bn3 = nn.SyncBatchNorm(6, dtype=torch.float64)


def _frozen_norm(module):
    module.bn1.eval()


def _subclass(module):
    class Louder(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    module.conv6.__class__ = Louder


def _own_forward(module):
    module.conv1.forward = lambda input: F.conv2d(2 * input, module.conv1.weight, module.conv1.bias)


def _parametrized(module):
    nn.utils.parametrizations.weight_norm(module.conv3)


def _padding(module):
    module.conv1 = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64)


def _pixels(module):
    module.conv2 = nn.Conv2d(6, 6, 3, padding=1, dtype=torch.float64)


@pytest.mark.parametrize(
    "change", [_norm, _sync, _frozen_norm, _subclass, _own_forward, _parametrized, _padding, _pixels]
)
def test_other_layers_are_called(change, taken):
    """Whatever they do is done: the result is that of the plain composition."""
    module = build()
    change(module)
    got = gradients(module, features(*SHAPE))
    with plain():
        assert_same(got, gradients(module, features(*SHAPE)))
    assert not any(taken)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("layer", ["conv1", "conv6", "predict"])
def test_hooks_are_called(layer, kind, taken):
    module, called = build(), []
    handle = getattr(getattr(module, layer), f"register_{kind}_hook")(lambda *_: called.append(layer))
    module(features(*SHAPE).requires_grad_()).sum().backward()
    assert called == [layer]
    handle.remove()
    module(features(*SHAPE))
    assert taken == [False, True]


def test_global_hooks_are_called(taken):
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    try:
        build()(features(*SHAPE))
    finally:
        handle.remove()
    assert called.count("BatchNorm2d") == 3
    assert taken == [False]


def test_without_a_gradient_nothing_is_kept(taken):
    module, x = build(), features(*SHAPE)
    with torch.no_grad():
        module(x)
    module.requires_grad_(False)
    assert module(x).grad_fn is None
    assert module(x.requires_grad_()).grad_fn is not None
    assert taken == [False, False, True]


def test_the_reference_is_the_plain_composition(taken):
    with use_backend("reference"):
        build()(features(*SHAPE))
    assert taken == [False]


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_the_meta_device(backend, taken):
    with use_backend(backend):
        y = build().to("meta")(features(*SHAPE).to("meta").requires_grad_())
    assert y.device.type == "meta"
    assert taken == [False]


# ---- the ways modules are used -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_autocast(arguments, dtype, taken):
    module, x = build(**arguments), features(4, 6, 5, 7)
    module = module if dtype == torch.float64 else module.float()  # autocast leaves float64 alone
    other = copy.deepcopy(module)
    found = []
    for model, backend in ((module, "auto"), (other, "reference")):
        leaf = x.to(dtype).requires_grad_()
        with use_backend(backend):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = model(leaf)
            y.double().square().sum().backward()  # outside, as it is usually done
        assert y.dtype == dtype
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        found.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    tolerance = 1e-8 if dtype == torch.float64 else 0.05
    for mine, its in zip(*found, strict=True):
        scale = max(1.0, float(its.double().abs().max()))
        assert float((mine.double() - its.double()).abs().max()) <= tolerance * scale
    assert taken == [True, False]


def test_torch_compile_takes_the_whole_module(taken):
    torch._dynamo.reset()
    module, x = build(dtype=torch.float32), features(2, 6, 4, 4, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    got = gradients(compiled, x)
    want = gradients(module, x)
    assert_same({name.replace("_orig_mod.", ""): value for name, value in got.items()}, want, rtol=1e-4, atol=1e-5)


def test_torch_func_differentiates_the_plain_composition(taken):
    module, x = build(), features(*SHAPE)
    for norm in (module.bn1, module.bn3, module.bn6):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    got = torch.func.grad(lambda x: module(x).square().sum())(x)
    leaf = x.requires_grad_()
    (want,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(got, want)
    assert taken == [False, True]


def test_copies_made_after_a_step():
    module, x = build(), features(*SHAPE)
    module(x).sum().backward()
    other = copy.deepcopy(module)
    assert_same(gradients(other, x), gradients(module, x))


def test_checkpointing_around_it():
    module, x = build(), features(*SHAPE).requires_grad_()
    want = gradients(copy.deepcopy(module), x)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    y.backward(torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y))
    torch.testing.assert_close(x.grad, want["x"])
    torch.testing.assert_close(module.conv6.weight.grad, want["conv6.weight"])


def test_a_training_run_is_that_of_the_plain_composition(taken):
    """A few steps of SGD with momentum on a small network, whose sites are one in each group."""
    torch.manual_seed(0)
    network = resnet18(width=4).double().train()
    images, labels = torch.rand(6, 3, 16, 16, dtype=torch.float64), torch.arange(6)
    runs = []
    for backend in ("auto", "reference"):
        model = copy.deepcopy(network)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        with use_backend(backend):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
        runs.append(model.state_dict())
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[0][name], value, rtol=1e-7, atol=1e-8)
    assert taken == [True] * 12 + [False] * 12


_DDP = """
import copy, torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from sparta_kernels.nn import resnet18
distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.set_num_threads(1)
torch.manual_seed(0)
model = resnet18(width=4).double().train()
alone = copy.deepcopy(model)
images, labels = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64), torch.arange(8).view(2, 4)
parallel = DistributedDataParallel(model)
F.cross_entropy(parallel(images[rank]), labels[rank]).backward()
wanted = [torch.zeros_like(p) for p in alone.parameters()]
for part in range(2):
    one = copy.deepcopy(alone)
    F.cross_entropy(one(images[part]), labels[part]).backward()
    wanted = [w + p.grad / 2 for w, p in zip(wanted, one.parameters())]
for p, w in zip(model.parameters(), wanted):
    torch.testing.assert_close(p.grad, w, rtol=1e-8, atol=1e-10)
distributed.destroy_process_group()
"""


def test_two_processes_average_their_gradients(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(_DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("arguments", [{}, {"dynamic": False}, {"kernel_size": 3}], ids=str)
def test_on_a_gpu(arguments, dtype, taken):
    module, x = build(**arguments).cuda(), features(*SHAPE).cuda()
    got, want = both(module.to(dtype), x.to(dtype))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-2  # torch may multiply in tf32
    for name, value in want.items():
        scale = max(1.0, float(value.detach().abs().max()))
        assert float((got[name] - value).detach().abs().max()) <= tolerance * scale, name
    assert taken == [True, False]
