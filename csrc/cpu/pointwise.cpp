// swish-relu and smooth-relu on a CPU: one pass forward (x read, y written), one pass backward (gy and x read, gx written).
//
// Threads share chunks of a fixed size. The gradient of b is summed chunk by chunk, and the chunks' sums are added in
// order, so that it is the same for every number of threads.
#include "elements.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

constexpr int64_t kChunk = 8192;  // elements

// Calls body(first, count, chunk) for every chunk.
template <bool stream, class Body>
void for_chunks(const Place& place, int64_t elements, Body body) {
  const int64_t chunks = ceil_div(elements, kChunk);
#pragma omp parallel num_threads(useful_threads(place.threads, elements))
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      body(chunk * kChunk, min(kChunk, elements - chunk * kChunk), chunk);
    if (stream) stream_fence();
  }
}

// Calls run(T{}, stream): with the tensors' type, and whether `to` is written past the cache (true_type, false_type).
template <class Run>
SPARTA_INLINE void with_type_and_stream(DType dtype, const void* to, int64_t elements, Run run) {
  with_type(dtype, [&](auto type) {
    if (to != nullptr && bypasses_cache(to, 0, 0, elements * int64_t{sizeof type}))
      run(type, std::true_type{});
    else
      run(type, std::false_type{});
  });
}

double lane_sum(double value) { return value; }
double lane_sum(FloatVector value) {
  double sum = 0;
  for (int i = 0; i < kFloatLanes; ++i) sum += value[i];
  return sum;
}

template <class Args>
auto parameter(const Args& args, double) {
  double b;
  read(args.b, 0, 1, &b);
  return SmoothReluParameter<double>(b);
}
template <class Args, class T>
auto parameter(const Args& args, T) {
  float b;
  read(args.b, 0, 1, &b);
  return SmoothReluParameter<float>(b);
}

}  // namespace

void swish_relu_forward(const SwishReluForward& args) {
  with_type_and_stream(args.dtype, args.y, args.elements, [&](auto type, auto stream) {
    using T = decltype(type);
    const Elements<T, 1, stream> all{{static_cast<const T*>(args.x)}, static_cast<T*>(args.y)};
    for_chunks<stream>(args.place, args.elements, [&](int64_t first, int64_t count, int64_t) {
      all.behind(first).map(count, [](const auto* x, int64_t) { return swish_relu<kSignificantBits<T>>(x[0]); });
    });
  });
}

void swish_relu_backward(const SwishReluBackward& args) {
  with_type_and_stream(args.dtype, args.gx, args.elements, [&](auto type, auto stream) {
    using T = decltype(type);
    const Elements<T, 2, stream> all{{static_cast<const T*>(args.gy), static_cast<const T*>(args.x)},
                                     static_cast<T*>(args.gx)};
    for_chunks<stream>(args.place, args.elements, [&](int64_t first, int64_t count, int64_t) {
      all.behind(first).map(
          count, [](const auto* v, int64_t) { return swish_relu_grad<kSignificantBits<T>>(v[1], v[0]); });
    });
  });
}

void smooth_relu_forward(const SmoothReluForward& args) {
  with_type_and_stream(args.dtype, args.y, args.elements, [&](auto type, auto stream) {
    using T = decltype(type);
    const auto made = parameter(args, type);
    const Elements<T, 1, stream> all{{static_cast<const T*>(args.x)}, static_cast<T*>(args.y)};
    for_chunks<stream>(args.place, args.elements, [&](int64_t first, int64_t count, int64_t) {
      all.behind(first).map(
          count, [&](const auto* x, int64_t) { return smooth_relu<kSignificantBits<T>>(x[0], made); });
    });
  });
}

void smooth_relu_backward(const SmoothReluBackward& args) {
  with_type_and_stream(args.dtype, args.gx, args.elements, [&](auto type, auto stream) {
    using T = decltype(type);
    const auto made = parameter(args, type);
    const Elements<T, 2, stream> all{{static_cast<const T*>(args.gy), static_cast<const T*>(args.x)},
                                     static_cast<T*>(args.gx)};
    const int64_t chunks = ceil_div(args.elements, kChunk);
    Scratch<double> sums(chunks);
    for_chunks<stream>(args.place, args.elements, [&](int64_t first, int64_t count, int64_t chunk) {
      typename Simd<T>::Vector total{};
      all.behind(first).map(count, [&](const auto* v, int64_t) {
        const auto grad = smooth_relu_grad<kSignificantBits<T>>(v[1], v[0], made);
        total += grad.parameter;
        return grad.input;
      });
      sums[chunk] = lane_sum(total);
    });
    if (args.grad_b.data == nullptr) return;
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk];
    sum *= made.grad_scale;
    write(args.grad_b, 0, 1, &sum);
  });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
