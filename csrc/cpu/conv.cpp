// dynamic_conv on a CPU: a K x K cross-correlation on one channel with a kernel of its own for every sample (Conv5 of
// the earlier paper). The maps are small, one channel wide, so a sample is padded into scratch and stays in L1.
#include "../kernels.h"
#include "common.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

// A sample's map with size/2 zeros around it.
template <class Acc>
class Padded {
 public:
  explicit Padded(const ConvShape& shape)
      : shape_(shape), stride_(shape.width + shape.size - 1),
        count_(stride_ * (shape.height + shape.size - 1)), values_(count_) {
    for (int64_t i = 0; i < count_; ++i) values_[i] = 0;
  }

  void load(const Dense& from, int64_t sample) {
    const int64_t border = shape_.size / 2;
    for (int64_t h = 0; h < shape_.height; ++h)
      read(from, (sample * shape_.height + h) * shape_.width, shape_.width,
           values_ + (h + border) * stride_ + border);
  }

  const Acc* row(int64_t h) { return values_ + h * stride_; }  // from the border's first row

 private:
  ConvShape shape_;
  int64_t stride_, count_;
  Scratch<Acc> values_;
};

// output[h, w] = sum over (i, j) of kernel[i, j] * input[h + i - K/2, w + j - K/2]
template <class Acc>
void correlate(const ConvShape& s, Padded<Acc>& input, const Acc* kernel, const Dense& output, int64_t sample,
               Acc* line) {
  for (int64_t h = 0; h < s.height; ++h) {
    for (int64_t w = 0; w < s.width; ++w) line[w] = 0;
    for (int64_t i = 0; i < s.size; ++i) {
      const Acc* row = input.row(h + i);
      for (int64_t j = 0; j < s.size; ++j) {
        const Acc weight = kernel[i * s.size + j];
#pragma omp simd
        for (int64_t w = 0; w < s.width; ++w) line[w] += weight * row[w + j];
      }
    }
    write(output, (sample * s.height + h) * s.width, s.width, line);
  }
}

template <class Acc>
void forward(const ConvForward& args) {
  const ConvShape& s = args.shape;
  const int64_t taps = s.size * s.size;
#pragma omp parallel num_threads(useful_threads(args.place.threads, s.samples * s.height * s.width * taps))
  {
    Padded<Acc> input(s);
    Scratch<Acc> kernel(taps), line(s.width);
#pragma omp for schedule(static)
    for (int64_t sample = 0; sample < s.samples; ++sample) {
      input.load(args.spatial, sample);
      read(args.kernel, sample * taps, taps, static_cast<Acc*>(kernel));
      correlate<Acc>(s, input, kernel, args.output, sample, line);
    }
  }
}

template <class Acc>
void backward(const ConvBackward& args) {
  const ConvShape& s = args.shape;
  const int64_t taps = s.size * s.size;
#pragma omp parallel num_threads(useful_threads(args.place.threads, 2 * s.samples * s.height * s.width * taps))
  {
    Padded<Acc> input(s), grad_output(s);
    Scratch<Acc> kernel(taps), flipped(taps), grad_kernel(taps), line(s.width);
#pragma omp for schedule(static)
    for (int64_t sample = 0; sample < s.samples; ++sample) {
      grad_output.load(args.grad_output, sample);
      if (args.grad_spatial.data != nullptr) {
        read(args.kernel, sample * taps, taps, static_cast<Acc*>(kernel));
        for (int64_t i = 0; i < taps; ++i) flipped[i] = kernel[taps - 1 - i];
        correlate<Acc>(s, grad_output, flipped, args.grad_spatial, sample, line);
      }
      if (args.grad_kernel.data != nullptr) {
        input.load(args.spatial, sample);
        const int64_t border = s.size / 2;
        for (int64_t i = 0; i < s.size; ++i)
          for (int64_t j = 0; j < s.size; ++j) {
            Acc total = 0;
            for (int64_t h = 0; h < s.height; ++h) {
              const Acc* grad = grad_output.row(h + border) + border;
              const Acc* row = input.row(h + i) + j;
              Acc row_total = 0;
#pragma omp simd reduction(+ : row_total)
              for (int64_t w = 0; w < s.width; ++w) row_total += grad[w] * row[w];
              total += row_total;
            }
            grad_kernel[i * s.size + j] = total;
          }
        write(args.grad_kernel, sample * taps, taps, static_cast<const Acc*>(grad_kernel));
      }
    }
  }
}

}  // namespace

void conv_forward(const ConvForward& args) {
  with_type(args.spatial.dtype, [&](auto type) { forward<typename Accumulator<decltype(type)>::type>(args); });
}

void conv_backward(const ConvBackward& args) {
  with_type(args.spatial.dtype, [&](auto type) { backward<typename Accumulator<decltype(type)>::type>(args); });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
