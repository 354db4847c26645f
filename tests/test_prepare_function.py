"""attack.prepare: the same function of the images, whatever network it is made of."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from prepare_case import OURS, SIZES, THEIRS, assert_same_function, images_of, network, outputs, settle
from torch import nn

from sparta_kernels.attack import prepare
from sparta_kernels.nn import Sparta


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_the_same_function(name):
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    assert_same_function(model, images_of(SIZES.get(name, 32)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_bfloat16(name):
    model, images = network(name), images_of(SIZES.get(name, 32))
    prepared = prepare(model, precision="bf16")
    logits, gradient = outputs(prepared, images)
    exact, _ = outputs(model, images)
    assert logits.dtype == gradient.dtype == torch.float32
    assert (logits - exact).norm() <= 0.1 * exact.norm()
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(prepared.exact(images), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"share": 2}, {"kernel_size": 3}, {"hidden": 5}], ids=str)
def test_sparta_folds_itself(options):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3), Sparta(8, **options), nn.Conv2d(8, 4, 3), nn.Flatten(2))
    model = settle(nn.Sequential(block, nn.AdaptiveAvgPool1d(1), nn.Flatten()))
    prepared = assert_same_function(model, images_of())
    assert prepared.report.prepared == ("0.1",)
    assert not any(isinstance(m, (nn.BatchNorm2d, Sparta)) for m in prepared.modules())


class Between(nn.Module):
    """A sum, then a write into what it was made of, and then the activation of the sum."""

    def __init__(self, activation, other):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.activation, self.other = activation, other

    def forward(self, x):
        a, b = self.conv1(x), self.conv2(x)
        total = a + b
        c = self.other(b)
        return (self.activation(total) + c).mean((2, 3))


@pytest.mark.parametrize("other", [nn.ReLU6(inplace=True), nn.ReLU(inplace=True), nn.ReLU6()], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: Sparta(8)], ids=["relu", "sparta"])
def test_a_sum_is_not_made_after_its_parts_are_overwritten(activation, other):
    torch.manual_seed(0)
    prepared = assert_same_function(settle(Between(activation(), other)), images_of())
    assert prepared.report.sums == (0 if other.inplace else 1)


# ---- what a tracer does not see -------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Unseen(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), kind
        self.register_buffer("calls", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        if self.kind == "gradient":
            y = Reversed.apply(y)
        elif self.kind == "no-grad":
            with torch.no_grad():
                m = y.mean((1, 2, 3), keepdim=True)
            y = torch.relu(y - m)
        elif self.kind == "type" and torch.is_tensor(x):
            y = (y - 0.5) * 4
        elif self.kind == "buffer":
            self.calls = self.calls + 1
        elif self.kind == "attribute":
            self.feature = y
        elif self.kind == "list":
            self.seen.append(y)
        return y.mean((2, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gradient", "no-grad", "type", "buffer", "attribute", "list"])
def test_what_a_tracer_does_not_see_keeps_the_model_whole(kind, precision):
    torch.manual_seed(0)
    model, images = settle(Unseen(kind)), images_of()
    wanted = outputs(model, images)
    prepared = prepare(model, precision=precision)
    model.seen.clear()
    assert not any(isinstance(v, torch.fx.Proxy) for v in [*model.__dict__.values(), model.calls])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared(images)
    got = outputs(prepared, images)
    assert "" in prepared.report.left
    assert not any(isinstance(v, torch.fx.Proxy) for v in [*model.__dict__.values(), model.calls, *model.seen])
    limit = 1e-4 if precision == "fp32" else 0.1
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= limit * b.norm()


def test_a_difference_is_told():
    model = settle(Unseen("gradient"))
    prepared = prepare(model)
    with pytest.warns(UserWarning, match="prepare: the model is kept whole: its gradients are not those"):
        prepared(images_of())
    assert "its gradients are not those" in prepared.report.left[""]


def test_a_gradient_that_rounding_decides_is_no_difference():
    """Of an untrained GoogLeNet, whose pooling has ties all over."""
    prepared = prepare(network("torchvision-googlenet"))
    prepared(images_of(224, count=2))
    assert prepared.report.left == {}


def test_the_check_leaves_modes_alone():
    model = settle(Unseen("plain"))
    prepared = prepare(model)
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.norm.running_mean)
    prepared(images_of())
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(model.norm.running_mean, before)
    assert prepared.report.left == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated, and still in use
@pytest.mark.parametrize("compiled", ["script", "trace"])
@pytest.mark.parametrize("part", ["model", "module of it"])
def test_what_torch_jit_has_compiled_stays_whole(compiled, part):
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net = torch.jit.script(net) if compiled == "script" else torch.jit.trace(net, images_of())
    model = net if part == "model" else nn.Sequential(net, nn.Linear(8, 4)).eval()
    prepared = assert_same_function(model, images_of())
    assert prepared.report.left == {"" if part == "model" else "0": "it is compiled by torch.jit"}
