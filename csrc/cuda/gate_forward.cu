// The gate on a CUDA device, forward: x is read once, y is written once.
#include "gate.cuh"

namespace sparta {
namespace cuda {
namespace {

template <int vector>
constexpr int kBatch = vector == 1 ? 8 : 4;  // rows that a thread has in flight

template <class T, int vector>
__global__ void __launch_bounds__(kThreads) forward_kernel(GateForward args, Tiles tiles) {
  using Acc = typename Accumulator<T>::type;
  constexpr int batch = kBatch<vector>;
  __shared__ Acc row_factor[kMaxRows];
  __shared__ alignas(16) Acc col_factor[kThreads * vector];

  const Tile tile(tiles);
  const int lane = threadIdx.x % tiles.lanes, step = tiles.row_step();
  const int col = lane * vector;
  const bool inside = col < tile.cols;
  int row = threadIdx.x / tiles.lanes;
  const T* x = tile.template start<const T>(args.x) + row * args.x.row_stride + col;
  T* y = tile.template start<T>(args.y) + row * args.y.row_stride + col;

  Pack<T, vector> packs[batch];
  const auto read_batch = [&] {
#pragma unroll
    for (int i = 0; i < batch; ++i)
      packs[i] = read_once<T, vector>(x + i * step * args.x.row_stride, inside && row + i * step < tile.rows);
  };
  read_batch();  // on its way while the factors are fetched

  const Acc scale = static_cast<Acc>(kLogitScale) * kernel_of<Acc>(args.kernel, tile.sample);
  block_factors<Acc>(
      args.shape, args.spatial, args.channel, tile, [&](int i, Acc value) { row_factor[i] = value * scale; },
      [&](int i, Acc value) { col_factor[i] = value; });
  __syncthreads();
  if (!inside) return;
  Acc cols[vector];
#pragma unroll
  for (int j = 0; j < vector; ++j) cols[j] = col_factor[col + j];

  while (true) {
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (row + i * step >= tile.rows) break;
      const Acc factor = row_factor[row + i * step];
      Acc values[vector];
      widen_all(packs[i], values);
#pragma unroll
      for (int j = 0; j < vector; ++j)
        values[j] = gate(values[j], sigmoid_scaled<kSignificantBits<T>>(factor * cols[j]).value);
      store(y + i * step * args.y.row_stride, narrow_all<T>(values));
    }
    row += batch * step;
    if (row >= tile.rows) return;
    x += batch * step * args.x.row_stride;
    y += batch * step * args.y.row_stride;
    read_batch();
  }
}

template <class T, int vector>
void forward(const GateForward& args) {
  Tiles tiles(args.shape, vector);
  if (tiles.rows == 0 || tiles.cols == 0) return;
  // Two batches a thread: enough that fetching factors does not show. One where that leaves multiprocessors idle.
  const int64_t batch_rows = kBatch<vector> * tiles.row_step();
  tiles.cut_rows(2 * batch_rows);
  if (args.shape.samples * tiles.blocks() < 1024) tiles.cut_rows(batch_rows);
  launch("gate_forward", args.place, args.shape.samples * tiles.blocks(), tiles.threads, forward_kernel<T, vector>, args,
         tiles);
}

}  // namespace

void gate_forward(const GateForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (in_vectors<T>(args.shape, args.x) && in_vectors<T>(args.shape, args.y)) return forward<T, kVector<T>>(args);
    return forward<T, 1>(args);
  });
}

}  // namespace cuda
}  // namespace sparta
