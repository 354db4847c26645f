"""The gate's kernels: one pass forward, one pass backward, and what adds up the parts of a divided sample.

A sample is a matrix of rows and columns (`sparta_kernels.backends.layout`): with planar images a row is a channel and a
column a pixel, with channels_last it is the other way round. The sigmoid's argument is row_factor[r] * col_factor[k].
Indices within a tile are 32-bit; where a tile starts, and how far its rows lie apart, is 64-bit.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from sparta_kernels.backends.triton.arithmetic import bound, inlined, read, relu, sigmoid, sum_over, write


@inlined
def read_spatial(
    spatial, n, first, local, mask, cells, width, cells_wide, share, SHARED: tl.constexpr, ACC: tl.constexpr
):
    """The spatial value of pixels `first` + `local`."""
    if SHARED:
        pixel = first + local
        cell = (pixel // width // share) * cells_wide + pixel % width // share
        return read(spatial + n * cells + cell, mask, ACC)
    return read(spatial + first + n * cells + local, mask, ACC)


@triton.jit
def gate_forward(
    x,
    spatial,
    channel,
    kernel,
    y,
    samples,
    rows,
    cols,
    cells,
    width,
    cells_wide,
    share,
    x_sample,
    x_row,
    y_sample,
    y_row,
    row_tiles,
    col_tiles,
    PLANAR: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of ROWS x COLS of each of SAMPLES samples. EVEN: no tile reaches beyond its sample, or the last sample."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.program_id(0)
    first_row = (tile // col_tiles % row_tiles).to(tl.int64) * ROWS
    first_col = (tile % col_tiles).to(tl.int64) * COLS
    n = (tile // (row_tiles * col_tiles)).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None, None]
    r = tl.arange(0, ROWS)[None, :, None]
    k = tl.arange(0, COLS)[None, None, :]
    in_samples = None if EVEN else n < samples
    in_rows = None if EVEN else in_samples & (r < rows - first_row)
    in_cols = None if EVEN else in_samples & (k < cols - first_col)
    mask = None if EVEN else in_rows & in_cols

    value = read(x + first_row * x_row + first_col + n * x_sample + r.to(tl.int64) * x_row + k, mask, ACC)
    if PLANAR:
        row = read(channel + first_row + n * rows + r, in_rows, ACC)
        col = read_spatial(spatial, n, first_col, k, in_cols, cells, width, cells_wide, share, SHARED, ACC)
        if kernel is not None:
            col *= read(kernel + n, in_samples, ACC)
    else:
        row = read_spatial(spatial, n, first_row, r, in_rows, cells, width, cells_wide, share, SHARED, ACC)
        col = read(channel + first_col + n * cols + k, in_cols, ACC)
        if kernel is not None:
            row *= read(kernel + n, in_samples, ACC)
    phi, _ = sigmoid(row, col, ACC)
    write(y + first_row * y_row + first_col + n * y_sample + r.to(tl.int64) * y_row + k, relu(value) * phi, mask)


@triton.jit
def gate_backward(
    gy,
    x,
    spatial,
    channel,
    kernel,
    gx,
    pixel_sums,
    channel_sums,
    kernel_sums,
    samples,
    rows,
    cols,
    cells,
    width,
    cells_wide,
    share,
    gy_sample,
    gy_row,
    x_sample,
    x_row,
    gx_sample,
    gx_row,
    row_parts,
    col_parts,
    rows_in_part,
    PLANAR: tl.constexpr,
    SHARED: tl.constexpr,
    FINAL: tl.constexpr,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
):
    """One part of each of SAMPLES samples: rows_in_part rows, ROWS at a time, of COLS columns.

    gx, pixel_sums, channel_sums and kernel_sums are None where they are not wanted. The sums are (N, parts, extent):
    the parts differ in columns for a sum over columns, in rows for a sum over rows, in either for the kernel's. FINAL
    says that pixel_sums is the gradient of spatial itself, and not gs or a part of it. EVEN: no tile reaches beyond its
    part, or the last sample. FOLD of a tile's rows are a thread's own: their sums over rows are added up before they
    are kept, in a FOLD-th of the registers. ROW_STRIDE, if not 0, is the row stride of all three images: one address
    then serves several loads.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    WANT_PIXELS: tl.constexpr = pixel_sums is not None or kernel_sums is not None
    WANT_ROWS: tl.constexpr = channel_sums is not None if PLANAR else WANT_PIXELS
    WANT_COLS: tl.constexpr = WANT_PIXELS if PLANAR else channel_sums is not None
    if ROW_STRIDE:
        gy_row = ROW_STRIDE
        x_row = ROW_STRIDE
        gx_row = ROW_STRIDE

    part = tl.program_id(0)
    col_part = part % col_parts
    row_part = part // col_parts % row_parts
    first_col = col_part.to(tl.int64) * COLS
    first_row = row_part.to(tl.int64) * rows_in_part
    end_row = tl.minimum(first_row + rows_in_part, rows)
    n = (part // (row_parts * col_parts)).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None, None]
    r = tl.arange(0, ROWS)[None, :, None]
    k = tl.arange(0, COLS)[None, None, :]
    in_samples = None if EVEN else n < samples
    in_cols = None if EVEN else in_samples & (k < cols - first_col)

    weight = 1.0 if kernel is None else read(kernel + n, in_samples, ACC)
    if PLANAR:
        col = read_spatial(spatial, n, first_col, k, in_cols, cells, width, cells_wide, share, SHARED, ACC) * weight
    else:
        col = read(channel + first_col + n * cols + k, in_cols, ACC)

    gy += first_row * gy_row + first_col + n * gy_sample + r.to(tl.int64) * gy_row + k
    x += first_row * x_row + first_col + n * x_sample + r.to(tl.int64) * x_row + k
    if gx is not None:
        gx += first_row * gx_row + first_col + n * gx_sample + r.to(tl.int64) * gx_row + k
    col_sum = tl.full([SAMPLES, ROWS // FOLD, COLS], 0.0, ACC)
    kernel_sum = tl.full([SAMPLES, ROWS, 1], 0.0, ACC)

    for start in range(bound(first_row), bound(end_row), ROWS):
        in_rows = None if EVEN else in_samples & (r < end_row - start)
        mask = None if EVEN else in_rows & in_cols
        value = read(x, mask, ACC)
        grad = read(gy, mask, ACC)
        if PLANAR:
            row = read(channel + start + n * rows + r, in_rows, ACC)
        else:
            level = read_spatial(spatial, n, start, r, in_rows, cells, width, cells_wide, share, SHARED, ACC)
            row = level * weight

        phi, complement = sigmoid(row, col, ACC)
        grad *= phi
        if gx is not None:
            # Not a product with a mask: where x <= 0 the gradient is 0, whatever gy and phi are.
            write(gx, tl.where(value <= 0, 0.0, grad), mask)
            gx += ROWS * gx_row
        if WANT_ROWS or WANT_COLS:
            gz = grad * relu(value) * complement
            if not EVEN:
                gz = tl.where(mask, gz, 0.0)  # a factor that is infinite makes NaNs beside the matrix too
        if WANT_COLS:
            col_sum += sum_over(tl.reshape(gz * row, [SAMPLES, FOLD, ROWS // FOLD, COLS]), 1)
        if WANT_ROWS:
            row_sum = sum_over(gz * col, 2)[:, :, None]
            at = n * col_parts * rows + col_part * rows + start + r
            if PLANAR:
                write(channel_sums + at, row_sum, in_rows)
            else:
                if pixel_sums is not None:
                    write(pixel_sums + at, row_sum * weight if FINAL else row_sum, in_rows)
                if kernel_sums is not None:
                    kernel_sum += row_sum * level if EVEN else tl.where(in_rows, row_sum * level, 0.0)
        x += ROWS * x_row
        gy += ROWS * gy_row

    if WANT_COLS:
        col_total = sum_over(col_sum, 1)[:, None, :]
        at = n * row_parts * cols + row_part * cols + first_col + k
        if PLANAR:
            if pixel_sums is not None:
                write(pixel_sums + at, col_total * weight if FINAL else col_total, in_cols)
            if kernel_sums is not None:
                level = read_spatial(spatial, n, first_col, k, in_cols, cells, width, cells_wide, share, SHARED, ACC)
                term = col_total * level if EVEN else tl.where(in_cols, col_total * level, 0.0)
                kernel_sum = sum_over(term, 2)[:, :, None]
        else:
            write(channel_sums + at, col_total, in_cols)
    if kernel_sums is not None:
        at = n * row_parts * col_parts + row_part * col_parts + col_part
        write(kernel_sums + at, sum_over(kernel_sum, 1)[:, :, None], in_samples)


@triton.jit
def gate_finish(
    pixel_sums,
    channel_sums,
    kernel_sums,
    kernel,
    gspatial,
    gchannel,
    gkernel,
    channels,
    height,
    width,
    cells,
    cells_wide,
    share,
    cell_height,
    cell_width,
    pixel_parts,
    channel_parts,
    kernel_parts,
    cell_blocks,
    channel_blocks,
    CELLS: tl.constexpr,
    TERMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds up, in a fixed order, what gate_backward left of one sample's cells, of its channels, or of its kernel.

    gspatial, gchannel and gkernel are None where they are not wanted, or are finished. A cell is
    cell_height x cell_width pixels in each of pixel_parts parts; CELLS of them are done at once, TERMS terms at a time.
    """
    blocks = cell_blocks + channel_blocks + 1
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    if block < cell_blocks:
        if gspatial is not None:
            cell = block * CELLS + tl.arange(0, CELLS)[:, None]
            top = cell // cells_wide * share
            left = cell % cells_wide * share
            area = cell_height * cell_width
            terms = area * pixel_parts
            cell_sum = tl.full([CELLS, TERMS], 0.0, ACC)
            for first in range(0, bound(terms), TERMS):
                term = first + tl.arange(0, TERMS)[None, :]
                h = top + term % area // cell_width
                w = left + term % area % cell_width
                mask = (cell < cells) & (term < terms) & (h < height) & (w < width)
                cell_sum += read(pixel_sums + ((n * pixel_parts + term // area) * height + h) * width + w, mask, ACC)
            gs = sum_over(cell_sum, 1)[:, None]
            if kernel is not None:
                gs *= read(kernel + n, None, ACC)
            write(gspatial + n * cells + cell, gs, cell < cells)
    elif block < cell_blocks + channel_blocks:
        if gchannel is not None:
            c = (block - cell_blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
            channel_sum = tl.full([PARTS, CHANNELS], 0.0, ACC)
            for first_part in range(0, bound(channel_parts), PARTS):
                part = first_part + tl.arange(0, PARTS)[:, None]
                mask = (c < channels) & (part < channel_parts)
                channel_sum += read(channel_sums + (n * channel_parts + part) * channels + c, mask, ACC)
            write(gchannel + n * channels + c, sum_over(channel_sum, 0)[None, :], c < channels)
    else:
        if gkernel is not None:
            kernel_sum = tl.full([PARTS], 0.0, ACC)
            for first_kernel in range(0, bound(kernel_parts), PARTS):
                piece = first_kernel + tl.arange(0, PARTS)
                kernel_sum += read(kernel_sums + n * kernel_parts + piece, piece < kernel_parts, ACC)
            write(gkernel + n, sum_over(kernel_sum, 0), None)
