#include "memory.h"

#include <stdlib.h>  // defines __GLIBC__ where that is the C library

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <gnu/libc-version.h>
#include <malloc.h>
#endif

namespace sparta {

#if defined(__GLIBC__)

namespace {

// The defaults of mallopt(3), but for the two thresholds. glibc raises those as large buffers are freed, up to these
// values, until the first call of mallopt that concerns them; from then on they stay where they are put.
constexpr int kMmapMax = 65536;
constexpr int kMmapThreshold = static_cast<int>(sizeof(long) == 8 ? 4 * 1024 * 1024 * sizeof(long) : 512 * 1024);
constexpr int kTrimThreshold = 2 * kMmapThreshold;

const void* file_of(const void* symbol) {
  Dl_info found{};
  return symbol != nullptr && dladdr(symbol, &found) != 0 ? found.dli_fbase : nullptr;
}

}  // namespace

bool malloc_is_glibc() {
  // Only glibc defines gnu_get_libc_version.
  const void* libc = file_of(reinterpret_cast<const void*>(&gnu_get_libc_version));
  const char* const names[] = {"malloc", "free", "posix_memalign", "mallopt"};
  for (const char* name : names)
    if (libc == nullptr || file_of(dlsym(RTLD_DEFAULT, name)) != libc) return false;
  return true;
}

bool keep_freed_memory() {
  // mallopt takes an int; -1 becomes the largest size_t there, and no heap ever has so much to trim.
  return malloc_is_glibc() && mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
}

void return_freed_memory() {
  mallopt(M_MMAP_MAX, kMmapMax);
  mallopt(M_MMAP_THRESHOLD, kMmapThreshold);
  mallopt(M_TRIM_THRESHOLD, kTrimThreshold);
  malloc_trim(0);
}

#else

bool malloc_is_glibc() { return false; }
bool keep_freed_memory() { return false; }
void return_freed_memory() {}

#endif

}  // namespace sparta
