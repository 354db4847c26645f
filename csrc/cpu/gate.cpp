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

  // Padded by a register: they are read and written in whole registers.
  static int64_t padded(int64_t count) { return count + kFloatLanes; }
  static int64_t room(const Chunks& chunks) {
    return padded(min(chunks.bands * chunks.shape.share, chunks.shape.height) * chunks.shape.width);
  }
};

// sigmoid(row_factor * col_factor), as precisely as results in T can show.
template <class T>
SPARTA_INLINE Sigmoid<typename Simd<T>::Vector> attention(typename Accumulator<T>::type row_factor,
                                                          typename Simd<T>::Vector col_factor) {
  using Acc = typename Accumulator<T>::type;
  return sigmoid_scaled<kSignificantBits<T>>(row_factor * static_cast<Acc>(kLogitScale) * col_factor);
}

template <class T, bool stream>
SPARTA_INLINE void forward_row(const T* x, T* y, typename Accumulator<T>::type row_factor,
                               const typename Accumulator<T>::type* col_factor, int64_t cols) {
  using Lanes = Simd<T>;
  using Columns = Simd<typename Accumulator<T>::type>;
  constexpr int line = Lanes::line * Lanes::lanes;
  int64_t k = 0;
  for (; k + line <= cols; k += line) {
    prefetch_read(x + k);
    if (!stream) prefetch_write(y + k);
    typename Lanes::Vector values[Lanes::line];
    for (int64_t i = 0, at = k; i < Lanes::line; ++i, at += Lanes::lanes)
      values[i] = gate(Lanes::load(x + at), attention<T>(row_factor, Columns::load(col_factor + at)).value);
    Lanes::template store_line<stream>(y + k, values);
  }
  for (; k < cols; k += Lanes::lanes) {
    const int64_t count = min(Lanes::lanes, cols - k);
    prefetch_read(x + k);
    prefetch_write(y + k);
    const auto value = gate(load_partial(x + k, count), attention<T>(row_factor, Columns::load(col_factor + k)).value);
    store_partial(y + k, value, count);
  }
}

template <class T, bool stream>
void forward(const GateForward& args) {
  using Acc = typename Accumulator<T>::type;
  const Chunks chunks(args.shape);
  const bool planar = args.shape.planar;
  const int64_t tasks = chunks.tasks(), x_stride = args.x.row_stride, y_stride = args.y.row_stride;
  const int64_t elements = args.shape.samples * args.shape.channels * args.shape.pixels();
#pragma omp parallel num_threads(useful_threads(args.place.threads, elements))
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
      if (part.cols == Simd<T>::lanes)  // one register a row: with a constant the compiler drops the loop in forward_row
        for (int64_t r = 0; r < part.rows; ++r)
          forward_row<T, stream>(x + r * x_stride, y + r * y_stride, row_factor[r], col_factor, Simd<T>::lanes);
      else
        for (int64_t r = 0; r < part.rows; ++r)
          forward_row<T, stream>(x + r * x_stride, y + r * y_stride, row_factor[r], col_factor, part.cols);
    }
    if (stream) stream_fence();
  }
}

// Computed from one register of x and of gy: gx, and the terms of the two factors' gradients.
template <class T, bool want_input, bool want_factors>
struct Gradients {
  using Vector = typename Simd<T>::Vector;
  Vector gx{}, row{}, col{};

  SPARTA_INLINE Gradients(Vector x, Vector gy, typename Accumulator<T>::type row_factor, Vector col_factor) {
    const auto phi = attention<T>(row_factor, col_factor);
    if (want_input) gx = gate_grad_input(x, gy, phi.value);
    if (want_factors) {
      const Vector gz = gate_grad_logit(x, gy, phi);
      row = gz * col_factor;
      col = gz * row_factor;
    }
  }
  // Zero for the columns from `count` on: what was computed there is meaningless, and may be NaN.
  SPARTA_INLINE void keep(int64_t count) {
    row = first_lanes(row, count);
    col = first_lanes(col, count);
  }
};

// One chunk of one sample: writes gx, adds to grad_col, and sets grad_row. With `two`, gy is a sum.
template <class T, bool want_input, bool want_factors, bool stream, bool two>
struct BackwardChunk {
  using Acc = typename Accumulator<T>::type;
  using Lanes = Simd<T>;
  using Vector = typename Lanes::Vector;
  using Grads = Gradients<T, want_input, want_factors>;

  const T *x, *gy, *gy2;
  T* gx;
  int64_t x_stride, gy_stride, gy2_stride, gx_stride;
  int64_t rows, cols;
  const Acc *row_factor, *col_factor;
  Acc *grad_row, *grad_col;

  // A row's gradient, still spread over a register's lanes.
  SPARTA_INLINE Vector long_row(int64_t r) const {
    const T *x_row = x + r * x_stride, *gy_row = gy + r * gy_stride, *gy2_row = two ? gy2 + r * gy2_stride : nullptr;
    T* gx_row = want_input ? gx + r * gx_stride : nullptr;
    const Acc factor = row_factor[r];
    constexpr int line = Lanes::line * Lanes::lanes;
    Vector total{};
    int64_t k = 0;
    for (; k + line <= cols; k += line) {
      prefetch_read(x_row + k);
      prefetch_read(gy_row + k);
      if (two) prefetch_read(gy2_row + k);
      if (want_input && !stream) prefetch_write(gx_row + k);
      Vector gx_line[Lanes::line];
      for (int64_t i = 0, at = k; i < Lanes::line; ++i, at += Lanes::lanes) {
        Vector gradient = Lanes::load(gy_row + at);
        if (two) gradient += Lanes::load(gy2_row + at);
        const Grads grads(Lanes::load(x_row + at), gradient, factor, Simd<Acc>::load(col_factor + at));
        gx_line[i] = grads.gx;
        if (want_factors) {
          total += grads.row;
          Simd<Acc>::store(grad_col + at, Simd<Acc>::load(grad_col + at) + grads.col);
        }
      }
      if (want_input) Lanes::template store_line<stream>(gx_row + k, gx_line);
    }
    for (; k < cols; k += Lanes::lanes) {
      Vector grad_cols{};
      if (want_factors) grad_cols = Simd<Acc>::load(grad_col + k);
      total += short_row(x_row + k, gy_row + k, two ? gy2_row + k : nullptr, want_input ? gx_row + k : nullptr,
                         min(Lanes::lanes, cols - k), factor, Simd<Acc>::load(col_factor + k), grad_cols);
      if (want_factors) Simd<Acc>::store(grad_col + k, grad_cols);
    }
    return total;
  }

  // The same for at most one register of columns, whose factors and gradients the caller keeps in registers.
  SPARTA_INLINE Vector short_row(const T* x_row, const T* gy_row, const T* gy2_row, T* gx_row, int64_t count, Acc factor,
                                 Vector columns, Vector& grad_cols) const {
    Vector gradient = load_partial(gy_row, count);
    if (two) gradient += load_partial(gy2_row, count);
    Grads grads(load_partial(x_row, count), gradient, factor, columns);
    if (want_input) store_partial(gx_row, grads.gx, count);
    if (want_factors) {
      grads.keep(count);
      grad_cols += grads.col;
    }
    return grads.row;
  }

  // Rows in groups, whose sums are finished together.
  template <class Row>
  SPARTA_INLINE void for_rows(Row row) const {
    constexpr int group = Lanes::lanes;
    for (int64_t first = 0; first < rows; first += group) {
      Vector totals[group];
      const int64_t count = min(group, rows - first);
      for (int64_t i = 0; i < count; ++i) totals[i] = row(first + i);
      if (!want_factors) continue;
      for (int64_t i = count; i < group; ++i) totals[i] = Vector{};
      Simd<Acc>::store(grad_row + first, sums(totals));
    }
  }

  void run() const {
    if (cols > Lanes::lanes) return for_rows([&](int64_t r) { return long_row(r); });
    const Vector columns = Simd<Acc>::load(col_factor);
    Vector grad_cols{};
    const auto row = [&](int64_t r, int64_t count) {
      prefetch_read(x + r * x_stride);
      prefetch_read(gy + r * gy_stride);
      const T* gy2_row = two ? gy2 + r * gy2_stride : nullptr;
      if (two) prefetch_read(gy2_row);
      T* gx_row = want_input ? gx + r * gx_stride : nullptr;
      if (want_input) prefetch_write(gx_row);
      return short_row(x + r * x_stride, gy + r * gy_stride, gy2_row, gx_row, count, row_factor[r], columns, grad_cols);
    };
    if (cols == Lanes::lanes)  // so that the compiler sees whole registers
      for_rows([&](int64_t r) { return row(r, Lanes::lanes); });
    else
      for_rows([&](int64_t r) { return row(r, cols); });
    if (want_factors) Simd<Acc>::store(grad_col, grad_cols);
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
#pragma omp simd reduction(+ : grad_kernel)
    for (int64_t i = 0; i < part.cells; ++i) grad_kernel += gs[i] * factors.cells[i];
  if (args.grad_spatial.data != nullptr) {
    for (int64_t i = 0; i < part.cells; ++i) gs[i] *= factors.kernel;
    write(args.grad_spatial, part.sample * s.cells() + part.first_cell, part.cells, gs);
  }
  return grad_kernel;
}

template <class Acc>
void finish_sample(const GateBackward& args, int64_t sample, const Acc* grad_channel, Acc grad_kernel) {
  const int64_t channels = args.shape.channels;
  if (args.grad_channel.data != nullptr) write(args.grad_channel, sample * channels, channels, grad_channel);
  if (args.grad_kernel.data != nullptr) write(args.grad_kernel, sample, 1, &grad_kernel);
}

template <class T, bool want_input, bool want_factors, bool stream, bool two = false>
void backward(const GateBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const GateShape& s = args.shape;
  const Chunks chunks(s);
  const bool planar = s.planar;
  const int64_t tasks = chunks.tasks();
  // gchannel and gkernel sum over a whole sample: where that is several chunks, each leaves its part here, and a second
  // stage adds them in order.
  const int64_t partial_size = s.channels + 1;
  Scratch<Acc> partial_memory(want_factors && chunks.count > 1 ? tasks * partial_size : 0);
  Acc* partials = partial_memory;
#pragma omp parallel num_threads(useful_threads(args.place.threads, s.samples * s.channels * s.pixels()))
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
      const T* gy2 = two ? part.start<const T>(args.gy2, planar) : nullptr;
      T* gx = want_input ? part.start<T>(args.gx, planar) : nullptr;
      if (want_factors)
        for (int64_t k = 0; k < part.cols; ++k) grad_col[k] = 0;
      BackwardChunk<T, want_input, want_factors, stream, two>{
          x,          gy,         gy2,      gx,      args.x.row_stride, args.gy.row_stride, args.gy2.row_stride,
          args.gx.row_stride, part.rows, part.cols, row_factor, col_factor, grad_row, grad_col}
          .run();
      if (want_factors) {
        const Acc grad_kernel = finish_pixels(args, part, factors);
        if (chunks.count == 1) {
          finish_sample<Acc>(args, part.sample, factors.grad_channel, grad_kernel);
        } else {
          Acc* partial = partials + task * partial_size;
          for (int64_t c = 0; c < s.channels; ++c) partial[c] = factors.grad_channel[c];
          partial[s.channels] = grad_kernel;
        }
      }
    }
    if (stream) stream_fence();
    if (want_factors && chunks.count > 1) {
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < s.samples; ++sample) {
        Acc* total = partials + sample * chunks.count * partial_size;
        for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
          for (int64_t i = 0; i < partial_size; ++i) total[i] += total[chunk * partial_size + i];
        finish_sample<Acc>(args, sample, total, total[s.channels]);
      }
    }
  }
}

template <class T>
bool streams(const GateShape& shape, const Matrices& to) {
  const int64_t size = sizeof(T), elements = shape.samples * shape.channels * shape.pixels();
  // A chunk may start in the middle of a row: at a whole register too, if image rows are whole registers.
  const int64_t band = shape.planar ? shape.width * size : 0;
  return bypasses_cache(to.data, to.row_stride * size | band, to.sample_stride * size, elements * size);
}

}  // namespace

void gate_forward(const GateForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (streams<T>(args.shape, args.y)) return forward<T, true>(args);
    return forward<T, false>(args);
  });
}

void gate_backward(const GateBackward& args) {
  const bool want_input = args.gx.data != nullptr;
  const bool want_factors = args.grad_spatial.data != nullptr || args.grad_channel.data != nullptr ||
                            args.grad_kernel.data != nullptr;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool stream = want_input && streams<T>(args.shape, args.gx);
    if (args.gy2.data != nullptr)
      return stream ? backward<T, true, true, true, true>(args) : backward<T, true, true, false, true>(args);
    if (want_input && want_factors) return stream ? backward<T, true, true, true>(args) : backward<T, true, true, false>(args);
    if (want_input) return stream ? backward<T, true, false, true>(args) : backward<T, true, false, false>(args);
    if (want_factors) return backward<T, false, true, false>(args);
  });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
