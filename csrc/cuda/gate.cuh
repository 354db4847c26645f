// What the gate's two passes share on a CUDA device.
//
// z = s[pixel] * channel[channel] is an outer product, so the two memory formats are the same problem with the roles of
// pixel and channel exchanged. The kernels speak of rows and columns of one matrix a sample: its rows are contiguous,
// and `row factor * column factor` is the sigmoid's argument. A thread works on one vector of columns, whose factors it
// keeps in registers, and on many rows, whose factors the block keeps in shared memory.
#pragma once

#include "common.cuh"

namespace sparta {
namespace cuda {

constexpr int kMaxRows = 1024;  // of a block: their factors lie in shared memory

// How many rows a thread has in flight.
template <class T, int vector>
constexpr int kRing = vector == 1 ? 8 : (sizeof(T) == 8 ? 2 : 4);

// How a sample's matrix is cut into blocks of threads. A block has `lanes` = 2^lane_bits threads side by side along a
// row, and `row_step` such lines of threads one below the other.
struct Tiles {
  int rows, cols;  // of a sample
  int width, share, cells_wide, cells;
  bool planar;
  int threads, lanes, lane_bits, row_step;
  int block_rows, block_cols;  // that a block works on, at most
  int row_blocks, col_blocks;  // in a sample, at least one

  SPARTA_INLINE int64_t blocks() const { return int64_t{row_blocks} * col_blocks; }

  // Columns in blocks of `lanes` vectors; all rows in one block.
  Tiles(const char* operation, const GateShape& s, int vector) : planar(s.planar) {
    if (max(s.channels, s.pixels()) > 0x7fffffff)
      throw std::runtime_error(std::string(operation) + ": x must have less than 2^31 pixels and channels, got " +
                               std::to_string(s.height) + " x " + std::to_string(s.width) + " and " +
                               std::to_string(s.channels));
    rows = static_cast<int>(s.planar ? s.channels : s.pixels());
    cols = static_cast<int>(s.planar ? s.pixels() : s.channels);
    width = static_cast<int>(s.width);
    share = static_cast<int>(s.share);
    cells_wide = static_cast<int>(s.cells_wide());
    cells = static_cast<int>(s.cells());
    const int64_t vectors = max(1, ceil_div(cols, vector));
    const int64_t block_vectors = ceil_div(vectors, ceil_div(vectors, kThreads));
    col_blocks = static_cast<int>(ceil_div(vectors, block_vectors));
    block_cols = static_cast<int>(block_vectors * vector);
    for (lane_bits = 0; 1 << lane_bits < block_vectors;) ++lane_bits;
    lanes = 1 << lane_bits;
    for (threads = kThreads; threads > kWarp && threads / 2 >= lanes * max(1, rows);) threads /= 2;
    row_step = threads / lanes;
    cut_rows(rows);
  }
  // Rows in blocks of at most `most`.
  void cut_rows(int64_t most) {
    const int64_t blocks = max(1, ceil_div(rows, max(1, min(most, kMaxRows))));
    block_rows = static_cast<int>(max(1, ceil_div(rows, blocks)));
    row_blocks = static_cast<int>(max(1, ceil_div(rows, block_rows)));
  }
};

// A thread's place in its line of threads, and which line that is.
SPARTA_DEVICE int lane_of(const Tiles& tiles) { return static_cast<int>(threadIdx.x) & (tiles.lanes - 1); }
SPARTA_DEVICE int row_of(const Tiles& tiles) { return static_cast<int>(threadIdx.x) >> tiles.lane_bits; }

// One block's place in the batch.
struct Tile {
  int64_t sample;
  int row_block, col_block;
  int first_row, first_col;
  int rows, cols;

  SPARTA_DEVICE explicit Tile(const Tiles& tiles) {
    const unsigned row_of_blocks = blockIdx.x / static_cast<unsigned>(tiles.col_blocks);
    col_block = static_cast<int>(blockIdx.x % static_cast<unsigned>(tiles.col_blocks));
    sample = row_of_blocks / static_cast<unsigned>(tiles.row_blocks);
    row_block = static_cast<int>(row_of_blocks % static_cast<unsigned>(tiles.row_blocks));
    first_row = row_block * tiles.block_rows;
    first_col = col_block * tiles.block_cols;
    rows = tiles.rows - first_row < tiles.block_rows ? tiles.rows - first_row : tiles.block_rows;
    cols = tiles.cols - first_col < tiles.block_cols ? tiles.cols - first_col : tiles.block_cols;
  }

  // Where a thread's first vector lies: `row` and `col` count from the block's first.
  template <class T>
  SPARTA_DEVICE T* at(const Matrices& m, int row, int col) const {
    return static_cast<T*>(m.data) + sample * m.sample_stride + (int64_t{first_row} + row) * m.row_stride +
           int64_t{first_col} + col;
  }
};

// Fetches the unscaled factors of a block's rows and columns (a pixel has the value of its cell) by all its threads, which
// must synchronise afterwards. Even warps fetch those of rows and odd ones those of columns, four loads at a time, since
// the block cannot begin before it has them all.
template <class Acc>
SPARTA_DEVICE void fetch_factors(const Tiles& tiles, const Tile& tile, const Dense& spatial, const Dense& channel,
                                 Acc* row_factor, Acc* col_factor) {
  constexpr int together = 4;
  const int warp = threadIdx.x / kWarp, teams = blockDim.x > kWarp ? 2 : 1;
  const int thread = warp / teams * kWarp + threadIdx.x % kWarp, threads = blockDim.x / teams;
#pragma unroll 1
  for (int team = warp % teams; team < 2; team += teams) {
    const bool rows = team == 0, pixels = rows != tiles.planar, spread = pixels && tiles.share > 1;
    const int first = rows ? tile.first_row : tile.first_col, count = rows ? tile.rows : tile.cols;
    Acc* to = rows ? row_factor : col_factor;
    const Dense& small = pixels ? spatial : channel;
    const int64_t start = tile.sample * (pixels ? tiles.cells : rows ? tiles.rows : tiles.cols);
#pragma unroll 1
    for (int i = thread; i < count; i += together * threads) {
      unsigned at[together];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        at[k] = first + (i + k * threads < count ? i + k * threads : i);
        if (spread) {
          const unsigned h = at[k] / tiles.width, w = at[k] % tiles.width;
          at[k] = h / tiles.share * tiles.cells_wide + w / tiles.share;
        }
      }
      with_type(small.dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(small.data) + start;
        decltype(type) values[together];
#pragma unroll
        for (int k = 0; k < together; ++k) values[k] = from[at[k]];
#pragma unroll
        for (int k = 0; k < together; ++k)
          if (i + k * threads < count) to[i + k * threads] = static_cast<Acc>(widen(values[k]));
      });
    }
  }
}

// A sample's kernel, 1 where there is none: loaded early, decoded when it is needed.
class SampleKernel {
 public:
  SPARTA_DEVICE SampleKernel(const Dense& kernel, int64_t sample)
      : bits_(kernel.data == nullptr ? 0 : read_bits(kernel, sample)) {}

  template <class Acc>
  SPARTA_DEVICE Acc value(const Dense& kernel) const {
    return kernel.data == nullptr ? Acc{1} : decode<Acc>(kernel.dtype, bits_);
  }

 private:
  uint64_t bits_;
};

// Whether an image is read and written in vectors of T.
template <class T>
bool in_vectors(const GateShape& s, const Matrices& m) {
  return in_vectors<T, kVector<T>>(m, s.samples, s.planar ? s.channels : s.pixels(), s.planar ? s.pixels() : s.channels);
}

}  // namespace cuda
}  // namespace sparta
