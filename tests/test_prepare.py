"""attack.prepare: the same function of the images, whatever network it is made of, and what it keeps of it."""

from __future__ import annotations

import copy
import gc
import io
import time
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchvision_here import import_torchvision

from sparta_kernels import use_backend
from sparta_kernels.attack import Prepared, prepare
from sparta_kernels.nn import Sparta, resnet18


def settle(model):
    """Statistics and weights of BatchNorm as a trained network has them, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for tensor, low, high in [
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.2),
                (module.bias, -0.3, 0.3),
            ]:
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def outputs(model, images):
    """The logits, and the images' gradient of a weighted sum of them."""
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    return logits.detach(), gradient


def assert_same_function(model, images, tolerance=1e-10):
    """In float64, where nothing but a mistake is larger."""
    model, images = copy.deepcopy(model).double(), images.double()
    prepared = prepare(model)
    prepared._checked = True  # the tracing itself is to be right, and not to be saved by the check
    for got, wanted in zip(outputs(prepared, images), outputs(model, images), strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    return prepared


def images_of(size=16, count=3, channels=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(2))


# ---- networks as people write them -------------------------------------------------------------------------


class Functional(nn.Module):
    """Functions instead of modules, additions in place, a scale of its own, a branch on an argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.register_buffer("mean", torch.full((3,), 0.4))
        self.weight = nn.Parameter(torch.randn(5, 8) / 3)

    def forward(self, x, features=False):
        x = F.relu(self.norm(self.conv(x - self.mean[:, None, None])), inplace=True)
        y = torch.sigmoid(self.deep(x)) * 1.0
        y += x
        y = self.deep(y)
        y += x
        y = torch.relu(y)
        y = (y * self.scale.view(-1, 1, 1)).relu()
        y = F.dropout(y, 0.5, self.training)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return y if features else F.linear(y, self.weight)


class Shared(nn.Module):
    """One convolution in two places, one BatchNorm behind two convolutions, one ReLU everywhere."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 1)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.one(self.stem(x)))
        y = self.relu(self.two(self.conv(x)))
        y = self.relu(self.one(self.conv(y)) + x)
        y = self.relu(self.two(self.other(y)) + self.other(y))
        return self.linear(y.mean((2, 3)))


class Preactivated(nn.Module):
    """BatchNorm before the convolution; an in-place ReLU whose input is read before and after."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.stem(x)
        before = x.mean((2, 3))
        y = self.relu(x)  # from here on x is y
        z = self.conv2(self.relu(self.norm2(self.conv1(self.relu(self.norm1(x))))))
        return (z + x + y).mean((2, 3)) + before


class Untraceable(nn.Module):
    """A part that looks at its values, beside parts that do not."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y * 2 if y.shape[0] > 1 and float(y.detach().abs().max()) > 0 else y

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.part = self.Part()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.part(self.stem(x)).mean((2, 3)))


class Whole(nn.Module):
    """Not traceable at all: an in-place write of a part."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.conv(x)) * 1
        y[:, 0] = 0
        return y.relu().mean((2, 3))


class ViewsAndWrites(nn.Module):
    """A write into a view of a tensor that is read again, and a sum of a thing with itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x)
        half = y[:, :4]
        half.mul_(0.5)
        z = self.deep(torch.relu(y))
        return torch.relu(z + z).mean((2, 3)) + y.mean((2, 3))


def odd_layers():
    """Layers that are less common, one after another."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.BatchNorm2d(6),
        nn.GroupNorm(2, 6),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3)),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


class LeNet(nn.Module):
    """As in PyTorch's tutorial: a view of what the pooling gives."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(16 * 5 * 5, 10)

    def forward(self, x):
        assert isinstance(x.shape[0], int)  # while it is traced it is none, and the exception says nothing
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(input=x)))
        return self.fc(x.view(-1, 16 * 5 * 5))


class Tutorial(LeNet):
    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(input=x)))
        return self.fc(x.view(-1, 16 * 5 * 5))


class WrittenInPlace(nn.Module):
    """Writes that somebody sees who reads the same memory by another name."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.deep, self.kind = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), kind
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()

    def twice(self, x):
        x *= 2.0
        return self.deep(x)

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "argument":
            return (self.twice(y) + y).mean((2, 3))
        if self.kind == "alias":
            other = y
            other += self.deep(y).detach()
            return (y * y).mean((2, 3))
        if self.kind == "view-before":
            v = y[:, :4]
            y += 1.5
            return v.mean((2, 3))
        if self.kind == "identity":
            z = self.same(y)
            z += 1
            return (y + z).mean((2, 3))
        if self.kind == "reshaped":
            v = y.reshape(y.size(0), -1)
            v *= 0.5
            return y.mean((2, 3))
        if self.kind == "relu-of-view":
            v = self.relu(y[:, :4])
            return (y * 2).mean((2, 3)) + v.mean((1, 2, 3))[:, None]
        v = F.relu_(y.view(y.size(0), 8, -1))
        return y.mean((2, 3)) + v.mean(2)


class Computed(nn.Module):
    """BatchNorm of weights that are computed, and a weight that is read beside its convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.other, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        n = self.norm
        y = F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight.abs() * 3, n.bias)
        z = self.last(self.other(x))
        return y.mean((2, 3)) + F.conv_transpose2d(z, self.other.weight).mean((2, 3)).sum(1, keepdim=True)


class OneByOne(nn.Module):
    """A convolution of one image at a time; the sum of a tensor and a number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = torch.stack([self.conv(x[i]) for i in range(2)])
        total = torch.zeros(1, dtype=torch.float64)
        total += y.mean()
        y = y * total.to(y.dtype)
        return torch.relu(y + y.shape[1] / 8 - 1).mean((2, 3))


_WRITES = ("argument", "alias", "view-before", "identity", "reshaped", "relu-of-view", "relu-of-reshaped")
OURS = {
    "lenet": LeNet,
    "tutorial": Tutorial,
    "computed": Computed,
    "one-by-one": OneByOne,
    **{f"written-{kind}": partial(WrittenInPlace, kind) for kind in _WRITES},
    "resnet18-relu": lambda: resnet18(activation="relu", width=8),
    "resnet18-sparta": lambda: resnet18(activation="sparta", width=8, mean=0.4, std=0.3),
    "resnet18-sparta-static": lambda: resnet18(activation="sparta-static", width=8),
    "functional": Functional,
    "shared": Shared,
    "preactivated": Preactivated,
    "untraceable": Untraceable,
    "whole": Whole,
    "views": ViewsAndWrites,
    "odd": odd_layers,
}
THEIRS = {
    "torchvision-resnet18": lambda vision, timm: vision.models.resnet18(num_classes=5),
    "torchvision-mobilenet": lambda vision, timm: vision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "torchvision-densenet": lambda vision, timm: vision.models.DenseNet(8, (2, 2), 8, num_classes=5),
    "torchvision-vgg": lambda vision, timm: vision.models.vgg11_bn(num_classes=5),
    "torchvision-googlenet": lambda vision, timm: vision.models.googlenet(
        num_classes=5, aux_logits=False, init_weights=False
    ),
    "timm-resnet10t": lambda vision, timm: timm.create_model("resnet10t", num_classes=5),
    "timm-resnetv2": lambda vision, timm: timm.create_model("resnetv2_18", num_classes=5),
    "timm-efficientnet": lambda vision, timm: timm.create_model("efficientnet_lite0", num_classes=5),
    "timm-nf-resnet": lambda vision, timm: timm.create_model("nf_resnet26", num_classes=5),
    "torchvision-swin": lambda vision, timm: vision.models.SwinTransformer(
        [4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5
    ),
}
_SIZES = {"torchvision-vgg": 32, "torchvision-googlenet": 64}


def network(name):
    torch.manual_seed(0)
    if name in OURS:
        return settle(OURS[name]())
    vision = import_torchvision()
    return settle(THEIRS[name](vision, pytest.importorskip("timm")))


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_the_same_function(name):
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    assert_same_function(model, images_of(_SIZES.get(name, 32)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_bfloat16(name):
    model, images = network(name), images_of(_SIZES.get(name, 32))
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


# ---- what was done, and what was left ------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "relus", "own"), [("relu", 17, 0), ("sparta", 13, 4)])
def test_everything_in_a_resnet_is_fused(activation, relus, own):
    prepared = prepare(settle(resnet18(activation=activation, width=8)))
    report = prepared.report
    assert (len(report.folded), report.relus, report.sums, len(report.prepared)) == (20, relus, 8, own)
    assert report.left == {}
    assert ("layer1.0.bn1", "layer1.0.conv1") in report.folded
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.ReLU, nn.Conv2d)) for m in prepared.modules())
    assert "20 BatchNorms folded" in str(report)


def test_a_torchvision_resnet_is_fused_too():
    report = prepare(network("torchvision-resnet18")).report
    assert (len(report.folded), report.relus, report.sums, report.left) == (20, 17, 8, {})


def test_normalisation_by_a_function_is_folded_too():
    """timm's networks have their BatchNorm and activation in one module, which calls torch's function."""
    report = prepare(network("timm-efficientnet")).report
    assert len(report.folded) == 49
    assert ("bn1", "conv_stem") in report.folded
    assert report.left == {}
    left = prepare(network("timm-resnetv2")).report.left
    assert left["stages.0.blocks.0.norm1"] == "there is no convolution before it to fold it into"


def test_what_is_left_is_named_with_the_reason():
    left = prepare(network("odd")).report.left
    reasons = {
        "0": "padding is 'reflect'",
        "1": "no convolution before it",
        "7": "follows a ConvTranspose2d",
        "8": "GroupNorm",
        "9": "neither a convolution nor a linear layer",
        "10": "no convolution before it",
        "12": "no convolution before it",
        "17": "no convolution before it",
    }
    for name, reason in reasons.items():
        assert reason in left[name], (name, left[name])
    assert set(left) == set(reasons)
    left = prepare(network("untraceable")).report.left
    assert list(left) == ["part"]
    assert "cannot be traced" in left["part"]
    assert list(prepare(network("whole")).report.left) == [""]
    left = prepare(network("shared")).report.left
    assert "others read the output" not in str(left)


def test_a_convolution_that_others_read_keeps_its_batchnorm():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return (self.norm(y) + y).mean((2, 3))

    report = assert_same_function(settle(Read()), images_of()).report
    assert report.folded == ()
    assert report.left == {"norm": "others read the output of conv too"}


def test_hooks_still_run():
    model = settle(resnet18(activation="relu", width=8))
    calls = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    model.layer3.register_forward_pre_hook(lambda module, args: calls.append(2))
    prepared = prepare(model)
    assert prepared.report.left["layer2.0.conv1"] == prepared.report.left["layer3"] == "it has hooks"
    images = images_of(32)
    prepared(images)
    calls.clear()
    torch.testing.assert_close(prepared(images), model(images), rtol=1e-4, atol=1e-4)
    assert calls == [1, 2, 1, 2]


# ---- what it keeps -------------------------------------------------------------------------------------------


def saved_by(model, images):
    """What autograd keeps for the backward pass: addresses with sizes, and their bytes together."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images.clone().requires_grad_())
    return logits, list(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_input_of_a_convolution_is_kept(precision):
    model, images = settle(resnet18(activation="relu", width=8)), images_of(32, count=4)
    prepared = prepare(model, precision=precision)
    prepared(images)  # the first call checks the function
    seen = []
    for module in prepared.modules():
        if type(module).__name__ in ("FrozenConv", "FrozenLinear"):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    _, kept = saved_by(prepared, images)
    assert len(seen) == 21
    addresses = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert not addresses & {tensor.untyped_storage().data_ptr() for tensor in seen}
    weights = sum(p.numel() * p.element_size() for p in [*prepared.parameters(), *prepared.buffers()])
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    elements = sum(tensor.numel() for tensor in seen)
    assert total <= weights + elements / 8 * 1.2 + 4096  # a bit an element: nothing else


def test_nothing_is_trainable_and_weights_are_shared():
    model = settle(resnet18(activation="sparta", width=8))
    prepared = prepare(model)
    assert not any(p.requires_grad for p in prepared.parameters())
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in prepared.parameters()} <= own
    assert model.linear.weight.data_ptr() in {p.data_ptr() for p in prepared.parameters()}
    assert not {b.data_ptr() for b in prepared.buffers()} & own
    loss = prepared(images_of(32)).sum()
    assert not loss.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def step(model):
    """An optimiser step, as training makes it: weights and statistics change in place."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    device = next(model.parameters()).device
    F.cross_entropy(model(images_of(32, count=8).to(device)), torch.arange(8, device=device) % 4).backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["resnet18-relu", "resnet18-sparta", "functional", "untraceable"])
def test_refresh_takes_over_what_was_learnt(name, precision):
    model, images = network(name), images_of(32)
    prepared = prepare(model, precision=precision)
    first = prepared(images)
    prepared.exact(images)
    tensors = [*prepared.parameters(), *prepared.buffers()]
    places = [tensor.data_ptr() for tensor in tensors]
    step(model)
    prepared.refresh()
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert torch.equal(prepared(images), prepare(model, precision=precision)(images))
    assert torch.equal(prepared.exact(images), prepare(model)(images))
    assert not torch.equal(prepared(images), first)


def test_a_refresh_costs_little():
    """Under 2% of a training step with PGD-10 on 128 images, of which eleven passes each way are the most."""
    model, images = settle(resnet18(activation="sparta", width=32)), images_of(32, count=16)
    prepared = prepare(model)

    def seconds(call):
        call()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    passes = 128 / 16 * 11
    assert seconds(prepared.refresh) < 0.02 * passes * seconds(lambda: outputs(prepared, images))


def test_the_model_can_be_given_new_tensors():
    model, images = settle(resnet18(activation="relu", width=8)), images_of(32)
    prepared = prepare(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    prepared.refresh()
    assert torch.equal(prepared(images), prepare(model)(images))


# ---- wrapped, saved, copied, refused ---------------------------------------------------------------------------


def test_wrappers_are_looked_through(tmp_path):
    model, images = settle(resnet18(activation="relu", width=8)), images_of(32)
    wanted = prepare(model)(images)
    assert torch.equal(prepare(DataParallel(model).eval())(images), wanted)
    assert torch.equal(prepare(torch.compile(model))(images), wanted)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        prepared = prepare(DistributedDataParallel(model).eval())
    finally:
        torch.distributed.destroy_process_group()
    assert prepared.model is model
    assert torch.equal(prepared(images), wanted)


def test_its_state_dict_is_the_models():
    model, images = settle(resnet18(activation="sparta", width=8)), images_of(32)
    prepared = prepare(model, precision="bf16")
    state = prepared.state_dict()
    assert list(state) == list(model.state_dict())
    other = settle(resnet18(activation="sparta", width=8))
    other.load_state_dict(state)
    step(model)
    prepared.load_state_dict(other.state_dict())
    assert torch.equal(prepared(images), prepare(other, precision="bf16")(images))


def test_copies_and_pickles_are_prepared_anew():
    model, images = settle(resnet18(activation="sparta", width=8)), images_of(32)
    prepared = prepare(model, precision="bf16")
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    for twin in (copy.deepcopy(prepared), torch.load(file, weights_only=False)):
        assert isinstance(twin, Prepared)
        assert twin.model is not model
        assert twin.precision == "bf16"
        assert torch.equal(twin(images), prepared(images))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_prepared_model_under_another_backend(backend):
    model, images = settle(resnet18(activation="sparta", width=8)), images_of(32)
    wanted = prepare(model)(images)
    state = model.state_dict()
    with use_backend(backend):
        fresh = settle(resnet18(activation="sparta", width=8))
        fresh.load_state_dict(state)
        torch.testing.assert_close(prepare(fresh)(images), wanted, rtol=1e-5, atol=1e-5)


def test_nothing_outlives_it():
    model = settle(resnet18(activation="relu", width=8))
    prepared = prepare(model)
    prepared.exact(images_of(32))
    gone = weakref.ref(prepared)
    del prepared
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (lambda: "model", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: nn.Linear(2, 2).train(), {}, ValueError, "model must be in eval mode"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout().train()).train(False)[1].train(),
            {},
            ValueError,
            "training mode",
        ),
        (lambda: nn.Linear(2, 2).eval(), {"precision": "fp8"}, ValueError, "precision must be one of 'fp32', "),
        (lambda: nn.Linear(2, 2).eval(), {"precision": "tf32"}, ValueError, "precision must be 'fp32' or 'bf16' on a"),
        (lambda: prepare(nn.Linear(2, 2).eval()), {}, ValueError, "model must not be prepared already"),
    ],
)
def test_refused(make, options, error, words):
    with pytest.raises(error, match=f"^prepare: .*{words}"):
        prepare(make(), **options)


def test_it_stays_as_it_was_prepared():
    prepared = prepare(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match="mode must be False"):
        prepared.train()
    assert prepared.eval() is prepared
    with pytest.raises(RuntimeError, match="cannot be moved"):
        prepared.double()
