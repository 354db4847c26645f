// swish_relu and smooth_relu on a CUDA device, forward and backward: x (and gy) are read once, y (or gx) written once.
//
// A block's work is a stretch of elements, which its threads process vector by vector; a stretch that is incomplete or
// not aligned is done one element at a time. The gradient of smooth_relu's b is a sum over all elements: every block
// leaves its part in scratch memory, and a second kernel, of one block, adds the parts in order. How elements are cut
// follows from their number, dtype and alignment alone, so results are bitwise the same every time, on every device.
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

constexpr int kVectors = 2;            // that a thread has in flight of each tensor
constexpr int64_t kMostParts = 4096;  // of a sum

// ---- the functions ----------------------------------------------------------------------------------------

template <class T>
struct SwishRelu {
  using Acc = typename Accumulator<T>::type;
  static constexpr int bits = kSignificantBits<T>;

  explicit SPARTA_DEVICE SwishRelu(const Dense&) {}
  SPARTA_DEVICE Acc value(Acc x) const { return swish_relu<bits>(x); }
  SPARTA_DEVICE Acc grad(Acc x, Acc gy, Acc&) const { return swish_relu_grad<bits>(x, gy); }
};

template <class T>
struct SmoothRelu {
  using Acc = typename Accumulator<T>::type;
  static constexpr int bits = kSignificantBits<T>;
  SmoothReluParameter<Acc> parameter;

  explicit SPARTA_DEVICE SmoothRelu(const Dense& b) : parameter(read<Acc>(b, 0)) {}
  SPARTA_DEVICE Acc value(Acc x) const { return smooth_relu<bits>(x, parameter); }
  SPARTA_DEVICE Acc grad(Acc x, Acc gy, Acc& sum) const {
    const SmoothReluGrad<Acc> found = smooth_relu_grad<bits>(x, gy, parameter);
    sum += found.parameter;
    return found.input;
  }
};

// ---- forward ----------------------------------------------------------------------------------------------

template <int count>
constexpr int kStretch = kThreads * count * kVectors;  // elements

template <class Function, class T, int count>
SPARTA_DEVICE Pack<T, count> values_of(const Function& function, const Pack<T, count>& x) {
  typename Accumulator<T>::type values[count];
  widen_all(x, values);
#pragma unroll
  for (int j = 0; j < count; ++j) values[j] = function.value(values[j]);
  return narrow_all<T>(values);
}

template <class T, int count, class Function>
__global__ void __launch_bounds__(kThreads) pointwise_forward_kernel(const T* x, T* y, Dense b, int64_t elements) {
  const int64_t first = int64_t{blockIdx.x} * kStretch<count>;
  if (count > 1 && first + kStretch<count> <= elements) {
    const int64_t at = first + threadIdx.x * count;
    Pack<T, count> packs[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) packs[v] = read_once<T, count>(x + at + v * kThreads * count);
    const Function function(b);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) store(y + at + v * kThreads * count, values_of(function, packs[v]));
  } else {
    const Function function(b);
    const int64_t end = min(first + kStretch<count>, elements);
#pragma unroll 1
    for (int64_t at = first + threadIdx.x; at < end; at += kThreads)
      store(y + at, values_of(function, read_once<T, 1>(x + at)));
  }
}

// ---- backward ---------------------------------------------------------------------------------------------

// Writes gx, unless it is null, and adds to the sum for b.
template <class Function, class T, int count, class Acc>
SPARTA_DEVICE void gradients_of(const Function& function, const Pack<T, count>& x, const Pack<T, count>& gy, T* gx,
                                Acc& sum) {
  Acc values[count], grads[count];
  widen_all(x, values);
  widen_all(gy, grads);
#pragma unroll
  for (int j = 0; j < count; ++j) grads[j] = function.grad(values[j], grads[j], sum);
  if (gx != nullptr) store(gx, narrow_all<T>(grads));
}

// Blocks take stretches in turn. parts: a number for each block, or null.
template <class T, int count, class Function>
__global__ void __launch_bounds__(kThreads)
    pointwise_backward_kernel(const T* gy, const T* x, T* gx, Dense b, typename Accumulator<T>::type* parts,
                              int64_t elements) {
  using Acc = typename Accumulator<T>::type;
  __shared__ Acc memory[kThreads / kWarp];
  Acc sum = 0;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * kStretch<count>; first < elements;
       first += int64_t{gridDim.x} * kStretch<count>) {
    if (count > 1 && first + kStretch<count> <= elements) {
      const int64_t start = first + threadIdx.x * count;
      Pack<T, count> packs[kVectors], grads[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        packs[v] = read_once<T, count>(x + start + v * kThreads * count);
        grads[v] = read_once<T, count>(gy + start + v * kThreads * count);
      }
      const Function function(b);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        T* to = gx == nullptr ? nullptr : gx + start + v * kThreads * count;
        gradients_of(function, packs[v], grads[v], to, sum);
      }
    } else {
      const Function function(b);
      const int64_t end = min(first + kStretch<count>, elements);
#pragma unroll 1
      for (int64_t at = first + threadIdx.x; at < end; at += kThreads)
        gradients_of(function, read_once<T, 1>(x + at), read_once<T, 1>(gy + at), gx == nullptr ? nullptr : gx + at,
                     sum);
    }
  }
  if (parts == nullptr) return;
  sum = sum_block(sum, memory);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The second kernel, one block.
template <class Acc>
__global__ void __launch_bounds__(kThreads) smooth_relu_finish_kernel(const Acc* parts, int count, Dense b, Dense grad_b) {
  __shared__ Acc memory[kThreads / kWarp];
  Acc sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = sum_block(sum, memory);
  if (threadIdx.x == 0) write(grad_b, 0, sum * SmoothReluParameter<Acc>(read<Acc>(b, 0)).grad_scale);
}

// ---- launches ---------------------------------------------------------------------------------------------

template <class T>
bool aligned(const void* a, const void* b, const void* c = nullptr) {
  return (address(a) | address(b) | address(c)) % sizeof(Pack<T, kVector<T>>) == 0;
}

template <class T, int count, class Function>
void forward(const char* operation, const Place& place, int64_t elements, const void* x, void* y, const Dense& b) {
  launch(operation, place, ceil_div(elements, kStretch<count>), kThreads,
         pointwise_forward_kernel<T, count, Function>, static_cast<const T*>(x), static_cast<T*>(y), b, elements);
}

template <class T, int count, class Function, class Acc>
void backward(const char* operation, const Place& place, int64_t elements, int64_t blocks, const void* gy,
              const void* x, void* gx, const Dense& b, Acc* parts) {
  launch(operation, place, blocks, kThreads, pointwise_backward_kernel<T, count, Function>, static_cast<const T*>(gy),
         static_cast<const T*>(x), static_cast<T*>(gx), b, parts, elements);
}

// Blocks of a backward pass that leaves sums.
template <int count>
int64_t summing_blocks(int64_t elements) {
  return min(ceil_div(elements, kStretch<count>), kMostParts);
}

template <class T, int count>
void smooth_backward(const SmoothReluBackward& args) {
  using Acc = typename Accumulator<T>::type;
  const char* operation = "smooth_relu_backward";
  const bool sums = args.grad_b.data != nullptr;
  const int64_t blocks = sums ? summing_blocks<count>(args.elements) : ceil_div(args.elements, kStretch<count>);
  Acc* parts = sums ? static_cast<Acc*>(args.scratch) : nullptr;
  backward<T, count, SmoothRelu<T>>(operation, args.place, args.elements, blocks, args.gy, args.x, args.gx, args.b,
                                    parts);
  if (sums)
    launch(operation, args.place, 1, kThreads, smooth_relu_finish_kernel<Acc>, parts, static_cast<int>(blocks), args.b,
           args.grad_b);
}

}  // namespace

void swish_relu_forward(const SwishReluForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = aligned<T>(args.x, args.y) ? forward<T, kVector<T>, SwishRelu<T>> : forward<T, 1, SwishRelu<T>>;
    run("swish_relu_forward", args.place, args.elements, args.x, args.y, Dense{});
  });
}

void swish_relu_backward(const SwishReluBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using Acc = typename Accumulator<T>::type;
    const bool whole = aligned<T>(args.gy, args.x, args.gx);
    const auto run = whole ? backward<T, kVector<T>, SwishRelu<T>, Acc> : backward<T, 1, SwishRelu<T>, Acc>;
    const int64_t blocks = ceil_div(args.elements, whole ? kStretch<kVector<T>> : kStretch<1>);
    run("swish_relu_backward", args.place, args.elements, blocks, args.gy, args.x, args.gx, Dense{}, nullptr);
  });
}

void smooth_relu_forward(const SmoothReluForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = aligned<T>(args.x, args.y) ? forward<T, kVector<T>, SmoothRelu<T>> : forward<T, 1, SmoothRelu<T>>;
    run("smooth_relu_forward", args.place, args.elements, args.x, args.y, args.b);
  });
}

void smooth_relu_backward(const SmoothReluBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (aligned<T>(args.gy, args.x, args.gx)) return smooth_backward<T, kVector<T>>(args);
    return smooth_backward<T, 1>(args);
  });
}

// Enough however the tensors are aligned: it is a few kilobytes at most.
int64_t smooth_relu_backward_scratch(int64_t elements, DType dtype) {
  return summing_blocks<1>(elements) * (dtype == DType::float64 ? 8 : 4);
}

}  // namespace cuda
}  // namespace sparta
