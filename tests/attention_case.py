"""Inputs for the attention network's kernels, and what they have to give: plain torch in float64.

The operands of the matrix products are rounded to x's dtype, as the kernels do; what may still differ is bounded by the
sum of the terms' magnitudes, times what a rounding costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from cases import here, lay, random
from torch import Tensor

from sparta_kernels import AttentionWeights

# What rounding an operand of a product costs at most, relative to it.
_OPERAND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_TF32 = 2.0**-10  # cut off, not rounded
_SUM = 2.0**-19  # of float32 sums of up to a few thousand terms


@dataclass(frozen=True)
class AttentionCase:
    """One call of the forward kernels and one of the backward kernel."""

    shape: tuple[int, int, int, int]
    hidden: int
    dtype: torch.dtype
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    dynamic: bool = True
    scale: float = 1.0  # of the gradients
    seed: int = 0

    def inputs(self) -> tuple[Tensor, AttentionWeights]:
        """x, and weights whose matrices are what `dtype` can hold."""
        samples, channels, height, width = self.shape
        hidden, generator = self.hidden, torch.Generator().manual_seed(self.seed)
        x = lay(random(generator, samples, channels, height, width).to(self.dtype), self.layout)
        w13 = random(generator, 2 * hidden, channels) / channels**0.5
        w6, b6 = random(generator, hidden, hidden) / hidden**0.5, random(generator, hidden)
        w4, b4, b13 = random(generator, hidden) / hidden**0.5, random(generator, 1), random(generator, 2 * hidden)
        w2, b2 = random(generator, channels, hidden) / hidden**0.5, random(generator, channels)
        w7, b7 = random(generator, hidden) / hidden**0.5, random(generator, 1)
        b13[::5] = 0.0
        matrices = [w.to(self.dtype).float() for w in (w13, w6)]
        return x, AttentionWeights(
            matrices[0],
            b13.float(),
            w4.float(),
            b4.float(),
            w2.float(),
            b2.float(),
            b7.float(),
            matrices[1] if self.dynamic else None,
            b6.float() if self.dynamic else None,
            w7.float() if self.dynamic else None,
        )

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """gx, which holds the gate's part, ga, v1 and v6."""
        samples, _, height, width = self.shape
        generator = torch.Generator().manual_seed(self.seed + 1)
        gx = lay((self.scale * random(generator, *self.shape)).to(self.dtype), self.gradient_layout)
        ga = (self.scale * random(generator, samples, 1, height, width)).float()
        v1, v6 = ((self.scale * random(generator, samples, self.hidden)).float() for _ in range(2))
        return gx, ga, v1, v6 if self.dynamic else None


def pixels_first(image: Tensor) -> Tensor:
    """(N, C, H, W) as (N, P, C), in float64."""
    return image.double().flatten(2).transpose(1, 2)


def unpacked(bits: Tensor, hidden: int) -> Tensor:
    """(N, P, masks, bytes) as (masks, N, P, hidden) booleans."""
    passing = (bits.int()[..., None] >> here(torch.arange(8))) & 1
    passing = passing.flatten(-2)
    assert not passing[..., hidden:].any(), "bits of channels that do not exist"
    return passing[..., :hidden].movedim(2, 0) != 0


def _close(got: Tensor, want: Tensor, room: Tensor, name: str) -> None:
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    wrong = ((got.double() - want).abs() <= room).logical_not()
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"


def check_forward(module: ModuleType, case: AttentionCase, keep: bool = True, tf32: bool = False) -> Any:
    """Run forward and compare; bits may differ only where a sum is as good as zero."""
    x, weights = case.inputs()
    got = module.hidden_forward(x, module.pack_attention(weights, case.dtype), case.hidden, keep)
    samples, _, height, width = case.shape
    unit = _TF32 if tf32 else _OPERAND[case.dtype]
    rounding = _SUM + (2 * _TF32 if tf32 else 0.0)  # of a product of numbers that the dtype can hold
    pixels, (w1, w3), (b1, b3) = pixels_first(x), weights.w13.double().chunk(2), weights.b13.double().chunk(2)
    sums = [pixels @ w.t() + b for w, b in ((w1, b1), (w3, b3))]
    rooms = [rounding * (pixels.abs() @ w.abs().t() + b.abs()) for w, b in ((w1, b1), (w3, b3))]
    h3 = sums[1].relu()
    if weights.w6 is not None and weights.b6 is not None:
        w6, b6 = weights.w6.double(), weights.b6.double()
        sums.append(h3 @ w6.t() + b6)
        rooms.append((rooms[1] + (unit + rounding) * h3) @ w6.abs().t() + _SUM * b6.abs())
    a = h3 @ weights.w4.double() + weights.b4.double()
    room = (rooms[1] + _SUM * h3) @ weights.w4.double().abs() + _SUM * weights.b4.double().abs()
    assert got.a.shape == (samples, 1, height, width)
    _close(got.a.flatten(1), a, room, "a")
    for name, mean, index in (("mean1", got.mean1, 0), ("mean6", got.mean6, 2)):
        if index < len(sums):
            assert mean is not None
            hidden = sums[index].relu()
            _close(mean, hidden.mean(1), (rooms[index] + _SUM * hidden).mean(1), name)
        else:
            assert mean is None
    for result in got[:3]:
        assert result is None or result.dtype == torch.float32
    if keep:
        assert got.bits is not None
        assert got.bits.dtype == torch.uint8
        assert got.bits.shape == (samples, height * width, len(sums), 2 * -(-case.hidden // 16))
        assert got.bits.is_contiguous()
        for name, passing, total, room in zip("136", unpacked(got.bits, case.hidden), sums, rooms, strict=False):
            wrong = (passing != (total > 0)) & (total.abs() > room)
            assert not wrong.any(), f"bits of h{name}: {int(wrong.sum())}, first at {wrong.nonzero()[0].tolist()}"
    else:
        assert got.bits is None
    return got


def check_backward(module: ModuleType, case: AttentionCase, bits: Tensor | None = None, tf32: bool = False) -> Tensor:
    """Run backward from these bits, by default half of them set, and compare."""
    _, weights = case.inputs()
    gx, ga, v1, v6 = case.gradients()
    samples, _, height, width = case.shape
    if bits is None:
        size = (samples, height * width, 3 if case.dynamic else 2, 16 * -(-case.hidden // 16))
        chosen = random(torch.Generator().manual_seed(case.seed + 2), *size) > 0
        chosen[..., case.hidden :] = False
        bits = (chosen.unflatten(-1, (-1, 8)) << here(torch.arange(8))).sum(-1).to(torch.uint8)
    before, layout = gx.clone(), (gx.data_ptr(), gx.stride())
    packed = module.pack_attention(weights, case.dtype)
    assert module.hidden_backward_(gx, ga, v1, v6, bits, packed, case.hidden) is None
    assert (gx.data_ptr(), gx.stride()) == layout

    unit = _TF32 if tf32 else _OPERAND[case.dtype]
    unit += _SUM + (_TF32 if tf32 else 0.0)
    masks = unpacked(bits, case.hidden)
    (w1, w3), w4 = weights.w13.double().chunk(2), weights.w4.double()
    g1 = masks[0] * v1.double()[:, None]
    g3, room3 = pixels_first(ga) * w4, _SUM * (pixels_first(ga) * w4).abs()
    if weights.w6 is not None and v6 is not None:
        g6 = masks[2] * v6.double()[:, None]
        g3, room3 = g3 + g6 @ weights.w6.double(), room3 + unit * (g6.abs() @ weights.w6.double().abs())
    g3, room3 = masks[1] * g3, masks[1] * room3
    added = g1 @ w1 + g3 @ w3
    room = unit * (g1.abs() @ w1.abs()) + (room3 + unit * g3.abs()) @ w3.abs()
    want = pixels_first(before) + added
    finfo = torch.finfo(case.dtype)
    room += finfo.eps / 2 * (want.abs() + room) + finfo.smallest_normal * finfo.eps
    _close(pixels_first(gx), want, room, "gx")
    return gx
