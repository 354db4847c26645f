// The element types of tensors, as numbers that cross the language border and as C++ types.
#pragma once

#include <cstdint>

#include "activation.h"

namespace sparta {

enum class DType : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that sums of T are kept in: float64 for float64, float32 for the rest.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// How many significant bits a result has, rounded to T.
template <class T>
constexpr int kSignificantBits = 24;  // or more
template <>
constexpr int kSignificantBits<float16> = 11;
template <>
constexpr int kSignificantBits<bfloat16> = 8;

}  // namespace sparta
