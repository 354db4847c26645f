// The attack's step and start on a CUDA device. Compiled without FMA contraction: adversarial images are the same, bit
// for bit, as torch's and as every other backend's.
#include "../philox.h"
#include "common.cuh"

namespace sparta {
namespace cuda {
namespace {

// Rounded to the type that is computed in before they are used, as a tensor operation would.
template <class Acc>
struct Bounds {
  Acc signed_step, eps, lower, upper;
};

template <class T, int count, class Acc>
SPARTA_DEVICE void step_pack(T* adv, const T* grad, const T* clean, const Bounds<Acc>& bounds) {
  // Not by read_once: adv is written below.
  const Pack<T, count> adv_pack = *reinterpret_cast<const Pack<T, count>*>(adv);
  const Pack<T, count> grad_pack = read_once<T, count>(grad), clean_pack = read_once<T, count>(clean);
  Acc a[count], g[count], c[count];
  widen_all(adv_pack, a);
  widen_all(grad_pack, g);
  widen_all(clean_pack, c);
#pragma unroll
  for (int i = 0; i < count; ++i)
    a[i] = pgd_stepped(a[i], g[i], c[i], bounds.signed_step, bounds.eps, bounds.lower, bounds.upper);
  store(adv, narrow_all<T>(a));
}

// A thread's work: one pack of `count` elements, or one element of the incomplete pack at the end.
template <class T, int count, class Acc>
__global__ void __launch_bounds__(kThreads)
    step_kernel(T* adv, const T* grad, const T* clean, int64_t elements, Bounds<Acc> bounds) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t packs = elements / count;
  if (thread < packs) {
    const int64_t at = thread * count;
    step_pack<T, count>(adv + at, grad + at, clean + at, bounds);
  } else if (packs * count + thread - packs < elements) {
    const int64_t at = packs * count + thread - packs;
    step_pack<T, 1>(adv + at, grad + at, clean + at, bounds);
  }
}

// A thread's work is a Philox block: four elements of one image, in the order of channels, rows and columns.
template <class T>
__global__ void __launch_bounds__(kThreads) start_kernel(PgdStart args) {
  using Acc = typename Accumulator<T>::type;
  const int64_t elements = args.channels * args.height * args.width, blocks = ceil_div(elements, 4);
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t sample = thread / blocks, block = thread % blocks;
  if (sample >= args.samples) return;
  const PhiloxWords words =
      image_words(args.seed, args.index[sample], Purpose::start, args.restart, static_cast<uint32_t>(block));
  const Acc eps = static_cast<Acc>(args.eps);
  const Acc lower = static_cast<Acc>(args.lower), upper = static_cast<Acc>(args.upper);
  const T* clean = static_cast<const T*>(args.clean);
  T* adv = static_cast<T*>(args.adv);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t element = 4 * block + i, line = element / args.width;
    if (element >= elements) break;
    const int64_t at = sample * args.strides[0] + line / args.height * args.strides[1] +
                       line % args.height * args.strides[2] + element % args.width * args.strides[3];
    const Acc value = pgd_started<Acc>(widen(clean[at]), static_cast<Acc>(uniform(words.word[i])), eps, lower, upper);
    adv[at] = Narrow<T>::of(value);
  }
}

template <class T, int count>
void step(const PgdStep& args) {
  using Acc = typename Accumulator<T>::type;
  const Bounds<Acc> bounds{static_cast<Acc>(args.signed_step), static_cast<Acc>(args.eps), static_cast<Acc>(args.lower),
                           static_cast<Acc>(args.upper)};
  const int64_t threads = args.elements / count + args.elements % count;
  launch("pgd_step", args.place, ceil_div(threads, kThreads), kThreads, step_kernel<T, count, Acc>,
         static_cast<T*>(args.adv), static_cast<const T*>(args.grad), static_cast<const T*>(args.clean), args.elements,
         bounds);
}

}  // namespace

void pgd_step(const PgdStep& args) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if ((address(args.adv) | address(args.grad) | address(args.clean)) % 16 == 0) return step<T, kVector<T>>(args);
    return step<T, 1>(args);
  });
}

void pgd_start(const PgdStart& args) {
  const int64_t threads = args.samples * ceil_div(args.channels * args.height * args.width, 4);
  with_type(args.dtype, [&](auto type) {
    launch("pgd_start", args.place, ceil_div(threads, kThreads), kThreads, start_kernel<decltype(type)>, args);
  });
}

}  // namespace cuda
}  // namespace sparta
