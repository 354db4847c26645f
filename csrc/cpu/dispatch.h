// Which instruction set's kernels run: the best that both this build and this machine have.
#pragma once

#include <string>
#include <vector>

#include "../kernels.h"

namespace sparta {

struct CpuKernels {
  const char* isa;
  bool (*supported)();  // by the machine
#define SPARTA_KERNEL_MEMBER(scope, name, Arguments) void (*name)(const Arguments&);
  SPARTA_FOR_EACH_CPU_KERNEL(SPARTA_KERNEL_MEMBER, )
#undef SPARTA_KERNEL_MEMBER
};

const CpuKernels& cpu_kernels();

std::vector<std::string> built_isas();      // worst first
std::vector<std::string> supported_isas();  // those of them that run here
void set_isa(const std::string& isa);       // throws std::invalid_argument

}  // namespace sparta
