// The gate on a CUDA device, backward: x and gy are read once, gx is written once, and the two factors' gradients are
// summed on the way.
//
// Sums of columns are kept in registers, sums of rows are reduced over a warp's lanes; both are then added up over the
// block in shared memory. Where a sample is one block, that block finishes the small gradients too; otherwise blocks
// leave their sums in scratch memory, and a second kernel adds them in order. How samples are cut follows from the
// tensors' shape, dtype and alignment alone, so results are bitwise the same every time, on every device.
#include "gate.cuh"

namespace sparta {
namespace cuda {
namespace {

// Every block's sums, in scratch: (samples, row_blocks, cols) of columns and (samples, col_blocks, rows) of rows.
template <class Acc>
struct Partials {
  Acc *cols, *rows;

  Partials(void* scratch, const Tiles& tiles, int64_t samples)
      : cols(static_cast<Acc*>(scratch)), rows(cols + samples * tiles.row_blocks * tiles.cols) {}
};

// ---- from sums to gradients -------------------------------------------------------------------------------
// With gz = gy * relu(x) * phi * (1 - phi), summed without the factor kernel:
//   pixel_sum(p) = sum over channels of gz * channel        gspatial = kernel * pixel_sum, summed over a cell's pixels
//   channel_sum(c) = sum over pixels of gz * spatial        gchannel = kernel * channel_sum
// and gkernel = sum over c of channel * channel_sum.

// Sums of the rows or the columns of a block or a sample, each in `count` parts.
template <class Acc>
struct Sums {
  const Acc* parts;
  int stride, count;
  int64_t part_stride;

  SPARTA_DEVICE Acc of(int i) const {
    Acc sum = 0;
#pragma unroll 4
    for (int k = 0; k < count; ++k) sum += parts[int64_t{i} * stride + k * part_stride];
    return sum;
  }
};

// a or b. Field by field: selecting whole structures would go through local memory.
template <class Acc>
SPARTA_DEVICE Sums<Acc> choose(bool first, const Sums<Acc>& a, const Sums<Acc>& b) {
  return {first ? a.parts : b.parts, first ? a.stride : b.stride, first ? a.count : b.count,
          first ? a.part_stride : b.part_stride};
}

template <class Acc>
SPARTA_DEVICE void finish_cells(const GateBackward& args, const Tiles& tiles, int64_t sample, Acc kernel, int first,
                                int last, const Sums<Acc>& of_pixels) {
  if (args.grad_spatial.data == nullptr) return;
  const int team = tiles.share > 4 ? kWarp : 1;  // a warp sums a large cell, a thread a small one
#pragma unroll 1
  for (int cell = first + threadIdx.x / team; cell < last; cell += blockDim.x / team) {
    Acc sum[1] = {0};
    if (tiles.share == 1) {
      sum[0] = of_pixels.of(cell);
    } else {
      const int h = cell / tiles.cells_wide * tiles.share, w = cell % tiles.cells_wide * tiles.share;
      const int end_h = static_cast<int>(min(int64_t{h} + tiles.share, args.shape.height));
      const int end_w = static_cast<int>(min(int64_t{w} + tiles.share, args.shape.width));
#pragma unroll 1
      for (int i = h; i < end_h; ++i)
#pragma unroll 1
        for (int j = w + threadIdx.x % team; j < end_w; j += team) sum[0] += of_pixels.of(i * tiles.width + j);
      sum_lanes(sum, 1, team);
    }
    if (threadIdx.x % team == 0) write(args.grad_spatial, sample * tiles.cells + cell, kernel * sum[0]);
  }
}

// Called by a whole block; `memory` is shared, with room for one number per warp.
template <class Acc>
SPARTA_DEVICE void finish_channels(const GateBackward& args, int64_t sample, Acc kernel, const Sums<Acc>& of_channels,
                                   Acc* memory) {
  const int channels = static_cast<int>(args.shape.channels);
  Acc grad_kernel = 0;
#pragma unroll 1
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    const Acc sum = of_channels.of(c);
    const int64_t at = sample * channels + c;
    if (args.grad_channel.data != nullptr) write(args.grad_channel, at, kernel * sum);
    if (args.grad_kernel.data != nullptr) grad_kernel += read<Acc>(args.channel, at) * sum;
  }
  if (args.grad_kernel.data == nullptr) return;
  grad_kernel = sum_block(grad_kernel, memory);
  if (threadIdx.x == 0) write(args.grad_kernel, sample, grad_kernel);
}

// ---- the first kernel -------------------------------------------------------------------------------------

struct Steps {
  int64_t x, gy, gx;  // from one of a thread's rows to the next, in elements
};

// Blocks that a multiprocessor holds at once: of whole vectors four, with 32 kB in flight each.
template <class T, int vector>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : (vector == 1 ? 3 : 4);

template <class T, int vector>
__global__ void __launch_bounds__(kThreads, kBlocks<T, vector>)
    backward_kernel(GateBackward args, Tiles tiles, Steps steps, Partials<typename Accumulator<T>::type> partials) {
  using Acc = typename Accumulator<T>::type;
  constexpr int ring = kRing<T, vector>;
  using Rows = Ring<T, vector, ring>;
  __shared__ typename Rows::Vector x_memory[Rows::room];
  __shared__ typename Rows::Vector gy_memory[Rows::room];
  __shared__ alignas(16) Acc col_slots[kThreads * vector];  // the columns' factors; later sums, by lines of threads
  __shared__ Acc row_factor[kMaxRows];
  __shared__ Acc row_slots[kMaxRows];  // a row's sum from every warp that works on it

  const Tile tile(tiles);
  const int step = tiles.row_step, lane = lane_of(tiles), col = lane * vector;
  const int rows = col < tile.cols ? tile.rows : 0;  // of this thread's columns
  int row = row_of(tiles);
  const T* x = tile.template at<const T>(args.x, row, col);
  const T* gy = tile.template at<const T>(args.gy, row, col);
  T* gx = tile.template at<T>(args.gx, row, col);

  // When a row has been used, the load of the one `ring` rows further on is started.
  Rows x_ring(x_memory), gy_ring(gy_memory);
  const auto send_for = [&](int place, int which) {
    x_ring.send_for(place, x, which < rows);
    gy_ring.send_for(place, gy, which < rows);
    Rows::sent();
    x += steps.x;
    gy += steps.gy;
  };
#pragma unroll
  for (int i = 0; i < ring; ++i) send_for(i, row + i * step);

  const SampleKernel sample_kernel(args.kernel, tile.sample);
  fetch_factors(tiles, tile, args.spatial, args.channel, row_factor, col_slots);
  __syncthreads();
  const Acc scale = static_cast<Acc>(kLogitScale) * sample_kernel.value<Acc>(args.kernel);
  Acc col_factor[vector], col_sum[vector];
#pragma unroll
  for (int j = 0; j < vector; ++j) {
    col_factor[j] = col_slots[col + j];  // beyond the last column undefined, and unused
    col_sum[j] = 0;
  }
  __syncthreads();  // before sums are written over the factors

  // A row is summed by `near` lanes of a warp, and by `across` warps.
  const bool wide = tiles.lanes > kWarp;
  const int near = wide ? kWarp : tiles.lanes, across = wide ? tiles.lanes / kWarp : 1;
  const int slot = (lane & (near - 1)) == 0 ? lane / kWarp : -1;
#pragma unroll 1
  for (int first = 0; first < tile.rows; first += ring * step) {
    Acc row_sum[ring];
#pragma unroll
    for (int i = 0; i < ring; ++i, gx += steps.gx) {
      Rows::template wait<ring - 1>();
      row_sum[i] = 0;
      if (row + i * step < rows) {
        const Acc factor = row_factor[row + i * step], scaled = factor * scale;
        Acc x_values[vector], gy_values[vector], gx_values[vector];
        widen_all(x_ring.take(i), x_values);
        widen_all(gy_ring.take(i), gy_values);
#pragma unroll
        for (int j = 0; j < vector; ++j) {
          const Sigmoid<Acc> phi = sigmoid_scaled<kSignificantBits<T>>(scaled * col_factor[j]);
          gx_values[j] = gate_grad_input(x_values[j], gy_values[j], phi.value);
          const Acc gz = gate_grad_logit(x_values[j], gy_values[j], phi);
          row_sum[i] += gz * col_factor[j];
          col_sum[j] += gz * factor;
        }
        if (args.gx.data != nullptr) store(gx, narrow_all<T>(gx_values));
      }
      send_for(i, row + (ring + i) * step);
    }
    sum_lanes(row_sum, 1, near);
    if (slot >= 0) {
#pragma unroll
      for (int i = 0; i < ring; ++i)
        if (row + i * step < tile.rows) row_slots[(row + i * step) * across + slot] = row_sum[i];
    }
    row += ring * step;
  }

  const SampleKernel kernel_again(args.kernel, tile.sample);  // reloaded: keeping it would have taken a register
  // Columns: over the rows of a warp here, over the block's warps where the sum is used.
  sum_lanes(col_sum, near, kWarp);
  if (threadIdx.x % kWarp < near && col < tile.cols) {
    const int line = wide ? row_of(tiles) : static_cast<int>(threadIdx.x) / kWarp;
    store_all(col_slots + line * tiles.block_cols + col, col_sum);
  }
  __syncthreads();

  const Sums<Acc> of_rows{row_slots, across, across, 1};
  const Sums<Acc> of_cols{col_slots, 1, wide ? step : static_cast<int>(blockDim.x) / kWarp, tiles.block_cols};
  if (tiles.blocks() > 1) {
    Acc* cols = partials.cols + (tile.sample * tiles.row_blocks + tile.row_block) * tiles.cols + tile.first_col;
    Acc* rows = partials.rows + (tile.sample * tiles.col_blocks + tile.col_block) * tiles.rows + tile.first_row;
#pragma unroll 1
    for (int c = threadIdx.x; c < tile.cols; c += blockDim.x) cols[c] = of_cols.of(c);
#pragma unroll 1
    for (int r = threadIdx.x; r < tile.rows; r += blockDim.x) rows[r] = of_rows.of(r);
  } else {
    const Acc kernel = kernel_again.value<Acc>(args.kernel);
    finish_cells(args, tiles, tile.sample, kernel, 0, tiles.cells, choose(tiles.planar, of_cols, of_rows));
    finish_channels(args, tile.sample, kernel, choose(tiles.planar, of_rows, of_cols), row_factor);
  }
}

// ---- the second kernel ------------------------------------------------------------------------------------

// A sample's first block finishes the channels, the others `block_cells` cells each.
template <class Acc>
__global__ void __launch_bounds__(kThreads, 4)
    finish_kernel(GateBackward args, Tiles tiles, Partials<Acc> partials, unsigned blocks, int block_cells) {
  __shared__ Acc memory[kThreads / kWarp];
  const int64_t sample = blockIdx.x / blocks;
  const int block = static_cast<int>(blockIdx.x % blocks);
  const Acc kernel = SampleKernel(args.kernel, sample).value<Acc>(args.kernel);
  const Sums<Acc> of_cols{partials.cols + sample * tiles.row_blocks * tiles.cols, 1, tiles.row_blocks, tiles.cols};
  const Sums<Acc> of_rows{partials.rows + sample * tiles.col_blocks * tiles.rows, 1, tiles.col_blocks, tiles.rows};
  if (block == 0) {
    finish_channels(args, sample, kernel, choose(tiles.planar, of_rows, of_cols), memory);
  } else {
    const int first = (block - 1) * block_cells;
    const int last = tiles.cells - first < block_cells ? tiles.cells : first + block_cells;
    finish_cells(args, tiles, sample, kernel, first, last, choose(tiles.planar, of_cols, of_rows));
  }
}

// ---- launches ---------------------------------------------------------------------------------------------

// A sample in one block, unless it is large, or there are too few samples to fill a large GPU.
template <class T, int vector>
Tiles backward_tiles(const GateShape& s) {
  constexpr int64_t most_elements = 1 << 17, enough_blocks = 255;
  Tiles tiles("gate_backward", s, vector);
  const int64_t across = max(1, tiles.lanes / kWarp), batch_rows = int64_t{kRing<T, vector>} * tiles.row_step;
  const int64_t most_rows = min(kMaxRows / across, max(batch_rows, most_elements / tiles.block_cols));
  const int64_t wanted_blocks = max(1, enough_blocks / max(1, s.samples * tiles.col_blocks));
  tiles.cut_rows(min(most_rows, max(batch_rows, ceil_div(tiles.rows, wanted_blocks))));
  return tiles;
}

template <class T, int vector>
void backward(const GateBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const GateShape& s = args.shape;
  const Tiles tiles = backward_tiles<T, vector>(s);
  const int64_t step = tiles.row_step;
  const Partials<Acc> partials(args.scratch, tiles, s.samples);
  launch("gate_backward", args.place, s.samples * tiles.blocks(), tiles.threads, backward_kernel<T, vector>, args,
         tiles, Steps{step * args.x.row_stride, step * args.gy.row_stride, step * args.gx.row_stride}, partials);
  if (tiles.blocks() == 1) return;
  const int block_cells = s.share > 4 ? kThreads / kWarp : kThreads;
  const int64_t blocks = 1 + ceil_div(tiles.cells, block_cells);
  launch("gate_backward", args.place, s.samples * blocks, kThreads, finish_kernel<Acc>, args, tiles, partials,
         static_cast<unsigned>(blocks), block_cells);
}

template <class T>
bool all_in_vectors(const GateShape& s, const Matrices& x, const Matrices& gy, const Matrices& gx) {
  return in_vectors<T>(s, x) && in_vectors<T>(s, gy) && (gx.data == nullptr || in_vectors<T>(s, gx));
}

}  // namespace

void gate_backward(const GateBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (all_in_vectors<T>(args.shape, args.x, args.gy, args.gx)) return backward<T, kVector<T>>(args);
    return backward<T, 1>(args);
  });
}

int64_t gate_backward_scratch(const GateShape& s, DType dtype, const Matrices& x, const Matrices& gy,
                              const Matrices& gx) {
  int64_t bytes = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Tiles tiles =
        all_in_vectors<T>(s, x, gy, gx) ? backward_tiles<T, kVector<T>>(s) : backward_tiles<T, 1>(s);
    if (tiles.blocks() == 1) return;
    const int64_t sample_sums = int64_t{tiles.row_blocks} * tiles.cols + int64_t{tiles.col_blocks} * tiles.rows;
    bytes = s.samples * sample_sums * static_cast<int64_t>(sizeof(typename Accumulator<T>::type));
  });
  return bytes;
}

}  // namespace cuda
}  // namespace sparta
