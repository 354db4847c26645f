// Where the kernels meet CUDA: launches, vectors of elements, small tensors of any dtype, sums over warps and blocks.
//
// Inline PTX stands under `#if defined(__CUDA_ARCH__)`, each time beside plain C++ that computes the same: the kernels
// also compile for, and run on, a CPU (tests/emulator).
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"

#define SPARTA_DEVICE __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels need CUDA devices of compute capability 8.0 or newer: set SPARTA_CUDA_ARCHS accordingly"
#endif

namespace sparta {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, at most
constexpr unsigned kAllLanes = 0xffffffffu;

SPARTA_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
SPARTA_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
SPARTA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- launches ---------------------------------------------------------------------------------------------

inline void check(const char* operation, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error: it is reported here, and must not surface in an unrelated later call
  throw std::runtime_error(std::string(operation) + ": " + what + " failed: " + cudaGetErrorString(error));
}

// A guard: makes a device the current one, and restores the previous one at its end.
class CurrentDevice {
 public:
  CurrentDevice(const char* operation, int device) {
    check(operation, "cudaGetDevice", cudaGetDevice(&before_));
    if (before_ == device) return;
    check(operation, "cudaSetDevice", cudaSetDevice(device));
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Queues `blocks` blocks of kernel(args...) on the place's stream; no blocks are no launch.
template <class... Parameters>
void launch(const char* operation, const Place& place, int64_t blocks, int threads, void (*kernel)(Parameters...),
            const std::common_type_t<Parameters>&... args) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff)
    throw std::runtime_error(std::string(operation) + ": CUDA launches at most 2^31 - 1 blocks, but this takes " +
                             std::to_string(blocks));
  const CurrentDevice device(operation, place.device);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(operation, "CUDA launch",
        cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), pointers, 0,
                         static_cast<cudaStream_t>(place.stream)));
}

// ---- elements ---------------------------------------------------------------------------------------------

// Calls body(T{}) with the C++ type of dtype. For the host and for devices, as the body is.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Body>
SPARTA_INLINE void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float64: return body(double{});
    case DType::float32: return body(float{});
    case DType::bfloat16: return body(bfloat16{});
    case DType::float16: return body(float16{});
  }
}

SPARTA_DEVICE double widen(double value) { return value; }
SPARTA_DEVICE float widen(float value) { return value; }
SPARTA_DEVICE float widen(bfloat16 value) { return Bits<float>::to(static_cast<int32_t>(uint32_t{value.bits} << 16)); }
SPARTA_DEVICE float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // subnormal, in units of 2^-24
    const float wide = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -wide : wide;
  }
  const uint32_t rebias = magnitude < 0x7c00u ? (127u - 15u) << 23 : (255u - 31u) << 23;
  return Bits<float>::to(static_cast<int32_t>(sign | ((magnitude << 13) + rebias)));
#endif
}

// To the nearest, ties to even; NaN stays NaN.
template <class T>
struct Narrow {  // float32, float64
  template <class Acc>
  static SPARTA_DEVICE T of(Acc value) {
    return static_cast<T>(value);
  }
};

template <>
struct Narrow<bfloat16> {
  static SPARTA_DEVICE bfloat16 of(float value) {
#if defined(__CUDA_ARCH__)
    bfloat16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = static_cast<uint32_t>(Bits<float>::of(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
  }
  static SPARTA_DEVICE bfloat16 of(double value) { return of(static_cast<float>(value)); }
};

template <>
struct Narrow<float16> {
  static SPARTA_DEVICE float16 of(float value) {
#if defined(__CUDA_ARCH__)
    float16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
    return narrow;
#else
    const uint32_t bits = static_cast<uint32_t>(Bits<float>::of(value));
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7fffu;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
      half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves it, rounded, in units of 2^-24
      const float shifted = Bits<float>::to(static_cast<int32_t>(magnitude)) + 0.5f;
      half = static_cast<uint32_t>(Bits<float>::of(shifted)) - 0x3f000000u;
    } else {
      half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - ((127u - 15u) << 23)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
  }
  static SPARTA_DEVICE float16 of(double value) { return of(static_cast<float>(value)); }
};

// Two 16-bit elements, the first in the lower half.
template <class T>
SPARTA_DEVICE uint32_t narrow_two(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
#else
  return Narrow<T>::of(first).bits | uint32_t{Narrow<T>::of(second).bits} << 16;
#endif
}

// The raw bits of an element of a small tensor: the load is in flight until they are decoded.
SPARTA_DEVICE uint64_t read_bits(const Dense& from, int64_t at) {
  uint64_t bits = 0;
  with_type(from.dtype, [&](auto type) {
    std::conditional_t<sizeof type == 8, uint64_t, std::conditional_t<sizeof type == 4, uint32_t, uint16_t>> word;
    memcpy(&word, static_cast<const decltype(type)*>(from.data) + at, sizeof word);
    bits = word;
  });
  return bits;
}

template <class Acc>
SPARTA_DEVICE Acc decode(DType dtype, uint64_t bits) {
  Acc value{};
  with_type(dtype, [&](auto type) {
    memcpy(&type, &bits, sizeof type);
    value = static_cast<Acc>(widen(type));
  });
  return value;
}

template <class Acc>
SPARTA_DEVICE Acc read(const Dense& from, int64_t at) {
  return decode<Acc>(from.dtype, read_bits(from, at));
}

template <class Acc>
SPARTA_DEVICE void write(const Dense& to, int64_t at, Acc value) {
  with_type(to.dtype, [&](auto type) {
    using T = decltype(type);
    static_cast<T*>(to.data)[at] = Narrow<T>::of(value);
  });
}

// ---- vectors of elements ----------------------------------------------------------------------------------

// Elements that are read and written by one instruction, in the words that registers hold.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  using Word = std::conditional_t<sizeof(T) * count % 4 == 0, uint32_t, uint16_t>;
  Word words[sizeof(T) * count / sizeof(Word)];
};

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of the widest one

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Whether images are read and written in vectors. The stride of a single sample or row is arbitrary and ignored.
template <class T, int count>
bool in_vectors(const Matrices& m, int64_t samples, int64_t rows, int64_t cols) {
  return cols % count == 0 && address(m.data) % sizeof(Pack<T, count>) == 0 &&
         (samples < 2 || m.sample_stride % count == 0) && (rows < 2 || m.row_stride % count == 0);
}

// Loads a vector that the kernel reads once, and that nothing writes while it runs.
template <class T, int count>
SPARTA_DEVICE Pack<T, count> read_once(const T* from) {
  Pack<T, count> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == 16)
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
        : "l"(from));
  else
#endif
    pack = *reinterpret_cast<const Pack<T, count>*>(from);
  return pack;
}

// Loads in flight for one thread: a ring of up to `places` vectors. Vectors of 16 bytes are copied to shared memory
// asynchronously, where they take no registers and the compiler cannot move the loads to their uses; smaller ones are
// loaded into registers.
template <class T, int count, int places>
class Ring {
 public:
  using Vector = Pack<T, count>;
  static constexpr bool shared = sizeof(Vector) == 16;
  static constexpr int room = shared ? places * kThreads : 1;  // vectors of shared memory for a block

  SPARTA_DEVICE explicit Ring(Vector* memory) : memory_(memory + (shared ? threadIdx.x : 0)) {}

  // Starts the load of a vector, if `wanted`. Every round of these must be closed by sent().
  SPARTA_DEVICE void send_for(int place, const T* from, bool wanted) {
    if constexpr (shared) {
#if defined(__CUDA_ARCH__)
      asm volatile(
          "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %2, 0;\n\t"
          "@wanted cp.async.cg.shared.global [%0], [%1], 16;\n\t}" ::"r"(
              static_cast<uint32_t>(__cvta_generic_to_shared(memory_ + place * kThreads))),
          "l"(from), "r"(static_cast<uint32_t>(wanted))
          : "memory");
#else
      if (wanted) __pipeline_memcpy_async(memory_ + place * kThreads, from, sizeof(Vector));
#endif
    } else {
      if (wanted) registers_[place] = *reinterpret_cast<const Vector*>(from);
    }
  }
  static SPARTA_DEVICE void sent() {
#if defined(__CUDA_ARCH__)
    if constexpr (shared) asm volatile("cp.async.commit_group;" ::: "memory");
#else
    if constexpr (shared) __pipeline_commit();
#endif
  }
  // Waits until at most the newest `newest` rounds are in flight.
  template <int newest>
  static SPARTA_DEVICE void wait() {
#if defined(__CUDA_ARCH__)
    if constexpr (shared) asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
#else
    if constexpr (shared) __pipeline_wait_prior(newest);
#endif
  }
  // The vector that was loaded into that place, in a round that has been waited for.
  SPARTA_DEVICE Vector take(int place) const {
    if constexpr (shared)
      return memory_[place * kThreads];
    else
      return registers_[place];
  }

 private:
  Vector* memory_;
  Vector registers_[shared ? 1 : places];
};

template <class T, int count>
SPARTA_DEVICE void store(T* to, const Pack<T, count>& pack) {
  *reinterpret_cast<Pack<T, count>*>(to) = pack;
}

// Stores numbers to shared memory, as many at a time as an instruction takes; `to` is aligned accordingly.
template <int count, class Acc>
SPARTA_DEVICE void store_all(Acc* to, const Acc (&values)[count]) {
  constexpr int together = count < kVector<Acc> ? count : kVector<Acc>;
#pragma unroll
  for (int i = 0; i < count; i += together) {
    Pack<Acc, together> pack;
    memcpy(pack.words, values + i, sizeof pack);
    store(to + i, pack);
  }
}

template <class T, int count, class Acc>
SPARTA_DEVICE void widen_all(const Pack<T, count>& pack, Acc (&values)[count]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < count; ++i)
      values[i] = widen(T{static_cast<uint16_t>(i % 2 == 0 ? pack.words[i / 2] & 0xffffu : pack.words[i / 2] >> 16)});
  } else {
    memcpy(values, pack.words, sizeof values);
  }
}

template <class T, int count, class Acc>
SPARTA_DEVICE Pack<T, count> narrow_all(const Acc (&values)[count]) {
  Pack<T, count> pack;
  if constexpr (sizeof(T) != 2) {
    memcpy(pack.words, values, sizeof values);
  } else if constexpr (count == 1) {
    pack.words[0] = Narrow<T>::of(values[0]).bits;
  } else {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) pack.words[i] = narrow_two<T>(values[2 * i], values[2 * i + 1]);
  }
  return pack;
}

// ---- sums -------------------------------------------------------------------------------------------------

// Sums over groups of a warp's lanes: those whose numbers differ only in the bits from `low` to below `high` (powers of
// two). Every lane of a group gets the group's sums.
template <int count, class Acc>
SPARTA_DEVICE void sum_lanes(Acc (&values)[count], int low, int high) {
#pragma unroll 1
  for (int bit = low; bit < high; bit *= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], bit);
  }
}

// The sum over a block of whole warps, in its first thread. `memory` has room for a number a warp.
template <class Acc>
SPARTA_DEVICE Acc sum_block(Acc value, Acc* memory) {
  Acc sum[] = {value};
  sum_lanes(sum, 1, kWarp);
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = sum[0];
  __syncthreads();
  Acc total = 0;
  if (threadIdx.x == 0)
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += memory[warp];
  return total;
}

}  // namespace cuda
}  // namespace sparta
