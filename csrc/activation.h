// The arithmetic of every operation, once, for every device.
//
// `Real` is float, double, or a SIMD vector of floats (cpu/simd.h): anything with + - * /, comparisons and ?:.
// Everything is forced inline: a CPU build compiles this file once per instruction set, and an out-of-line copy
// could be merged by the linker with one compiled for a machine that this one is not.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define SPARTA_INLINE __host__ __device__ __forceinline__
#else
#define SPARTA_INLINE inline __attribute__((always_inline))
#endif

namespace sparta {

// ---- primitives that a machine may have instructions for -------------------------------------------------

// The integer type as wide as Real's elements, and the two reinterpretations between them. SIMD types specialise it.
template <class Real>
struct Bits;

template <>
struct Bits<float> {
  using Int = int32_t;
  static SPARTA_INLINE Int of(float value) {
    Int bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  static SPARTA_INLINE float to(Int bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// 2^r for 0 <= r <= 1, by the minimax polynomial whose relative error is far below that of results with `bits`
// significant bits (24 for float32 and better, 11 for float16, 8 for bfloat16): 2e-9, 3e-6, or 7e-5.
template <int bits, class Real>
SPARTA_INLINE Real exp2_fraction(Real r) {
  if constexpr (bits > 11) {
    Real p = r * 2.170225568e-4f + 1.243968775e-3f;
    p = p * r + 9.678841007e-3f;
    p = p * r + 5.548334198e-2f;
    p = p * r + 2.402298363e-1f;
    p = p * r + 6.931469838e-1f;
    return p * r + 1.0f;
  }
  if constexpr (bits > 8) {
    Real p = r * 1.353416806e-2f + 5.201146030e-2f;
    p = p * r + 2.414427571e-1f;
    p = p * r + 6.930038344e-1f;
    return p * r + 1.000002593f;
  }
  Real p = r * 7.802452269e-2f + 2.260671554e-1f;
  p = p * r + 6.958335405e-1f;
  return p * r + 9.999252186e-1f;
}

// Bounds and 2^t in portable arithmetic; simd.h specialises them for machines with instructions that do the same.
template <class Real>
struct Bound {  // a NaN passes both
  static SPARTA_INLINE Real at_least(Real value, Real bound) { return value < bound ? bound : value; }
  static SPARTA_INLINE Real at_most(Real value, Real bound) { return value > bound ? bound : value; }
};

// 2^t: inf above the range of normal floats, 0 below it, NaN for NaN.
template <class Real>
struct Exp2 {
  template <int bits>
  static SPARTA_INLINE Real of(Real t) {
    const Real round_magic = Real{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    t = Bound<Real>::at_most(Bound<Real>::at_least(t, Real{} - 126.5f), Real{} + 128.5f);  // exponent bits 0 to 255
    const Real shifted = (t - 0.5f) + round_magic;  // so that r is in [0, 1]
    const Real r = t - (shifted - round_magic);
    const auto exponent = Bits<Real>::of(shifted) - Bits<Real>::of(round_magic) + 127;
    return exp2_fraction<bits>(r) * Bits<Real>::to(exponent << 23);
  }
};

template <>
struct Exp2<double> {
  template <int bits>
  static SPARTA_INLINE double of(double t) {
    return ::exp2(t);
  }
};

// 1 / value for value >= 1, inf and NaN.
template <class Real>
struct Reciprocal {
  template <int bits>
  static SPARTA_INLINE Real of(Real value) {
    return 1.0f / value;
  }
};

// log(1 + t) = t - t^2 * Q(t), and Q for sqrt(1/2) <= 1 + t <= sqrt(2), by the minimax polynomial whose relative error is
// 5e-8, 1e-5, or 9e-5 (see exp2_fraction).
template <int bits, class Real>
SPARTA_INLINE Real log1p_curve(Real t) {
  if constexpr (bits > 11) {
    Real q = t * 7.777992184e-02f - 1.277729396e-01f;
    q = q * t + 1.311403547e-01f;
    q = q * t - 1.419615143e-01f;
    q = q * t + 1.662709430e-01f;
    q = q * t - 2.000163606e-01f;
    q = q * t + 2.500077867e-01f;
    q = q * t - 3.333332536e-01f;
    return q * t + 4.999999764e-01f;
  }
  if constexpr (bits > 8) {
    Real q = t * -1.214059498e-01f + 1.843712382e-01f;
    q = q * t - 2.036267360e-01f;
    q = q * t + 2.493677683e-01f;
    q = q * t - 3.332450418e-01f;
    return q * t + 5.000037041e-01f;
  }
  Real q = t * 1.458491128e-01f - 2.176867170e-01f;
  q = q * t + 2.527177493e-01f;
  q = q * t - 3.328800763e-01f;
  return q * t + 4.999695167e-01f;
}

// log(1 + t) for t >= 0. An infinite t counts as the largest finite number; for NaN the result is unspecified.
template <class Real>
struct Log1p {
  using Near = decltype(Real{} < Real{});  // bool, or a mask of lanes
  Near near;                               // t is small: t - log(1 + t) would cancel, and `curve` gives it instead
  Real value;                              // log(1 + t)
  Real curve;                              // (t - log(1 + t)) / t^2, where near

  template <int bits>
  static SPARTA_INLINE Log1p of(Real t) {
    using Pattern = Bits<Real>;
    const auto none = typename Pattern::Int{};
    const Real sum = 1.0f + t;
    const Near near = sum < 1.41421354f;
    // 1 + t = 2^exponent * (1 + rest), sqrt(1/2) <= 1 + rest < sqrt(2)
    const auto pattern = Pattern::of(sum);
    const auto exponent = (pattern - (none + 0x3f3504f3)) >> 23;
    const Real rest = near ? t : Pattern::to(pattern - (exponent << 23)) - 1.0f;
    const Real round_magic = Real{} + 12582912.0f;  // as in Exp2: its low bits hold an integer
    const Real power = Pattern::to(exponent + Pattern::of(round_magic)) - round_magic;
    const Real curve = log1p_curve<bits>(rest);
    return {near, power * 0.693147181f + (rest - rest * rest * curve), curve};
  }
};

template <>
struct Log1p<double> {
  bool near;
  double value, curve;

  template <int bits>
  static SPARTA_INLINE Log1p of(double t) {
    if (t > 1.7976931348623157e308) t = 1.7976931348623157e308;
    const double value = ::log1p(t);
    const double series = 0.5 - t * (1.0 / 3 - t * (0.25 - t * (0.2 - t * (1.0 / 6 - t / 7))));
    return {t < 0.41421356, value, t < 1e-3 ? series : (t - value) / (t * t)};
  }
};

#if defined(__CUDA_ARCH__)
// One instruction each on a device: within 2 ulp and 1 ulp; subnormal results are flushed to 0.
template <>
struct Exp2<float> {
  template <int bits>
  static SPARTA_INLINE float of(float t) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    return power;
  }
};

template <>
struct Reciprocal<float> {
  template <int bits>
  static SPARTA_INLINE float of(float value) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(value));
    return inverse;
  }
};
#endif

// The scalar type that every lane of a Real can be multiplied by.
template <class Real>
using Scale = std::conditional_t<std::is_same_v<Real, double>, double, float>;

// ---- the gate: Eq. 3, 5, 8 -------------------------------------------------------------------------------

// sigmoid(z) = 1 / (1 + 2^t) with t = kLogitScale * z: the scale is multiplied into one of z's factors beforehand.
constexpr double kLogitScale = -1.44269504088896340736;  // -log2(e)

template <class Real>
struct Sigmoid {
  Real value;       // phi
  Real complement;  // 1 - phi
};

template <int bits, class Real>
SPARTA_INLINE Sigmoid<Real> sigmoid_scaled(Real t) {
  const Real power = Exp2<Real>::template of<bits>(t);
  const Real value = Reciprocal<Real>::template of<bits>(1.0f + power);
  if constexpr (std::is_same_v<Real, double>) {
    return {value, 1.0 - value};  // as torch computes it
  } else {
    // 1 - phi = 2^t * phi: the difference itself cancels where phi is near 1, altogether if phi is an estimate.
    // Bounded, so that inf * 0 does not turn a gradient that is 0 anyway into NaN.
    return {value, Bound<Real>::at_most(power, Real{} + 0x1p126f) * value};
  }
}

template <class Real>
SPARTA_INLINE Real relu(Real x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Real, float>) {
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
    return x;
  } else
#endif
    return Bound<Real>::at_least(x, Real{});  // a NaN passes, as it does in torch
}

// y = relu(x) * phi
template <class Real>
SPARTA_INLINE Real gate(Real x, Real phi) {
  return relu(x) * phi;
}

// gx: the gradient through relu (0 at x = 0, as in torch; a NaN in x lets the gradient pass, as in torch)
template <class Real>
SPARTA_INLINE Real gate_grad_input(Real x, Real gy, Real phi) {
  const Real zero{};
  return x <= zero ? zero : gy * phi;
}

// gz: the gradient of the sigmoid's argument z = s * channel
template <class Real>
SPARTA_INLINE Real gate_grad_logit(Real x, Real gy, Sigmoid<Real> phi) {
  return gy * phi.value * relu(x) * phi.complement;
}

// ---- swish-relu: relu(x) * sigmoid(x) ---------------------------------------------------------------------

template <int bits, class Real>
SPARTA_INLINE Real swish_relu(Real x) {
  return gate(x, sigmoid_scaled<bits>(Real(x * static_cast<Scale<Real>>(kLogitScale))).value);
}

template <int bits, class Real>
SPARTA_INLINE Real swish_relu_grad(Real x, Real gy) {
  const Real zero{};
  const Sigmoid<Real> phi = sigmoid_scaled<bits>(Real(x * static_cast<Scale<Real>>(kLogitScale)));
  return x <= zero ? zero : gy * (phi.value * (1.0f + x * phi.complement));
}

// ---- smooth-relu: x - log(beta * x + 1) / beta for x > 0, beta = b * b -----------------------------------

// What is derived from b once per call. For a subnormal beta 1 / beta may be infinite: y and its gradients are then
// computed as for small t, which does not use it.
template <class Scalar>
struct SmoothReluParameter {
  Scalar beta, inverse;   // 1 / beta, or 0
  Scalar grad_scale;      // 2 / b, or 0: gb is the sum of smooth_relu_grad's terms times this

  explicit SPARTA_INLINE SmoothReluParameter(Scalar b) : beta(b * b), inverse(0), grad_scale(0) {
    const Scalar smallest = static_cast<Scalar>(1.17549435e-38);
    if (!(beta < smallest)) inverse = 1 / beta;
    if (!((b < 0 ? -b : b) < smallest)) grad_scale = 2 / b;
  }
};

template <int bits, class Real>
SPARTA_INLINE Real smooth_relu(Real x, const SmoothReluParameter<Scale<Real>>& parameter) {
  const Real zero{}, t = relu(x) * parameter.beta;
  const auto log = Log1p<Real>::template of<bits>(t);
  const Real y = log.near ? x * t * log.curve : x - log.value * parameter.inverse;
  return x <= zero ? zero : y;
}

template <class Real>
struct SmoothReluGrad {
  Real input;      // gx
  Real parameter;  // the element's term of gb, before grad_scale
};

template <int bits, class Real>
SPARTA_INLINE SmoothReluGrad<Real> smooth_relu_grad(Real x, Real gy, const SmoothReluParameter<Scale<Real>>& parameter) {
  const Real zero{}, t = relu(x) * parameter.beta;
  const auto log = Log1p<Real>::template of<bits>(t);
  const Real inverse = Reciprocal<Real>::template of<bits>(1.0f + t);
  const Real slope = log.near ? t * inverse : 1.0f - inverse;  // t / (1 + t)
  const Real term = log.near ? x * t * (inverse - log.curve) : (log.value - slope) * parameter.inverse;
  return {x <= zero ? zero : gy * slope, x <= zero ? zero : gy * term};
}

// ---- dyrelu: the largest of K lines ----------------------------------------------------------------------

// The line that is the largest at one x: the first NaN, or the first of the largest. Start with line 0, then offer the
// others in order.
template <class Real>
struct LargestLine {
  Real value, slope;
  Real index;  // a Real, so that comparing it gives masks of the same type

  LargestLine() = default;
  SPARTA_INLINE LargestLine(Real x, Real slope0, Real intercept0)
      : value(slope0 * x + intercept0), slope(slope0), index(Real{}) {}

  SPARTA_INLINE void offer(Real x, Real other_slope, Real intercept, int k) {
    const Real other = other_slope * x + intercept;
    const auto stays = (other <= value) | (value != value);
    value = stays ? value : other;
    slope = stays ? slope : other_slope;
    index = stays ? index : Real{} + static_cast<Scale<Real>>(k);
  }
};

// ---- projected gradient descent --------------------------------------------------------------------------
// Files that use these are compiled without FMA contraction, so that every backend rounds alike.

// As torch.clamp: a NaN value passes, and the lower bound is applied first.
template <class Real>
SPARTA_INLINE Real clamp(Real value, Real lower, Real upper) {
  return Bound<Real>::at_most(Bound<Real>::at_least(value, lower), upper);
}

// As torch.sign: 0 for 0 and for NaN.
template <class Real>
SPARTA_INLINE Real sign(Real value) {
  const Real zero{}, one = zero + 1.0f;
  return value > zero ? one : (value < zero ? -one : zero);
}

// `signed_step` is the step for an untargeted attack (up the loss) and minus the step for a targeted one.
template <class Real>
SPARTA_INLINE Real pgd_stepped(Real adv, Real grad, Real clean, Real signed_step, Real eps, Real lower, Real upper) {
  const Real moved = adv + signed_step * sign(grad);
  const Real delta = clamp(Real(moved - clean), Real(-eps), eps);
  return clamp(Real(clean + delta), lower, upper);
}

// `uniform` in [0, 1)
template <class Real>
SPARTA_INLINE Real pgd_started(Real clean, Real uniform, Real eps, Real lower, Real upper) {
  const Real noise = (2.0f * uniform - 1.0f) * eps;
  return clamp(Real(clean + noise), lower, upper);
}

}  // namespace sparta
