// The arithmetic of every operation, once, for every device.
//
// `Real` is float, double, or a SIMD vector of floats (cpu/simd.h): anything with + - * /, comparisons and ?:.
// Everything is forced inline: a CPU build compiles this file once per instruction set, and an out-of-line copy
// could be merged by the linker with one compiled for a machine that this one is not.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SPARTA_INLINE __host__ __device__ __forceinline__
#else
#define SPARTA_INLINE inline __attribute__((always_inline))
#endif

namespace sparta {

// ---- exp(-z) ---------------------------------------------------------------------------------------------

SPARTA_INLINE double exp_negative(double z) { return ::exp(-z); }

#if defined(__CUDA_ARCH__)

SPARTA_INLINE float exp_negative(float z) { return ::expf(-z); }

#else

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

// exp(-z) = 2^n * exp(r) with n = round(-z / ln 2) and |r| <= ln(2)/2; exp(r) by the polynomial of Cephes' expf.
// Relative error below 2^-23. Results that would be subnormal come out as 0 after the division in sigmoid, results
// above the float range as inf, NaN as NaN.
template <class Real>
SPARTA_INLINE Real exp_negative(Real z) {
  using Int = typename Bits<Real>::Int;
  const Real log2_e = Real{} + 1.44269504088896341f;
  const Real round_magic = Real{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Real lowest = Real{} - 87.3f, highest = Real{} + 88.8f;  // n in [-126, 128]; 2^128 is inf
  Real v = -z;
  v = v < lowest ? lowest : v;  // a NaN fails both comparisons and stays
  v = v > highest ? highest : v;
  const Real shifted = v * log2_e + round_magic;
  const Real n = shifted - round_magic;
  const Real r = (v - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  Real p = Real{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Int exponent = Bits<Real>::of(shifted) - Bits<Real>::of(round_magic) + 127;
  return p * Bits<Real>::to(exponent << 23);
}

#endif

// ---- the gate: Eq. 3, 5, 8 -------------------------------------------------------------------------------

template <class Real>
SPARTA_INLINE Real sigmoid(Real z) {
  return 1.0f / (1.0f + exp_negative(z));
}

template <class Real>
SPARTA_INLINE Real relu(Real x) {
  const Real zero{};
  return x <= zero ? zero : x;  // in this order a NaN passes, as it does in torch
}

// y = relu(x) * phi
template <class Real>
SPARTA_INLINE Real gate(Real x, Real phi) {
  return relu(x) * phi;
}

// gx: the gradient through relu (0 at x = 0, as in torch)
template <class Real>
SPARTA_INLINE Real gate_grad_input(Real x, Real gy, Real phi) {
  const Real zero{};
  return x <= zero ? zero : gy * phi;
}

// gz: the gradient of the sigmoid's argument z = s * channel
template <class Real>
SPARTA_INLINE Real gate_grad_logit(Real x, Real gy, Real phi) {
  return gy * relu(x) * phi * (1.0f - phi);
}

// ---- projected gradient descent --------------------------------------------------------------------------
// Files that use these are compiled without FMA contraction, so that every backend rounds alike.

// As torch.clamp: a NaN value passes, and the lower bound is applied first.
template <class Real>
SPARTA_INLINE Real clamp(Real value, Real lower, Real upper) {
  value = value < lower ? lower : value;
  return value > upper ? upper : value;
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
