"""SPARTA's attention network (DSCANet), and the whole activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sparta_kernels.reference.gating import conv5, dynamic_conv, gate


def attention(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    kernel_size: int = 1,
    dynamic: bool = True,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """DSCANet (Fig. 2), which predicts the gate's ``spatial``, ``channel`` and ``kernel``.

        CANet   h1 = relu(bn1(conv1(x)))    c = conv2(mean_p(h1)) at K = 1, mean_p(conv2(h1)) at K = 3
        SANet   h3 = relu(bn3(conv3(x)))    a = conv4(h3)
        DPNet   h6 = relu(bn6(conv6(h3)))   kernel = predict(mean_p(h6))

    Args:
        x: ``(N, C, H, W)``.
        parameters: tensors by name, a `sparta_kernels.nn.Sparta`'s ``state_dict()``.
        kernel_size: K, the size of every convolution.
        dynamic: False for "SPARTA-w/o-DPNet", where Conv5 is the one learned kernel ``parameters["conv5"]``.
        training: normalise with the batch's statistics, not with the stored ones, which are not updated.

    Returns:
        ``a (N, 1, H, W)`` before Conv5, ``c (N, C)``, and ``kernel``: ``(N,)`` at K = 1, else ``(N, K, K)``.
    """

    def conv(name: str, value: Tensor) -> Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return F.conv2d(value, weight, bias, padding=kernel_size // 2)

    def bn(name: str, value: Tensor) -> Tensor:
        mean = None if training else parameters[f"{name}.running_mean"]
        var = None if training else parameters[f"{name}.running_var"]
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return F.batch_norm(value, mean, var, weight, bias, training=training)

    h1 = torch.relu(bn("bn1", conv("conv1", x)))
    if kernel_size == 1:
        c = conv("conv2", h1.mean(dim=(2, 3), keepdim=True))
    else:
        c = conv("conv2", h1).mean(dim=(2, 3), keepdim=True)

    h3 = torch.relu(bn("bn3", conv("conv3", x)))
    a = conv("conv4", h3)

    if dynamic:
        h6 = torch.relu(bn("bn6", conv("conv6", h3)))
        kernel = F.linear(h6.mean(dim=(2, 3)), parameters["predict.weight"], parameters["predict.bias"])
    else:
        kernel = parameters["conv5"].reshape(1, -1).expand(x.shape[0], -1)
    shape = (x.shape[0],) if kernel_size == 1 else (x.shape[0], kernel_size, kernel_size)
    return a, c[:, :, 0, 0], kernel.reshape(shape)


def folded_attention(
    x: Tensor,
    w13: Tensor,
    b13: Tensor,
    w4: Tensor,
    b4: Tensor,
    w2: Tensor,
    b2: Tensor,
    b7: Tensor,
    w6: Tensor | None = None,
    b6: Tensor | None = None,
    w7: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` at K = 1 with BatchNorm folded into the convolutions before it.

        h1 = relu(w1 x + b1)    c = w2 mean_p(h1) + b2
        h3 = relu(w3 x + b3)    a = w4 h3 + b4
        h6 = relu(w6 h3 + b6)   kernel = w7 mean_p(h6) + b7

    Args:
        x: ``(N, C, H, W)``.
        w13, b13: ``(2 * Co, C)``, ``(2 * Co,)``: those of h1, then those of h3.
        w4, b4: ``(Co,)``, ``(1,)``. w2, b2: ``(C, Co)``, ``(C,)``. w6, b6: ``(Co, Co)``, ``(Co,)``. w7: ``(Co,)``.
        b7: ``(1,)``; without w6, b6 and w7 it is the kernel of every sample.

    Returns:
        ``a (N, 1, H, W)``, ``c (N, C)`` and ``kernel (N,)``. Differentiable by autograd.
    """

    def conv(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(value, weight[:, :, None, None].to(x.dtype), bias.to(x.dtype))

    h1, h3 = torch.relu(conv(x, w13, b13)).chunk(2, dim=1)
    a = conv(h3, w4[None], b4)
    c = conv(h1.mean(dim=(2, 3), keepdim=True), w2, b2)[:, :, 0, 0]
    if w6 is None or b6 is None or w7 is None:
        return a, c, b7.to(x.dtype).expand(x.shape[0])
    h6 = torch.relu(conv(h3, w6, b6))
    return a, c, conv(h6.mean(dim=(2, 3), keepdim=True), w7[None], b7)[:, 0, 0, 0]


def sparta(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    kernel_size: int = 1,
    dynamic: bool = True,
    share: int = 1,
    training: bool = False,
) -> Tensor:
    """The whole activation (Eq. 3, 5, 6, 8): ``y = relu(x) * sigmoid(s (x) c)``, ``s = conv5(a; kernel)``.

    Arguments are those of `attention`; with ``share = N`` s is average-pooled N x N (a block cut off by the border
    averages the pixels that it has). Returns ``(N, C, H, W)`` in the dtype of x. Differentiable by autograd.
    """
    a, channel, kernel = attention(x, parameters, kernel_size=kernel_size, dynamic=dynamic, training=training)
    s = conv5(a, kernel) if kernel_size == 1 else dynamic_conv(a, kernel)
    if share > 1:
        s = F.avg_pool2d(s, share, ceil_mode=True)
    return gate(x, s, channel, None, share)
