// Elementwise functions of tensors that lie in the same order without gaps, in one pass, a register at a time.
#pragma once

#include "common.h"

namespace sparta {
namespace SPARTA_ISA {

// One or two inputs and an output, which is written a whole cache line at a time; with `stream`, past the cache.
template <class T, int inputs, bool stream>
struct Elements {
  using Lanes = Simd<T>;
  using Vector = typename Lanes::Vector;
  static constexpr int64_t line = Lanes::line * Lanes::lanes;

  const T* from[inputs];
  T* to;  // null: nothing is written

  // From element `start` on.
  SPARTA_INLINE Elements behind(int64_t start) const {
    Elements rest = *this;
    for (int i = 0; i < inputs; ++i) rest.from[i] += start;
    if (to != nullptr) rest.to += start;
    return rest;
  }

  // For the first `count` elements: function(values, place) returns the result for a register of elements from `place`
  // on. Lanes behind the last element are given as 0, and their results are not written.
  template <class Function>
  SPARTA_INLINE void map(int64_t count, Function function) const {
    int64_t k = 0;
    for (; k + line <= count; k += line) {
      for (const T* tensor : from) prefetch_read(tensor + k);
      if (!stream && to != nullptr && to != from[0]) prefetch_write(to + k);
      Vector results[Lanes::line];
      for (int64_t i = 0, at = k; i < Lanes::line; ++i, at += Lanes::lanes) {
        Vector values[inputs];
        for (int tensor = 0; tensor < inputs; ++tensor) values[tensor] = Lanes::load(from[tensor] + at);
        results[i] = function(values, at);
      }
      if (to != nullptr) Lanes::template store_line<stream>(to + k, results);
    }
    for (; k < count; k += Lanes::lanes) {
      const int64_t lanes = min(Lanes::lanes, count - k);
      Vector values[inputs];
      for (int tensor = 0; tensor < inputs; ++tensor) values[tensor] = load_partial(from[tensor] + k, lanes);
      const Vector result = function(values, k);
      if (to != nullptr) store_partial(to + k, result, lanes);
    }
  }
};

}  // namespace SPARTA_ISA
}  // namespace sparta
