// The gate on a CUDA device, forward: x is read once, y is written once.
#include "gate.cuh"

namespace sparta {
namespace cuda {
namespace {

struct Steps {
  int64_t x, y;  // from one of a thread's rows to the next, in elements
};

// Blocks that a multiprocessor holds at once: of whole vectors five, with 16 kB in flight each.
template <class T, int vector>
constexpr int kBlocks = sizeof(T) == 8 || vector == 1 ? 3 : 5;

template <class T, int vector>
__global__ void __launch_bounds__(kThreads, kBlocks<T, vector>)
    forward_kernel(GateForward args, Tiles tiles, Steps steps) {
  using Acc = typename Accumulator<T>::type;
  constexpr int ring = kRing<T, vector>;
  using Rows = Ring<T, vector, ring>;
  __shared__ typename Rows::Vector x_memory[Rows::room];
  __shared__ alignas(16) Acc col_factor[kThreads * vector];
  __shared__ Acc row_factor[kMaxRows];

  const Tile tile(tiles);
  const int step = tiles.row_step, col = lane_of(tiles) * vector;
  const int rows = col < tile.cols ? tile.rows : 0;  // of this thread's columns
  int row = row_of(tiles);
  const T* x = tile.template at<const T>(args.x, row, col);
  T* y = tile.template at<T>(args.y, row, col);

  // When a row has been used, the load of the one `ring` rows further on is started.
  Rows x_ring(x_memory);
  const auto send_for = [&](int place, int which) {
    x_ring.send_for(place, x, which < rows);
    x_ring.sent();
    x += steps.x;
  };
#pragma unroll
  for (int i = 0; i < ring; ++i) send_for(i, row + i * step);

  const SampleKernel kernel(args.kernel, tile.sample);
  fetch_factors(tiles, tile, args.spatial, args.channel, row_factor, col_factor);
  __syncthreads();
  const Acc scale = static_cast<Acc>(kLogitScale) * kernel.value<Acc>(args.kernel);
  Acc cols[vector];
#pragma unroll
  for (int j = 0; j < vector; ++j) cols[j] = col_factor[col + j];

  while (true) {
#pragma unroll
    for (int i = 0; i < ring; ++i, row += step, y += steps.y) {
      if (row >= rows) return;
      x_ring.template wait<ring - 1>();
      const Acc factor = row_factor[row] * scale;
      Acc values[vector];
      widen_all(x_ring.take(i), values);
#pragma unroll
      for (int j = 0; j < vector; ++j)
        values[j] = gate(values[j], sigmoid_scaled<kSignificantBits<T>>(factor * cols[j]).value);
      store(y, narrow_all<T>(values));
      send_for(i, row + ring * step);
    }
  }
}

template <class T, int vector>
void forward(const GateForward& args) {
  Tiles tiles("gate_forward", args.shape, vector);
  if (tiles.rows == 0 || tiles.cols == 0) return;
  // A thread goes around its ring twice, which is enough to amortise fetching the factors; or once, where there would
  // otherwise be too few blocks for a large GPU.
  const int64_t ring_rows = int64_t{kRing<T, vector>} * tiles.row_step;
  tiles.cut_rows(2 * ring_rows);
  if (args.shape.samples * tiles.blocks() < 1024) tiles.cut_rows(ring_rows);
  launch("gate_forward", args.place, args.shape.samples * tiles.blocks(), tiles.threads, forward_kernel<T, vector>,
         args, tiles, Steps{tiles.row_step * args.x.row_stride, tiles.row_step * args.y.row_stride});
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
