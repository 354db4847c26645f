// dyrelu on a CPU: one pass forward (x read, y written), one pass backward (gy and x read, gx written).
//
// A task is one sample and one chunk of its pixels. Where rows are channels (NCHW), a row has one set of lines, whose sums
// stay in registers until it ends; where rows are pixels (channels_last), every register of channels has a set of its own,
// which is read, and its sums added to, once for several rows. Chunks depend on the shape alone and are summed in order,
// so results are the same for every number of threads.
#include "../kernels.h"
#include "common.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

struct Chunks {
  int64_t pixels;  // in a chunk: whole cache lines, so that results can be written past the cache
  int64_t count;   // chunks in a sample, at least one

  explicit Chunks(const DyReluShape& s)
      : pixels(max(512, 65536 / max(1, s.channels) / 64 * 64)), count(max(1, ceil_div(s.pixels, pixels))) {}
};

// The value, hidden from the optimiser: for masks derived from other masks GCC emits code that goes lane by lane.
SPARTA_INLINE double opaque(double value) { return value; }
SPARTA_INLINE FloatVector opaque(FloatVector value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// K lines for each lane of a register; also the sums of the lines' gradients.
template <class T, int K>
struct Lines {
  using Acc = typename Accumulator<T>::type;
  using Vector = typename Simd<T>::Vector;
  Vector slope[K], intercept[K];

  // K numbers of each kind for one channel, for all lanes.
  static SPARTA_INLINE Lines of_channel(const Acc* slopes, const Acc* intercepts, int64_t stride) {
    Lines lines;
    for (int k = 0; k < K; ++k) {
      lines.slope[k] = Vector{} + slopes[k * stride];
      lines.intercept[k] = Vector{} + intercepts[k * stride];
    }
    return lines;
  }
  // A register of channels.
  static SPARTA_INLINE Lines of_channels(const Acc* slopes, const Acc* intercepts, int64_t stride) {
    Lines lines;
    for (int k = 0; k < K; ++k) {
      lines.slope[k] = Simd<Acc>::load(slopes + k * stride);
      lines.intercept[k] = Simd<Acc>::load(intercepts + k * stride);
    }
    return lines;
  }
  SPARTA_INLINE void store(Acc* slopes, Acc* intercepts, int64_t stride) const {
    for (int k = 0; k < K; ++k) {
      Simd<Acc>::store(slopes + k * stride, slope[k]);
      Simd<Acc>::store(intercepts + k * stride, intercept[k]);
    }
  }
  SPARTA_INLINE LargestLine<Vector> largest(Vector x) const {
    LargestLine<Vector> found(x, slope[0], intercept[0]);
    for (int k = 1; k < K; ++k) found.offer(x, slope[k], intercept[k], k);
    return found;
  }
  // Returns gx, and adds the terms of the lines' gradients to `sums`.
  SPARTA_INLINE Vector backward(Vector x, Vector gy, Lines& sums) const {
    const auto found = largest(x);
    const Vector zero{}, product = gy * x, index = opaque(found.index);
    for (int k = 0; k < K; ++k) {
      const auto own = index == zero + static_cast<Acc>(k);
      sums.slope[k] += own ? product : zero;
      sums.intercept[k] += own ? gy : zero;
    }
    return gy * found.slope;
  }
};

// A thread's working memory: one sample's lines, line by line, and the sums of their gradients. Each line is padded by
// a register, so that whole registers can be read behind the last channel.
template <class Acc, int K>
struct Coefficients {
  static constexpr int rows = K <= 4 ? 4 : 1;  // pixels at once: as many as registers allow

  int64_t lines, channels, stride;
  Scratch<Acc> slopes, intercepts, grad_slopes, grad_intercepts, interleaved;

  explicit Coefficients(const DyReluShape& s, bool backward)
      : lines(s.lines), channels(s.channels), stride(s.channels + kFloatLanes), slopes(K * stride),
        intercepts(K * stride), grad_slopes(backward ? K * stride : 0), grad_intercepts(backward ? K * stride : 0),
        interleaved(K * stride) {}

  // With fewer lines than K the first stands for the missing ones: among equals the first is taken, so they never are.
  void load(const Dense& from, int64_t sample, Acc* to) {
    Acc* source = interleaved;
    read(from, sample * channels * lines, channels * lines, source);
    for (int k = 0; k < K; ++k) {
      const int64_t line = k < lines ? k : 0;
      for (int64_t c = 0; c < channels; ++c) to[k * stride + c] = source[c * lines + line];
    }
  }
  template <class Args>
  void load(const Args& args, int64_t sample) {
    load(args.slopes, sample, slopes);
    load(args.intercepts, sample, intercepts);
  }
  void clear() {
    for (int64_t i = 0; i < K * stride; ++i) grad_slopes[i] = grad_intercepts[i] = 0;
  }
  // In the order of the gradient tensors: (channels, lines).
  void interleave(const Acc* sums, Acc* to) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < lines; ++k) to[c * lines + k] = sums[k * stride + c];
  }
};

template <class T>
struct Part {  // of one tensor: a chunk of a sample
  T* data;
  int64_t stride;  // between rows

  Part(const Matrices& m, const DyReluShape& s, int64_t sample, int64_t first_pixel)
      : data(static_cast<T*>(m.data)), stride(m.row_stride) {
    if (data != nullptr) data += sample * m.sample_stride + first_pixel * (s.planar ? 1 : m.row_stride);
  }
  SPARTA_INLINE T* row(int64_t r) const { return data == nullptr ? nullptr : data + r * stride; }
};

// ---- one channel's pixels -----------------------------------------------------------------------------------

// function(x, gy) gives the result; without `two`, gy is 0.
template <class T, bool two, bool stream, class Function>
SPARTA_INLINE void map_row(const T* x, const T* gy, T* to, int64_t count, Function function) {
  using Lanes = Simd<T>;
  using Vector = typename Lanes::Vector;
  constexpr int64_t line = Lanes::line * Lanes::lanes;
  int64_t k = 0;
  for (; k + line <= count; k += line) {
    prefetch_read(x + k);
    if (two) prefetch_read(gy + k);
    if (!stream && to != nullptr) prefetch_write(to + k);
    Vector results[Lanes::line];
    for (int64_t i = 0, at = k; i < Lanes::line; ++i, at += Lanes::lanes)
      results[i] = function(Lanes::load(x + at), two ? Lanes::load(gy + at) : Vector{});
    if (to != nullptr) Lanes::template store_line<stream>(to + k, results);
  }
  for (; k < count; k += Lanes::lanes) {
    const int64_t lanes = min(Lanes::lanes, count - k);
    const Vector result =
        function(load_partial(x + k, lanes), two ? load_partial(gy + k, lanes) : Vector{});  // 0 behind the last
    if (to != nullptr) store_partial(to + k, result, lanes);
  }
}

template <class T, int K, bool stream, class Acc>
void forward_planar(const Part<const T>& x, const Part<T>& y, int64_t pixels, const Coefficients<Acc, K>& own) {
  for (int64_t c = 0; c < own.channels; ++c) {
    const auto lines = Lines<T, K>::of_channel(own.slopes + c, own.intercepts + c, own.stride);
    map_row<T, false, stream>(x.row(c), static_cast<const T*>(nullptr), y.row(c), pixels,
                              [&](auto value, auto) { return lines.largest(value).value; });
  }
}

template <class T, int K, bool stream, class Acc>
void backward_planar(const Part<const T>& x, const Part<const T>& gy, const Part<T>& gx, int64_t pixels,
                     Coefficients<Acc, K>& own) {
  using Vector = typename Simd<T>::Vector;
  constexpr int group = Simd<T>::lanes;  // channels whose sums are finished together
  for (int64_t first = 0; first < own.channels; first += group) {
    Vector slope_sums[K][group], intercept_sums[K][group];
    const int64_t count = min(group, own.channels - first);
    for (int64_t i = 0; i < group; ++i) {
      Lines<T, K> totals{};
      if (i < count) {
        const int64_t c = first + i;
        const auto lines = Lines<T, K>::of_channel(own.slopes + c, own.intercepts + c, own.stride);
        map_row<T, true, stream>(x.row(c), gy.row(c), gx.row(c), pixels,
                                 [&](auto value, auto gradient) { return lines.backward(value, gradient, totals); });
      }
      for (int k = 0; k < K; ++k) slope_sums[k][i] = totals.slope[k], intercept_sums[k][i] = totals.intercept[k];
    }
    for (int k = 0; k < K; ++k) {
      Simd<Acc>::store(own.grad_slopes + k * own.stride + first, sums(slope_sums[k]));
      Simd<Acc>::store(own.grad_intercepts + k * own.stride + first, sums(intercept_sums[k]));
    }
  }
}

// ---- one pixel's channels -----------------------------------------------------------------------------------

// `rows` pixels at once.
template <int rows, class T, int K, bool stream, class Acc>
SPARTA_INLINE void forward_pixels(const Part<const T>& x, const Part<T>& y, int64_t first,
                                  const Coefficients<Acc, K>& own) {
  using Lanes = Simd<T>;
  constexpr int64_t line = Lanes::line * Lanes::lanes;
  int64_t c = 0;
  for (; c + line <= own.channels; c += line) {
    typename Lanes::Vector results[rows][Lanes::line];
    for (int64_t i = 0, at = c; i < Lanes::line; ++i, at += Lanes::lanes) {
      const auto lines = Lines<T, K>::of_channels(own.slopes + at, own.intercepts + at, own.stride);
      for (int r = 0; r < rows; ++r) results[r][i] = lines.largest(Lanes::load(x.row(first + r) + at)).value;
    }
    for (int r = 0; r < rows; ++r) {
      prefetch_read(x.row(first + r) + c);
      if (!stream) prefetch_write(y.row(first + r) + c);
      Lanes::template store_line<stream>(y.row(first + r) + c, results[r]);
    }
  }
  for (; c < own.channels; c += Lanes::lanes) {
    const int64_t count = min(Lanes::lanes, own.channels - c);
    const auto lines = Lines<T, K>::of_channels(own.slopes + c, own.intercepts + c, own.stride);
    for (int r = 0; r < rows; ++r) {
      const auto value = load_partial(x.row(first + r) + c, count);
      store_partial(y.row(first + r) + c, lines.largest(value).value, count);
    }
  }
}

template <int rows, class T, int K, bool stream, class Acc>
SPARTA_INLINE void backward_pixels(const Part<const T>& x, const Part<const T>& gy, const Part<T>& gx, int64_t first,
                                   Coefficients<Acc, K>& own) {
  using Lanes = Simd<T>;
  constexpr int64_t line = Lanes::line * Lanes::lanes;
  const bool writes = gx.data != nullptr;
  int64_t c = 0;
  for (; c + line <= own.channels; c += line) {
    typename Lanes::Vector results[rows][Lanes::line];
    for (int64_t i = 0, at = c; i < Lanes::line; ++i, at += Lanes::lanes) {
      const auto lines = Lines<T, K>::of_channels(own.slopes + at, own.intercepts + at, own.stride);
      auto totals = Lines<T, K>::of_channels(own.grad_slopes + at, own.grad_intercepts + at, own.stride);
      for (int r = 0; r < rows; ++r)
        results[r][i] = lines.backward(Lanes::load(x.row(first + r) + at), Lanes::load(gy.row(first + r) + at), totals);
      totals.store(own.grad_slopes + at, own.grad_intercepts + at, own.stride);
    }
    for (int r = 0; r < rows; ++r) {
      prefetch_read(x.row(first + r) + c);
      prefetch_read(gy.row(first + r) + c);
      if (!writes) continue;
      if (!stream) prefetch_write(gx.row(first + r) + c);
      Lanes::template store_line<stream>(gx.row(first + r) + c, results[r]);
    }
  }
  for (; c < own.channels; c += Lanes::lanes) {
    const int64_t count = min(Lanes::lanes, own.channels - c);
    const auto lines = Lines<T, K>::of_channels(own.slopes + c, own.intercepts + c, own.stride);
    auto totals = Lines<T, K>::of_channels(own.grad_slopes + c, own.grad_intercepts + c, own.stride);
    for (int r = 0; r < rows; ++r) {
      const auto value = load_partial(x.row(first + r) + c, count), gradient = load_partial(gy.row(first + r) + c, count);
      const auto result = lines.backward(value, gradient, totals);
      if (writes) store_partial(gx.row(first + r) + c, result, count);
    }
    totals.store(own.grad_slopes + c, own.grad_intercepts + c, own.stride);
  }
}

// ---- whole tensors ------------------------------------------------------------------------------------------

template <class T, int K, bool stream>
void forward(const DyReluForward& args) {
  using Acc = typename Accumulator<T>::type;
  const DyReluShape& s = args.shape;
  const Chunks chunks(s);
#pragma omp parallel num_threads(useful_threads(args.place.threads, s.samples * s.channels * s.pixels))
  {
    Coefficients<Acc, K> own(s, false);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.samples * chunks.count; ++task) {
      const int64_t sample = task / chunks.count, first = task % chunks.count * chunks.pixels;
      const int64_t pixels = min(chunks.pixels, s.pixels - first);
      own.load(args, sample);
      const Part<const T> x(args.x, s, sample, first);
      const Part<T> y(args.y, s, sample, first);
      if (s.planar) {
        forward_planar<T, K, stream>(x, y, pixels, own);
        continue;
      }
      int64_t p = 0;
      for (; p + own.rows <= pixels; p += own.rows) forward_pixels<own.rows, T, K, stream>(x, y, p, own);
      for (; p < pixels; ++p) forward_pixels<1, T, K, stream>(x, y, p, own);
    }
    if (stream) stream_fence();
  }
}

template <class T, int K, bool stream>
void backward(const DyReluBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const DyReluShape& s = args.shape;
  const Chunks chunks(s);
  const int64_t tasks = s.samples * chunks.count, count = s.channels * s.lines;  // sums of one kind in a sample
  Scratch<Acc> memory(2 * count * tasks);  // each task's sums: of the slopes, then of the intercepts
  Acc* parts = memory;
#pragma omp parallel num_threads(useful_threads(args.place.threads, s.samples * s.channels * s.pixels))
  {
    Coefficients<Acc, K> own(s, true);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t sample = task / chunks.count, first = task % chunks.count * chunks.pixels;
      const int64_t pixels = min(chunks.pixels, s.pixels - first);
      own.load(args, sample);
      const Part<const T> x(args.x, s, sample, first), gy(args.gy, s, sample, first);
      const Part<T> gx(args.gx, s, sample, first);
      if (s.planar) {
        backward_planar<T, K, stream>(x, gy, gx, pixels, own);
      } else {
        own.clear();
        int64_t p = 0;
        for (; p + own.rows <= pixels; p += own.rows) backward_pixels<own.rows, T, K, stream>(x, gy, gx, p, own);
        for (; p < pixels; ++p) backward_pixels<1, T, K, stream>(x, gy, gx, p, own);
      }
      own.interleave(own.grad_slopes, parts + 2 * count * task);
      own.interleave(own.grad_intercepts, parts + 2 * count * task + count);
    }
    if (stream) stream_fence();
#pragma omp for schedule(static)
    for (int64_t sample = 0; sample < s.samples; ++sample) {
      Acc* total = parts + 2 * count * chunks.count * sample;
      for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
        for (int64_t i = 0; i < 2 * count; ++i) total[i] += total[2 * count * chunk + i];
      if (args.grad_slopes.data != nullptr) write(args.grad_slopes, sample * count, count, total);
      if (args.grad_intercepts.data != nullptr) write(args.grad_intercepts, sample * count, count, total + count);
    }
  }
}

// Calls run(T{}, K, stream), the latter two as types. Compiled for the 3 lines of the papers' networks, which 2 are computed
// as too, and once more for any number.
template <class Run>
SPARTA_INLINE void with_constants(const DyReluShape& s, DType dtype, const Matrices& to, Run run) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t size = sizeof(T);
    if constexpr (size < 8) {
      const bool stream = to.data != nullptr && bypasses_cache(to.data, to.row_stride * size, to.sample_stride * size,
                                                               s.samples * s.channels * s.pixels * size);
      using Lines = std::integral_constant<int, 3>;
      if (s.lines <= 3) return stream ? run(type, Lines{}, std::true_type{}) : run(type, Lines{}, std::false_type{});
    }
    run(type, std::integral_constant<int, 8>{}, std::false_type{});
  });
}

}  // namespace

void dyrelu_forward(const DyReluForward& args) {
  with_constants(args.shape, args.dtype, args.y,
                 [&](auto type, auto lines, auto stream) { forward<decltype(type), lines, stream>(args); });
}

void dyrelu_backward(const DyReluBackward& args) {
  with_constants(args.shape, args.dtype, args.gx,
                 [&](auto type, auto lines, auto stream) { backward<decltype(type), lines, stream>(args); });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
