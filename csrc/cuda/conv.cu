// dynamic_conv on a CUDA device: a K x K cross-correlation on one channel with a kernel of its own for every sample (Conv5
// of the earlier paper). It moves 1/C of what the gate does, so it is written for any dtypes and sizes, and plainly.
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

// sum over (i, j) of kernel[i, j] * input[h + i - K/2, w + j - K/2], or with the kernel turned around.
template <class Acc>
SPARTA_DEVICE Acc correlation(const ConvShape& s, const Dense& input, const Dense& kernel, int64_t sample, int64_t h,
                              int64_t w, bool turned) {
  const int64_t border = s.size / 2, taps = s.size * s.size;
  Acc total = 0;
  for (int64_t i = max(0, border - h); i < min(s.size, s.height + border - h); ++i)
    for (int64_t j = max(0, border - w); j < min(s.size, s.width + border - w); ++j) {
      const int64_t tap = i * s.size + j;
      const Acc weight = read<Acc>(kernel, sample * taps + (turned ? taps - 1 - tap : tap));
      total += weight * read<Acc>(input, (sample * s.height + h + i - border) * s.width + w + j - border);
    }
  return total;
}

// A thread an output.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    correlate_kernel(ConvShape shape, Dense input, Dense kernel, Dense output, bool turned) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, line = at / shape.width;
  if (line >= shape.samples * shape.height) return;
  const int64_t sample = line / shape.height, h = line % shape.height, w = at % shape.width;
  write(output, at, correlation<Acc>(shape, input, kernel, sample, h, w, turned));
}

// A block a tap of a sample: the sum over pixels of grad_output[h, w] * input[h + i - K/2, w + j - K/2].
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    grad_kernel_kernel(ConvShape shape, Dense grad_output, Dense input, Dense grad_kernel) {
  __shared__ Acc memory[kThreads / kWarp];
  const int64_t taps = shape.size * shape.size, border = shape.size / 2;
  const int64_t sample = blockIdx.x / taps, tap = blockIdx.x % taps;
  const int64_t down = tap / shape.size - border, right = tap % shape.size - border;
  // Where the tap stays on the map.
  const int64_t first_h = max(0, -down), height = max(0, min(shape.height, shape.height - down) - first_h);
  const int64_t first_w = max(0, -right), width = max(0, min(shape.width, shape.width - right) - first_w);
  const int64_t pixels = height * width;
  Acc total = 0;
  for (int64_t pixel = threadIdx.x; pixel < pixels; pixel += blockDim.x) {
    const int64_t at = (sample * shape.height + first_h + pixel / width) * shape.width + first_w + pixel % width;
    total += read<Acc>(grad_output, at) * read<Acc>(input, at + down * shape.width + right);
  }
  total = sum_block(total, memory);
  if (threadIdx.x == 0) write(grad_kernel, sample * taps + tap, total);
}

template <class Acc>
void correlate(const char* operation, const Place& place, const ConvShape& shape, const Dense& input,
               const Dense& kernel, const Dense& output, bool turned) {
  const int64_t outputs = shape.samples * shape.height * shape.width;
  launch(operation, place, ceil_div(outputs, kThreads), kThreads, correlate_kernel<Acc>, shape, input, kernel, output,
         turned);
}

template <class Acc>
void backward(const ConvBackward& args) {
  const ConvShape& s = args.shape;
  if (args.grad_spatial.data != nullptr)
    correlate<Acc>("conv_backward", args.place, s, args.grad_output, args.kernel, args.grad_spatial, true);
  if (args.grad_kernel.data != nullptr)
    launch("conv_backward", args.place, s.samples * s.size * s.size, kThreads, grad_kernel_kernel<Acc>, s,
           args.grad_output, args.spatial, args.grad_kernel);
}

}  // namespace

void conv_forward(const ConvForward& args) {
  if (args.spatial.dtype == DType::float64)
    correlate<double>("conv_forward", args.place, args.shape, args.spatial, args.kernel, args.output, false);
  else
    correlate<float>("conv_forward", args.place, args.shape, args.spatial, args.kernel, args.output, false);
}

void conv_backward(const ConvBackward& args) {
  if (args.spatial.dtype == DType::float64)
    backward<double>(args);
  else
    backward<float>(args);
}

}  // namespace cuda
}  // namespace sparta
