// relu(a + b) on a CPU, forward and backward, in one pass each: what is kept in between is one bit an element.
//
// Threads share blocks of 64 elements, whose bits are one 64-bit word: no byte is written by two threads.
#define SPARTA_KEEP_SUBNORMALS  // simd.h: results are torch's, bit for bit
#include "elements.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

constexpr int64_t kBlock = 64;

// Elements::map of the sum of the inputs; for whole blocks the number of elements is a constant.
template <class T, int inputs, bool stream, class Function>
SPARTA_INLINE void map_sum(const Elements<T, inputs, stream>& block, int64_t count, Function function) {
  const auto of_sum = [&](const auto* values, int64_t place) {
    return function(inputs > 1 ? values[0] + values[inputs - 1] : values[0], place);
  };
  if (count == kBlock)
    block.map(kBlock, of_sum);
  else
    block.map(count, of_sum);
}

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
  Elements<T, 1 + two, stream> all{{static_cast<const T*>(args.a)}, static_cast<T*>(args.y)};
  if (two) all.from[two] = static_cast<const T*>(args.b);
  const int64_t blocks = ceil_div(args.elements, kBlock);
#pragma omp parallel num_threads(useful_threads(args.place.threads, args.elements))
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < blocks; ++index) {
      const int64_t start = index * kBlock, count = min(kBlock, args.elements - start);
      uint64_t bits = 0;
      // Taken before rounding to T: a positive sum of two 16-bit numbers, in float32, does not round to 0.
      const auto rectified = [&](auto sum, int64_t place) {
        bits |= passing(sum) << place;
        return relu(sum);
      };
      map_sum(all.behind(start), count, rectified);
      if (args.bits != nullptr) write_bits(args.bits + start / 8, bits, ceil_div(count, 8));
    }
    if (stream) stream_fence();
  }
}

template <class T, bool two, bool stream>
void backward(const ReluBackward& args) {
  Elements<T, 1 + two, stream> all{{static_cast<const T*>(args.grad)}, static_cast<T*>(args.gx)};
  if (two) all.from[two] = static_cast<const T*>(args.grad2);
  const int64_t blocks = ceil_div(args.elements, kBlock);
#pragma omp parallel num_threads(useful_threads(args.place.threads, args.elements))
  {
#pragma omp for schedule(static)
    for (int64_t index = 0; index < blocks; ++index) {
      const int64_t start = index * kBlock, count = min(kBlock, args.elements - start);
      const uint64_t bits = read_bits(args.bits + start / 8, ceil_div(count, 8));
      const auto passed = [&](auto sum, int64_t place) { return masked(sum, bits >> place); };
      map_sum(all.behind(start), count, passed);
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
