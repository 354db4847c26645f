// A block's `__shared__` variables: NaN until they are written, and with gaps between them in which nothing is.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "fibers.h"

namespace emulator {

constexpr size_t kStaticShared = 48 * 1024;    // bytes
constexpr size_t kDynamicShared = 227 * 1024;  // once a kernel has asked for more than 48 kB

#if defined(__SANITIZE_ADDRESS__)
inline void close(void* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void open(void* from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
inline void close(void*, size_t) {}
inline void open(void*, size_t) {}
#endif

class SharedMemory {
 public:
  SharedMemory() { close(memory_, sizeof memory_); }

  void begin_block(size_t dynamic_bytes) {
    close(memory_, used_);
    open(memory_, kGap);
    std::memset(memory_, kPoison, kGap);
    close(memory_, kGap);
    used_ = kGap;
    variables_.clear();
    dynamic_ = place(dynamic_bytes, "(dynamic)");
    static_bytes_ = 0;
  }

  // Memory for a static variable, or null where there is none left.
  void* add(size_t bytes, const char* name) {
    static_bytes_ += bytes;
    return static_bytes_ > kStaticShared || variables_.size() == kMostVariables ? nullptr : place(bytes, name);
  }

  void* dynamic() const { return dynamic_; }

  // The variable beside which something was written, or null. AddressSanitizer would have told already.
  const char* hurt() const {
#if !defined(__SANITIZE_ADDRESS__)
    const char *gap = memory_, *before = variables_.front().name;
    for (const Variable& variable : variables_) {
      if (!intact(gap, variable.start)) return before;
      gap = variable.start + variable.bytes;
      before = variable.name;
    }
    if (!intact(gap, memory_ + used_)) return before;
#endif
    return nullptr;
  }

 private:
  static constexpr size_t kGap = 128;             // also the variables' alignment
  static constexpr unsigned char kPoison = 0xff;  // a NaN in every floating type, -1 in every signed integer

  struct Variable {
    const char* name;
    char* start;
    size_t bytes;
  };

  void* place(size_t bytes, const char* name) {
    char* const start = memory_ + used_;
    const size_t reserved = (bytes + 2 * kGap - 1) / kGap * kGap;
    used_ += reserved;
    open(start, reserved);
    std::memset(start, kPoison, reserved);
    close(start + bytes, reserved - bytes);
    variables_.push_back({name, start, bytes});
    return start;
  }

  static bool intact(const char* from, const char* to) {
    return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kPoison; });
  }

  static constexpr size_t kMostVariables = 256;
  alignas(kGap) char memory_[kStaticShared + kDynamicShared + kMostVariables * 2 * kGap];
  size_t used_ = 0, static_bytes_ = 0;
  void* dynamic_ = nullptr;
  std::vector<Variable> variables_;
};

}  // namespace emulator
