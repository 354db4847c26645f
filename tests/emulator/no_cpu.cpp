// In place of the CPU kernels: the emulated module has those of csrc/cuda, and nothing may land anywhere else.
#include <stdexcept>

#include "kernels.h"

namespace sparta {
namespace baseline {

#define EMULATOR_NO_KERNEL(name, Arguments) \
  void name(const Arguments&) { throw std::logic_error(#name ": the emulated module has no CPU kernels"); }

EMULATOR_NO_KERNEL(gate_forward, GateForward)
EMULATOR_NO_KERNEL(gate_backward, GateBackward)
EMULATOR_NO_KERNEL(conv_forward, ConvForward)
EMULATOR_NO_KERNEL(conv_backward, ConvBackward)
EMULATOR_NO_KERNEL(pgd_step, PgdStep)
EMULATOR_NO_KERNEL(pgd_start, PgdStart)
EMULATOR_NO_KERNEL(relu_forward, ReluForward)
EMULATOR_NO_KERNEL(relu_backward, ReluBackward)
EMULATOR_NO_KERNEL(swish_relu_forward, SwishReluForward)
EMULATOR_NO_KERNEL(swish_relu_backward, SwishReluBackward)
EMULATOR_NO_KERNEL(smooth_relu_forward, SmoothReluForward)
EMULATOR_NO_KERNEL(smooth_relu_backward, SmoothReluBackward)
EMULATOR_NO_KERNEL(dyrelu_forward, DyReluForward)
EMULATOR_NO_KERNEL(dyrelu_backward, DyReluBackward)
EMULATOR_NO_KERNEL(attention_forward, AttentionForward)
EMULATOR_NO_KERNEL(attention_backward, AttentionBackward)

}  // namespace baseline
}  // namespace sparta
