// dyrelu on a CUDA device, forward and backward: of every element the largest of K lines slope[k] * x + intercept[k],
// whose coefficients belong to the element's sample and channel. x (and gy) are read once, y (or gx) is written once.
//
// A thread keeps the coefficients of its channels in registers, and walks along pixels. In planar images a team of up to
// 32 threads works on a row, one channel's pixels, whose sums are added up over its lanes. In channels_last images a team
// spans the channels, a block's teams take turns with the pixels, and their sums are added up in shared memory. Long rows
// and large images are cut into parts of pixels: each part leaves its sums in scratch memory, and a second kernel adds
// them in order. How samples are cut follows from the tensors' shape, dtype and alignment alone, so results are bitwise
// the same every time, on every device.
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

constexpr int kMostLines = 8;  // K, at most
constexpr int kAhead = 4;      // vectors that a thread has in flight

// How a sample is cut: into parts of pixels; and a block into teams of `lanes` = 2^lane_bits threads.
struct Cut {
  int channels, pixels, lines;  // lines = K
  int lanes, lane_bits, teams;
  int parts, part_pixels;
  int64_t blocks;  // of a sample

  Cut(const char* operation, const DyReluShape& s, int count) : lines(static_cast<int>(s.lines)) {
    if (max(s.channels, s.pixels) > 0x7fffffff / 2)
      throw std::runtime_error(std::string(operation) + ": x must have at most 2^30 - 1 pixels and channels, got " +
                               std::to_string(s.pixels) + " and " + std::to_string(s.channels));
    channels = static_cast<int>(s.channels);
    pixels = static_cast<int>(s.pixels);
    const int64_t vectors = ceil_div(s.planar ? pixels : channels, count);
    for (lane_bits = 0; 1 << lane_bits < kWarp && 1 << lane_bits < vectors;) ++lane_bits;
    lanes = 1 << lane_bits;
    teams = kThreads / lanes;
    // A thread has 32 vectors of a part at most.
    parts = static_cast<int>(max(1, ceil_div(s.planar ? vectors : pixels, 32 * (s.planar ? lanes : teams))));
    part_pixels = static_cast<int>(ceil_div(ceil_div(pixels, parts), s.planar ? count : 1) * (s.planar ? count : 1));
    blocks = s.planar ? ceil_div(int64_t{channels} * parts, teams) : parts * ceil_div(vectors, lanes);
  }
};

// What a thread works on: some vectors of one channel's pixels (planar), or of `count` channels' (channels_last).
template <int count, bool planar>
struct Walk {
  int64_t sample;
  int channel, part;
  int pixel, step;  // its first, and how far apart its vectors lie, in pixels
  int vectors;

  SPARTA_DEVICE explicit Walk(const Cut& cut) {
    sample = blockIdx.x / static_cast<unsigned>(cut.blocks);
    const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(cut.blocks));
    const int lane = static_cast<int>(threadIdx.x) & (cut.lanes - 1), line = static_cast<int>(threadIdx.x) >> cut.lane_bits;
    if constexpr (planar) {
      const int64_t row = int64_t{block} * cut.teams + line;
      channel = static_cast<int>(min(row / cut.parts, cut.channels));  // the last block may have lines too many
      part = static_cast<int>(row % cut.parts);
      pixel = part * cut.part_pixels + lane * count;
      step = cut.lanes * count;
    } else {
      channel = (block / cut.parts * cut.lanes + lane) * count;
      part = block % cut.parts;
      pixel = part * cut.part_pixels + line;
      step = cut.teams;
    }
    const int end = static_cast<int>(min((int64_t{part} + 1) * cut.part_pixels, cut.pixels));
    vectors = channel < cut.channels && pixel < end ? (end - pixel + step - 1) / step : 0;
  }
  // The address of the first vector, and the stride to the next.
  template <class T>
  SPARTA_DEVICE T* first(const Matrices& m) const {
    const int64_t row = planar ? channel : pixel, col = planar ? pixel : channel;
    return static_cast<T*>(m.data) + sample * m.sample_stride + row * m.row_stride + col;
  }
  SPARTA_DEVICE int64_t next(const Matrices& m) const { return planar ? int64_t{step} : step * m.row_stride; }
};

// The coefficients of a thread's channels: room for `most` lines, of which the first K are used.
template <class Acc, int most, int channels>
struct Lines {
  Acc slope[most][channels], intercept[most][channels];
  int count;

  SPARTA_DEVICE Lines(const Dense& slopes, const Dense& intercepts, const Cut& cut, int64_t sample, int channel)
      : count(cut.lines) {
    const int64_t first = (sample * cut.channels + channel) * count;
    read(slopes, first, slope);
    read(intercepts, first, intercept);
  }

  // The largest of them at every element of a vector.
  template <int elements>
  SPARTA_DEVICE void largest(const Acc (&x)[elements], LargestLine<Acc> (&found)[elements]) const {
#pragma unroll
    for (int j = 0; j < elements; ++j) found[j] = {x[j], slope[0][j % channels], intercept[0][j % channels]};
#pragma unroll
    for (int k = 1; k < most; ++k) {
      if (k >= count) break;
#pragma unroll
      for (int j = 0; j < elements; ++j) found[j].offer(x[j], slope[k][j % channels], intercept[k][j % channels], k);
    }
  }

 private:
  // Loads them all before the first is used.
  SPARTA_DEVICE void read(const Dense& small, int64_t first, Acc (&values)[most][channels]) const {
    with_type(small.dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(small.data) + first;
      decltype(type) narrow[most][channels];
#pragma unroll
      for (int k = 0; k < most; ++k) {
        if (k >= count) break;
#pragma unroll
        for (int c = 0; c < channels; ++c) narrow[k][c] = from[c * count + k];
      }
#pragma unroll
      for (int k = 0; k < most; ++k)
#pragma unroll
        for (int c = 0; c < channels; ++c) values[k][c] = static_cast<Acc>(widen(narrow[k][c]));
    });
  }
};

// ---- forward ----------------------------------------------------------------------------------------------

// Blocks that a multiprocessor holds at once.
template <class T, bool planar>
constexpr int kBlocks = planar && sizeof(T) < 8 ? 4 : 2;

template <class T, int count, bool planar, int most>
__global__ void __launch_bounds__(kThreads, kBlocks<T, planar>) dyrelu_forward_kernel(DyReluForward args, Cut cut) {
  using Acc = typename Accumulator<T>::type;
  const Walk<count, planar> walk(cut);
  if (walk.vectors == 0) return;
  const T* x = walk.template first<const T>(args.x);
  T* y = walk.template first<T>(args.y);
  const int64_t x_next = walk.next(args.x), y_next = walk.next(args.y);
  Pack<T, count> vectors[kAhead];
  const auto read_from = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, x += x_next)
      if (first + i < walk.vectors) vectors[i] = read_once<T, count>(x);
  };
  read_from(0);
  const Lines<Acc, most, planar ? 1 : count> lines(args.slopes, args.intercepts, cut, walk.sample, walk.channel);
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, y += y_next) {
      if (first + i >= walk.vectors) continue;
      Acc values[count];
      LargestLine<Acc> best[count];
      widen_all(vectors[i], values);
      lines.largest(values, best);
#pragma unroll
      for (int j = 0; j < count; ++j) values[j] = best[j].value;
      store(y, narrow_all<T>(values));
    }
    first += kAhead;
    if (first >= walk.vectors) break;
    read_from(first);
  }
}

// ---- backward ---------------------------------------------------------------------------------------------

// Every part's sums, (samples, parts, channels, K) each, in scratch memory; unused where there is one part.
template <class Acc>
struct Partials {
  Acc *slopes, *intercepts;

  Partials(void* scratch, const Cut& cut, int64_t samples)
      : slopes(static_cast<Acc*>(scratch)), intercepts(slopes + samples * cut.parts * cut.channels * cut.lines) {}
};

template <class Acc>
SPARTA_DEVICE void keep(const DyReluBackward& args, const Cut& cut, const Partials<Acc>& partials, int64_t sample,
                        int part, int channel, int k, Acc slope, Acc intercept) {
  if (cut.parts > 1) {
    const int64_t at = ((sample * cut.parts + part) * cut.channels + channel) * cut.lines + k;
    partials.slopes[at] = slope;
    partials.intercepts[at] = intercept;
    return;
  }
  const int64_t at = (sample * cut.channels + channel) * cut.lines + k;
  if (args.grad_slopes.data != nullptr) write(args.grad_slopes, at, slope);
  if (args.grad_intercepts.data != nullptr) write(args.grad_intercepts, at, intercept);
}

template <class T, int count, bool planar, int most>
__global__ void __launch_bounds__(kThreads, 2)
    dyrelu_backward_kernel(DyReluBackward args, Cut cut, Partials<typename Accumulator<T>::type> partials) {
  using Acc = typename Accumulator<T>::type;
  constexpr int channels = planar ? 1 : count, ahead = kAhead / 2;
  const Walk<count, planar> walk(cut);
  const T* x = walk.template first<const T>(args.x);
  const T* gy = walk.template first<const T>(args.gy);
  T* gx = walk.template first<T>(args.gx);
  const int64_t x_next = walk.next(args.x), gy_next = walk.next(args.gy), gx_next = walk.next(args.gx);
  Acc slope_sums[most][channels]{}, intercept_sums[most][channels]{};
  if (walk.vectors > 0) {
    Pack<T, count> vectors[ahead], grads[ahead];
    const auto read_from = [&](int first) {
#pragma unroll
      for (int i = 0; i < ahead; ++i, x += x_next, gy += gy_next) {
        if (first + i >= walk.vectors) continue;
        vectors[i] = read_once<T, count>(x);
        grads[i] = read_once<T, count>(gy);
      }
    };
    read_from(0);
    const Lines<Acc, most, channels> lines(args.slopes, args.intercepts, cut, walk.sample, walk.channel);
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int i = 0; i < ahead; ++i, gx += gx_next) {
        if (first + i >= walk.vectors) continue;
        Acc values[count], grad[count], products[count];
        LargestLine<Acc> best[count];
        widen_all(vectors[i], values);
        widen_all(grads[i], grad);
        lines.largest(values, best);
#pragma unroll
        for (int j = 0; j < count; ++j) products[j] = grad[j] * best[j].slope;
        if (args.gx.data != nullptr) store(gx, narrow_all<T>(products));
#pragma unroll
        for (int k = 0; k < most; ++k) {
          if (k >= cut.lines) break;
#pragma unroll
          for (int j = 0; j < count; ++j) {
            const bool chosen = best[j].index == static_cast<Acc>(k);
            slope_sums[k][j % channels] += chosen ? grad[j] * values[j] : 0;
            intercept_sums[k][j % channels] += chosen ? grad[j] : 0;
          }
        }
      }
      first += ahead;
      if (first >= walk.vectors) break;
      read_from(first);
    }
  }
  if (args.grad_slopes.data == nullptr && args.grad_intercepts.data == nullptr) return;

  if constexpr (planar) {
    const bool writes = (threadIdx.x & (cut.lanes - 1)) == 0 && walk.channel < cut.channels;
#pragma unroll
    for (int k = 0; k < most; ++k) {
      if (k >= cut.lines) break;
      Acc sums[] = {slope_sums[k][0], intercept_sums[k][0]};
      sum_lanes(sums, 1, cut.lanes);
      if (writes) keep(args, cut, partials, walk.sample, walk.part, walk.channel, k, sums[0], sums[1]);
    }
  } else {
    __shared__ Acc memory[2 * most * count * kThreads];  // a sum's addends side by side, thread by thread
#pragma unroll
    for (int k = 0; k < most; ++k)
#pragma unroll
      for (int c = 0; c < count; ++c) {
        memory[(k * count + c) * kThreads + threadIdx.x] = slope_sums[k][c];
        memory[((most + k) * count + c) * kThreads + threadIdx.x] = intercept_sums[k][c];
      }
    __syncthreads();
    const int first_channel = walk.channel - static_cast<int>(threadIdx.x & (cut.lanes - 1)) * count;
#pragma unroll 1
    for (int i = threadIdx.x; i < cut.lanes * count * cut.lines; i += kThreads) {
      const int lane = i & (cut.lanes - 1), number = i >> cut.lane_bits, k = number / count, c = number % count;
      const int channel = first_channel + lane * count + c;
      Acc slope = 0, intercept = 0;
#pragma unroll 4
      for (int line = 0; line < cut.teams; ++line) {
        slope += memory[number * kThreads + line * cut.lanes + lane];
        intercept += memory[(most * count + number) * kThreads + line * cut.lanes + lane];
      }
      if (channel < cut.channels) keep(args, cut, partials, walk.sample, walk.part, channel, k, slope, intercept);
    }
  }
}

// The second kernel: one thread for each coefficient's gradient.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    dyrelu_finish_kernel(DyReluBackward args, Cut cut, Partials<Acc> partials, int64_t coefficients) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= coefficients) return;
  const int64_t in_sample = int64_t{cut.channels} * cut.lines, sample = at / in_sample;
  int64_t from = sample * cut.parts * in_sample + at % in_sample;
  Acc slope = 0, intercept = 0;
#pragma unroll 4
  for (int part = 0; part < cut.parts; ++part, from += in_sample) {
    slope += partials.slopes[from];
    intercept += partials.intercepts[from];
  }
  if (args.grad_slopes.data != nullptr) write(args.grad_slopes, at, slope);
  if (args.grad_intercepts.data != nullptr) write(args.grad_intercepts, at, intercept);
}

// ---- launches ---------------------------------------------------------------------------------------------

// Images whose rows consist of whole vectors are processed in vectors: of 16 bytes where planar; in channels_last, where
// every element of a vector has its own coefficients and sums, of 16 bytes in the accumulator's type, for up to 4 lines.
constexpr int kFewLines = 4;
template <class T>
constexpr int kChannels = kVector<typename Accumulator<T>::type>;

template <int count, bool planar, int most>
struct Variant {
  template <class T>
  static void forward(const DyReluForward& args) {
    const Cut cut("dyrelu_forward", args.shape, count);
    launch("dyrelu_forward", args.place, args.shape.samples * cut.blocks, kThreads,
           dyrelu_forward_kernel<T, count, planar, most>, args, cut);
  }
  template <class T>
  static int64_t backward_scratch(const DyReluShape& s) {
    const Cut cut("dyrelu_backward", s, count);
    if (cut.parts == 1) return 0;
    const int64_t sums = 2 * s.samples * cut.parts * s.channels * s.lines;
    return sums * static_cast<int64_t>(sizeof(typename Accumulator<T>::type));
  }
  template <class T>
  static void backward(const DyReluBackward& args) {
    using Acc = typename Accumulator<T>::type;
    const Cut cut("dyrelu_backward", args.shape, count);
    const Partials<Acc> partials(args.scratch, cut, args.shape.samples);
    launch("dyrelu_backward", args.place, args.shape.samples * cut.blocks, kThreads,
           dyrelu_backward_kernel<T, count, planar, most>, args, cut, partials);
    if (cut.parts == 1 || (args.grad_slopes.data == nullptr && args.grad_intercepts.data == nullptr)) return;
    const int64_t coefficients = args.shape.samples * cut.channels * cut.lines;
    launch("dyrelu_backward", args.place, ceil_div(coefficients, kThreads), kThreads, dyrelu_finish_kernel<Acc>, args,
           cut, partials, coefficients);
  }
};

template <class T, int count>
bool in_vectors(const DyReluShape& s, const Matrices& m) {
  return cuda::in_vectors<T, count>(m, s.samples, s.planar ? s.channels : s.pixels, s.planar ? s.pixels : s.channels);
}

// Calls body(Variant) with the variant for these images.
template <class T, class Body, class... Images>
void with_variant(const DyReluShape& s, Body body, const Images&... images) {
  if (s.planar) {
    if ((in_vectors<T, kVector<T>>(s, images) && ...)) return body(Variant<kVector<T>, true, kMostLines>{});
    return body(Variant<1, true, kMostLines>{});
  }
  if (s.lines <= kFewLines && (in_vectors<T, kChannels<T>>(s, images) && ...))
    return body(Variant<kChannels<T>, false, kFewLines>{});
  return body(Variant<1, false, kMostLines>{});
}

}  // namespace

void dyrelu_forward(const DyReluForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_variant<T>(args.shape, [&](auto variant) { decltype(variant)::template forward<T>(args); }, args.x, args.y);
  });
}

void dyrelu_backward(const DyReluBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_variant<T>(args.shape, [&](auto variant) { decltype(variant)::template backward<T>(args); }, args.x, args.gy,
                    args.gx);
  });
}

int64_t dyrelu_backward_scratch(const DyReluShape& s, DType dtype, const Matrices& gy, const Matrices& x,
                                const Matrices& gx) {
  int64_t bytes = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    with_variant<T>(s, [&](auto variant) { bytes = decltype(variant)::template backward_scratch<T>(s); }, x, gy, gx);
  });
  return bytes;
}

}  // namespace cuda
}  // namespace sparta
