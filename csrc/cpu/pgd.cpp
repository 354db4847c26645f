// The attack's step and start on a CPU. Compiled without FMA contraction: adversarial images are the same, bit for bit,
// as torch's and as every other backend's.
#define SPARTA_KEEP_SUBNORMALS  // simd.h: also where that takes more instructions
#include "../kernels.h"
#include "../philox.h"
#include "common.h"

namespace sparta {
namespace SPARTA_ISA {
namespace {

template <class T>
void step(const PgdStep& args) {
  using Lanes = Simd<T>;
  using Acc = typename Accumulator<T>::type;
  using Vector = typename Lanes::Vector;
  T* adv = static_cast<T*>(args.adv);
  const T* grad = static_cast<const T*>(args.grad);
  const T* clean = static_cast<const T*>(args.clean);
  // Rounded to the type that is computed in before they are used, as a tensor operation would.
  const Vector signed_step = Vector{} + static_cast<Acc>(args.signed_step), eps = Vector{} + static_cast<Acc>(args.eps);
  const Vector lower = Vector{} + static_cast<Acc>(args.lower), upper = Vector{} + static_cast<Acc>(args.upper);
  const int64_t blocks = ceil_div(args.elements, Lanes::lanes);
#pragma omp parallel for schedule(static) num_threads(useful_threads(args.place.threads, args.elements))
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t i = block * Lanes::lanes, count = min(Lanes::lanes, args.elements - i);
    const Vector moved = pgd_stepped(load_partial(adv + i, count), load_partial(grad + i, count),
                                  load_partial(clean + i, count), signed_step, eps, lower, upper);
    store_partial(adv + i, moved, count);
  }
}

template <class T>
void start(const PgdStart& args) {
  using Acc = typename Accumulator<T>::type;
  const Acc eps = static_cast<Acc>(args.eps);
  const Acc lower = static_cast<Acc>(args.lower), upper = static_cast<Acc>(args.upper);
  const int64_t elements = args.channels * args.height * args.width;
#pragma omp parallel for schedule(static) num_threads(useful_threads(args.place.threads, args.samples * elements))
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    PhiloxWords words{};
    for (int64_t c = 0, element = 0; c < args.channels; ++c)
      for (int64_t h = 0; h < args.height; ++h)
        for (int64_t w = 0; w < args.width; ++w, ++element) {
          if (element % 4 == 0)
            words = image_words(args.seed, args.index[sample], Purpose::start, args.restart,
                                static_cast<uint32_t>(element / 4));
          const int64_t at =
              sample * args.strides[0] + c * args.strides[1] + h * args.strides[2] + w * args.strides[3];
          Acc clean{};
          read({const_cast<void*>(args.clean), args.dtype}, at, 1, &clean);
          const Acc value = pgd_started(clean, static_cast<Acc>(uniform(words.word[element % 4])), eps, lower, upper);
          write({args.adv, args.dtype}, at, 1, &value);
        }
  }
}

}  // namespace

void pgd_step(const PgdStep& args) {
  with_type(args.dtype, [&](auto type) { step<decltype(type)>(args); });
}

void pgd_start(const PgdStart& args) {
  with_type(args.dtype, [&](auto type) { start<decltype(type)>(args); });
}

}  // namespace SPARTA_ISA
}  // namespace sparta
