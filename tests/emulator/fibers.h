// Fibers: several stacks in one OS thread, and a switch between them that costs a few nanoseconds and no system call.
#pragma once

#include <cstddef>
#include <cstdint>

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves on this stack what a call preserves, stores the stack's address in *from, and returns on the stack `to`.
extern "C" void emulator_switch_stacks(void** from, void* to);

namespace emulator {

// A stack and where it was left. One that was not made by start() stands for the OS thread's own.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (mapping_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, size_);  // where an abandoned function's variables were
#endif
    munmap(mapping_, kStack + kGuard);
  }

  // A stack of its own, on which entry() begins at the first switch; entry never returns. `number` shifts the stack's
  // top: stacks that begin at equal offsets of a page would fight for the same few cache lines.
  void start(void (*entry)(), int number) {
    mapping_ = static_cast<char*>(
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      throw std::bad_alloc();
    }
    mprotect(mapping_, kGuard, PROT_NONE);  // below the stack: an overflow faults
    stack_ = mapping_ + kGuard;
    size_ = kStack;
    auto* top = reinterpret_cast<void**>(stack_ + size_ - number % 61 * 128 - 128);
#if defined(__x86_64__)
    *--top = nullptr;  // entry's return address, so that its stack is aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
    top -= 20;
    for (int i = 0; i < 20; ++i) top[i] = nullptr;
    top[11] = reinterpret_cast<void*>(entry);  // x30
#endif
    position_ = top;
  }

  // Leaves this fiber, which is the running one, for another; returns when somebody comes back.
  void leave_for(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&shadow_, other.stack_, other.size_);
#endif
    emulator_switch_stacks(&position_, other.position_);
    arrived(other);
  }

  // What a fiber does first of all, `from` being where it was switched to from.
  void arrived([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    __sanitizer_finish_switch_fiber(shadow_, &stack, &from.size_);
    from.stack_ = static_cast<char*>(const_cast<void*>(stack));
#endif
  }

 private:
  static constexpr size_t kStack = 128 * 1024, kGuard = 4096 * 16;  // a page may have 64 kB

  void* position_ = nullptr;
  char* mapping_ = nullptr;
  char* stack_ = nullptr;
  size_t size_ = 0;
  void* shadow_ = nullptr;  // AddressSanitizer's
};

}  // namespace emulator
