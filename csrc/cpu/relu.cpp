// relu(a + b) on a CPU, forward and backward, in one pass each: what is kept in between is one bit an element.
//
// Threads share out blocks of 64 elements, whose bits are one 64-bit word: nobody else writes a byte of it.
#define SPARTA_KEEP_SUBNORMALS  // simd.h: results are torch's, bit for bit
#include "../kernels.h"
#include "common.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

constexpr int64_t kBlock = 64;

// What both directions do with a block: results from one or two tensors, a whole cache line at a time, or the first
// `count` elements of the last block.
template <class T, bool two, bool stream>
struct Block {
  using Lanes = Simd<T>;
  using Vector = typename Lanes::Vector;
  static constexpr int64_t line = Lanes::line * Lanes::lanes;

  const T *first, *second;
  T* result;

  // function(sum, place) gives the result; place counts the elements of the block before.
  template <class Function>
  SPARTA_INLINE void whole(Function function) const {
    for (int64_t k = 0; k < kBlock; k += line) {
      prefetch_read(first + k);
      if (two) prefetch_read(second + k);
      if (!stream && result != first) prefetch_write(result + k);
      Vector values[Lanes::line];
      for (int64_t i = 0, at = k; i < Lanes::line; ++i, at += Lanes::lanes) {
        Vector sum = Lanes::load(first + at);
        if (two) sum += Lanes::load(second + at);
        values[i] = function(sum, at);
      }
      Lanes::template store_line<stream>(result + k, values);
    }
  }
  template <class Function>
  SPARTA_INLINE void part(int64_t count, Function function) const {
    for (int64_t k = 0; k < count; k += Lanes::lanes) {
      const int64_t lanes = min(Lanes::lanes, count - k);
      Vector sum = load_partial(first + k, lanes);
      if (two) sum += load_partial(second + k, lanes);
      store_partial(result + k, function(sum, k), lanes);
    }
  }
};

// Bytes in the order of memory: the lowest bits are those of the first elements on any machine.
SPARTA_INLINE void write_bits(uint8_t* to, uint64_t bits, int64_t bytes) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (bytes == 8) return store_bits(to, bits);
#endif
  for (int64_t i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(bits >> 8 * i);
}
SPARTA_INLINE uint64_t read_bits(const uint8_t* from, int64_t bytes) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (bytes == 8) return load_bits<uint64_t>(from);
#endif
  uint64_t bits = 0;
  for (int64_t i = 0; i < bytes; ++i) bits |= uint64_t{from[i]} << 8 * i;
  return bits;
}

template <class T, bool two, bool stream>
void forward(const ReluForward& args) {
  const T *a = static_cast<const T*>(args.a), *b = static_cast<const T*>(args.b);
  T* y = static_cast<T*>(args.y);
  const int64_t blocks = ceil_div(args.elements, kBlock);
#pragma omp parallel num_threads(useful_threads(args.place.threads, args.elements))
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < blocks; ++index) {
      const int64_t start = index * kBlock, count = min(kBlock, args.elements - start);
      const Block<T, two, stream> block{a + start, two ? b + start : nullptr, y + start};
      uint64_t bits = 0;
      // A sum of two 16-bit numbers that is positive, and computed in float32, does not become 0 when it is rounded.
      const auto rectified = [&](auto sum, int64_t place) {
        bits |= passing(sum) << place;
        return relu(sum);
      };
      if (count == kBlock)
        block.whole(rectified);
      else
        block.part(count, rectified);
      if (args.bits != nullptr) write_bits(args.bits + start / 8, bits, ceil_div(count, 8));
    }
    if (stream) stream_fence();
  }
}

template <class T, bool two, bool stream>
void backward(const ReluBackward& args) {
  const T *grad = static_cast<const T*>(args.grad), *grad2 = static_cast<const T*>(args.grad2);
  T* gx = static_cast<T*>(args.gx);
  const int64_t blocks = ceil_div(args.elements, kBlock);
#pragma omp parallel num_threads(useful_threads(args.place.threads, args.elements))
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < blocks; ++index) {
      const int64_t start = index * kBlock, count = min(kBlock, args.elements - start);
      const Block<T, two, stream> block{grad + start, two ? grad2 + start : nullptr, gx + start};
      const uint64_t bits = read_bits(args.bits + start / 8, ceil_div(count, 8));
      const auto passed = [&](auto sum, int64_t place) { return masked(sum, bits >> place); };
      if (count == kBlock)
        block.whole(passed);
      else
        block.part(count, passed);
    }
    if (stream) stream_fence();
  }
}

}  // namespace

void relu_forward(const ReluForward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool stream = args.y != args.a && bypasses_cache(args.y, 0, 0, args.elements * int64_t{sizeof(T)});
    if (args.b == nullptr) return stream ? forward<T, false, true>(args) : forward<T, false, false>(args);
    return stream ? forward<T, true, true>(args) : forward<T, true, false>(args);
  });
}

void relu_backward(const ReluBackward& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool stream = bypasses_cache(args.gx, 0, 0, args.elements * int64_t{sizeof(T)});
    if (args.grad2 == nullptr) return stream ? backward<T, false, true>(args) : backward<T, false, false>(args);
    return stream ? backward<T, true, true>(args) : backward<T, true, false>(args);
  });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
