"""The compiled kernels, C++ and CUDA: takes torch tensors, passes addresses and strides.

Tensors arrive checked (`sparta_kernels.ops`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparta_kernels.backends import extension, products
from sparta_kernels.backends.extension import DTYPES, address, addresses, matrices, small
from sparta_kernels.backends.layout import (
    Output,
    as_rows,
    bits_of,
    gapless,
    in_order_of,
    in_strides,
    is_planar,
    scratch,
)
from sparta_kernels.backends.native_activations import (  # noqa: F401  functions of this backend too
    dyrelu_backward,
    dyrelu_forward,
    smooth_relu_backward,
    smooth_relu_forward,
    swish_relu_backward,
    swish_relu_forward,
)

if TYPE_CHECKING:
    from sparta_kernels.ops.attention_kernels import AttentionWeights

DEVICES = ("cpu", "cuda") if extension.kernels.with_cuda else ("cpu",)


def gate_forward(x: Tensor, spatial: Tensor, channel: Tensor, kernel: Tensor | None, share: int) -> Tensor:
    planar = is_planar(x.shape, x.stride())
    read = as_rows(x, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    y = Output(x, planar)
    extension.kernels.gate_forward(
        (*x.shape, share),
        planar,
        DTYPES[x.dtype],
        matrices(read),
        matrices(y.rows),
        small(spatial),
        small(channel),
        small(kernel),
        extension.place(x),
    )
    return y.finish()


def gate_backward(
    gy: Tensor,
    x: Tensor,
    spatial: Tensor,
    channel: Tensor,
    kernel: Tensor | None,
    share: int,
    wanted: list[bool],
    gy2: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """With `gy2`, which is for the CPU and for all gradients, those for gy + gy2."""
    planar = is_planar(x.shape, x.stride())
    read, gy_read = as_rows(x, planar), as_rows(gy, planar)
    gy2_read = None if gy2 is None else as_rows(gy2, planar)
    spatial, channel = spatial.contiguous(), channel.contiguous()
    kernel = None if kernel is None else kernel.contiguous()
    gx = Output(x, planar) if wanted[0] else None
    gspatial = torch.empty_like(spatial) if wanted[1] else None
    gchannel = torch.empty_like(channel) if wanted[2] else None
    gkernel = torch.empty_like(kernel) if kernel is not None and wanted[3] else None
    shape, dtype, place = (*x.shape, share), DTYPES[x.dtype], extension.place(x)
    images = matrices(read), matrices(gy_read), matrices(None if gx is None else gx.rows)
    sums = scratch(extension.scratch_size("gate_backward", place, shape, planar, dtype, *images), x)
    extension.kernels.gate_backward(
        shape,
        planar,
        dtype,
        *images,
        matrices(gy2_read),
        small(spatial),
        small(channel),
        small(kernel),
        small(gspatial),
        small(gchannel),
        small(gkernel),
        address(sums),
        place,
    )
    return None if gx is None else gx.finish(), gspatial, gchannel, gkernel


def conv_forward(spatial: Tensor, kernel: Tensor) -> Tensor:
    samples, _, height, width = spatial.shape
    spatial, kernel = spatial.contiguous(), kernel.contiguous()
    output = torch.empty_like(spatial)
    extension.kernels.conv_forward(
        (samples, height, width, kernel.shape[-1]),
        small(spatial),
        small(kernel),
        small(output),
        extension.place(spatial),
    )
    return output


def conv_backward(
    grad_output: Tensor, spatial: Tensor, kernel: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    samples, _, height, width = spatial.shape
    grad_output, spatial, kernel = grad_output.contiguous(), spatial.contiguous(), kernel.contiguous()
    grad_spatial = torch.empty_like(spatial) if wanted[0] else None
    grad_kernel = torch.empty_like(kernel) if wanted[1] else None
    extension.kernels.conv_backward(
        (samples, height, width, kernel.shape[-1]),
        small(grad_output),
        small(spatial),
        small(kernel),
        small(grad_spatial),
        small(grad_kernel),
        extension.place(spatial),
    )
    return grad_spatial, grad_kernel


def pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, signed_step: float, eps: float, lower: float, upper: float
) -> None:
    with gapless(adv) as target:
        grad, clean = in_order_of(grad, target), in_order_of(clean, target)
        extension.kernels.pgd_step(
            target.numel(),
            DTYPES[adv.dtype],
            target.data_ptr(),
            grad.data_ptr(),
            clean.data_ptr(),
            signed_step,
            eps,
            lower,
            upper,
            extension.place(adv),
        )


def pgd_start(
    adv: Tensor,
    clean: Tensor,
    indices: Tensor,
    eps: float,
    seed: int,
    restart: int,
    lower: float,
    upper: float,
) -> None:
    with gapless(adv) as target:
        clean, indices = in_order_of(clean, target), indices.contiguous()
        extension.kernels.pgd_start(
            tuple(target.shape),
            tuple(target.stride()),
            DTYPES[adv.dtype],
            target.data_ptr(),
            clean.data_ptr(),
            indices.data_ptr(),
            seed,
            restart,
            eps,
            lower,
            upper,
            extension.place(adv),
        )


def _relu(a: Tensor, b: Tensor | None, y: Tensor, keep: bool) -> Tensor | None:
    """Write y, which has no gaps."""
    a, b = in_order_of(a, y), None if b is None else in_order_of(b, y)
    bits = bits_of(y) if keep else None
    extension.kernels.relu_forward(
        y.numel(),
        DTYPES[y.dtype],
        a.data_ptr(),
        address(b),
        y.data_ptr(),
        address(bits),
        extension.place(y),
    )
    return bits


def relu_forward(a: Tensor, b: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
    y = torch.empty_like(a)
    return y, _relu(a, b, y, keep)


def relu_forward_(a: Tensor, b: Tensor | None, keep: bool) -> Tensor | None:
    return _relu(a, b, a, keep)


def relu_backward(grad: Tensor, grad2: Tensor | None, bits: Tensor, stride: tuple[int, ...]) -> Tensor:
    grad = in_strides(grad, stride)
    grad2 = None if grad2 is None else in_strides(grad2, stride)
    gx = torch.empty_like(grad)
    extension.kernels.relu_backward(
        gx.numel(),
        DTYPES[gx.dtype],
        grad.data_ptr(),
        address(grad2),
        bits.data_ptr(),
        gx.data_ptr(),
        extension.place(gx),
    )
    return gx


# ---- the attention network, on a CPU -----------------------------------------------------------------------


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the attention network's matrix products, for images of `dtype`."""
    if dtype == torch.float64:
        return dtype
    # Without instructions for it, bfloat16 would be converted for every product, not once for all of them.
    fast = extension.kernels.isa() == "avx512_bf16" and torch.backends.mkldnn.enabled
    low = torch.bfloat16 in products.available() and dtype == torch.bfloat16 and fast
    return torch.bfloat16 if low else torch.float32


def attention_unfit(x: Tensor, hidden: int) -> str | None:
    """Why these kernels cannot take x."""
    if x.device.type != "cpu":
        return f"the attention network has no native kernel for {x.device.type}"
    if _product_dtype(x.dtype) not in products.available():
        return f"this torch has no matrix products that kernels can call for {x.dtype}"
    return None


class _Packed(NamedTuple):
    """The weights as the kernels read them (csrc/kernels.h)."""

    forward13: Tensor
    forward6: Tensor
    forward2: Tensor
    backward13: Tensor
    backward6: Tensor
    backward2: Tensor
    b13: Tensor
    b6: Tensor
    b2: Tensor
    w4: Tensor
    w7: Tensor

    @property
    def dynamic(self) -> bool:
        return self.forward6.numel() > 0


def _unpacked(packed: list[Tensor]) -> _Packed:
    """The packed weights, their matrices in float32 where torch.backends.mkldnn has been switched off since."""
    made = _Packed(*packed)
    if made.forward13.dtype != torch.bfloat16 or torch.backends.mkldnn.enabled:
        return made
    names = ("forward13", "forward6", "backward13", "backward6")
    return made._replace(**{name: products.out_of_pairs(getattr(made, name)).float() for name in names})


def _padded(hidden: int) -> int:
    return -(-hidden // 16) * 16


def pack_attention(weights: AttentionWeights, dtype: torch.dtype) -> list[Tensor]:
    product, work = _product_dtype(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    hidden, channels = weights.w4.numel(), weights.w13.shape[1]
    padded = _padded(hidden)

    def both_ways(rows: int, columns: int, dtype: torch.dtype, *parts: Tensor | None) -> tuple[Tensor, Tensor]:
        whole = torch.zeros(rows, columns, dtype=dtype, device=weights.w4.device)
        for i, part in enumerate(parts):
            if part is None:
                return whole.new_empty(0), whole.new_empty(0)
            whole[i * padded : i * padded + part.shape[0], : part.shape[1]] = part
        ways = whole.t().contiguous(), whole
        return tuple(map(products.in_pairs, ways)) if dtype == torch.bfloat16 else ways  # type: ignore[return-value]

    def vector(*parts: Tensor | None, end: Tensor | None = None) -> Tensor:
        whole = torch.zeros(len(parts) * padded + (end is not None), dtype=work, device=weights.w4.device)
        for i, part in enumerate(parts):
            if part is not None:
                whole[i * padded : i * padded + part.numel()] = part
        if end is not None:
            whole[-1:] = end
        return whole

    forward13, backward13 = both_ways(2 * padded, channels, product, weights.w13[:hidden], weights.w13[hidden:])
    forward6, backward6 = both_ways(padded, padded, product, weights.w6)
    forward2, backward2 = both_ways(channels, padded, work, weights.w2)
    return list(
        _Packed(
            *(forward13, forward6, forward2, backward13, backward6, backward2),
            b13=vector(weights.b13[:hidden], weights.b13[hidden:]),
            b6=vector(weights.b6),
            b2=weights.b2.to(work, copy=True),
            w4=vector(weights.w4, end=weights.b4),
            w7=vector(weights.w7, end=weights.b7),
        )
    )


def attention_forward(
    x: Tensor, packed: list[Tensor], hidden: int, keep: bool, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """With `skip`, for x + skip, which is written over x: that has no gaps."""
    planar = is_planar(x.shape, x.stride())
    read = as_rows(x, planar)
    added = None if skip is None else as_rows(skip, planar)
    if skip is not None and read.tensor is not x:
        return attention_forward(x.add_(skip), packed, hidden, keep)
    samples, channels, height, width = x.shape
    made, padded = _unpacked(packed), _padded(hidden)
    new = made.b13.new_empty
    a, channel, kernel = new(samples, 1, height, width), new(samples, channels), new(samples)
    mean1, mean6 = new(samples, padded), new(samples, padded) if made.dynamic else None
    masks = 3 if made.dynamic else 2
    bits = new(samples, height * width, masks, padded // 8, dtype=torch.uint8) if keep else None
    weights = made.forward13, made.forward6, made.forward2, made.b13, made.b6, made.b2, made.w4, made.w7
    extension.kernels.attention_forward(
        (samples, channels, height * width, padded, padded - hidden),
        planar,
        made.dynamic,
        DTYPES[x.dtype],
        DTYPES[made.forward13.dtype],
        matrices(read),
        matrices(added),
        addresses(*weights),
        addresses(a, channel, kernel, mean1, mean6, bits),
        extension.place(x),
    )
    if padded != hidden:
        mean1 = mean1[:, :hidden].contiguous()
        mean6 = None if mean6 is None else mean6[:, :hidden].contiguous()
    return a, channel, kernel, mean1, mean6, bits


def attention_backward_(
    gx: Tensor, ga: Tensor, gchannel: Tensor, gkernel: Tensor, bits: Tensor, packed: list[Tensor], hidden: int
) -> None:
    planar = is_planar(gx.shape, gx.stride())
    written = as_rows(gx, planar)
    samples, channels, height, width = gx.shape
    made = _unpacked(packed)
    gradients = [gradient.to(made.w4.dtype).contiguous() for gradient in (ga, gchannel, gkernel)]
    extension.kernels.attention_backward(
        (samples, channels, height * width, _padded(hidden), _padded(hidden) - hidden),
        planar,
        made.dynamic,
        DTYPES[gx.dtype],
        DTYPES[made.backward13.dtype],
        matrices(written),
        addresses(made.backward13, made.backward6, made.backward2, made.w4, made.w7),
        addresses(*gradients),
        bits.data_ptr(),
        extension.place(gx),
    )
    if written.tensor is not gx:  # an order of axes that the kernel does not write
        gx.copy_(written.tensor)
