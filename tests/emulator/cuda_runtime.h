// Found in place of NVIDIA's header of this name: CUDA sources then compile as plain C++, and run on the CPU.
//
// It has what csrc/cuda uses and no more; what a build misses is to be added here. Unlike the real one it does not
// understand `<<<>>>` (launch with cudaLaunchKernel), and build.py rewrites `__shared__` variables beforehand.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define CUDART_VERSION 13000

// ---- the language ------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

using uint3 = emulator::Index;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

inline const uint3& threadIdx = emulator::thread_index;
inline const uint3& blockIdx = emulator::block_index;
inline const uint3& blockDim = emulator::block_extent;
inline const uint3& gridDim = emulator::grid_extent;
constexpr int warpSize = 32;

// The alignments are the real ones: a sanitized build tells of an access that a GPU would refuse.
#define EMULATOR_VECTORS(scalar, name, align2, align4)                                             \
  struct alignas(align2) name##2 {                                                                 \
    scalar x, y;                                                                                   \
  };                                                                                               \
  struct alignas(align4) name##4 {                                                                 \
    scalar x, y, z, w;                                                                             \
  };                                                                                               \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                             \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATOR_VECTORS(char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
#undef EMULATOR_VECTORS

// ---- what threads do together ------------------------------------------------------------------------------

// Added to a function's parameters: where in the source it is called.
#define EMULATOR_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_WHERE) { emulator::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_WHERE) {
  emulator::exchange({emulator::Together::barrier, mask, 0, 0, {file, line}});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
  return static_cast<unsigned>(
      emulator::exchange({emulator::Together::ballot, mask, predicate != 0, 0, {file, line}}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_WHERE) {
  return __ballot_sync(mask, predicate == 0, file, line) == 0;
}

namespace emulator {

template <class T>
T shuffle(unsigned mask, T value, int source_lane, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange({Together::shuffle, mask, bits, source_lane, where});
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int first_of(int width) { return lane() & -width; }
inline int last_of(int width) { return first_of(width) + width - 1; }

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_WHERE) {
  return emulator::shuffle(mask, value, emulator::first_of(width) + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_WHERE) {
  const int source = emulator::lane() - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source < emulator::first_of(width) ? emulator::lane() : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_WHERE) {
  const int source = emulator::lane() + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source > emulator::last_of(width) ? emulator::lane() : source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_WHERE) {
  const int source = emulator::lane() ^ lane_mask;
  return emulator::shuffle(mask, value, source > emulator::last_of(width) ? emulator::lane() : source, {file, line});
}

inline void __trap() { emulator::fail("__trap()"); }

// ---- the runtime -------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
};

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor;
  int multiProcessorCount;
};

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return static_cast<cudaError_t>(emulator::limit_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes));
}

namespace emulator {

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const Configuration& configuration,
                   std::tuple<std::decay_t<Parameters>...> arguments) {
  auto call = std::make_pair(kernel, std::move(arguments));
  const Body body{reinterpret_cast<const void*>(kernel),
                  [](void* data) {
                    const auto& [function, values] = *static_cast<const decltype(call)*>(data);
                    std::apply(function, values);
                  },
                  &call};
  return static_cast<cudaError_t>(launch(body, configuration));
}

template <class... Parameters, size_t... i>
std::tuple<std::decay_t<Parameters>...> unpack(void (*)(Parameters...), void** arguments, std::index_sequence<i...>) {
  return {*static_cast<std::decay_t<Parameters>*>(arguments[i])...};
}

}  // namespace emulator

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t dynamic_shared = 0, cudaStream_t stream = nullptr) {
  return emulator::launch(kernel, {grid, block, dynamic_shared, stream},
                          emulator::unpack(kernel, arguments, std::index_sequence_for<Parameters...>{}));
}

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::launch(kernel, {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream},
                          {std::forward<Arguments>(arguments)...});
}
