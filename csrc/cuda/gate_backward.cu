// The gate on a CUDA device, backward: x and gy are read once, gx is written once, and the two factors' gradients are
// summed on the way.
//
// Sums of columns grow in registers, sums of rows are finished by the lanes of a warp; both are then added up over the
// block in shared memory. Where a sample is one block, that block finishes the small gradients too; otherwise blocks leave
// their sums in scratch memory, and a second kernel adds them in order. How samples are cut follows from the tensors'
// shape, dtype and alignment alone, so results are the same bits every time, on every device.
#include "gate.cuh"

namespace sparta {
namespace cuda {
namespace {

template <int vector>
constexpr int kBatch = vector == 1 ? 8 : 4;  // rows that a thread has in flight

// Every block's sums, in scratch: (samples, row_blocks, cols) of columns and (samples, col_blocks, rows) of rows.
template <class Acc>
struct Partials {
  Acc *cols, *rows;

  Partials(void* scratch, const Tiles& tiles, int64_t samples)
      : cols(static_cast<Acc*>(scratch)), rows(cols + samples * tiles.row_blocks * tiles.cols) {}
};

// ---- from sums to gradients ------------------------------------------------------------------------------------------
// With gz = gy * relu(x) * phi * (1 - phi), summed without the factor kernel:
//   pixel_sum(p) = sum over channels of gz * channel        gspatial = kernel * pixel_sum, summed over a cell's pixels
//   channel_sum(c) = sum over pixels of gz * spatial        gchannel = kernel * channel_sum
// and gkernel = sum over c of channel * channel_sum.

template <class Acc, class PixelSum>
SPARTA_DEVICE void finish_cells(const GateBackward& args, int64_t sample, int64_t first, int64_t last,
                                PixelSum pixel_sum) {
  if (args.grad_spatial.data == nullptr) return;
  const GateShape& s = args.shape;
  const int64_t cells = s.cells();
  const Acc kernel = kernel_of<Acc>(args.kernel, sample);
  if (s.share == 1) {
    for (int64_t cell = first + threadIdx.x; cell < last; cell += blockDim.x)
      write(args.grad_spatial, sample * cells + cell, kernel * pixel_sum(cell));
    return;
  }
  // A warp sums a large cell, a thread a small one.
  const int team = s.share > 4 ? kWarp : 1;
  for (int64_t cell = first + threadIdx.x / team; cell < last; cell += blockDim.x / team) {
    const int64_t h = cell / s.cells_wide() * s.share, w = cell % s.cells_wide() * s.share;
    const int64_t width = min(s.share, s.width - w), pixels = min(s.share, s.height - h) * width;
    Acc sum = 0;
    for (int64_t i = threadIdx.x % team; i < pixels; i += team) sum += pixel_sum((h + i / width) * s.width + w + i % width);
    if (team == kWarp) sum = sum_lanes(sum, 1, kWarp);
    if (threadIdx.x % team == 0) write(args.grad_spatial, sample * cells + cell, kernel * sum);
  }
}

// By a whole block.
template <class Acc, class ChannelSum>
SPARTA_DEVICE void finish_channels(const GateBackward& args, int64_t sample, ChannelSum channel_sum) {
  __shared__ Acc memory[kThreads / kWarp];
  const int64_t channels = args.shape.channels;
  const Acc kernel = kernel_of<Acc>(args.kernel, sample);
  Acc grad_kernel = 0;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const Acc sum = channel_sum(c);
    if (args.grad_channel.data != nullptr) write(args.grad_channel, sample * channels + c, kernel * sum);
    if (args.grad_kernel.data != nullptr) grad_kernel += read<Acc>(args.channel, sample * channels + c) * sum;
  }
  if (args.grad_kernel.data == nullptr) return;
  grad_kernel = sum_block(grad_kernel, memory);
  if (threadIdx.x == 0) write(args.grad_kernel, sample, grad_kernel);
}

// ---- the first kernel ------------------------------------------------------------------------------------------------

template <class Acc>
struct RowFactor {
  Acc plain, scaled;  // as it is; times the kernel and the logit's scale
};

template <class T, int vector>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    backward_kernel(GateBackward args, Tiles tiles, Partials<typename Accumulator<T>::type> partials) {
  using Acc = typename Accumulator<T>::type;
  constexpr int batch = kBatch<vector>;
  __shared__ RowFactor<Acc> row_factor[kMaxRows];
  __shared__ Acc row_slots[kMaxRows];  // a row's sum from every warp that works on it
  __shared__ alignas(16) Acc col_slots[kThreads * vector];  // the columns' factors; later sums, a line for every warp's rows

  const Tile tile(tiles);
  const int lanes = tiles.lanes, step = tiles.row_step();
  const int lane = threadIdx.x % lanes, col = lane * vector;
  const bool inside = col < tile.cols;
  int row = threadIdx.x / lanes;
  const int64_t x_step = step * args.x.row_stride, gy_step = step * args.gy.row_stride;
  const int64_t gx_step = step * args.gx.row_stride;
  const T* x = tile.template start<const T>(args.x) + row * args.x.row_stride + col;
  const T* gy = tile.template start<const T>(args.gy) + row * args.gy.row_stride + col;
  T* gx = tile.template start<T>(args.gx) + row * args.gx.row_stride + col;
  const bool want_input = args.gx.data != nullptr;

  Pack<T, vector> x_packs[batch], gy_packs[batch];
  const auto read_batch = [&] {
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const bool wanted = inside && row + i * step < tile.rows;
      x_packs[i] = read_once<T, vector>(x + i * x_step, wanted);
      gy_packs[i] = read_once<T, vector>(gy + i * gy_step, wanted);
    }
  };
  read_batch();  // on its way while the factors are fetched

  const Acc scale = static_cast<Acc>(kLogitScale) * kernel_of<Acc>(args.kernel, tile.sample);
  block_factors<Acc>(
      args.shape, args.spatial, args.channel, tile,
      [&](int i, Acc value) {
        row_factor[i] = {value, value * scale};
      },
      [&](int i, Acc value) { col_slots[i] = value; });
  __syncthreads();
  Acc col_factor[vector], col_sum[vector];
#pragma unroll
  for (int j = 0; j < vector; ++j) {
    col_factor[j] = inside ? col_slots[col + j] : Acc{0};
    col_sum[j] = 0;
  }
  __syncthreads();  // before sums are written over the factors

  // A row is summed by `near` lanes of a warp, and by `across` warps.
  const int near = lanes < kWarp ? lanes : kWarp, across = lanes / near;
  const int warp_across = lane / near;
  const bool first_lane = lane % near == 0;
  const int batches = (tile.rows + batch * step - 1) / (batch * step);
  for (int b = 0; b < batches; ++b) {
    if (b > 0) read_batch();
    Acc row_sum[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      row_sum[i] = 0;
      if (!inside || row + i * step >= tile.rows) continue;
      const RowFactor<Acc> factor = row_factor[row + i * step];
      Acc x_values[vector], gy_values[vector], gx_values[vector];
      widen_all(x_packs[i], x_values);
      widen_all(gy_packs[i], gy_values);
#pragma unroll
      for (int j = 0; j < vector; ++j) {
        const Sigmoid<Acc> phi = sigmoid_scaled<kSignificantBits<T>>(factor.scaled * col_factor[j]);
        gx_values[j] = gate_grad_input(x_values[j], gy_values[j], phi.value);
        const Acc gz = gate_grad_logit(x_values[j], gy_values[j], phi);
        row_sum[i] += gz * col_factor[j];
        col_sum[j] += gz * factor.plain;
      }
      if (want_input) store(gx + i * gx_step, narrow_all<T>(gx_values));
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      row_sum[i] = sum_lanes(row_sum[i], 1, near);
      if (first_lane && row + i * step < tile.rows) row_slots[(row + i * step) * across + warp_across] = row_sum[i];
    }
    row += batch * step;
    x += batch * x_step;
    gy += batch * gy_step;
    gx += batch * gx_step;
  }

  // Columns: over the rows of a warp here, over warps where the sum is used.
  const int lines = max(1, step / (kWarp / near)), line = threadIdx.x / (lanes > kWarp ? lanes : kWarp);
#pragma unroll
  for (int j = 0; j < vector; ++j) {
    col_sum[j] = sum_lanes(col_sum[j], near, kWarp);
    if (threadIdx.x % kWarp < near && inside) col_slots[line * tiles.block_cols + col + j] = col_sum[j];
  }
  __syncthreads();

  const auto sum_of_row = [&](int64_t r) {
    Acc sum = row_slots[r * across];
    for (int i = 1; i < across; ++i) sum += row_slots[r * across + i];
    return sum;
  };
  const auto sum_of_col = [&](int64_t c) {
    Acc sum = col_slots[c];
    for (int i = 1; i < lines; ++i) sum += col_slots[i * tiles.block_cols + c];
    return sum;
  };
  if (tiles.blocks() > 1) {
    Acc* cols = partials.cols + (tile.sample * tiles.row_blocks + tile.row_block) * tiles.cols + tile.first_col;
    Acc* rows = partials.rows + (tile.sample * tiles.col_blocks + tile.col_block) * tiles.rows + tile.first_row;
    for (int c = threadIdx.x; c < tile.cols; c += blockDim.x) cols[c] = sum_of_col(c);
    for (int r = threadIdx.x; r < tile.rows; r += blockDim.x) rows[r] = sum_of_row(r);
  } else if (args.shape.planar) {
    finish_cells<Acc>(args, tile.sample, 0, args.shape.cells(), sum_of_col);
    finish_channels<Acc>(args, tile.sample, sum_of_row);
  } else {
    finish_cells<Acc>(args, tile.sample, 0, args.shape.cells(), sum_of_row);
    finish_channels<Acc>(args, tile.sample, sum_of_col);
  }
}

// ---- the second kernel -----------------------------------------------------------------------------------------------

// A sample's first block finishes the channels, the others `block_cells` cells each.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(GateBackward args, Tiles tiles, Partials<Acc> partials, int64_t cell_blocks, int64_t block_cells) {
  const int64_t sample = blockIdx.x / (1 + cell_blocks), block = blockIdx.x % (1 + cell_blocks) - 1;
  const Acc* cols = partials.cols + sample * tiles.row_blocks * tiles.cols;
  const Acc* rows = partials.rows + sample * tiles.col_blocks * tiles.rows;
  const auto added = [](const Acc* from, int64_t count, int64_t stride) {
    Acc sum = 0;
#pragma unroll 8
    for (int64_t i = 0; i < count; ++i) sum += from[i * stride];
    return sum;
  };
  const auto sum_of_col = [&](int64_t c) { return added(cols + c, tiles.row_blocks, tiles.cols); };
  const auto sum_of_row = [&](int64_t r) { return added(rows + r, tiles.col_blocks, tiles.rows); };
  const bool planar = args.shape.planar;
  if (block < 0) {
    finish_channels<Acc>(args, sample, [&](int64_t c) { return planar ? sum_of_row(c) : sum_of_col(c); });
  } else {
    const int64_t first = block * block_cells, last = min(first + block_cells, args.shape.cells());
    finish_cells<Acc>(args, sample, first, last, [&](int64_t p) { return planar ? sum_of_col(p) : sum_of_row(p); });
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

// A sample in one block, unless it is large, or there are too few samples to fill a large GPU.
Tiles backward_tiles(const GateShape& s, int vector, int batch) {
  constexpr int64_t most_elements = 1 << 17, enough_blocks = 255;
  Tiles tiles(s, vector);
  const int64_t across = max(1, tiles.lanes / kWarp), batch_rows = batch * tiles.row_step();
  const int64_t most_rows = min(kMaxRows / across, max(batch_rows, most_elements / tiles.block_cols));
  const int64_t wanted_blocks = max(1, enough_blocks / max(1, s.samples * tiles.col_blocks));
  tiles.cut_rows(min(most_rows, max(batch_rows, ceil_div(tiles.rows, wanted_blocks))));
  return tiles;
}

template <class T, int vector>
void backward(const GateBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const GateShape& s = args.shape;
  const Tiles tiles = backward_tiles(s, vector, kBatch<vector>);
  const Partials<Acc> partials(args.scratch, tiles, s.samples);
  launch("gate_backward", args.place, s.samples * tiles.blocks(), tiles.threads, backward_kernel<T, vector>, args, tiles,
         partials);
  if (tiles.blocks() == 1) return;
  const int64_t block_cells = s.share > 4 ? kThreads / kWarp : kThreads, cell_blocks = ceil_div(s.cells(), block_cells);
  launch("gate_backward", args.place, s.samples * (1 + cell_blocks), kThreads, finish_kernel<Acc>, args, tiles, partials,
         cell_blocks, block_cells);
}

}  // namespace

void gate_backward(const GateBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (in_vectors<T>(args.shape, args.x) && in_vectors<T>(args.shape, args.gy) &&
        (args.gx.data == nullptr || in_vectors<T>(args.shape, args.gx)))
      return backward<T, kVector<T>>(args);
    return backward<T, 1>(args);
  });
}

// For the tensors' shape and dtype, however they lie.
int64_t gate_backward_scratch(const GateShape& s, DType dtype, const Place&) {
  int64_t bytes = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (const int vector : {1, kVector<T>}) {
      const Tiles tiles = backward_tiles(s, vector, vector == 1 ? kBatch<1> : kBatch<kVector<T>>);
      if (tiles.blocks() == 1) continue;
      const int64_t sums = s.samples * (tiles.row_blocks * tiles.cols + tiles.col_blocks * tiles.rows);
      bytes = max(bytes, sums * static_cast<int64_t>(sizeof(typename Accumulator<T>::type)));
    }
  });
  return bytes;
}

}  // namespace cuda
}  // namespace sparta
