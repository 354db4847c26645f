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

// ---- what a machine may do in its own way ----------------------------------------------------------------

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

// Bounds and 2^t in portable arithmetic; simd.h specialises them where one instruction does the whole.
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

#if defined(__CUDA_ARCH__)
// One instruction each on a device: within 2 ulp and 1 ulp, and what would be below the normal numbers is 0.
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
    // 1 - phi = 2^t * phi: of a difference little is left where phi is near 1, nothing in a reciprocal estimate's.
    // Bounded, so that inf * 0 does not make a NaN of a gradient that is 0 anyway.
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
