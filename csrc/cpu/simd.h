// A vector of floats as wide as the instruction set, and how tensors of each dtype are read into it and written from
// it. Written with the compiler's vector extension (GCC and Clang); intrinsics only where it has no word for the thing.
//
// Compiled once per instruction set: everything is always_inline or inside the SPARTA_ISA namespace (see activation.h).
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparta {
namespace SPARTA_ISA {

#if defined(__AVX512F__)
constexpr int kFloatLanes = 16;
#elif defined(__AVX2__)
constexpr int kFloatLanes = 8;
#else
constexpr int kFloatLanes = 4;
#endif

typedef float FloatVector __attribute__((vector_size(kFloatLanes * 4)));
typedef int32_t IntVector __attribute__((vector_size(kFloatLanes * 4)));
typedef uint32_t WordVector __attribute__((vector_size(kFloatLanes * 4)));
typedef uint16_t HalfVector __attribute__((vector_size(kFloatLanes * 2)));

}  // namespace SPARTA_ISA

template <>
struct Bits<SPARTA_ISA::FloatVector> {
  using Int = SPARTA_ISA::IntVector;
  static SPARTA_INLINE Int of(SPARTA_ISA::FloatVector value) { return (Int)value; }
  static SPARTA_INLINE SPARTA_ISA::FloatVector to(Int bits) { return (SPARTA_ISA::FloatVector)bits; }
};

namespace SPARTA_ISA {

template <class Vector, class T>
SPARTA_INLINE Vector load_bits(const T* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector, class T>
SPARTA_INLINE void store_bits(T* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// ---- 16-bit formats, a register at a time ----------------------------------------------------------------

SPARTA_INLINE FloatVector widen(bfloat16, HalfVector half) {
  return (FloatVector)(__builtin_convertvector(half, WordVector) << 16);
}

SPARTA_INLINE HalfVector narrow(bfloat16, FloatVector value) {
  const WordVector bits = (WordVector)value;
  const WordVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const WordVector quiet_nan = WordVector{} + 0x7fc0u;
  return __builtin_convertvector((IntVector)(value == value) ? rounded : quiet_nan, HalfVector);
}

#if defined(__AVX512F__)

SPARTA_INLINE FloatVector widen(float16, HalfVector half) { return (FloatVector)_mm512_cvtph_ps((__m256i)half); }
SPARTA_INLINE HalfVector narrow(float16, FloatVector value) {
  return (HalfVector)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__F16C__)

SPARTA_INLINE FloatVector widen(float16, HalfVector half) { return (FloatVector)_mm256_cvtph_ps((__m128i)half); }
SPARTA_INLINE HalfVector narrow(float16, FloatVector value) {
  return (HalfVector)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else

// In integer and float arithmetic alone, after the method of F. Giesen ("half to float done quick").
SPARTA_INLINE FloatVector widen(float16, HalfVector half) {
  const WordVector bits = __builtin_convertvector(half, WordVector);
  const WordVector magnitude = (bits & 0x7fffu) << 13;
  const FloatVector scaled = (FloatVector)magnitude * 5.192296858534828e33f;  // 2^112: moves the exponent's bias
  const WordVector inf_or_nan = (WordVector)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (FloatVector)((WordVector)scaled | inf_or_nan | (bits & 0x8000u) << 16);
}

SPARTA_INLINE HalfVector narrow(float16, FloatVector value) {
  const WordVector bits = (WordVector)value;
  const WordVector sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const WordVector normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // bias 127 -> 15, ties to even
  const FloatVector shift = (FloatVector)(WordVector{} + 0x3f000000u);                   // 0.5: aligns half subnormals
  const WordVector subnormal = (WordVector)((FloatVector)magnitude + shift) - 0x3f000000u;
  const WordVector overflow = (IntVector)(magnitude > 0x7f800000u) ? WordVector{} + 0x7e00u : WordVector{} + 0x7c00u;
  WordVector result = (IntVector)(magnitude < 0x38800000u) ? subnormal : normal;
  result = (IntVector)(magnitude >= 0x47800000u) ? overflow : result;
  return __builtin_convertvector(result | sign >> 16, HalfVector);
}

#endif

// ---- Simd<T>: a register's worth of elements of T --------------------------------------------------------

template <class T>
struct Simd {  // the 16-bit formats
  using Vector = FloatVector;
  static constexpr int lanes = kFloatLanes;
  static SPARTA_INLINE Vector load(const T* from) { return widen(T{}, load_bits<HalfVector>(from)); }
  static SPARTA_INLINE void store(T* to, Vector value) { store_bits(to, narrow(T{}, value)); }
};

template <>
struct Simd<float> {
  using Vector = FloatVector;
  static constexpr int lanes = kFloatLanes;
  static SPARTA_INLINE Vector load(const float* from) { return load_bits<Vector>(from); }
  static SPARTA_INLINE void store(float* to, Vector value) { store_bits(to, value); }
};

// float64 is for checking gradients: one element at a time, with the C library's exp.
template <>
struct Simd<double> {
  using Vector = double;
  static constexpr int lanes = 1;
  static SPARTA_INLINE Vector load(const double* from) { return *from; }
  static SPARTA_INLINE void store(double* to, Vector value) { *to = value; }
};

// The first `count` <= lanes elements; the others are read as 0 and not written.
template <class T>
SPARTA_INLINE typename Simd<T>::Vector load_partial(const T* from, int64_t count) {
  if (count == Simd<T>::lanes) return Simd<T>::load(from);
  T buffer[Simd<T>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return Simd<T>::load(buffer);
}

template <class T>
SPARTA_INLINE void store_partial(T* to, typename Simd<T>::Vector value, int64_t count) {
  if (count == Simd<T>::lanes) return Simd<T>::store(to, value);
  T buffer[Simd<T>::lanes];
  Simd<T>::store(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// The sum of a vector's lanes, by halves.
SPARTA_INLINE double sum(double value) { return value; }

SPARTA_INLINE float sum(FloatVector value) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter parts[kFloatLanes / 4];
  __builtin_memcpy(parts, &value, sizeof value);
  Quarter total = parts[0];
  for (int i = 1; i < kFloatLanes / 4; ++i) total += parts[i];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

}  // namespace SPARTA_ISA
}  // namespace sparta
