// Matrix products by a library's functions, for kernels that process a product's result while it is in the cache.
//
// Compiled once, not per instruction set: the library chooses its own instructions.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "../dtypes.h"

namespace sparta {

// The addresses of the functions, in their own signatures: extents m, n, k, row strides of A, B and C, whether to add to
// C, the matrices, and whether B lies in pairs of rows. dgemm is Fortran's.
struct ProductFunctions {
  using Float32 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float*, const float*, float*,
                           bool);
  using Bfloat16 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const void*, const void*, float*,
                            bool);
  using Release = void (*)(bool);
  using Float64 = void (*)(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                           const int*, const double*, const int*, const double*, double*, const int*);
  Float32 float32 = nullptr;
  Bfloat16 bfloat16 = nullptr;
  Release release = nullptr;
  Float64 float64 = nullptr;
};

void set_products(const ProductFunctions&);

// The products of one kernel call. All threads share it.
class Products {
 public:
  // C = A B, all row-major, C in the accumulator's type; B of bfloat16 has its rows interleaved in pairs: element (k, n)
  // is at 2 * (k / 2 * ldb + n) + k % 2, and k is even. After a failure further calls do nothing.
  void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                int64_t ldc) noexcept;
  void multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb,
                float* c, int64_t ldc) noexcept;
  void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
                int64_t ldc) noexcept;
  // Every thread calls this after its last product: the library may hold processor state (AMX tiles).
  void release() noexcept;
  // Rethrows what a product threw. Call it after the parallel region, which no exception may leave.
  void check() const;

 private:
  template <class Function>
  void guarded(Function function) noexcept;

  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace sparta
