// In place of the CPU kernels: the emulated module has those of csrc/cuda, and nothing may land anywhere else.
#include <stdexcept>

#include "kernels.h"

namespace sparta {
namespace baseline {

#define EMULATOR_NO_KERNEL(scope, name, Arguments) \
  void name(const Arguments&) { throw std::logic_error(#name ": the emulated module has no CPU kernels"); }

SPARTA_FOR_EACH_CPU_KERNEL(EMULATOR_NO_KERNEL, baseline)

}  // namespace baseline
}  // namespace sparta
