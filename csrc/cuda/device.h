// The machine's CUDA devices, for cuda_info() in bindings.cpp. Part of builds with CUDA only.
#pragma once

#include <string>
#include <vector>

namespace sparta {
namespace cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  long long memory;  // bytes
};

struct Versions {
  int runtime;  // the CUDA this was built with, as 1000 * major + 10 * minor
  int driver;   // the newest CUDA that the installed driver can run; 0 where there is no driver
};

Versions versions();
std::vector<Device> devices();  // empty where there is no driver or no device

}  // namespace cuda
}  // namespace sparta
