// A vector of floats as wide as the instruction set, and how tensors of each dtype are read into it and written from
// it. Written with the compiler's vector extension (GCC and Clang), and with intrinsics where that cannot express it.
//
// Compiled once per instruction set: everything is always_inline or inside the SPARTA_ISA namespace (see activation.h).
#pragma once

#include <cstdint>
#include <type_traits>

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

// max and min return their second operand when one is NaN: in this order a NaN value passes.
#if defined(__AVX512DQ__)

template <>
struct Bound<SPARTA_ISA::FloatVector> {
  using Vector = SPARTA_ISA::FloatVector;
  static SPARTA_INLINE Vector at_least(Vector value, Vector bound) {
    return (Vector)_mm512_max_ps((__m512)bound, (__m512)value);
  }
  static SPARTA_INLINE Vector at_most(Vector value, Vector bound) {
    return (Vector)_mm512_min_ps((__m512)bound, (__m512)value);
  }
};

// reduce gives t - floor(t), and 0 for inf; scalef multiplies by 2^floor(t) and saturates to 0 and inf by itself.
template <>
struct Exp2<SPARTA_ISA::FloatVector> {
  using Vector = SPARTA_ISA::FloatVector;
  template <int bits>
  static SPARTA_INLINE Vector of(Vector t) {
    const Vector r = (Vector)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (Vector)_mm512_scalef_ps((__m512)exp2_fraction<bits>(r), (__m512)t);
  }
};

// A quarter of the division's time; its relative error of 2^-14 is far below that of the 16-bit formats.
template <>
struct Reciprocal<SPARTA_ISA::FloatVector> {
  using Vector = SPARTA_ISA::FloatVector;
  template <int bits>
  static SPARTA_INLINE Vector of(Vector value) {
    return bits > 11 ? 1.0f / value : (Vector)_mm512_rcp14_ps((__m512)value);
  }
};

#elif defined(__AVX2__)

template <>
struct Bound<SPARTA_ISA::FloatVector> {
  using Vector = SPARTA_ISA::FloatVector;
  static SPARTA_INLINE Vector at_least(Vector value, Vector bound) {
    return (Vector)_mm256_max_ps((__m256)bound, (__m256)value);
  }
  static SPARTA_INLINE Vector at_most(Vector value, Vector bound) {
    return (Vector)_mm256_min_ps((__m256)bound, (__m256)value);
  }
};

#endif

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

// Past the cache: lines that are written whole need not be read first, which saves a third of a copy's traffic. For
// aligned addresses, and results too large to still be in the cache when they are read (common.h, bypasses_cache).
template <class Vector, class T>
SPARTA_INLINE void stream_bits(T* to, Vector vector) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)vector);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Vector) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)vector);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(Vector) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)vector);
#endif
  store_bits(to, vector);
}

// Orders streaming stores before all later stores. Every thread that streams must end with it.
SPARTA_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- 16-bit formats, a register at a time ----------------------------------------------------------------

// Between 16 and 32 bits a lane. GCC makes five to twenty instructions of __builtin_convertvector.
SPARTA_INLINE WordVector zero_extend(HalfVector half) {
#if defined(__AVX512F__)
  return (WordVector)_mm512_cvtepu16_epi32((__m256i)half);
#elif defined(__AVX2__)
  return (WordVector)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, WordVector);
#endif
}

SPARTA_INLINE HalfVector low_halves(WordVector words) {  // words below 2^16
#if defined(__AVX512F__)
  return (HalfVector)_mm512_cvtepi32_epi16((__m512i)words);
#elif defined(__AVX2__)
  return (HalfVector)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)words), _mm256_extracti128_si256((__m256i)words, 1));
#else
  return __builtin_convertvector(words, HalfVector);
#endif
}

SPARTA_INLINE FloatVector widen(bfloat16, HalfVector half) { return (FloatVector)(zero_extend(half) << 16); }

#if defined(__AVX512BF16__) && !defined(SPARTA_KEEP_SUBNORMALS)

// The instruction flushes subnormal numbers to 0; every other result is as below.
SPARTA_INLINE HalfVector narrow(bfloat16, FloatVector value) { return (HalfVector)_mm512_cvtneps_pbh((__m512)value); }

#else

SPARTA_INLINE HalfVector narrow(bfloat16, FloatVector value) {
  const WordVector bits = (WordVector)value;
  const WordVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const WordVector quiet_nan = WordVector{} + 0x7fc0u;
  return low_halves((IntVector)(value == value) ? rounded : quiet_nan);
}

#endif

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
  const WordVector bits = zero_extend(half);
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
  return low_halves(result | sign >> 16);
}

#endif

// ---- Simd<T>: a register's worth of elements of T --------------------------------------------------------

template <class T>
struct Simd {  // float and the 16-bit formats
  using Vector = FloatVector;
  static constexpr int lanes = kFloatLanes;
  static constexpr int line = 64 / (kFloatLanes * static_cast<int>(sizeof(T)));  // registers that fill a cache line

  static SPARTA_INLINE Vector load(const T* from) {
    if constexpr (sizeof(T) == 4)
      return load_bits<Vector>(from);
    else
      return widen(T{}, load_bits<HalfVector>(from));
  }
  static SPARTA_INLINE void store(T* to, Vector value) {
    if constexpr (sizeof(T) == 4)
      store_bits(to, value);
    else
      store_bits(to, narrow(T{}, value));
  }
  // A whole cache line, through the cache or past it.
  template <bool stream>
  static SPARTA_INLINE void store_line(T* to, const Vector* values) {
#if defined(__AVX512BF16__) && !defined(SPARTA_KEEP_SUBNORMALS)
    if constexpr (std::is_same_v<T, bfloat16>) {  // both registers in one conversion
      const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
      return stream ? stream_bits(to, both) : store_bits(to, both);
    }
#endif
    for (int i = 0; i < line; ++i) {
      if constexpr (!stream)
        store(to + i * lanes, values[i]);
      else if constexpr (sizeof(T) == 4)
        stream_bits(to + i * lanes, values[i]);
      else
        stream_bits(to + i * lanes, narrow(T{}, values[i]));
    }
  }
};

// float64 is for checking gradients: one element at a time, with the C library's exp.
template <>
struct Simd<double> {
  using Vector = double;
  static constexpr int lanes = 1;
  static constexpr int line = 8;
  static SPARTA_INLINE Vector load(const double* from) { return *from; }
  static SPARTA_INLINE void store(double* to, Vector value) { *to = value; }
  template <bool stream>
  static SPARTA_INLINE void store_line(double* to, const Vector* values) {
    for (int i = 0; i < line; ++i) to[i] = values[i];
  }
};

// The first `count` <= lanes elements; the others are read as 0 and not written.
template <class T>
SPARTA_INLINE typename Simd<T>::Vector load_partial(const T* from, int64_t count) {
  if (count == Simd<T>::lanes) return Simd<T>::load(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (FloatVector)_mm512_maskz_loadu_ps(mask, from);
  if constexpr (sizeof(T) == 2) return widen(T{}, (HalfVector)_mm256_maskz_loadu_epi16(mask, from));
#endif
  T buffer[Simd<T>::lanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return Simd<T>::load(buffer);
}

template <class T>
SPARTA_INLINE void store_partial(T* to, typename Simd<T>::Vector value, int64_t count) {
  if (count == Simd<T>::lanes) return Simd<T>::store(to, value);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, mask, (__m512)value);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(to, mask, (__m256i)narrow(T{}, value));
#endif
  T buffer[Simd<T>::lanes];
  Simd<T>::store(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// Prefetch 4 kB ahead of where memory is read (or written). The kernels stream through several tensors at once, with
// some arithmetic between two loads, and the hardware alone keeps too few misses in flight: on a Zen 5 the gate's
// backward pass takes 1.75 times as long as a copy without this, and 1.5 times with it.
template <class T>
SPARTA_INLINE void prefetch_read(const T* at) {
  __builtin_prefetch(at + 4096 / sizeof(T), 0, 3);
}
template <class T>
SPARTA_INLINE void prefetch_write(const T* at) {
  __builtin_prefetch(at + 4096 / sizeof(T), 1, 3);
}

// The value with 0 in the lanes from `count` on, whatever was there (NaN too).
SPARTA_INLINE double first_lanes(double value, int64_t) { return value; }

SPARTA_INLINE FloatVector first_lanes(FloatVector value, int64_t count) {
  IntVector lane;
  for (int i = 0; i < kFloatLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(count) ? value : FloatVector{};
}

// ---- one bit a lane ---------------------------------------------------------------------------------------

// The low bits are those of the lanes that pass their gradient on: all but those <= 0, so a NaN does.
SPARTA_INLINE uint64_t passing(double value) { return value <= 0 ? 0 : 1; }

SPARTA_INLINE uint64_t passing(FloatVector value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)value, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_setzero_ps(), _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnle_ps((__m128)value, _mm_setzero_ps())));
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kFloatLanes; ++lane) bits |= passing(static_cast<double>(value[lane])) << lane;
  return bits;
#endif
}

// The value in the lanes whose bit is set, and 0 in the others, whatever was there.
SPARTA_INLINE double masked(double value, uint64_t bits) { return bits & 1 ? value : 0.0; }

SPARTA_INLINE FloatVector masked(FloatVector value, uint64_t bits) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)value);
#else
  IntVector own;
  for (int lane = 0; lane < kFloatLanes; ++lane) own[lane] = 1 << lane;
  return ((IntVector{} + static_cast<int32_t>(bits & 0xffffu)) & own) != 0 ? value : FloatVector{};
#endif
}

// ---- sums of whole registers -----------------------------------------------------------------------------

// Adds the even groups of `step` lanes of a and b to the odd ones, the results of a and of b in turn: half as many
// groups of each are left, interleaved in one register.
template <int step>
SPARTA_INLINE FloatVector fold(FloatVector a, FloatVector b) {
  IntVector even, odd;
  for (int i = 0; i < kFloatLanes; ++i) {
    const int group = i / step;
    even[i] = i - (group % 2) * step + (group % 2) * kFloatLanes;
    odd[i] = even[i] + step;
  }
#if defined(__clang__)
  FloatVector first, second;
  for (int i = 0; i < kFloatLanes; ++i) {
    first[i] = even[i] < kFloatLanes ? a[even[i]] : b[even[i] - kFloatLanes];
    second[i] = odd[i] < kFloatLanes ? a[odd[i]] : b[odd[i] - kFloatLanes];
  }
  return first + second;
#else
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

// Lane i of the result is the sum of the lanes of rows[i]. All rows together cost as much as two would one by one.
template <int step = 1, int count = kFloatLanes>
SPARTA_INLINE FloatVector sums(const FloatVector* rows) {
  if constexpr (count == 1) {
    return rows[0];
  } else {
    FloatVector folded[count / 2];
    for (int i = 0; i < count / 2; ++i) folded[i] = fold<step>(rows[2 * i], rows[2 * i + 1]);
    return sums<step * 2, count / 2>(folded);
  }
}

SPARTA_INLINE double sums(const double* rows) { return rows[0]; }

}  // namespace SPARTA_ISA
}  // namespace sparta
