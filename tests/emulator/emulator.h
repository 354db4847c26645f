// Between cuda_runtime.h, which kernels see, and emulator.cpp, which runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

struct Where {  // in the kernels' source
  const char* file;
  int line;
  bool operator==(const Where& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

// What a launch asks for, beside its kernel.
struct Configuration {
  Index grid, block;
  size_t dynamic_shared;  // bytes
  void* stream;
};

// A kernel with its arguments: run(arguments) is what one thread does.
struct Body {
  const void* kernel;
  void (*run)(void* arguments);
  void* arguments;
};

// What the lanes of a warp do together. Every lane gives a value; what it gets back depends on the kind.
enum class Together { barrier, shuffle, ballot };

struct Exchange {
  Together kind;
  unsigned mask;
  uint64_t value;   // given; and then what came back
  int source_lane;  // of a shuffle: whose value is asked for
  Where where;
};

// A `__shared__` variable: where it lies in the block of that number.
struct Shared {
  uint64_t block = 0;
  void* address = nullptr;
};

extern uint64_t block_number;  // of the running block; every block of every launch has another
extern Index thread_index, block_index, block_extent, grid_extent;

int lane();
void block_barrier(Where where);
uint64_t exchange(Exchange asked);
void claim(Shared& variable, size_t bytes, const char* name);
void* dynamic_shared();
void copy_async(void* to, const void* from, size_t bytes, size_t zeros);
void end_copy_group();
void wait_for_copies(int newest);  // until only the newest groups of copies are on their way
[[noreturn]] void fail(const char* message);  // of the running thread

// scheduler.cpp
void run_grid(const Body& body, const Configuration& configuration);
void set_order(uint64_t seed);  // 0: ascending, 1: descending, else shuffled

// runtime.cpp; a cudaError_t each
int launch(const Body& body, const Configuration& configuration);
int limit_dynamic_shared(const void* kernel, int bytes);

template <class T>
T& shared(Shared& variable, const char* name) {
  if (variable.block != block_number) claim(variable, sizeof(T), name);
  return *static_cast<T*>(variable.address);
}

}  // namespace emulator
