// relu(a + b) on a CUDA device, forward and backward, in one pass each: what is kept in between is one bit an element.
//
// A warp's work is a tile of 256 elements, whose bits are 32 bytes, one for each lane. Its vectors lie one lane after
// the other, so that each load and store of a warp is one stretch of memory; where they are narrower than eight
// elements, lanes put their bits together. A tile that is cut off, or not aligned, is done one element at a time.
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

constexpr int kTile = 8 * kWarp;

template <class Acc>
SPARTA_DEVICE unsigned passing(Acc value) {  // all but those <= 0, so a NaN does
  return value <= 0 ? 0u : 1u;
}

// The tile of the calling thread's warp: its first element.
SPARTA_DEVICE int64_t first_of_tile() {
  return (int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp) * kTile;
}

// Not through read_once: what is written over is not for its cache.
template <class T, int count, class Acc>
SPARTA_DEVICE void load_all(const T* from, Acc (&values)[count]) {
  widen_all(*reinterpret_cast<const Pack<T, count>*>(from), values);
}

// The values of a and b, and whose gradients pass.
template <class T, int count>
SPARTA_DEVICE unsigned forward_pack(const T* a, const T* b, T* y) {
  using Acc = typename Accumulator<T>::type;
  Acc sum[count];
  load_all<T, count>(a, sum);
  if (b != nullptr) {
    Acc other[count];
    load_all<T, count>(b, other);
#pragma unroll
    for (int i = 0; i < count; ++i) sum[i] += other[i];
  }
  // A sum of two 16-bit numbers that is positive, and computed in float32, does not become 0 when it is rounded.
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    bits |= passing(sum[i]) << i;
    sum[i] = relu(sum[i]);
  }
  store(y, narrow_all<T>(sum));
  return bits;
}

template <class T, int count>
SPARTA_DEVICE void backward_pack(const T* grad, const T* grad2, unsigned bits, T* gx) {
  using Acc = typename Accumulator<T>::type;
  Acc sum[count];
  widen_all(read_once<T, count>(grad), sum);
  if (grad2 != nullptr) {
    Acc other[count];
    widen_all(read_once<T, count>(grad2), other);
#pragma unroll
    for (int i = 0; i < count; ++i) sum[i] += other[i];
  }
#pragma unroll
  for (int i = 0; i < count; ++i) sum[i] = bits >> i & 1 ? sum[i] : Acc{};
  store(gx, narrow_all<T>(sum));
}

template <class T, int count>
__global__ void __launch_bounds__(kThreads)
    relu_forward_kernel(const T* a, const T* b, T* y, uint8_t* bits, int64_t elements) {
  const int64_t first = first_of_tile();
  if (first >= elements) return;  // the whole warp
  const int lane = threadIdx.x % kWarp;
  unsigned own = 0;  // bits of the elements 8 * lane and the seven behind
  if (count > 1 && first + kTile <= elements) {
    constexpr int vectors = 8 / count;  // of a lane; as many lanes have the bits of one byte
    unsigned packed = 0;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = first + (v * kWarp + lane) * count;
      packed |= forward_pack<T, count>(a + at, b == nullptr ? nullptr : b + at, y + at) << (v * count);
    }
    if constexpr (vectors == 1) {
      own = packed;
    } else if (bits != nullptr) {
      const int source = lane * vectors % kWarp, vector = lane * vectors / kWarp;
#pragma unroll
      for (int i = 0; i < vectors; ++i) {
        const unsigned theirs = __shfl_sync(kAllLanes, packed, source + i) >> (vector * count);
        own |= (theirs & ((1u << count) - 1)) << (i * count);
      }
    }
  } else {
    for (int i = 0; i < 8; ++i) {
      const int64_t at = first + 8 * lane + i;
      if (at < elements) own |= forward_pack<T, 1>(a + at, b == nullptr ? nullptr : b + at, y + at) << i;
    }
  }
  if (bits != nullptr && first + 8 * lane < elements) bits[first / 8 + lane] = static_cast<uint8_t>(own);
}

template <class T, int count>
__global__ void __launch_bounds__(kThreads)
    relu_backward_kernel(const T* grad, const T* grad2, const uint8_t* bits, T* gx, int64_t elements) {
  const int64_t first = first_of_tile();
  if (first >= elements) return;
  const int lane = threadIdx.x % kWarp;
  if (count > 1 && first + kTile <= elements) {
#pragma unroll
    for (int v = 0; v < 8 / count; ++v) {
      const int64_t at = first + (v * kWarp + lane) * count;
      const unsigned theirs = unsigned{bits[at / 8]} >> (at % 8);
      backward_pack<T, count>(grad + at, grad2 == nullptr ? nullptr : grad2 + at, theirs, gx + at);
    }
  } else {
    for (int i = 0; i < 8; ++i) {
      const int64_t at = first + 8 * lane + i;
      if (at >= elements) break;
      const unsigned theirs = unsigned{bits[at / 8]} >> i;
      backward_pack<T, 1>(grad + at, grad2 == nullptr ? nullptr : grad2 + at, theirs, gx + at);
    }
  }
}

int64_t blocks(int64_t elements) { return ceil_div(elements, kTile * (kThreads / kWarp)); }

template <class T, int count>
void forward(const ReluForward& args) {
  launch("relu_forward", args.place, blocks(args.elements), kThreads, relu_forward_kernel<T, count>,
         static_cast<const T*>(args.a), static_cast<const T*>(args.b), static_cast<T*>(args.y), args.bits,
         args.elements);
}

template <class T, int count>
void backward(const ReluBackward& args) {
  launch("relu_backward", args.place, blocks(args.elements), kThreads, relu_backward_kernel<T, count>,
         static_cast<const T*>(args.grad), static_cast<const T*>(args.grad2), args.bits, static_cast<T*>(args.gx),
         args.elements);
}

}  // namespace

void relu_forward(const ReluForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if ((address(args.a) | address(args.b) | address(args.y)) % 16 == 0) return forward<T, kVector<T>>(args);
    return forward<T, 1>(args);
  });
}

void relu_backward(const ReluBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if ((address(args.grad) | address(args.grad2) | address(args.gx)) % 16 == 0)
      return backward<T, kVector<T>>(args);
    return backward<T, 1>(args);
  });
}

}  // namespace cuda
}  // namespace sparta
