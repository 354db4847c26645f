#include "dispatch.h"

#include <atomic>
#include <fstream>
#include <stdexcept>

namespace sparta {
namespace {

bool any_machine() { return true; }

#if defined(SPARTA_X86_LEVELS)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#define SPARTA_KERNEL_OF(isa, name, Arguments) isa::name,
#define SPARTA_CPU_KERNELS(isa, supported) {#isa, supported, SPARTA_FOR_EACH_CPU_KERNEL(SPARTA_KERNEL_OF, isa)}

const CpuKernels kBuilt[] = {
    SPARTA_CPU_KERNELS(baseline, any_machine),
#if defined(SPARTA_X86_LEVELS)
    SPARTA_CPU_KERNELS(avx2, has_avx2),
    SPARTA_CPU_KERNELS(avx512, has_avx512),
    SPARTA_CPU_KERNELS(avx512_bf16, has_avx512_bf16),
#endif
};

const CpuKernels* best() {
  const CpuKernels* choice = kBuilt;
  for (const CpuKernels& kernels : kBuilt)
    if (kernels.supported()) choice = &kernels;
  return choice;
}

std::atomic<const CpuKernels*>& chosen() {
  static std::atomic<const CpuKernels*> kernels{best()};
  return kernels;
}

// From sysfs: in a virtual machine sysconf may name the whole host's cache.
int64_t read_last_level_cache() {
  int64_t kilobytes = 0;
  for (const char* level : {"index3", "index2"}) {
    std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/") + level + "/size");
    if (file >> kilobytes && kilobytes > 0) return kilobytes * 1024;
  }
  return int64_t{32} << 20;
}

}  // namespace

int64_t last_level_cache() {
  static const int64_t bytes = read_last_level_cache();
  return bytes;
}

const CpuKernels& cpu_kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : kBuilt) names.emplace_back(kernels.isa);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const CpuKernels& kernels : kBuilt)
    if (kernels.supported()) names.emplace_back(kernels.isa);
  return names;
}

void set_isa(const std::string& isa) {
  std::string available;
  for (const CpuKernels& kernels : kBuilt) {
    if (!kernels.supported()) continue;
    if (isa == kernels.isa) return chosen().store(&kernels);
    available += std::string(available.empty() ? "" : ", ") + kernels.isa;
  }
  throw std::invalid_argument("set_isa: isa must be one of " + available + ", got " + isa);
}

}  // namespace sparta
