// The gate on a CPU: one pass forward (x read, y written), one pass backward (x and gy read, gx written).
//
// z = s[pixel] * channel[channel] is an outer product, so the two memory formats are the same problem with the roles of
// pixel and channel exchanged. Everything below speaks of rows and columns of one matrix a sample: its rows are
// contiguous, `row_factor[r] * col_factor[k]` is the sigmoid's argument, and SIMD runs along the columns.
//
// A task is one sample and one chunk of its pixels (whole bands of `share` image rows). Chunks depend on the shape
// alone and are summed in order, so results are the same for every number of threads.
#include "../kernels.h"
#include "common.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

struct Chunks {
  GateShape shape;
  int64_t bands;  // share-high bands of image rows in a chunk
  int64_t count;  // chunks in a sample, at least one

  explicit Chunks(const GateShape& s) : shape(s) {
    const int64_t band_pixels = max(1, s.share * s.width);
    const int64_t target = max(512, 65536 / max(1, s.channels));  // a chunk of x fits in L2, a row in it is long
    bands = max(1, target / band_pixels);
    count = max(1, ceil_div(ceil_div(s.height, s.share), bands));
  }
  int64_t tasks() const { return shape.samples * count; }
};

// One task's place in the batch.
struct Part {
  int64_t sample, chunk;
  int64_t first_pixel, pixels;
  int64_t first_cell, cells;  // of the spatial map
  int64_t rows, cols;

  Part(const Chunks& chunks, int64_t task) : sample(task / chunks.count), chunk(task % chunks.count) {
    const GateShape& s = chunks.shape;
    const int64_t first_row = chunk * chunks.bands * s.share;
    const int64_t image_rows = min(chunks.bands * s.share, s.height - first_row);
    first_pixel = first_row * s.width;
    pixels = image_rows * s.width;
    first_cell = chunk * chunks.bands * s.cells_wide();
    cells = ceil_div(image_rows, s.share) * s.cells_wide();
    rows = s.planar ? s.channels : pixels;
    cols = s.planar ? pixels : s.channels;
  }

  template <class T>
  T* start(const Matrices& m, bool planar) const {
    return static_cast<T*>(m.data) + sample * m.sample_stride + first_pixel * (planar ? 1 : m.row_stride);
  }
};

// Calls body(pixel, cell), both counted from the part's first, for every pixel of a part.
template <class Body>
SPARTA_INLINE void for_pixels(const GateShape& s, const Part& part, Body body) {
  for (int64_t pixel = 0, row = 0; pixel < part.pixels; ++row) {
    const int64_t first_cell = row / s.share * s.cells_wide();
    for (int64_t column = 0; column < s.width; ++column, ++pixel) body(pixel, first_cell + column / s.share);
  }
}

// A thread's working memory: the two factors of the outer product, and the sums of their gradients.
template <class Acc>
struct Factors {
  Scratch<Acc> cells, pixel, channel, grad_pixel, grad_channel;
  Acc kernel = 1;

  Factors(const Chunks& chunks, bool backward)
      : cells(room(chunks)), pixel(room(chunks)), channel(padded(chunks.shape.channels)),
        grad_pixel(backward ? room(chunks) : 0), grad_channel(backward ? padded(chunks.shape.channels) : 0) {}

  // s = kernel * spatial (the 1x1 Conv5), spread over each cell's pixels; and the channel factor.
  template <class Args>
  void load(const Args& args, const Part& part) {
    const GateShape& s = args.shape;
    kernel = 1;
    if (args.kernel.data != nullptr) read(args.kernel, part.sample, 1, &kernel);
    read(args.channel, part.sample * s.channels, s.channels, static_cast<Acc*>(channel));
    read(args.spatial, part.sample * s.cells() + part.first_cell, part.cells, static_cast<Acc*>(cells));
    if (s.share == 1) {
      for (int64_t i = 0; i < part.pixels; ++i) pixel[i] = kernel * cells[i];
    } else {
      for_pixels(s, part, [&](int64_t p, int64_t cell) { pixel[p] = kernel * cells[cell]; });
    }
  }

  // Columns are read a register at a time, so there is a register's room behind the last.
  static int64_t padded(int64_t count) { return count + kFloatLanes; }
  static int64_t room(const Chunks& chunks) {
    return padded(min(chunks.bands * chunks.shape.share, chunks.shape.height) * chunks.shape.width);
  }
};

template <class T>
SPARTA_INLINE void forward_row(const T* x, T* y, typename Accumulator<T>::type row_factor,
                               const typename Accumulator<T>::type* col_factor, int64_t cols) {
  using Lanes = Simd<T>;
  using Acc = typename Accumulator<T>::type;
  int64_t k = 0;
  for (; k + Lanes::lanes <= cols; k += Lanes::lanes) {
    const auto phi = sigmoid(row_factor * Simd<Acc>::load(col_factor + k));
    Lanes::store(y + k, gate(Lanes::load(x + k), phi));
  }
  if (k < cols) {
    const auto phi = sigmoid(row_factor * Simd<Acc>::load(col_factor + k));
    store_partial(y + k, gate(load_partial(x + k, cols - k), phi), cols - k);
  }
}

template <class T>
void forward(const GateForward& args) {
  using Acc = typename Accumulator<T>::type;
  const Chunks chunks(args.shape);
  const bool planar = args.shape.planar;
  const int64_t tasks = chunks.tasks();
  const int64_t elements = args.shape.samples * args.shape.channels * args.shape.pixels();
#pragma omp parallel num_threads(useful_threads(args.threads, elements))
  {
    Factors<Acc> factors(chunks, false);
    const Acc* row_factor = planar ? factors.channel : factors.pixel;
    const Acc* col_factor = planar ? factors.pixel : factors.channel;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const Part part(chunks, task);
      factors.load(args, part);
      const T* x = part.start<const T>(args.x, planar);
      T* y = part.start<T>(args.y, planar);
      for (int64_t r = 0; r < part.rows; ++r)
        forward_row(x + r * args.x.row_stride, y + r * args.y.row_stride, row_factor[r], col_factor, part.cols);
    }
  }
}

template <class T, bool want_input, bool want_factors>
struct BackwardRow {
  using Acc = typename Accumulator<T>::type;
  using Lanes = Simd<T>;
  using Vector = typename Lanes::Vector;

  const T *x, *gy;
  T* gx;
  Acc row_factor;
  const Acc* col_factor;
  Acc* grad_col;  // added to

  struct Grads {
    Vector gx, row, col;
  };

  SPARTA_INLINE Grads at(Vector x_value, Vector gy_value, int64_t k) const {
    const Vector col = Simd<Acc>::load(col_factor + k);
    const Vector phi = sigmoid(row_factor * col);
    Grads grads{};
    if (want_input) grads.gx = gate_grad_input(x_value, gy_value, phi);
    if (want_factors) {
      const Vector gz = gate_grad_logit(x_value, gy_value, phi);
      grads.row = gz * col;
      grads.col = gz * row_factor;
    }
    return grads;
  }

  // Writes gx, adds to grad_col, and returns the row factor's gradient.
  SPARTA_INLINE Acc run(int64_t cols) const {
    Vector grad_row{};
    int64_t k = 0;
    for (; k + Lanes::lanes <= cols; k += Lanes::lanes) {
      const Grads grads = at(Lanes::load(x + k), Lanes::load(gy + k), k);
      if (want_input) Lanes::store(gx + k, grads.gx);
      if (want_factors) {
        grad_row += grads.row;
        Simd<Acc>::store(grad_col + k, Simd<Acc>::load(grad_col + k) + grads.col);
      }
    }
    Acc total = want_factors ? sum(grad_row) : Acc{};
    if (k < cols) {
      const Grads grads = at(load_partial(x + k, cols - k), load_partial(gy + k, cols - k), k);
      if (want_input) store_partial(gx + k, grads.gx, cols - k);
      if (want_factors) {
        // What lies in the register behind the last column may be anything, NaN too: it must not be summed.
        Acc row[Lanes::lanes], col[Lanes::lanes];
        Simd<Acc>::store(row, grads.row);
        Simd<Acc>::store(col, grads.col);
        for (int64_t i = 0; i < cols - k; ++i) {
          total += row[i];
          grad_col[k + i] += col[i];
        }
      }
    }
    return total;
  }
};

// gspatial = kernel * gs summed over each cell's pixels; returns gkernel's share, the sum of gs * spatial.
template <class Acc>
Acc finish_pixels(const GateBackward& args, const Part& part, Factors<Acc>& factors) {
  const GateShape& s = args.shape;
  Acc* gs = factors.grad_pixel;
  if (s.share > 1) {
    Acc* by_cell = factors.pixel;  // no longer needed, and large enough
    for (int64_t i = 0; i < part.cells; ++i) by_cell[i] = 0;
    for_pixels(s, part, [&](int64_t p, int64_t cell) { by_cell[cell] += gs[p]; });
    gs = by_cell;
  }
  Acc grad_kernel = 0;
  if (args.grad_kernel.data != nullptr)
    for (int64_t i = 0; i < part.cells; ++i) grad_kernel += gs[i] * factors.cells[i];
  if (args.grad_spatial.data != nullptr) {
    for (int64_t i = 0; i < part.cells; ++i) gs[i] *= factors.kernel;
    write(args.grad_spatial, part.sample * s.cells() + part.first_cell, part.cells, gs);
  }
  return grad_kernel;
}

template <class T, bool want_input, bool want_factors>
void backward(const GateBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const GateShape& s = args.shape;
  const Chunks chunks(s);
  const bool planar = s.planar;
  const int64_t tasks = chunks.tasks();
  // gchannel and gkernel sum over a whole sample: a chunk leaves its part here, and a second stage adds them in order.
  const int64_t partial_size = s.channels + 1;
  Scratch<Acc> partial_memory(want_factors ? tasks * partial_size : 0);
  Acc* partials = partial_memory;
#pragma omp parallel num_threads(useful_threads(args.threads, s.samples * s.channels * s.pixels()))
  {
    Factors<Acc> factors(chunks, want_factors);
    const Acc* row_factor = planar ? factors.channel : factors.pixel;
    const Acc* col_factor = planar ? factors.pixel : factors.channel;
    Acc* grad_row = planar ? factors.grad_channel : factors.grad_pixel;
    Acc* grad_col = planar ? factors.grad_pixel : factors.grad_channel;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const Part part(chunks, task);
      factors.load(args, part);
      const T* x = part.start<const T>(args.x, planar);
      const T* gy = part.start<const T>(args.gy, planar);
      T* gx = want_input ? part.start<T>(args.gx, planar) : nullptr;
      if (want_factors)
        for (int64_t k = 0; k < part.cols; ++k) grad_col[k] = 0;
      for (int64_t r = 0; r < part.rows; ++r) {
        const BackwardRow<T, want_input, want_factors> row{
            x + r * args.x.row_stride, gy + r * args.gy.row_stride, want_input ? gx + r * args.gx.row_stride : nullptr,
            row_factor[r], col_factor, grad_col};
        const Acc total = row.run(part.cols);
        if (want_factors) grad_row[r] = total;
      }
      if (want_factors) {
        Acc* partial = partials + task * partial_size;
        for (int64_t c = 0; c < s.channels; ++c) partial[c] = factors.grad_channel[c];
        partial[s.channels] = finish_pixels(args, part, factors);
      }
    }
    if (want_factors) {
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < s.samples; ++sample) {
        Acc* total = partials + sample * chunks.count * partial_size;
        for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
          for (int64_t i = 0; i < partial_size; ++i) total[i] += total[chunk * partial_size + i];
        if (args.grad_channel.data != nullptr) write(args.grad_channel, sample * s.channels, s.channels, total);
        if (args.grad_kernel.data != nullptr) write(args.grad_kernel, sample, 1, total + s.channels);
      }
    }
  }
}

}  // namespace

void gate_forward(const GateForward& args) {
  with_type(args.dtype, [&](auto type) { forward<decltype(type)>(args); });
}

void gate_backward(const GateBackward& args) {
  const bool want_input = args.gx.data != nullptr;
  const bool want_factors = args.grad_spatial.data != nullptr || args.grad_channel.data != nullptr ||
                            args.grad_kernel.data != nullptr;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (want_input && want_factors) return backward<T, true, true>(args);
    if (want_input) return backward<T, true, false>(args);
    if (want_factors) return backward<T, false, true>(args);
  });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
