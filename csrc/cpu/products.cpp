#include "products.h"

#include <stdexcept>

namespace sparta {
namespace {

ProductFunctions functions;

void present(bool is) {
  if (!is) throw std::runtime_error("no matrix product for this dtype was set");
}

}  // namespace

void set_products(const ProductFunctions& set) { functions = set; }

template <class Function>
void Products::guarded(Function function) noexcept {
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    function();
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
}

void Products::multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                        float* c, int64_t ldc) noexcept {
  guarded([&] {
    present(functions.float32 != nullptr);
    functions.float32(m, n, k, lda, ldb, ldc, false, a, b, c, false);
  });
}

void Products::multiply(int64_t m, int64_t n, int64_t k, const bfloat16* a, int64_t lda, const bfloat16* b, int64_t ldb,
                        float* c, int64_t ldc) noexcept {
  guarded([&] {
    present(functions.bfloat16 != nullptr);
    functions.bfloat16(m, n, k, lda, ldb, ldc, false, a, b, c, true);
  });
}

void Products::multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                        double* c, int64_t ldc) noexcept {
  guarded([&] {
    present(functions.float64 != nullptr);
    // Fortran's matrices are column-major: read so, ours are transposed, and C^T = B^T A^T.
    const int rows = static_cast<int>(n), columns = static_cast<int>(m), inner = static_cast<int>(k);
    const int first = static_cast<int>(ldb), second = static_cast<int>(lda), result = static_cast<int>(ldc);
    const double one = 1, zero = 0;
    functions.float64("N", "N", &rows, &columns, &inner, &one, b, &first, a, &second, &zero, c, &result);
  });
}

void Products::release() noexcept {
  if (functions.release == nullptr) return;
  try {  // after a failure too
    functions.release(true);
  } catch (...) {
  }
}

void Products::check() const {
  if (error_) std::rethrow_exception(error_);
}

}  // namespace sparta
