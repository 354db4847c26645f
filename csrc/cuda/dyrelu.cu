// dyrelu on a CUDA device: not written yet.
#include "common.cuh"

namespace sparta {
namespace cuda {

void dyrelu_forward(const DyReluForward&) { throw std::runtime_error("dyrelu has no CUDA kernel yet"); }
void dyrelu_backward(const DyReluBackward&) { throw std::runtime_error("dyrelu has no CUDA kernel yet"); }
int64_t dyrelu_backward_scratch(const DyReluShape&, DType, const Place&) { return 0; }

}  // namespace cuda
}  // namespace sparta
