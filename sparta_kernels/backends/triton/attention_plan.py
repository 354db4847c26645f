"""The attention network's launches and their table, and its functions: those of `sparta_kernels.backends.native`.

Weights are packed: padded with zeros to what `tl.dot` takes, once as they are and once transposed, so that every matrix
product's reduction axis is contiguous.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparta_kernels.backends.layout import as_rows, is_planar
from sparta_kernels.backends.triton import attention
from sparta_kernels.backends.triton.launch import INTERPRETED, Launch, ceil_div, power_above, run

if TYPE_CHECKING:
    from sparta_kernels.ops.attention_kernels import AttentionWeights

_MOST_HIDDEN = 256
_MANY = 2**14  # pixels, of which tiles of 128 give every multiprocessor one
_MOST_PIXELS = 2**31 - 2**12  # of all samples together; they are counted in 32 bits


# ---- the table ---------------------------------------------------------------------------------------------


class AttentionTiling(NamedTuple):
    pixels: int  # of a program
    depth: int  # forward: channels of x in a step of the first product; backward: channels of G6
    chunk: int  # forward: channels of h6 at a time; backward: channels of gx
    stages: int  # steps that are under way at a time
    together: bool = True  # forward: h1 and h3 from one reading of x; backward: G1 and G3 in one piece
    warps: int = 8
    registers: int | None = None  # of a thread, at most; 255 where ptxas spills for an occupancy that is not needed


def _shared(arch: int) -> int:
    """How many kB of shared memory a program may have; `arch` is 10 * major + minor of the compute capability."""
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(arch, 99)


@lru_cache(maxsize=256)
def attention_forward_tiling(total: int, channels: int, hidden: int, itemsize: int, arch: int) -> AttentionTiling:
    """For that many pixels in all, and padded extents.

    A program reads all weights from L2, whatever its tile; with 128 hidden channels and more this is the bottleneck. So
    tiles have 128 pixels if there are enough of them for every multiprocessor, and registers allow. With 256 hidden
    channels registers have room for one hidden tensor at a time.
    """
    step = min(128 // itemsize, channels)
    chunk = min(128 // itemsize, hidden)
    large = itemsize == 2 and arch == 90 and total >= _MANY
    if hidden <= 64:
        return AttentionTiling(128, step, chunk, 2, registers=255 if itemsize == 4 and arch >= 100 else None)
    if hidden <= 128 and large:
        return AttentionTiling(128, step, chunk, 2, warps=16)
    if hidden <= 128:
        return AttentionTiling(64, step, chunk, 2)
    if large:
        return AttentionTiling(128, step, chunk, 3, together=False)
    if itemsize == 2:
        return AttentionTiling(64, step if _shared(arch) > 163 else min(32, step), chunk, 2)
    return AttentionTiling(64 if _shared(arch) > 99 else 32, step, chunk, 2, together=arch == 90)


def _alike(total: int, pixels: int) -> int:
    """What counts of the pixels: none, where images straddle tiles of 128, for which registers do not suffice then."""
    return total if pixels > 0 and (pixels % 128 == 0 or 128 % pixels == 0) else 0


@lru_cache(maxsize=256)
def attention_backward_tiling(
    total: int, channels: int, hidden: int, dtype: torch.dtype, planar: bool, arch: int
) -> AttentionTiling:
    """For that many pixels in all, and padded extents. G1 and G3 lie in shared memory, or in registers.

    Larger tiles help as they do forward, but registers suffice only if float16's scales and a planar image's addresses
    do not take some.
    """
    itemsize = dtype.itemsize
    depth = min(128 // itemsize, hidden)
    chunk = min(128 // itemsize, channels)
    shared = _shared(arch)
    wide = itemsize == 4
    registers = 255 if arch < 90 or shared <= 99 else None
    if hidden <= 64:
        return AttentionTiling(64 if wide and shared <= 99 else 128, depth, chunk, 2, registers=registers)
    if hidden <= 128 and not wide and arch == 90 and total >= _MANY:
        return AttentionTiling(128, depth, chunk, 2, warps=16)
    if hidden <= 128 and shared > 99:
        return AttentionTiling(64, depth, chunk, 2, registers=registers)
    if hidden <= 128:
        return AttentionTiling(32 if wide else 64, depth, max(16, chunk // 2), 2, registers=registers)
    if dtype == torch.bfloat16 and arch == 90 and not planar and total >= _MANY:
        return AttentionTiling(128, min(32, depth), min(32, channels), 2, together=False, warps=16)
    if shared > 163:
        return AttentionTiling(64, depth, max(16, chunk // 2), 2 if wide else 3)
    if shared > 99:
        return AttentionTiling(32 if wide else 64, min(32, depth), max(16, chunk // 2), 2, registers=registers)
    return AttentionTiling(32, min(32, depth), 16, 1 if wide else 2, registers=registers)


def padded_hidden(hidden: int) -> int:
    """A tile's extent must be a power of two, and a matrix product's at least 16."""
    return max(16, power_above(hidden))


def padded_channels(channels: int) -> int:
    """What the table's steps divide."""
    return max(16, power_above(channels)) if channels < 64 else ceil_div(channels, 64) * 64


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# ---- what they take ----------------------------------------------------------------------------------------


def _tf32_is_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    try:
        return matmul.allow_tf32
    except RuntimeError:  # it was set by its newer name, and torch does not translate
        return matmul.fp32_precision == "tf32"


def attention_unfit(x: Tensor, hidden: int) -> str | None:
    """Why these kernels do not take x (N, C, H, W) with that many hidden channels; None where they do."""
    if x.device.type == "cuda" and x.dtype == torch.float32 and not _tf32_is_allowed():
        return "float32 products are the library's, unless torch.backends.cuda.matmul.allow_tf32 lets them be tf32"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are kernels for float32, bfloat16 and float16, not for {str(x.dtype).removeprefix('torch.')}"
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return f"there are no kernels for {x.device.type} tensors"
    if x.device.type == "cuda" and _arch(x.device) < 80:
        return "their products need compute capability 8.0"
    if not 1 <= hidden <= _MOST_HIDDEN:
        return f"hidden must be from 1 to {_MOST_HIDDEN}, got {hidden}"
    if x.shape[1] == 0:
        return "x has no channels"
    if x.shape[0] * x.shape[2] * x.shape[3] > _MOST_PIXELS:
        return f"x must have at most 2**31 - 2**12 pixels, got {x.shape[0] * x.shape[2] * x.shape[3]}"
    return None


def pack_attention(weights: AttentionWeights, dtype: torch.dtype) -> list[Tensor]:
    """Copies: w13 (2 hidden, C), b13, w4, b4, w13 transposed, w2, b2, b7; if dynamic w6, b6, w6 transposed, w7.

    Extents of what the kernels read are padded (`padded_hidden`, `padded_channels`), and their matrices in `dtype`; all
    else is in float32.
    """
    hidden, channels = weights.w4.numel(), weights.w13.shape[1]
    high, wide = padded_hidden(hidden), padded_channels(channels)

    def vector(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values.detach().float(), (0, high - hidden))

    def small(values: Tensor) -> Tensor:
        return values.detach().to(torch.float32, copy=True)

    def matrix(values: Tensor, cols: int) -> Tensor:
        values = values.detach().to(dtype)
        return torch.nn.functional.pad(values, (0, cols - values.shape[1], 0, high - hidden))

    w13 = torch.cat([matrix(part, wide) for part in weights.w13.split(hidden)])
    b13 = torch.cat([vector(part) for part in weights.b13.split(hidden)])
    w4, b4, w2, b2, b7 = vector(weights.w4), *map(small, (weights.b4, weights.w2, weights.b2, weights.b7))
    packed = [w13, b13, w4, b4, w13.t().contiguous(), w2, b2, b7]
    if weights.w6 is not None and weights.b6 is not None and weights.w7 is not None:
        w6 = matrix(weights.w6, high)
        packed += [w6, vector(weights.b6), w6.t().contiguous(), small(weights.w7)]
    return [tensor.contiguous() for tensor in packed]


def _dynamic(packed: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor] | tuple[None, None, None, None]:
    """w6, b6, w6 transposed and w7, or None."""
    return (packed[8], packed[9], packed[10], packed[11]) if len(packed) > 8 else (None, None, None, None)


def _strides(image: Tensor, planar: bool) -> tuple[Tensor, int, int, int]:
    """The image or a copy, and the strides of samples, pixels and channels."""
    tensor, sample, row = as_rows(image, planar)
    return (tensor, sample, 1, row) if planar else (tensor, sample, row, 1)


# ---- forward -----------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """What the kernels leave: a (N, 1, H, W), the means (N, hidden), the bits (N, P, masks, bytes)."""

    a: Tensor
    mean1: Tensor
    mean6: Tensor | None
    bits: Tensor | None


def plan_attention_forward(
    x: Tensor, packed: list[Tensor], hidden: int, keep: bool, arch: int | None = None
) -> tuple[list[Launch], Attention]:
    samples, channels, height, width = x.shape
    pixels, total = height * width, samples * height * width
    w13, b13, w4, b4 = packed[:4]
    w6, b6, _, _ = _dynamic(packed)
    width_of_bits = 2 * ceil_div(hidden, 16)
    a = torch.empty((samples, 1, height, width), dtype=torch.float32, device=x.device)
    mean1 = torch.empty((samples, hidden), dtype=torch.float32, device=x.device)
    mean6 = None if w6 is None else torch.empty_like(mean1)
    bits = None
    if keep:
        masks = 2 if w6 is None else 3
        bits = torch.empty((samples, pixels, masks, width_of_bits), dtype=torch.uint8, device=x.device)
    result = Attention(a, mean1, mean6, bits)
    if total == 0:
        for mean in (mean1, mean6):
            if mean is not None:
                mean.fill_(float("nan"))  # of nothing
        return [], result

    planar = is_planar(x.shape, x.stride())
    rows, sample_stride, pixel_stride, channel_stride = _strides(x, planar)
    wide, high = w13.shape[1], w4.shape[0]
    arch = _arch(x.device) if arch is None else arch
    tiling = attention_forward_tiling(_alike(total, pixels), wide, high, x.itemsize, arch)
    tiles = ceil_div(total, tiling.pixels)
    if tiling.pixels % pixels == 0:
        segments, slots = tiling.pixels // pixels, 0
    elif pixels % tiling.pixels == 0:
        segments, slots = 1, 1
    else:
        segments, slots = 0, (tiling.pixels - 2) // pixels + 2
    sums1, sums6 = mean1, mean6
    if slots:
        sums1 = torch.empty((tiles, slots, hidden), dtype=torch.float32, device=x.device)
        sums6 = None if mean6 is None else torch.empty_like(sums1)
    arguments = (
        rows,
        w13,
        b13,
        w4,
        b4,
        w6,
        b6,
        a,
        sums1,
        sums6,
        bits,
        total,
        samples,
        pixels,
        channels,
        hidden,
        sample_stride,
        pixel_stride,
        channel_stride,
        segments,
        slots,
        wide == channels,
        high != hidden,
        width_of_bits,
        wide,
        high,
        tiling.pixels,
        tiling.depth,
        tiling.chunk,
        tiling.together,
        tiling.stages,
    )
    launches = [Launch(attention.attention_forward, tiles, arguments, tiling.warps, tiling.registers)]
    if slots:
        terms = min(8, power_above(ceil_div(pixels, tiling.pixels) + 1))
        finish = (sums1, sums6, mean1, mean6, pixels, hidden, slots, high, tiling.pixels, terms)
        launches.append(Launch(attention.attention_finish, samples * (1 if mean6 is None else 2), finish))
    return launches, result


def hidden_forward(x: Tensor, packed: list[Tensor], hidden: int, keep: bool) -> Attention:
    launches, result = plan_attention_forward(x, packed, hidden, keep)
    run(launches, x.device)
    return result


def attention_forward(
    x: Tensor, packed: list[Tensor], hidden: int, keep: bool, skip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """a (N, 1, H, W), channel (N, C), kernel (N,), the means of h1 and h6 (N, hidden), the bits.

    With `skip`, for x + skip, which is written over x, in a pass of its own. What is left between the means and channel
    and kernel are two small products, in float32 (tf32 where torch may).
    """
    if skip is not None:
        x.add_(skip)
    found = hidden_forward(x, packed, hidden, keep)
    w2, b2, b7 = packed[5:8]
    w7 = _dynamic(packed)[3]
    channel = torch.addmm(b2, found.mean1, w2.t())
    if found.mean6 is not None and w7 is not None:
        kernel = torch.addmv(b7, found.mean6, w7)
    else:
        kernel = b7.expand(x.shape[0]).clone()
    return found.a, channel, kernel, found.mean1, found.mean6, found.bits


# ---- backward ----------------------------------------------------------------------------------------------


def plan_attention_backward(
    gx: Tensor,
    ga: Tensor,
    v1: Tensor,
    v6: Tensor | None,
    bits: Tensor,
    packed: list[Tensor],
    hidden: int,
    arch: int | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches, and the tensor that they add to: gx, or a copy of it."""
    samples, channels, height, width = gx.shape
    pixels, total = height * width, samples * height * width
    if total == 0:
        return [], gx
    w4, w13t = packed[2], packed[4]
    _, _, w6t, _ = _dynamic(packed)
    planar = is_planar(gx.shape, gx.stride())
    target, sample_stride, pixel_stride, channel_stride = _strides(gx, planar)
    wide, high = w13t.shape[0], w4.shape[0]
    arch = _arch(gx.device) if arch is None else arch
    tiling = attention_backward_tiling(total, wide, high, gx.dtype, planar, arch)
    arguments = (
        target,
        ga.contiguous(),
        v1.float().contiguous(),
        None if v6 is None else v6.float().contiguous(),
        bits,
        w13t,
        w4,
        w6t,
        total,
        pixels,
        channels,
        hidden,
        sample_stride,
        pixel_stride,
        channel_stride,
        pixels % tiling.pixels == 0,
        wide == channels,
        2 * ceil_div(hidden, 16),
        wide,
        high,
        tiling.pixels,
        tiling.depth,
        tiling.chunk,
        1 if tiling.together else 2,
        tiling.stages,
    )
    programs = ceil_div(total, tiling.pixels)
    return [Launch(attention.attention_backward, programs, arguments, tiling.warps, tiling.registers)], target


def hidden_backward_(
    gx: Tensor, ga: Tensor, v1: Tensor, v6: Tensor | None, bits: Tensor, packed: list[Tensor], hidden: int
) -> None:
    """Add to gx. v1, v6 (N, hidden): the gradients of the means of h1 and h6, divided by the number of pixels."""
    launches, target = plan_attention_backward(gx, ga, v1, v6, bits, packed, hidden)
    run(launches, gx.device)
    if target is not gx:
        gx.copy_(target)


def attention_backward_(
    gx: Tensor, ga: Tensor, gchannel: Tensor, gkernel: Tensor, bits: Tensor, packed: list[Tensor], hidden: int
) -> None:
    """Add to gx, given the gradients of what forward returns first."""
    pixels, w2, w7 = gx.shape[2] * gx.shape[3], packed[5], _dynamic(packed)[3]
    v1 = gchannel.float() @ w2 / pixels
    v6 = None if w7 is None else torch.outer(gkernel.float(), w7 / pixels)
    hidden_backward_(gx, ga, v1, v6, bits, packed, hidden)
