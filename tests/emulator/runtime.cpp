// The CUDA runtime as far as csrc/cuda calls it: what is refused, two devices that are alike, errors on demand.
#include "cuda_runtime.h"

#include <map>
#include <mutex>

#include "shared_memory.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {
namespace {

constexpr int kDevices = 2;
constexpr int kMaxThreads = 1024;

std::mutex one_launch;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
int multiprocessors = 132;
int fail_next = cudaSuccess;
std::map<const void*, size_t> dynamic_limits;  // where it is not that of static memory

struct LastLaunch {
  int64_t count, grid[3], block[3], dynamic_shared, device, stream;
} last_launch;

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool exists(int device) { return device >= 0 && device < kDevices; }

cudaError_t judge(const Body& body, const Configuration& asked) {
  const auto is_within = [](const Index& i, unsigned x, unsigned y, unsigned z) {
    return i.x >= 1 && i.x <= x && i.y >= 1 && i.y <= y && i.z >= 1 && i.z <= z;
  };
  if (!is_within(asked.grid, 0x7fffffff, 65535, 65535) || !is_within(asked.block, kMaxThreads, kMaxThreads, 64) ||
      uint64_t{asked.block.x} * asked.block.y * asked.block.z > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  const auto limit = dynamic_limits.find(body.kernel);
  return asked.dynamic_shared > (limit == dynamic_limits.end() ? kStaticShared : limit->second) ? cudaErrorInvalidValue
                                                                                                 : cudaSuccess;
}

}  // namespace

int launch(const Body& body, const Configuration& asked) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (const int error = std::exchange(fail_next, cudaSuccess)) return note(static_cast<cudaError_t>(error));
  if (const cudaError_t error = judge(body, asked)) return note(error);
  const Index &grid = asked.grid, &block = asked.block;
  last_launch = {last_launch.count + 1,
                 {grid.x, grid.y, grid.z},
                 {block.x, block.y, block.z},
                 static_cast<int64_t>(asked.dynamic_shared),
                 current_device,
                 reinterpret_cast<int64_t>(asked.stream)};
  run_grid(body, asked);
  return cudaSuccess;
}

int limit_dynamic_shared(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (bytes < 0 || static_cast<size_t>(bytes) > kDynamicShared) return note(cudaErrorInvalidValue);
  dynamic_limits[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

EMULATOR_EXPORT void emulator_set_order(uint64_t seed) { set_order(seed); }
EMULATOR_EXPORT void emulator_fail_next_launch(int error) { fail_next = error; }
EMULATOR_EXPORT void emulator_set_multiprocessors(int count) { multiprocessors = count; }
EMULATOR_EXPORT int emulator_current_device() { return current_device; }
EMULATOR_EXPORT void emulator_last_launch(LastLaunch* out) { *out = last_launch; }

}  // namespace emulator

using namespace emulator;

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!exists(device)) return note(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!exists(device)) return note(cudaErrorInvalidDevice);
  *properties = {"emulated", size_t{80} << 30, 9, 0, multiprocessors};
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return note(cudaErrorInvalidDevice);
  if (attribute != cudaDevAttrMultiProcessorCount) return note(cudaErrorInvalidValue);
  *value = multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
  }
  return "unrecognized error code";
}
