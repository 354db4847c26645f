"""SPARTA's attention network at K = 1: two kernels in which no hidden tensor reaches memory.

The pixels of all samples are numbered consecutively, and a program takes PIXELS of them: a part of a sample, one sample
or several, and parts of two more if a sample's pixels are not a power of two. All matrices of a program are
pixels x channels, so a pixel's bits are in a row. Masks select, they do not multiply.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import INTERPRETED, bound, inlined, read, relu, sum_over, write


@inlined
def operand(value, DTYPE: tl.constexpr):
    """A factor of a matrix product, rounded to DTYPE.

    The interpreter multiplies bfloat16 wrongly and float16 slowly: there it is a float32 of the same value.
    """
    if INTERPRETED:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            bits = value.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return tl.where(value == value, rounded, 0x7FC00000).to(tl.uint32).to(tl.float32, bitcast=True)
        return value.to(DTYPE).to(tl.float32)
    return value.to(DTYPE)


@inlined
def factor(pointer, mask):
    """A factor of a matrix product as it lies in memory; for the interpreter as above."""
    if INTERPRETED:
        return read(pointer, mask, tl.float32)
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0.0)


@inlined
def product(a, b, acc):
    """acc + a b, in tf32 where these are float32 and a GPU computes."""
    return tl.dot(a, b, acc, input_precision="ieee" if INTERPRETED else "tf32")


@inlined
def hidden_of(sums, bias, col, hidden, PADDED: tl.constexpr):
    """A hidden tensor. PADDED: some of its columns are none; an infinite x, times 0, would make NaNs of them."""
    h = relu(sums + tl.load(bias + col)[None, :])
    if PADDED:
        h = tl.where((col < hidden)[None, :], h, 0.0)
    return h


@inlined
def store_bits(bits, h, row, in_rows, first, BYTES: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr):
    """The bits of h's COLS columns, from byte `first` of every row on. A NaN passes."""
    passing = tl.reshape(tl.where(h <= 0, 0, 1), [PIXELS, COLS // 8, 8])
    byte = sum_over(passing << tl.arange(0, 8)[None, None, :], 2)
    col = first + tl.arange(0, COLS // 8)[None, :]
    tl.store(bits + row[:, None] + col, byte.to(tl.uint8), mask=in_rows[:, None] & (col < BYTES))


@inlined
def load_bits(bits, row, in_rows, first, BYTES: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr):
    """Where they are set."""
    col = first + tl.arange(0, COLS // 8)[None, :]
    byte = tl.load(bits + row[:, None] + col, mask=in_rows[:, None] & (col < BYTES), other=0).to(tl.int32)
    passing = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(passing, [PIXELS, COLS]) != 0


@inlined
def store_sums(
    sums, h, n, col, samples, pixels, hidden, SEGMENTS: tl.constexpr, SLOTS: tl.constexpr, PIXELS: tl.constexpr
):
    """The sums of a tile's columns `col`, a row of them for every sample: where those are whole, the means.

    SEGMENTS: how many samples a tile has, or parts of one; 0 where they straddle. SLOTS: for how many it leaves sums to
    be finished; 0 where samples are whole. Pixels beyond the last belong to samples that are not there.
    """
    tile = tl.program_id(0)
    COLS: tl.constexpr = h.shape[1]
    if SEGMENTS == 0:
        first = tile * PIXELS // pixels
        last = tl.minimum((tile * PIXELS + PIXELS - 1) // pixels, samples - 1)
        for slot in range(0, bound(last - first + 1)):
            total = sum_over(tl.where((n == first + slot)[:, None], h, 0.0), 0)
            tl.store(sums + (tile.to(tl.int64) * SLOTS + slot) * hidden + col, total, mask=col < hidden)
    elif SEGMENTS == 1:
        total = sum_over(h, 0)
        if SLOTS == 0:
            total /= PIXELS
        tl.store(sums + tile.to(tl.int64) * hidden + col, total, mask=col < hidden)
    else:
        total = sum_over(tl.reshape(h, [SEGMENTS, PIXELS // SEGMENTS, COLS]), 1) / (PIXELS // SEGMENTS)
        sample = tile * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
        mask = (sample < samples) & (col < hidden)[None, :]
        tl.store(sums + sample.to(tl.int64) * hidden + col[None, :], total, mask=mask)


@triton.jit
def attention_forward(
    x,
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
    x_sample,
    x_pixel,
    x_channel,
    SEGMENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    EVEN: tl.constexpr,
    PADDED: tl.constexpr,
    BYTES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """a, the sums of h1 and h6, and the bits of h1, h3 and h6 of PIXELS pixels.

    w6: None where Conv5 is static. bits: None where there will be no gradient. CHANNELS, HIDDEN: the weights' extents,
    padded with zeros. EVEN: x has CHANNELS channels. PADDED: there are fewer than HIDDEN hidden ones. DEPTH channels of
    x and CHUNK of h6 are multiplied at a time. TOGETHER: h1 and h3 are computed from one reading of x; else from two,
    of which the second finds it in a cache.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    MASKS: tl.constexpr = 2 if w6 is None else 3
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    in_rows = pixel < total
    n = pixel // pixels
    place = x + n.to(tl.int64) * x_sample + (pixel - n * pixels).to(tl.int64) * x_pixel
    k = tl.arange(0, DEPTH)
    col = tl.arange(0, HIDDEN)
    row = pixel.to(tl.int64) * (MASKS * BYTES)

    h1 = tl.zeros([PIXELS, HIDDEN], tl.float32)
    h3 = tl.zeros([PIXELS, HIDDEN], tl.float32)
    for first in tl.range(0, CHANNELS, DEPTH, num_stages=STAGES):
        c = (first + k).to(tl.int64)
        mask = in_rows[:, None] if EVEN else in_rows[:, None] & (c < channels)[None, :]
        tile = factor(place[:, None] + (c * x_channel)[None, :], mask)
        weights = w13 + col[None, :] * CHANNELS + (first + k)[:, None]
        h1 = product(tile, factor(weights, None), h1)
        if TOGETHER:
            h3 = product(tile, factor(weights + HIDDEN * CHANNELS, None), h3)
    h1 = hidden_of(h1, b13, col, hidden, PADDED)
    if bits is not None:
        store_bits(bits, h1, row, in_rows, 0, BYTES, PIXELS, HIDDEN)
    store_sums(sums1, h1, n, col, samples, pixels, hidden, SEGMENTS, SLOTS, PIXELS)

    if not TOGETHER:
        for first in tl.range(0, CHANNELS, DEPTH, num_stages=STAGES):
            c = (first + k).to(tl.int64)
            mask = in_rows[:, None] if EVEN else in_rows[:, None] & (c < channels)[None, :]
            tile = factor(place[:, None] + (c * x_channel)[None, :], mask)
            weights = w13 + HIDDEN * CHANNELS + col[None, :] * CHANNELS + (first + k)[:, None]
            h3 = product(tile, factor(weights, None), h3)
    h3 = hidden_of(h3, b13 + HIDDEN, col, hidden, PADDED)
    if bits is not None:
        store_bits(bits, h3, row + BYTES, in_rows, 0, BYTES, PIXELS, HIDDEN)
    spatial = sum_over(h3 * tl.load(w4 + col)[None, :], 1) + tl.load(b4)
    tl.store(a + pixel, spatial, mask=in_rows)

    if w6 is not None:
        h3 = operand(h3, DTYPE)
        chunk = tl.arange(0, CHUNK)
        for first in tl.range(0, HIDDEN, CHUNK, num_stages=STAGES):
            weights = factor(w6 + (first + chunk)[None, :] * HIDDEN + col[:, None], None)
            h6 = product(h3, weights, tl.zeros([PIXELS, CHUNK], tl.float32))
            h6 = hidden_of(h6, b6, first + chunk, hidden, PADDED)
            if bits is not None:
                store_bits(bits, h6, row + 2 * BYTES, in_rows, first // 8, BYTES, PIXELS, CHUNK)
            store_sums(sums6, h6, n, first + chunk, samples, pixels, hidden, SEGMENTS, SLOTS, PIXELS)


@triton.jit
def attention_finish(
    sums1,
    sums6,
    mean1,
    mean6,
    pixels,
    hidden,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIXELS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """The means of a sample, of h1 or of h6, from what the tiles that have some of it left: in their order."""
    n = tl.program_id(0)
    sums = sums1
    mean = mean1
    if mean6 is not None:  # two programs a sample
        if n % 2 != 0:
            sums = sums6
            mean = mean6
        n = n // 2
    first = n * pixels // PIXELS
    last = ((n + 1) * pixels - 1) // PIXELS
    term, col = tl.arange(0, TERMS)[:, None], tl.arange(0, HIDDEN)[None, :]
    total = tl.zeros([TERMS, HIDDEN], tl.float32)
    for start in range(0, bound(last - first + 1), TERMS):
        tile = first + start + term
        slot = n - tile * PIXELS // pixels
        mask = (tile <= last) & (col < hidden)
        total += tl.load(sums + (tile.to(tl.int64) * SLOTS + slot) * hidden + col, mask=mask, other=0.0)
    total = sum_over(total, 0) / tl.full([1], pixels, tl.float32)
    col = tl.arange(0, HIDDEN)
    tl.store(mean + n.to(tl.int64) * hidden + col, total, mask=col < hidden)


# ---- backward ----------------------------------------------------------------------------------------------


@inlined
def largest(value):
    """Of every row, to divide it by: 1 where that is 0, infinite or no number."""
    size = tl.max(tl.abs(value), 1)
    return tl.where((size > 0.0) & (size < float("inf")), size, 1.0)


@inlined
def factors(v, sample, n, in_rows, col, hidden, ONE: tl.constexpr):
    """The values of these columns, of each pixel's sample: one row for all where that is one."""
    if ONE:
        value = tl.load(v + sample * hidden + col, mask=col < hidden, other=0.0)[None, :]
    else:
        mask = in_rows[:, None] & (col < hidden)[None, :]
        value = tl.load(v + (n.to(tl.int64) * hidden)[:, None] + col[None, :], mask=mask, other=0.0)
    return value


@inlined
def hidden_gradients(
    first_col,
    ga,
    v1,
    v6,
    bits,
    w4,
    w6t,
    pixel,
    in_rows,
    pixels,
    hidden,
    ONE: tl.constexpr,
    BYTES: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIXELS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """COLS columns of G1 and of G3, as factors of a matrix product; and what their rows have been divided by."""
    MASKS: tl.constexpr = 2 if w6t is None else 3
    # float16 does not reach down to what gradients are: rows are multiplied as parts of their largest element.
    SCALED: tl.constexpr = DTYPE == tl.float16  # noqa: SIM300
    n = pixel // pixels
    sample = (tl.program_id(0) * PIXELS // pixels).to(tl.int64)
    row = pixel.to(tl.int64) * (MASKS * BYTES)
    col = first_col + tl.arange(0, COLS)
    g3 = tl.zeros([PIXELS, COLS], tl.float32)
    if w6t is not None:
        if SCALED:
            size6 = largest(factors(v6, sample, n, in_rows, tl.arange(0, HIDDEN), hidden, ONE))
        k = tl.arange(0, DEPTH)
        for first in tl.range(0, HIDDEN, DEPTH, num_stages=STAGES):
            value = factors(v6, sample, n, in_rows, first + k, hidden, ONE)
            if SCALED:
                value /= size6[:, None]
            passing = load_bits(bits, row + 2 * BYTES, in_rows, first // 8, BYTES, PIXELS, DEPTH)
            g6 = operand(tl.where(passing, value, 0.0), DTYPE)
            g3 = product(g6, factor(w6t + col[None, :] * HIDDEN + (first + k)[:, None], None), g3)
        if SCALED:
            g3 *= size6[:, None]
    spatial = read(ga + pixel, in_rows, tl.float32)
    g3 += spatial[:, None] * tl.load(w4 + col)[None, :]
    g3 = tl.where(load_bits(bits, row + BYTES, in_rows, first_col // 8, BYTES, PIXELS, COLS), g3, 0.0)
    g1 = factors(v1, sample, n, in_rows, col, hidden, ONE)
    g1 = tl.where(load_bits(bits, row, in_rows, first_col // 8, BYTES, PIXELS, COLS), g1, 0.0)
    size = spatial
    if SCALED:
        size1, size3 = largest(g1), largest(g3)
        size = tl.where(size1 > size3, size1, size3)
        g1, g3 = g1 / size[:, None], g3 / size[:, None]
    return operand(g1, DTYPE), operand(g3, DTYPE), size


@inlined
def add_products(sums, g1, g3, size, weights, HIDDEN: tl.constexpr, SCALED: tl.constexpr):
    """sums + (G1 W1 + G3 W3) size"""
    if SCALED:
        more = product(g1, factor(weights, None), tl.zeros(sums.shape, tl.float32))
        more = product(g3, factor(weights + HIDDEN, None), more)
        sums += more * size[:, None]
    else:
        sums = product(g1, factor(weights, None), sums)
        sums = product(g3, factor(weights + HIDDEN, None), sums)
    return sums


@triton.jit
def attention_backward(
    gx,
    ga,
    v1,
    v6,
    bits,
    w13t,
    w4,
    w6t,
    total,
    pixels,
    channels,
    hidden,
    gx_sample,
    gx_pixel,
    gx_channel,
    ONE: tl.constexpr,
    EVEN: tl.constexpr,
    BYTES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HALVES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """gx += G1 W1 + G3 W3 of PIXELS pixels. v6, w6t: None where Conv5 is static. ONE: they are of one sample.

    DEPTH channels of G6 are built and multiplied at a time; CHUNK channels of gx are read, added to and written.
    HALVES: G1 and G3 are made in one piece (1), or in two (2), which takes fewer registers.
    """
    DTYPE: tl.constexpr = gx.dtype.element_ty
    SCALED: tl.constexpr = DTYPE == tl.float16  # noqa: SIM300
    COLS: tl.constexpr = HIDDEN // HALVES
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    in_rows = pixel < total
    n = pixel // pixels
    g1, g3, size = hidden_gradients(
        0, ga, v1, v6, bits, w4, w6t, pixel, in_rows, pixels, hidden,
        ONE, BYTES, HIDDEN, PIXELS, COLS, DEPTH, STAGES, DTYPE,
    )  # fmt: skip
    if HALVES == 2:
        other1, other3, other_size = hidden_gradients(
            COLS, ga, v1, v6, bits, w4, w6t, pixel, in_rows, pixels, hidden,
            ONE, BYTES, HIDDEN, PIXELS, COLS, DEPTH, STAGES, DTYPE,
        )  # fmt: skip

    place = gx + n.to(tl.int64) * gx_sample + (pixel - n * pixels).to(tl.int64) * gx_pixel
    chunk = tl.arange(0, CHUNK)
    for first in tl.range(0, CHANNELS, CHUNK, num_stages=STAGES):
        weights = w13t + (first + chunk)[None, :] * (2 * HIDDEN) + tl.arange(0, COLS)[:, None]
        sums = tl.zeros([PIXELS, CHUNK], tl.float32)
        sums = add_products(sums, g1, g3, size, weights, HIDDEN, SCALED)
        if HALVES == 2:
            sums = add_products(sums, other1, other3, other_size, weights + COLS, HIDDEN, SCALED)
        c = (first + chunk).to(tl.int64)
        target = place[:, None] + (c * gx_channel)[None, :]
        mask = in_rows[:, None] if EVEN else in_rows[:, None] & (c < channels)[None, :]
        write(target, read(target, mask, tl.float32) + sums, mask)
