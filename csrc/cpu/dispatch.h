// Which instruction set's kernels run: the best that both this build and this machine have.
#pragma once

#include <string>
#include <vector>

#include "../kernels.h"

namespace sparta {

struct CpuKernels {
  const char* isa;
  bool (*supported)();  // by the machine
  decltype(&baseline::gate_forward) gate_forward;
  decltype(&baseline::gate_backward) gate_backward;
  decltype(&baseline::conv_forward) conv_forward;
  decltype(&baseline::conv_backward) conv_backward;
  decltype(&baseline::pgd_step) pgd_step;
  decltype(&baseline::pgd_start) pgd_start;
  decltype(&baseline::relu_forward) relu_forward;
  decltype(&baseline::relu_backward) relu_backward;
  decltype(&baseline::swish_relu_forward) swish_relu_forward;
  decltype(&baseline::swish_relu_backward) swish_relu_backward;
  decltype(&baseline::smooth_relu_forward) smooth_relu_forward;
  decltype(&baseline::smooth_relu_backward) smooth_relu_backward;
  decltype(&baseline::dyrelu_forward) dyrelu_forward;
  decltype(&baseline::dyrelu_backward) dyrelu_backward;
  decltype(&baseline::attention_forward) attention_forward;
  decltype(&baseline::attention_backward) attention_backward;
};

const CpuKernels& cpu_kernels();

std::vector<std::string> built_isas();      // worst first
std::vector<std::string> supported_isas();  // those of them that run here
void set_isa(const std::string& isa);       // throws std::invalid_argument

}  // namespace sparta
