"""The attention network's compiled kernels, for CPUs: functions of `sparta_kernels.backends.native`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparta_kernels.backends import extension, products
from sparta_kernels.backends.extension import DTYPES, addresses, matrices
from sparta_kernels.backends.layout import as_rows, is_planar

if TYPE_CHECKING:
    from sparta_kernels.ops.attention_kernels import AttentionWeights


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
