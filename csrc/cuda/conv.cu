// dynamic_conv on a CUDA device: a K x K cross-correlation on one channel with a kernel of its own for every sample
// (Conv5 of the earlier paper). It moves 1/C of what the gate does, so it is written for any dtypes and sizes, plainly.
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

// One sample's map and kernel; their numbers of elements are below 2^31.
struct Map {
  int height, width, size;  // size = K, odd

  Map(const char* operation, const ConvShape& s)
      : height(static_cast<int>(s.height)), width(static_cast<int>(s.width)), size(static_cast<int>(s.size)) {
    if (max(s.height * s.width, s.size * s.size) > 0x7fffffff)
      throw std::runtime_error(std::string(operation) + ": a map must have less than 2^31 pixels, got " +
                               std::to_string(s.height) + " x " + std::to_string(s.width) + ", kernel size " +
                               std::to_string(s.size));
  }
  SPARTA_INLINE int pixels() const { return height * width; }
  SPARTA_INLINE int taps() const { return size * size; }
};

SPARTA_INLINE int larger(int a, int b) { return a > b ? a : b; }
SPARTA_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// output[h, w] = sum over (i, j) of kernel[i, j] * input[h + i - K/2, w + j - K/2], or with the kernel `turned` around.
// A thread an output; `blocks` blocks a sample.
template <class Acc>
__global__ void __launch_bounds__(kThreads, 4)
    correlate_kernel(Map map, unsigned blocks, Dense input, Dense kernel, Dense output, bool turned) {
  const int64_t sample = blockIdx.x / blocks, first = sample * map.pixels(), first_tap = sample * map.taps();
  const unsigned number = blockIdx.x % blocks * blockDim.x + threadIdx.x;
  if (number >= static_cast<unsigned>(map.pixels())) return;
  const int pixel = static_cast<int>(number);
  const int border = map.size / 2, h = pixel / map.width, w = pixel % map.width;
  // The taps that lie on the map.
  const int first_i = larger(0, border - h), last_i = smaller(map.size, map.height + border - h);
  const int first_j = larger(0, border - w), last_j = smaller(map.size, map.width + border - w);
  Acc total = 0;
  for (int i = first_i; i < last_i; ++i) {
    const int64_t line = first + (h + i - border) * map.width + w - border;
    for (int j = first_j; j < last_j; ++j) {
      const int tap = i * map.size + j;
      total += read<Acc>(kernel, first_tap + (turned ? map.taps() - 1 - tap : tap)) * read<Acc>(input, line + j);
    }
  }
  write(output, first + pixel, total);
}

// A tap of a sample is a block: the sum over pixels of grad_output[h, w] * input[h + i - K/2, w + j - K/2]. The block
// is `across` threads wide and blockDim.x / across high, and walks over the map.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    grad_tap_kernel(Map map, int across, Dense grad_output, Dense input, Dense grad_kernel) {
  __shared__ Acc memory[kThreads / kWarp];
  const int64_t sample = blockIdx.x / map.taps(), first = sample * map.pixels();
  const int tap = static_cast<int>(blockIdx.x % map.taps());
  const int down = tap / map.size - map.size / 2, right = tap % map.size - map.size / 2;
  const int step = static_cast<int>(blockDim.x) / across, lane = static_cast<int>(threadIdx.x) % across;
  const int line = static_cast<int>(threadIdx.x) / across;
  Acc total = 0;
  if (line < step) {  // a remainder of the threads has no whole line
    const int last_h = smaller(map.height, map.height - down), last_w = smaller(map.width, map.width - right);
    for (int h = larger(0, -down) + line; h < last_h; h += step)
      for (int w = larger(0, -right) + lane; w < last_w; w += across)
        total += read<Acc>(grad_output, first + h * map.width + w) *
                 read<Acc>(input, first + (h + down) * map.width + w + right);
  }
  total = sum_block(total, memory);
  if (threadIdx.x == 0) write(grad_kernel, sample * map.taps() + tap, total);
}

template <class Acc>
void correlate(const char* operation, const Place& place, const ConvShape& shape, const Dense& input,
               const Dense& kernel, const Dense& output, bool turned) {
  const Map map(operation, shape);
  const int threads = static_cast<int>(min(kThreads, max(1, ceil_div(map.pixels(), kWarp)) * kWarp));
  const int64_t blocks = ceil_div(map.pixels(), threads);
  launch(operation, place, shape.samples * blocks, threads, correlate_kernel<Acc>, map, static_cast<unsigned>(blocks),
         input, kernel, output, turned);
}

template <class Acc>
void backward(const ConvBackward& args) {
  const char* operation = "conv_backward";
  const Map map(operation, args.shape);
  if (args.grad_spatial.data != nullptr)
    correlate<Acc>(operation, args.place, args.shape, args.grad_output, args.kernel, args.grad_spatial, true);
  if (args.grad_kernel.data != nullptr)
    launch(operation, args.place, args.shape.samples * map.taps(), kThreads, grad_tap_kernel<Acc>, map,
           smaller(kThreads, larger(1, map.width)), args.grad_output, args.spatial, args.grad_kernel);
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
