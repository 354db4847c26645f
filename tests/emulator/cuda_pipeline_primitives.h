// Found in place of NVIDIA's header of this name: copies to shared memory that a thread does not wait for at once.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  emulator::copy_async(to, from, bytes, zeros);
}
inline void __pipeline_commit() { emulator::end_copy_group(); }
inline void __pipeline_wait_prior(size_t newest) { emulator::wait_for_copies(static_cast<int>(newest)); }
