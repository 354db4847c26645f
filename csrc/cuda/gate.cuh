// What the gate's two passes share on a CUDA device.
//
// z = s[pixel] * channel[channel] is an outer product, so the two memory formats are the same problem with the roles of
// pixel and channel exchanged. The kernels speak of rows and columns of one matrix a sample: its rows are contiguous, and
// `row factor * column factor` is the sigmoid's argument. A thread works on one vector of columns, whose factors it keeps in
// registers, and on many rows, whose factors the block keeps in shared memory.
#pragma once

#include "common.cuh"

namespace sparta {
namespace cuda {

constexpr int kMaxRows = 1024;  // of a block: their factors lie in shared memory

// How the matrices are cut into blocks of threads. A block has `lanes` threads side by side along a row, a power of two,
// and as many rows of threads one above the other as its threads make up.
struct Tiles {
  int64_t rows, cols;  // of a sample
  int threads, lanes;
  int block_rows, block_cols;    // that a block works on, at most
  int64_t row_blocks, col_blocks;  // in a sample, at least one

  SPARTA_INLINE int64_t blocks() const { return row_blocks * col_blocks; }
  SPARTA_INLINE int row_step() const { return threads / lanes; }

  // Columns in blocks of `lanes` vectors; all rows in one block.
  Tiles(const GateShape& s, int vector)
      : rows(s.planar ? s.channels : s.pixels()), cols(s.planar ? s.pixels() : s.channels), row_blocks(1) {
    const int64_t vectors = ceil_div(cols, vector);
    col_blocks = max(1, ceil_div(vectors, kThreads));
    const int64_t block_vectors = max(1, ceil_div(vectors, col_blocks));
    col_blocks = max(1, ceil_div(vectors, block_vectors));
    block_cols = static_cast<int>(block_vectors * vector);
    for (lanes = 1; lanes < block_vectors;) lanes *= 2;
    threads = kThreads;
    while (threads > kWarp && threads / 2 >= lanes * max(1, rows)) threads /= 2;
    cut_rows(rows);
  }
  // Rows in blocks of at most `most`.
  void cut_rows(int64_t most) {
    most = max(1, min(most, kMaxRows));
    row_blocks = max(1, ceil_div(rows, most));
    block_rows = static_cast<int>(ceil_div(rows, row_blocks));
    row_blocks = max(1, ceil_div(rows, max(1, block_rows)));
  }
};

// One block's place in the batch.
struct Tile {
  int64_t sample, row_block, col_block;
  int64_t first_row, first_col;
  int rows, cols;

  SPARTA_DEVICE explicit Tile(const Tiles& tiles) {
    const unsigned row_blocks = static_cast<unsigned>(tiles.row_blocks);
    const unsigned col_blocks = static_cast<unsigned>(tiles.col_blocks);
    const unsigned row_of_blocks = blockIdx.x / col_blocks;
    col_block = blockIdx.x % col_blocks;
    sample = row_of_blocks / row_blocks;
    row_block = row_of_blocks % row_blocks;
    first_row = row_block * tiles.block_rows;
    first_col = col_block * tiles.block_cols;
    rows = static_cast<int>(min(tiles.block_rows, tiles.rows - first_row));
    cols = static_cast<int>(min(tiles.block_cols, tiles.cols - first_col));
  }

  template <class T>
  SPARTA_DEVICE T* start(const Matrices& m) const {
    return static_cast<T*>(m.data) + sample * m.sample_stride + first_row * m.row_stride + first_col;
  }
};

// Calls take(i, value) for values first ... first + count - 1 of one sample's channel factors, spread over the block.
template <class Acc, class Take>
SPARTA_DEVICE void channel_factors(const GateShape& s, const Dense& channel, int64_t sample, int64_t first, int count,
                                   Take take) {
  with_type(channel.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(channel.data) + sample * s.channels + first;
    for (int i = threadIdx.x; i < count; i += blockDim.x) take(i, static_cast<Acc>(widen(from[i])));
  });
}

// The same for pixels: each has the value of its cell.
template <class Acc, class Take>
SPARTA_DEVICE void spatial_factors(const GateShape& s, const Dense& spatial, int64_t sample, int64_t first, int count,
                                   Take take) {
  with_type(spatial.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(spatial.data) + sample * s.cells();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      int64_t cell = first + i;
      if (s.share > 1) cell = cell / s.width / s.share * s.cells_wide() + cell % s.width / s.share;
      take(i, static_cast<Acc>(widen(from[cell])));
    }
  });
}

// Calls take_row and take_col for the factors of a block's rows and columns: the channels' and the cells', as they are.
template <class Acc, class TakeRow, class TakeCol>
SPARTA_DEVICE void block_factors(const GateShape& s, const Dense& spatial, const Dense& channel, const Tile& tile,
                                 TakeRow take_row, TakeCol take_col) {
  if (s.planar) {
    channel_factors<Acc>(s, channel, tile.sample, tile.first_row, tile.rows, take_row);
    spatial_factors<Acc>(s, spatial, tile.sample, tile.first_col, tile.cols, take_col);
  } else {
    spatial_factors<Acc>(s, spatial, tile.sample, tile.first_row, tile.rows, take_row);
    channel_factors<Acc>(s, channel, tile.sample, tile.first_col, tile.cols, take_col);
  }
}

// The kernel of a sample, 1 where there is none.
template <class Acc>
SPARTA_DEVICE Acc kernel_of(const Dense& kernel, int64_t sample) {
  return kernel.data == nullptr ? Acc{1} : read<Acc>(kernel, sample);
}

// Whether an image is read and written in vectors of T. Strides between fewer than two samples or rows say nothing.
template <class T>
bool in_vectors(const GateShape& s, const Matrices& m) {
  const int64_t rows = s.planar ? s.channels : s.pixels(), cols = s.planar ? s.pixels() : s.channels;
  return cols % kVector<T> == 0 && address(m.data) % 16 == 0 && (s.samples < 2 || m.sample_stride % kVector<T> == 0) &&
         (rows < 2 || m.row_stride % kVector<T> == 0);
}

}  // namespace cuda
}  // namespace sparta
