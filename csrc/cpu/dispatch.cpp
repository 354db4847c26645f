#include "dispatch.h"

#include <atomic>
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
#endif

#define SPARTA_CPU_KERNELS(isa, supported)                                                         \
  {                                                                                                \
    #isa, supported, isa::gate_forward, isa::gate_backward, isa::conv_forward, isa::conv_backward, \
        isa::pgd_step, isa::pgd_start                                                              \
  }

const CpuKernels kBuilt[] = {
    SPARTA_CPU_KERNELS(baseline, any_machine),
#if defined(SPARTA_X86_LEVELS)
    SPARTA_CPU_KERNELS(avx2, has_avx2),
    SPARTA_CPU_KERNELS(avx512, has_avx512),
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

}  // namespace

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
