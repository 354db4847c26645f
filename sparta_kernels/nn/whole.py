"""SPARTA as one operation: its folded weights, and when the operation may replace the module's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.attention_kernels import AttentionWeights, fused_backend
from .frozen import has_hooks, scale_and_shift

if TYPE_CHECKING:
    from .sparta import Sparta


def is_one_operation(sparta: Sparta, x: Tensor) -> bool:
    """Whether `sparta_activation` with `folded` weights computes what the module's layers would, one by one.

    That is so at K = 1 if every BatchNorm is in eval mode (including frozen ones in training). The layers run one by
    one if one of them was replaced, parametrised or has hooks, under autocast, which chooses a dtype for each of them,
    and if there are no kernels for x.
    """
    if x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled(x.device.type) or nn.modules.module._has_any_global_hook():
        return False
    if not can_be_folded(sparta) or any(has_hooks(layer) for layer in sparta.children()):
        return False
    if any(layer.training for layer in sparta.children() if isinstance(layer, nn.BatchNorm2d)):
        return False
    weight = sparta.conv1.weight
    return x.dtype == weight.dtype and x.device == weight.device and fused_backend(x, sparta.hidden)[0] != ""


def can_be_folded(sparta: Sparta) -> bool:
    """Whether K = 1 and the layers are those that `Sparta` made, so that `folded` weights describe them completely."""
    channels, hidden = sparta.channels, sparta.hidden
    convolutions = [(sparta.conv1, channels, hidden), (sparta.conv3, channels, hidden)]
    convolutions += [(sparta.conv2, hidden, channels), (sparta.conv4, hidden, 1)]
    norms = [sparta.bn1, sparta.bn3]
    if sparta.dynamic:
        convolutions, norms = [*convolutions, (sparta.conv6, hidden, hidden)], [*norms, sparta.bn6]
        predict = sparta.predict
        if type(predict) is not nn.Linear or predict.weight.shape != (1, hidden) or not _is_plain(predict):
            return False
    return (
        sparta.kernel_size == 1
        and all(_is_product(conv, *sizes) for conv, *sizes in convolutions)
        and all(
            type(bn) is nn.BatchNorm2d and bn.running_mean is not None and "forward" not in vars(bn) for bn in norms
        )
    )


def _is_product(conv: nn.Module, inputs: int, outputs: int) -> bool:
    """Whether the layer is a plain 1x1 convolution, with a bias."""
    if type(conv) is not nn.Conv2d or conv.weight.shape != (outputs, inputs, 1, 1) or not _is_plain(conv):
        return False
    return conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")


def _is_plain(layer: nn.Conv2d | nn.Linear) -> bool:
    plain = type(layer.weight) in (Tensor, nn.Parameter)  # others may have rules of their own
    return plain and layer.bias is not None and "forward" not in vars(layer)


def folded(sparta: Sparta) -> AttentionWeights:
    """The folded weights at K = 1, differentiable in the layers' parameters."""
    w1, b1 = _fold(sparta.conv1, sparta.bn1)
    w3, b3 = _fold(sparta.conv3, sparta.bn3)
    conv2, conv4 = sparta.conv2, sparta.conv4
    w6, b6 = _fold(sparta.conv6, sparta.bn6) if sparta.dynamic else (None, None)
    return AttentionWeights(
        w13=torch.cat((w1, w3)),
        b13=torch.cat((b1, b3)),
        w4=conv4.weight.flatten(),
        b4=conv4.bias,  # type: ignore[arg-type]
        w2=conv2.weight.flatten(1),
        b2=conv2.bias,  # type: ignore[arg-type]
        b7=sparta.predict.bias if sparta.dynamic else sparta.conv5.flatten(),
        w6=w6,
        b6=b6,
        w7=sparta.predict.weight.flatten() if sparta.dynamic else None,
    )


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Convolution and BatchNorm folded into one matrix and one bias, in float32 or float64."""
    work = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    scale, shift = scale_and_shift(conv.bias, bn, work)
    return conv.weight.flatten(1) * scale[:, None], shift
