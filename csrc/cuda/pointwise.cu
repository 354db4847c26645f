// swish-relu and smooth-relu on a CUDA device: not written yet.
#include "common.cuh"

namespace sparta {
namespace cuda {

void swish_relu_forward(const SwishReluForward&) { throw std::runtime_error("swish_relu has no CUDA kernel yet"); }
void swish_relu_backward(const SwishReluBackward&) { throw std::runtime_error("swish_relu has no CUDA kernel yet"); }
void smooth_relu_forward(const SmoothReluForward&) { throw std::runtime_error("smooth_relu has no CUDA kernel yet"); }
void smooth_relu_backward(const SmoothReluBackward&) { throw std::runtime_error("smooth_relu has no CUDA kernel yet"); }
int64_t smooth_relu_backward_scratch(int64_t, DType, const Place&) { return 0; }

}  // namespace cuda
}  // namespace sparta
