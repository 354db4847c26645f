"""Networks as people write them, and others', with what the tests of attack.prepare do to them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_here import import_torchvision

from sparta_kernels.attack import prepare
from sparta_kernels.nn import resnet18


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


def step(model):
    """An optimiser step, as training makes it: weights and statistics change in place."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    device = next(model.parameters()).device
    F.cross_entropy(model(images_of(32, count=8).to(device)), torch.arange(8, device=device) % 4).backward()
    optimizer.step()
    model.eval()


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
SIZES = {"torchvision-vgg": 32, "torchvision-googlenet": 64}


def network(name):
    torch.manual_seed(0)
    if name in OURS:
        return settle(OURS[name]())
    vision = import_torchvision()
    return settle(THEIRS[name](vision, pytest.importorskip("timm")))
