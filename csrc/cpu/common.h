// What the CPU kernels share: dispatch on dtype, small tensors in any dtype, scratch memory, number of threads.
#pragma once

#include <stdlib.h>

#include "../kernels.h"
#include "simd.h"

namespace sparta {
namespace SPARTA_ISA {

// Calls body(T{}) with the C++ type of dtype.
template <class Body>
SPARTA_INLINE void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float64: return body(double{});
    case DType::float32: return body(float{});
    case DType::bfloat16: return body(bfloat16{});
    case DType::float16: return body(float16{});
  }
}

SPARTA_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
SPARTA_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
SPARTA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread for every 32k elements at most: below that, waking a thread costs more than it saves.
SPARTA_INLINE int useful_threads(int threads, int64_t elements) {
  return static_cast<int>(max(1, min(threads, ceil_div(elements, 32768))));
}

// Whether results of `bytes` bytes, in rows `row_bytes` apart, are written past the cache: if they are aligned to whole
// registers, and too large for the last-level cache, so that little of them would still be there when they are read.
SPARTA_INLINE bool bypasses_cache(const void* to, int64_t row_bytes, int64_t sample_bytes, int64_t bytes) {
  const auto misaligned = reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(row_bytes | sample_bytes);
  return bytes >= last_level_cache() && misaligned % 64 == 0;
}

// Small tensors come in any dtype; sums and factors are kept in the accumulator's.
template <class Acc>
void read(const Dense& from, int64_t offset, int64_t count, Acc* to) {
  with_type(from.dtype, [&](auto type) {
    using T = decltype(type);
    const T* source = static_cast<const T*>(from.data) + offset;
    if constexpr (sizeof(T) >= 4) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Acc>(source[i]);
    } else {
      for (int64_t i = 0; i < count; i += kFloatLanes) {
        const int64_t lanes = min(kFloatLanes, count - i);
        const FloatVector value = load_partial(source + i, lanes);
        if constexpr (sizeof(Acc) == sizeof(float))
          store_partial(to + i, value, lanes);
        else
          for (int64_t lane = 0; lane < lanes; ++lane) to[i + lane] = value[lane];
      }
    }
  });
}

template <class Acc>
void write(const Dense& to, int64_t offset, int64_t count, const Acc* from) {
  with_type(to.dtype, [&](auto type) {
    using T = decltype(type);
    T* target = static_cast<T*>(to.data) + offset;
    if constexpr (sizeof(T) >= 4) {
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<T>(from[i]);
    } else {
      for (int64_t i = 0; i < count; i += kFloatLanes) {
        const int64_t lanes = min(kFloatLanes, count - i);
        FloatVector value{};
        if constexpr (sizeof(Acc) == sizeof(float))
          value = load_partial(from + i, lanes);
        else
          for (int64_t lane = 0; lane < lanes; ++lane) value[lane] = static_cast<float>(from[i + lane]);
        store_partial(target + i, value, lanes);
      }
    }
  });
}

// Memory for one call, aligned to a cache line. Not std::vector: a standard template instantiated here would be
// compiled for this instruction set and could be merged by the linker with everybody else's.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(aligned_alloc(64, bytes(count)))) {
    if (data_ == nullptr) abort();  // out of memory, and no exception may leave a parallel region
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  static size_t bytes(int64_t count) { return (static_cast<size_t>(count) * sizeof(T) / 64 + 1) * 64; }
  T* data_;
};

}  // namespace SPARTA_ISA
}  // namespace sparta
