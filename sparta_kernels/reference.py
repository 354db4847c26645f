"""The equations in plain PyTorch: the specification that every backend is tested against.

Nothing here is fast and nothing is checked. Equation numbers are those of "SPARTA: Spatially Attentive and
Adversarially Robust Activation" (Guo et al.). Shapes are ``(N, C, H, W)`` and ``P = H * W``. Every function
works on any device and in any floating dtype. Outside the attention network, whose convolutions compute in
their own dtype, float64 is computed in float64 and everything else in float32, and a result is rounded once,
at the end, to the dtype of the tensor that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

PURPOSE_START = 0
PURPOSE_TARGET = 1
PURPOSE_AUGMENT = 2

_WORD = 0xFFFFFFFF  # the low 32 bits


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the gate ----------------------------------------------------------------------------------------------


def _conv5(spatial: Tensor, kernel: Tensor | None) -> Tensor:
    """s[n,p] = kernel[n] * spatial[n,p]: at K = 1 the dynamic Conv5 is one predicted scalar a sample."""
    return spatial if kernel is None else spatial * kernel[:, None, None, None]


def _spread(s: Tensor, share: int, height: int, width: int) -> Tensor:
    """s[h // share, w // share] at every (h, w): Eq. 6's floor(p / N)."""
    return s.repeat_interleave(share, dim=2).repeat_interleave(share, dim=3)[:, :, :height, :width]


def _gather(full: Tensor, share: int) -> Tensor:
    """The transpose of `_spread`: the sum over every share x share block, cut off at the image's border."""
    n, c, height, width = full.shape
    rows, columns = -(-height // share), -(-width // share)
    padded = F.pad(full, (0, columns * share - width, 0, rows * share - height))
    return padded.reshape(n, c, rows, share, columns, share).sum(dim=(3, 5))


def gate(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None = None, share: int = 1) -> Tensor:
    """SPARTA's gate: Eq. 3, 5 and 8, and Eq. 6 where ``share > 1``.

        s[n,p]   = kernel[n] * spatial[n,p]
        phi      = sigmoid(s[n,p] * channel[n,c])
        y        = relu(x) * phi

    Args:
        x: ``(N, C, H, W)``, any floating dtype.
        spatial: ``(N, 1, ceil(H / share), ceil(W / share))``, any floating dtype.
        channel: ``(N, C)``, any floating dtype.
        kernel: ``(N,)``, any floating dtype, or None for ``s = spatial``.
        share: side of the square blocks of positions that share one spatial value.

    Returns:
        y ``(N, C, H, W)`` in the dtype of x.

    Differentiable by autograd; each gradient comes back in the dtype of its input. ``relu(nan)`` is nan.
    """
    work = _computing_dtype(x.dtype)
    small = _conv5(spatial.to(work), None if kernel is None else kernel.to(work))
    s = _spread(small, share, x.shape[2], x.shape[3])
    phi = torch.sigmoid(s * channel.to(work)[:, :, None, None])
    y = torch.relu(x.to(work)) * phi
    return y.to(x.dtype)


def gate_backward(
    gy: Tensor, x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None = None, share: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient of `gate`: Eq. 4 written out for the gate's own inputs, itself differentiable by autograd.

        gx            = gy * phi * (x > 0)
        gz            = gy * relu(x) * phi * (1 - phi)
        gs[n,p]       = sum_c gz * channel[n,c]            and over each block where share > 1
        gchannel[n,c] = sum_p gz * s[n,p]
        gspatial      = gs * kernel[n]
        gkernel[n]    = sum_p gs * spatial[n,p]

    Args:
        gy: ``(N, C, H, W)``, the gradient with respect to y; the others as in `gate`.

    Returns:
        ``(gx, gspatial, gchannel, gkernel)`` in the shapes and dtypes of ``(x, spatial, channel, kernel)``;
        gkernel is None where kernel is.

    ReLU's derivative is torch's: 0 at x = 0 (the paper's Eq. 2 and 4 say 1), and a nan in x lets the gradient
    through. Where x <= 0, gx is exactly 0, whatever gy and phi are.
    """
    work = _computing_dtype(x.dtype)
    gy_, x_, spatial_, channel_ = gy.to(work), x.to(work), spatial.to(work), channel.to(work)
    kernel_ = None if kernel is None else kernel.to(work)

    small = _conv5(spatial_, kernel_)
    s = _spread(small, share, x.shape[2], x.shape[3])
    phi = torch.sigmoid(s * channel_[:, :, None, None])

    # where(), not a product with the mask: a product would turn an infinite gy or a nan phi into nan.
    gx = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * phi)
    gz = gy_ * torch.relu(x_) * phi * (1 - phi)
    gs = _gather((gz * channel_[:, :, None, None]).sum(dim=1, keepdim=True), share)
    gchannel = (gz * s).sum(dim=(2, 3))
    gspatial = _conv5(gs, kernel_)
    gkernel = None if kernel is None else (gs * spatial_).sum(dim=(1, 2, 3)).to(kernel.dtype)
    return gx.to(x.dtype), gspatial.to(spatial.dtype), gchannel.to(channel.dtype), gkernel


def dynamic_conv(spatial: Tensor, kernel: Tensor) -> Tensor:
    """Conv5 with a separate kernel for every sample: K x K cross-correlation, one channel, zero padded.

        out[n,h,w] = sum_{i,j} kernel[n,i,j] * spatial[n, h + i - K//2, w + j - K//2]

    Args:
        spatial: ``(N, 1, H, W)``, any floating dtype.
        kernel: ``(N, K, K)`` with K odd, any floating dtype.

    Returns:
        ``(N, 1, H, W)`` in the dtype of spatial. Differentiable by autograd.
    """
    work = _computing_dtype(spatial.dtype)
    height, width = spatial.shape[2:]
    size = kernel.shape[-1]
    padded = F.pad(spatial.to(work), (size // 2,) * 4)
    out = torch.zeros_like(spatial, dtype=work)
    for i in range(size):
        for j in range(size):
            tap = kernel[:, i, j].to(work)[:, None, None, None]
            out = out + tap * padded[:, :, i : i + height, j : j + width]
    return out.to(spatial.dtype)


def add_relu(a: Tensor, b: Tensor | None = None) -> Tensor:
    """The backbone's ``relu(a + b)``, or ``relu(a)``: the sum is rounded to its dtype before.

    Args:
        a: any shape and floating dtype.
        b: shape and dtype of a.

    Returns:
        Like a. Differentiable by autograd.
    """
    return torch.relu(a if b is None else a + b)


# ---- other activations -------------------------------------------------------------------------------------


def swish_relu(x: Tensor) -> Tensor:
    """``relu(x) * sigmoid(x)``: Swish (Ramachandran et al., 2017) where x > 0, and 0 elsewhere.

    Args:
        x: any shape and floating dtype.

    Returns:
        y like x. Differentiable by autograd. ``relu(nan)`` is nan.
    """
    x_ = x.to(_computing_dtype(x.dtype))
    return (torch.relu(x_) * torch.sigmoid(x_)).to(x.dtype)


def swish_relu_backward(gy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `swish_relu`, itself differentiable by autograd.

        gx = gy * phi * (1 + x * (1 - phi)) * (x > 0)        with phi = sigmoid(x)

    Returns:
        gx like x: exactly 0 where x <= 0, whatever gy is; a nan in x lets the gradient through.
    """
    work = _computing_dtype(x.dtype)
    gy_, x_ = gy.to(work), x.to(work)
    phi = torch.sigmoid(x_)
    gx = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * (phi * (1 + x_ * (1 - phi))))
    return gx.to(x.dtype)


def _smooth_relu_terms(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x), beta and t = beta * relu(x), all in x's dtype. An infinite t counts as the largest number."""
    positive, beta = torch.relu(x), b.to(x.dtype).reshape(()).square()
    return positive, beta, (beta * positive).clamp(max=torch.finfo(x.dtype).max)


def smooth_relu(x: Tensor, b: Tensor) -> Tensor:
    """SmoothReLU: ReLU without its kink; it approaches ReLU as beta grows.

        y = x - log(beta * x + 1) / beta    where x > 0, else 0    with beta = b * b

    Computed as ``relu(x) * (1 - log1p(t) / t)`` with ``t = beta * relu(x)``: it is 0 at beta = 0, its limit there.

    Args:
        x: any shape and floating dtype.
        b: one element, any floating dtype.

    Returns:
        y like x. Differentiable by autograd. ``relu(nan)`` is nan, and inf stays inf.
    """
    positive, _, t = _smooth_relu_terms(x.to(_computing_dtype(x.dtype)), b)
    divisor = torch.where(t == 0, torch.ones_like(t), t)
    return (positive * torch.where(t == 0, t, 1 - torch.log1p(t) / divisor)).to(x.dtype)


def smooth_relu_backward(gy: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `smooth_relu`, themselves differentiable by autograd.

        t  = beta * relu(x)
        gx = gy * t / (1 + t)                                             0 where x <= 0
        gb = 2 / b * sum gy * (log(1 + t) - t / (1 + t)) / beta           over x > 0; 0 where beta is

    Returns:
        ``(gx, gb)`` in the shapes and dtypes of ``(x, b)``.
    """
    work = _computing_dtype(x.dtype)
    gy_, x_ = gy.to(work), x.to(work)
    _, beta, t = _smooth_relu_terms(x_, b)
    slope = t / (1 + t)
    gx = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * slope)
    none = beta == 0
    terms = torch.where(x_ <= 0, torch.zeros_like(x_), gy_ * (torch.log1p(t) - slope))
    divisor = torch.where(none, torch.ones_like(beta), beta * b.to(work).reshape(()))
    gb = torch.where(none, torch.zeros_like(beta), 2 * terms.sum() / divisor)
    return gx.to(x.dtype), gb.reshape(b.shape).to(b.dtype)


def _steepest(x: Tensor, slopes: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
    """The largest ``slopes[n,c,k] * x[n,c,...] + intercepts[n,c,k]``, and its k, the first of equals or NaN."""

    def line(k: int) -> Tensor:
        spread = (*slopes.shape[:2], *(1,) * (x.dim() - 2))
        return slopes[:, :, k].reshape(spread) * x + intercepts[:, :, k].reshape(spread)

    best = line(0)
    index = torch.zeros_like(best, dtype=torch.int64)
    for k in range(1, slopes.shape[2]):
        stays = (line(k) <= best) | best.isnan()
        best, index = torch.where(stays, best, line(k)), index.masked_fill(~stays, k)
    return best, index


def dyrelu(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    """Dynamic ReLU (Chen et al., 2020, Eq. 3): the maximum of K lines, which differ by sample and channel.

        y[n,c,p] = max over k of slopes[n,c,k] * x[n,c,p] + intercepts[n,c,k]

    Args:
        x: ``(N, C, ...)``, any floating dtype.
        slopes, intercepts: ``(N, C, K)``, any floating dtype.

    Returns:
        y like x. Differentiable by autograd; among equals the lowest k gets the gradient. NaN as in torch.max.
    """
    work = _computing_dtype(x.dtype)
    return _steepest(x.to(work), slopes.to(work), intercepts.to(work))[0].to(x.dtype)


def dyrelu_backward(gy: Tensor, x: Tensor, slopes: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `dyrelu`, themselves differentiable by autograd. k* is the line that is the largest.

        gx                 = gy * slopes[n,c,k*]
        gslopes[n,c,k]     = sum_p gy * x where k* = k
        gintercepts[n,c,k] = sum_p gy where k* = k

    Returns:
        ``(gx, gslopes, gintercepts)`` in the shapes and dtypes of ``(x, slopes, intercepts)``.
    """
    work = _computing_dtype(x.dtype)
    gy_, x_, slopes_ = gy.to(work), x.to(work), slopes.to(work)
    index = _steepest(x_, slopes_, intercepts.to(work))[1][..., None].flatten(2)  # (N, C, P)
    gx = gy_ * slopes_.gather(2, index).reshape(x.shape)

    def by_line(terms: Tensor) -> Tensor:
        flat = terms[..., None].flatten(2)
        chosen = [torch.where(index == k, flat, torch.zeros_like(flat)) for k in range(slopes.shape[2])]
        return torch.stack([part.sum(2) for part in chosen], dim=2)

    return gx.to(x.dtype), by_line(gy_ * x_).to(slopes.dtype), by_line(gy_).to(intercepts.dtype)


# ---- the attention network ---------------------------------------------------------------------------------


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
    s = _conv5(a, kernel) if kernel_size == 1 else dynamic_conv(a, kernel)
    if share > 1:
        s = F.avg_pool2d(s, share, ceil_mode=True)
    return gate(x, s, channel, None, share)


# ---- randomness that belongs to the image ------------------------------------------------------------------


def _multiply_32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit words. By 16-bit halves: the product overflows int64."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    low = a_low * b_low
    middle = a_low * b_high + a_high * b_low + (low >> 16)
    return a_high * b_high + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        counter: int64 ``(..., 4)``, words in ``[0, 2**32)``.
        key: int64 ``(..., 2)``, words in ``[0, 2**32)``; leading dimensions broadcast.

    Returns:
        int64 ``(..., 4)``, words in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply_32(0xD2511F53, c0)
        high1, low1 = _multiply_32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _words(seed: int, indices: Tensor, elements: int, purpose: int, restart: int) -> Tensor:
    """int64 ``(N, elements)``: one 32-bit word for every element of every image."""
    images = indices.to(torch.int64)
    key = torch.tensor([seed & _WORD, (seed >> 32) & _WORD], dtype=torch.int64, device=images.device)
    quad = torch.arange(-(-elements // 4), dtype=torch.int64, device=images.device)
    counter = torch.empty((len(images), len(quad), 4), dtype=torch.int64, device=images.device)
    counter[:, :, 0] = quad
    counter[:, :, 1] = purpose | restart << 8
    counter[:, :, 2] = (images & _WORD)[:, None]
    counter[:, :, 3] = ((images >> 32) & _WORD)[:, None]
    return philox4x32(counter, key).flatten(1)[:, :elements]


def uniform(seed: int, indices: Tensor, elements: int, purpose: int, restart: int = 0) -> Tensor:
    """Uniform numbers that depend on the image's index, not on its place in a batch.

    Philox4x32-10 with key ``(seed & 0xffffffff, seed >> 32)`` and counter ``(element // 4,
    purpose | restart << 8, index & 0xffffffff, index >> 32)``; the lane is ``element % 4``, and a word u
    becomes ``float32(u >> 8) * 2**-24``.

    Args:
        seed: in ``[0, 2**64)``.
        indices: ``(N,)`` integers, the images' indices in their data set.
        elements: how many numbers per image; element is the flat position in the ``(C, H, W)`` image.
        purpose: one of PURPOSE_START, PURPOSE_TARGET, PURPOSE_AUGMENT.
        restart: in ``[0, 2**24)``.

    Returns:
        float32 ``(N, elements)`` in ``[0, 1)``.
    """
    return (_words(seed, indices, elements, purpose, restart) >> 8).to(torch.float32) * 2.0**-24


# ---- the attack --------------------------------------------------------------------------------------------


def pgd_start(
    clean: Tensor,
    indices: Tensor,
    *,
    eps: float,
    seed: int = 0,
    restart: int = 0,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """A start drawn uniformly from the eps ball (Madry et al., 2018), reproducible image by image.

        adv = clamp(clean + (2 * u - 1) * eps, lower, upper)

    Args:
        clean: ``(N, C, H, W)``, images in pixel units, any floating dtype.
        indices: ``(N,)`` integers, see `uniform`; u is drawn with PURPOSE_START.
        eps: radius in pixel units.

    Returns:
        adv, like clean. Computed in float64 for float64 images, else in float32, without fused multiply-add.
    """
    work = _computing_dtype(clean.dtype)
    u = uniform(seed, indices, clean[:1].numel(), PURPOSE_START, restart)
    radius, low, high = (torch.tensor(v, dtype=work, device=clean.device) for v in (eps, lower, upper))
    noise = (2 * u.to(clean.device, work) - 1) * radius
    return torch.clamp(clean.to(work) + noise.reshape(clean.shape), low, high).to(clean.dtype)


def pgd_targets(labels: Tensor, classes: int, indices: Tensor, *, seed: int = 0, restart: int = 0) -> Tensor:
    """A wrong class for every image, uniform over the others: ``(label + U{1..classes-1}) mod classes``.

    The offset is ``1 + ((u * (classes - 1)) >> 32)`` with u the word of element 0 for PURPOSE_TARGET.

    Args:
        labels: ``(N,)`` integers in ``[0, classes)``.
        classes: at least 2.
        indices: ``(N,)`` integers, see `uniform`.

    Returns:
        int64 ``(N,)`` on the device of labels.
    """
    u = _words(seed, indices, 1, PURPOSE_TARGET, restart)[:, 0].to(labels.device)
    offset = 1 + ((u * (classes - 1)) >> 32)
    return (labels.to(torch.int64) + offset) % classes


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: float,
    eps: float,
    lower: float = 0.0,
    upper: float = 1.0,
    targeted: bool = True,
) -> Tensor:
    """One step of projected gradient descent in the L-inf ball, in torchattacks' order of operations.

        a   = adv - step_size * sign(grad)        (+ if not targeted)
        d   = clamp(a - clean, -eps, eps)
        adv = clamp(clean + d, lower, upper)

    Args:
        adv, grad, clean: of one shape, any floating dtype; grad is of the summed loss.
        step_size, eps, lower, upper: in pixel units; rounded to the computing dtype first.
        targeted: step down the loss (towards a target) or up (away from the label).

    Returns:
        The next iterate, like adv. Computed in float64 for a float64 adv, else in float32, every operation
        rounded by itself (no fused multiply-add), and rounded once to the dtype of adv.
    """
    work = _computing_dtype(adv.dtype)
    step, radius, low, high = (torch.tensor(v, dtype=work, device=adv.device) for v in (step_size, eps, lower, upper))
    clean_ = clean.to(work)
    move = step * torch.sign(grad.to(work))
    a = adv.to(work) - move if targeted else adv.to(work) + move
    d = torch.clamp(a - clean_, -radius, radius)
    return torch.clamp(clean_ + d, low, high).to(adv.dtype)
