"""SPARTA as one operation: its weights with BatchNorm folded in, and when the operation may stand for the module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.attention import AttentionWeights, fused_backend
from .frozen import has_hooks

if TYPE_CHECKING:
    from .sparta import Sparta


def is_one_operation(sparta: Sparta, x: Tensor) -> bool:
    """Whether `sparta_activation` with `folded` weights computes what the module's layers would, one by one.

    That is so at K = 1 where every BatchNorm is in eval mode (training with frozen ones included). Layers that somebody
    has replaced, parametrised or put hooks on are called one by one; so they are under autocast, which decides for each
    of them what it computes in, and where there are no kernels for x.
    """
    if sparta.kernel_size != 1 or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    convolutions = [sparta.conv1, sparta.conv2, sparta.conv3, sparta.conv4]
    norms = [sparta.bn1, sparta.bn3]
    if sparta.dynamic:
        convolutions, norms = [*convolutions, sparta.conv6], [*norms, sparta.bn6]
        if type(sparta.predict) is not nn.Linear or has_hooks(sparta.predict) or sparta.predict.bias is None:
            return False
    plain = all(type(conv) is nn.Conv2d and not has_hooks(conv) and conv.bias is not None for conv in convolutions)
    frozen = all(
        type(bn) is nn.BatchNorm2d and not has_hooks(bn) and not bn.training and bn.running_mean is not None
        for bn in norms
    )
    if not (plain and frozen) or x.dtype != sparta.conv1.weight.dtype or x.device != sparta.conv1.weight.device:
        return False
    return fused_backend(x, sparta.hidden)[0] != ""


def folded(sparta: Sparta) -> AttentionWeights:
    """The weights at K = 1, of which autograd knows what they are made of."""
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
    """``gamma (w x + b - mean) / sqrt(var + eps) + beta`` as one product and one bias, in float32 or float64."""
    work = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    scale = torch.rsqrt(bn.running_var.to(work) + bn.eps)  # type: ignore[union-attr]
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = (conv.bias - bn.running_mean) * scale  # type: ignore[operator]
    if bn.bias is not None:
        shift = shift + bn.bias
    return conv.weight.flatten(1) * scale[:, None], shift
