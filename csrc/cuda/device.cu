#include "device.h"

#include <cuda_runtime.h>

namespace sparta {
namespace cuda {

Versions versions() {
  Versions found{CUDART_VERSION, 0};
  if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
  return found;
}

std::vector<Device> devices() {
  std::vector<Device> found;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device: an answer, not an error to leave behind for the next call
    return found;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    found.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                     static_cast<long long>(properties.totalGlobalMem)});
  }
  return found;
}

}  // namespace cuda
}  // namespace sparta
