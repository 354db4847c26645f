// The interface of every kernel: what it reads, what it writes, and where that lies. Nothing here owns memory.
//
// Every pointer is an address that the caller keeps alive; every stride counts elements; every extent may be 0.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace sparta {

// An image batch (N, C, H, W) seen as one matrix a sample whose rows are contiguous: rows are channels and columns
// pixels (planar, NCHW), or rows are pixels and columns channels (channels_last). Which one is the gate's `planar`.
struct Matrices {
  void* data;
  int64_t sample_stride;
  int64_t row_stride;
};

// A small contiguous tensor in its own dtype; data is null where it is absent or not asked for.
struct Dense {
  void* data;
  DType dtype;
};

// Where a kernel runs.
struct Place {
  int threads;   // on the CPU
  int device;    // the CUDA device, or -1 for the CPU
  void* stream;  // a cudaStream_t of that device
};

struct GateShape {
  int64_t samples, channels, height, width;
  int64_t share;  // one spatial cell for share x share pixels (Eq. 6)
  bool planar;

  SPARTA_INLINE int64_t pixels() const { return height * width; }
  SPARTA_INLINE int64_t cells_wide() const { return (width + share - 1) / share; }
  SPARTA_INLINE int64_t cells() const { return (height + share - 1) / share * cells_wide(); }
};

struct GateForward {
  GateShape shape;
  DType dtype;                     // of x and y
  Matrices x, y;                   // y is written
  Dense spatial, channel, kernel;  // (N, cells), (N, C), (N,) or null
  Place place;
};

struct GateBackward {
  GateShape shape;
  DType dtype;                                     // of x, gy and gx
  Matrices x, gy, gx;                              // gx is written, unless its data is null
  Matrices gy2;                                    // on a CPU: added to gy, unless its data is null
  Dense spatial, channel, kernel;                  // as in forward
  Dense grad_spatial, grad_channel, grad_kernel;   // written, unless null
  void* scratch;                                   // on a CUDA device: gate_backward_scratch() bytes
  Place place;
};

// Per-sample K x K cross-correlation on one channel, zero padded to keep the size. All tensors contiguous.
struct ConvShape {
  int64_t samples, height, width, size;  // size = K, odd
};

struct ConvForward {
  ConvShape shape;
  Dense spatial, kernel, output;
  Place place;
};

struct ConvBackward {
  ConvShape shape;
  Dense grad_output, spatial, kernel;
  Dense grad_spatial, grad_kernel;  // written, unless null
  Place place;
};

// adv, grad and clean have the same dtype and lie in the same order without gaps.
struct PgdStep {
  int64_t elements;
  DType dtype;
  void* adv;  // read and written
  const void *grad, *clean;
  double signed_step, eps, lower, upper;  // signed_step: minus the step for a targeted attack
  Place place;
};

struct PgdStart {
  int64_t samples, channels, height, width;
  DType dtype;
  void* adv;  // written
  const void* clean;
  int64_t strides[4];    // of adv and of clean alike
  const int64_t* index;  // (N,): which image each sample is
  uint64_t seed;
  uint32_t restart;
  double eps, lower, upper;
  Place place;
};

// y = relu(a + b). All tensors lie in the same order without gaps, and bit i % 8 of byte i / 8 belongs to element i: it is
// set where the gradient passes, where y is positive or NaN. Bits behind the last element's are 0.
struct ReluForward {
  int64_t elements;
  DType dtype;
  const void *a, *b;  // b null: y = relu(a)
  void* y;            // written; may be a
  uint8_t* bits;      // ceil(elements / 8) bytes, written unless null
  Place place;
};

struct ReluBackward {
  int64_t elements;
  DType dtype;
  const void *grad, *grad2;  // grad2 null: grad alone
  const uint8_t* bits;
  void* gx;  // written: grad + grad2 where the bit is set, else 0
  Place place;
};

// relu(x) * sigmoid(x). All tensors lie in the same order without gaps.
struct SwishReluForward {
  int64_t elements;
  DType dtype;
  const void* x;
  void* y;  // written
  Place place;
};

struct SwishReluBackward {
  int64_t elements;
  DType dtype;
  const void *gy, *x;
  void* gx;  // written
  Place place;
};

// x - log(beta * x + 1) / beta where x > 0, else 0; beta = b * b. All tensors lie in the same order without gaps.
struct SmoothReluForward {
  int64_t elements;
  DType dtype;
  const void* x;
  void* y;  // written
  Dense b;  // one element
  Place place;
};

struct SmoothReluBackward {
  int64_t elements;
  DType dtype;
  const void *gy, *x;
  void* gx;  // written, unless null
  Dense b;
  Dense grad_b;   // one element, written unless null
  void* scratch;  // on a CUDA device: smooth_relu_backward_scratch() bytes
  Place place;
};

// The largest of `lines` lines, which differ from sample to sample and from channel to channel.
struct DyReluShape {
  int64_t samples, channels, pixels;
  int64_t lines;  // 1 to 8
  bool planar;    // as the gate's
};

struct DyReluForward {
  DyReluShape shape;
  DType dtype;               // of x and y
  Matrices x, y;             // y is written
  Dense slopes, intercepts;  // (N, C, lines)
  Place place;
};

struct DyReluBackward {
  DyReluShape shape;
  DType dtype;                         // of gy, x and gx
  Matrices gy, x, gx;                  // gx is written, unless its data is null
  Dense slopes, intercepts;            // as in forward
  Dense grad_slopes, grad_intercepts;  // (N, C, lines), written unless null
  void* scratch;                       // on a CUDA device: dyrelu_backward_scratch() bytes
  Place place;
};

// The attention network at K = 1 with folded BatchNorm, and its input gradient (docs/kernels.md).
//
//   h1 = relu(w1 x + b1)    channel = w2 mean(h1) + b2
//   h3 = relu(w3 x + b3)    a = w4 h3 + b4
//   h6 = relu(w6 h3 + b6)   kernel = w7 mean(h6) + b7
//
// "Padded" is a count rounded up to kHiddenGroup: padding weights and biases are 0. Matrices are row-major. w13 and w6 are
// in the dtype of the products (cpu/products.h), those of bfloat16 with their rows interleaved in pairs, with a row of
// zeros behind an odd last. All else is in the accumulator's type of the images' dtype.
constexpr int64_t kHiddenGroup = 16;

struct AttentionShape {
  int64_t samples, channels, pixels;
  int64_t hidden;  // padded
  int64_t spare;   // how many of those are padding
  bool planar, dynamic;

  SPARTA_INLINE int64_t masks() const { return dynamic ? 3 : 2; }
};

struct AttentionForward {
  AttentionShape shape;
  DType dtype, product;
  Matrices x, skip;           // x is read; where skip has data, x + skip is written over x first
  const void *w13, *w6, *w2;  // (channels, 2 * hidden): w1 and w3 transposed; (hidden, hidden), (hidden, channels): likewise
  const void *b13, *b6, *b2;  // (2 * hidden,), (hidden,), (channels,)
  const void *w4, *w7;        // (hidden + 1,): w4, then b4; w7, then b7 (where not dynamic, b7 alone is the kernel)
  void *a, *channel, *kernel;  // written: (N, pixels), (N, channels), (N,)
  void *mean1, *mean6;         // written: (N, hidden) each, the means of h1 and h6
  uint16_t* bits;              // written unless null: (N, pixels, masks, hidden / 16), of h1, h3, h6: see ReluForward
  Place place;
};

struct AttentionBackward {
  AttentionShape shape;
  DType dtype, product;
  Matrices gx;                // added to
  const void *w13, *w6, *w2;  // (2 * hidden, channels): w1 and w3; (hidden, hidden), (channels, hidden)
  const void *w4, *w7;        // as forward
  const void *ga, *gchannel, *gkernel;
  const uint16_t* bits;
  Place place;
};

int64_t last_level_cache();  // bytes

// The list of all kernels: X(scope, name, arguments) for each, where `scope` is the namespace of the implementation.
// clang-format off
#define SPARTA_FOR_EACH_KERNEL(X, scope)               \
  X(scope, gate_forward, GateForward)                  \
  X(scope, gate_backward, GateBackward)                \
  X(scope, conv_forward, ConvForward)                  \
  X(scope, conv_backward, ConvBackward)                \
  X(scope, pgd_step, PgdStep)                          \
  X(scope, pgd_start, PgdStart)                        \
  X(scope, relu_forward, ReluForward)                  \
  X(scope, relu_backward, ReluBackward)                \
  X(scope, swish_relu_forward, SwishReluForward)       \
  X(scope, swish_relu_backward, SwishReluBackward)     \
  X(scope, smooth_relu_forward, SmoothReluForward)     \
  X(scope, smooth_relu_backward, SmoothReluBackward)   \
  X(scope, dyrelu_forward, DyReluForward)              \
  X(scope, dyrelu_backward, DyReluBackward)

// The same with the kernels that exist for CPUs only.
#define SPARTA_FOR_EACH_CPU_KERNEL(X, scope)           \
  SPARTA_FOR_EACH_KERNEL(X, scope)                     \
  X(scope, attention_forward, AttentionForward)        \
  X(scope, attention_backward, AttentionBackward)
// clang-format on

#define SPARTA_DECLARE_KERNEL(scope, name, Arguments) void name(const Arguments&);

// One namespace per instruction set: the same sources, compiled once for each (CMakeLists.txt).
namespace baseline {
SPARTA_FOR_EACH_CPU_KERNEL(SPARTA_DECLARE_KERNEL, baseline)
}
namespace avx2 {
SPARTA_FOR_EACH_CPU_KERNEL(SPARTA_DECLARE_KERNEL, avx2)
}
namespace avx512 {
SPARTA_FOR_EACH_CPU_KERNEL(SPARTA_DECLARE_KERNEL, avx512)
}
namespace avx512_bf16 {
SPARTA_FOR_EACH_CPU_KERNEL(SPARTA_DECLARE_KERNEL, avx512_bf16)
}

// And one for CUDA devices. A kernel is queued on the place's stream and is not waited for; a refused launch throws
// std::runtime_error with the operation's name. Tensors and scratch are addresses on the place's device.
namespace cuda {
SPARTA_FOR_EACH_KERNEL(SPARTA_DECLARE_KERNEL, cuda)

// How many bytes of scratch memory the backward passes need for partial sums. The images decide, too: aligned ones are
// cut into fewer blocks. gx has no data where it is not wanted.
int64_t gate_backward_scratch(const GateShape&, DType, const Matrices& x, const Matrices& gy, const Matrices& gx);
int64_t dyrelu_backward_scratch(const DyReluShape&, DType, const Matrices& gy, const Matrices& x, const Matrices& gx);
int64_t smooth_relu_backward_scratch(int64_t elements, DType);
}

}  // namespace sparta
