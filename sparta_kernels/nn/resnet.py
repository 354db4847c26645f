"""ResNets for small images, with SPARTA where the papers put it: replacing a block's last ReLU."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, fx, nn

from .activations import make_activation
from .checks import check_count, check_feature_map

fx.wrap("check_feature_map")  # while the network is traced there is no tensor to check

_GROUPS = 4
_TERM = re.compile(r"G([0-9]+)\.B([0-9]+)")


def parse_sites(sites: str, blocks: Sequence[int] = (2, 2, 2, 2)) -> frozenset[tuple[int, int]]:
    """The (group, block) pairs, both counted from 1, that a sites string names.

    The papers' notation: "G1.B2" is the second block of the first group, "G1234.B12" both blocks of all four
    groups. Terms are joined by commas ("G14.B3,G2.B4,G3.B6" is the end of every group of a ResNet-34);
    "" and "none" mean no site.

    Args:
        sites: the string.
        blocks: number of blocks in every group.

    Raises:
        TypeError: sites is not a string.
        ValueError: it does not follow the grammar, names a group or block that does not exist, or one twice.
    """
    allowed = '"G<groups>.B<blocks>" such as "G1234.B2", "" or "none"'
    if not isinstance(sites, str):
        raise TypeError(f"parse_sites: sites must be {allowed}, got {sites!r}")
    if sites in ("", "none"):
        return frozenset()
    found: set[tuple[int, int]] = set()
    for term in sites.split(","):
        match = _TERM.fullmatch(term)
        if match is None:
            raise ValueError(f"parse_sites: sites must be {allowed}, got {sites!r}")
        for group, block in product(map(int, match[1]), map(int, match[2])):
            if not 1 <= group <= len(blocks):
                raise ValueError(f"parse_sites: sites must name groups in 1..{len(blocks)}, got {sites!r}")
            count = blocks[group - 1]
            if not 1 <= block <= count:
                raise ValueError(f"parse_sites: sites must name blocks in 1..{count} of group {group}, got {sites!r}")
            if (group, block) in found:
                raise ValueError(f"parse_sites: sites must name G{group}.B{block} once, got {sites!r}")
            found.add((group, block))
    return frozenset(found)


def _conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)
    # He et al. (2015): keeps the variance of the gradient through the ReLUs.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``act2(bn2(conv2(act1(bn1(conv1(x))))) + shortcut(x))``.

    ``act1`` is ReLU; ``act2``, after the addition, is the given activation.
    x ``(N, c_in, H, W)`` -> ``(N, c_out, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, activation: str = "relu") -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(c_in, c_out, 3, stride), nn.BatchNorm2d(c_out)
        self.act1 = make_activation("relu", c_out)
        self.conv2, self.bn2 = _conv(c_out, c_out, 3), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
        self.act2 = make_activation(activation, c_out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return self.act2(out)


class ResNet(nn.Module):
    """A ResNet of basic blocks for small images: 3x3 stem, no pooling before the end, normalisation included.

    The model itself normalises, ``(x - mean) / std`` with the buffers ``mean`` and ``std``, so that an attack works on
    pixels. Parameter names are those of kuangliu/pytorch-cifar; SPARTA's are in ``act2``.

    Args:
        blocks: number of blocks in each of the four groups.
        num_classes: size of the output.
        activation: used at the sites, a string for `make_activation`; ReLU everywhere else.
        sites: where the activation is used, see `parse_sites`.
        width: channels of the first group; the others have 2, 4 and 8 times as many.
        in_channels: channels of the images.
        mean, std: of the pixels, one number, or one per channel; std above 0. By default nothing is normalised.

    Shapes:
        x ``(N, in_channels, H, W)``, images in pixel units -> logits ``(N, num_classes)``.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int = 10,
        activation: str = "sparta",
        sites: str = "G1234.B2",
        width: int = 64,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(blocks, Sequence) or len(blocks) != _GROUPS:
            raise ValueError(f"ResNet: blocks must be {_GROUPS} numbers, one for each group, got {blocks!r}")
        for count in blocks:
            check_count("ResNet", "blocks", count)
        check_count("ResNet", "num_classes", num_classes)
        check_count("ResNet", "width", width)
        check_count("ResNet", "in_channels", in_channels)
        self.in_channels = in_channels
        chosen = parse_sites(sites, blocks)
        make_activation(activation, 1)  # an unknown one is an error even where there is no site

        self.register_buffer("mean", _per_channel("mean", mean, in_channels, "finite numbers", -math.inf))
        self.register_buffer("std", _per_channel("std", std, in_channels, "finite numbers above 0", 0.0))

        self.conv1, self.bn1 = _conv(in_channels, width, 3), nn.BatchNorm2d(width)
        self.act1 = make_activation("relu", width)

        def layer(group: int) -> nn.Sequential:
            c_out = width * 2 ** (group - 1)
            modules = []
            for block in range(1, blocks[group - 1] + 1):
                halves = group > 1 and block == 1
                name = activation if (group, block) in chosen else "relu"
                modules.append(BasicBlock(c_out // 2 if halves else c_out, c_out, 2 if halves else 1, name))
            return nn.Sequential(*modules)

        self.layer1, self.layer2, self.layer3, self.layer4 = layer(1), layer(2), layer(3), layer(4)
        self.linear = nn.Linear(width * 8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map("ResNet", x, self.in_channels)
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


def _per_channel(name: str, value: float | Sequence[float], channels: int, allowed: str, low: float) -> Tensor:
    """`value` for every channel, each finite and above `low`."""
    allowed = f"ResNet: {name} must be {allowed}, one or one for each of the {channels} channels"
    try:
        # On the CPU, to be looked at even where the model is being built on another device, such as "meta".
        values = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{allowed}, got {value!r}") from None
    if values.shape not in ((), (channels,)) or not bool((values.isfinite() & (values > low)).all()):
        raise ValueError(f"{allowed}, got {value!r}")
    return torch.empty(channels).copy_(values)


def resnet18(
    num_classes: int = 10,
    activation: str = "sparta",
    sites: str = "G1234.B2",
    width: int = 64,
    in_channels: int = 3,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> ResNet:
    """ResNet-18 for small images; arguments, shapes and errors as in `ResNet`.

    With ten classes, three channels and width 64: 11,985,490 parameters with SPARTA at "G1234.B2" and
    11,173,962 with ReLU.
    """
    return ResNet((2, 2, 2, 2), num_classes, activation, sites, width, in_channels, mean, std)


def resnet34(
    num_classes: int = 10,
    activation: str = "sparta",
    sites: str = "G1234.B2",
    width: int = 64,
    in_channels: int = 3,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> ResNet:
    """ResNet-34 for small images; arguments, shapes and errors as in `ResNet`.

    With ten classes, three channels and width 64: 22,093,650 parameters with SPARTA at a site in each group,
    21,282,122 with ReLU. "G1234.B2" is the second block of every group, as in a ResNet-18; the last block of
    each is "G14.B3,G2.B4,G3.B6".
    """
    return ResNet((3, 4, 6, 3), num_classes, activation, sites, width, in_channels, mean, std)
