// Runs the blocks of a launch one after the other. A block's threads are fibers that give way only where threads wait for
// each other, so that a block runs in one OS thread, in a chosen order, and what cannot go on is known at once.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include <dlfcn.h>

#include "emulator.h"
#include "fibers.h"
#include "order.h"
#include "shared_memory.h"

namespace emulator {

uint64_t block_number = 0;
Index thread_index, block_index, block_extent, grid_extent;

namespace {

constexpr int kLanes = 32;

enum class State { unstarted, ready, at_barrier, at_exchange, exited };

struct Copy {  // to shared memory, on its way
  void* to;
  const void* from;
  size_t bytes, zeros;
  int group;

  void arrive() const {
    std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, zeros);
  }
};

struct Thread {
  Index index;
  int lane;
  State state = State::unstarted;
  Fiber* fiber = nullptr;
  Where barrier = {};
  Exchange asked = {};
  std::vector<Copy> copies = {};
  int groups = 0;  // of copies, that are complete

  bool named_in(unsigned mask) const { return (mask >> lane & 1) != 0; }
};

Order order;
SharedMemory shared_memory;
const Body* body = nullptr;    // of the running launch
std::vector<Thread> threads;   // of the running block
Thread* current = nullptr;
std::string failure;           // of the current thread, found on its fiber
Fiber scheduler;               // the OS thread's own stack; from there fibers are resumed
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;

// ---- messages ----------------------------------------------------------------------------------------------

std::string text(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Where& where) { return std::string(where.file) + ":" + std::to_string(where.line); }

std::string text(const Thread& thread) {
  const std::string name = "thread " + text(thread.index);
  if (thread.state == State::exited) return name + " has returned";
  if (thread.state == State::at_barrier) return name + " waits at " + text(thread.barrier);
  if (thread.state == State::at_exchange) return name + " waits at " + text(thread.asked.where);
  return name;
}

// A function's name out of the module's symbol table, by binutils: dladdr knows exported names alone.
std::string name_of(const void* function) {
  Dl_info module;
  if (dladdr(function, &module) == 0) return "?";
  const auto offset = static_cast<const char*>(function) - static_cast<const char*>(module.dli_fbase);
  char command[4096], name[4096] = "?";
  std::snprintf(command, sizeof command, "addr2line -f -C -e '%s' 0x%tx 2>/dev/null", module.dli_fname, offset);
  if (std::FILE* pipe = popen(command, "r")) {
    if (std::fgets(name, sizeof name, pipe) != nullptr) name[std::strcspn(name, "\n")] = '\0';
    pclose(pipe);
  }
  return name;
}

[[noreturn]] void stop(const std::string& message) {
  throw std::runtime_error("emulated CUDA: " + name_of(body->kernel) + ", block " + text(block_index) + ": " + message);
}

// ---- threads -----------------------------------------------------------------------------------------------

// What every fiber does: it is one thread after the other.
void be_threads() {
  Fiber* const self = current->fiber;
  self->arrived(scheduler);
  for (;;) {
    body->run(body->arguments);
    for (const Copy& copy : current->copies) copy.arrive();
    current->state = State::exited;
    idle.push_back(self);
    self->leave_for(scheduler);
  }
}

Fiber* idle_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->start(be_threads, static_cast<int>(fibers.size()));
    return fibers.back().get();
  }
  Fiber* const fiber = idle.back();
  idle.pop_back();
  return fiber;
}

// Until it waits for others or returns.
void run(Thread& thread) {
  current = &thread;
  thread_index = thread.index;
  if (thread.state == State::unstarted) thread.fiber = idle_fiber();
  thread.state = State::ready;
  scheduler.leave_for(*thread.fiber);
  if (!failure.empty()) stop(text(thread) + ": " + failure);
}

// The current thread gives way, until it is ready and has its turn.
void wait(State state) {
  current->state = state;
  current->fiber->leave_for(scheduler);
}

// ---- warps -------------------------------------------------------------------------------------------------

struct Warp {
  Thread* first;
  int count;

  // Until every lane waits for the whole block or has returned. Warps do not proceed in step: one is at the end of its
  // work before another begins, as may happen on a device.
  void run_alone() const {
    do {
      for (int lane : order.of(count))
        if (first[lane].state <= State::ready) run(first[lane]);
    } while (release());
    for (int lane = 0; lane < count; ++lane)
      if (first[lane].state == State::at_exchange) stop_for_missing(first[lane]);
  }

 private:
  Thread* live(int lane) const { return lane < count && first[lane].state != State::exited ? first + lane : nullptr; }

  // Lets go whoever waits for lanes that are all there; whether there was anyone.
  bool release() const {
    bool any = false;
    for (int lane = 0; lane < count; ++lane) {
      if (first[lane].state != State::at_exchange || !complete(first[lane])) continue;
      answer(Exchange(first[lane].asked));
      any = true;
    }
    return any;
  }

  // Whether every lane that `thread` waits for is there. Those that have returned are not waited for.
  bool complete(const Thread& thread) const {
    const Exchange& asked = thread.asked;
    if (!thread.named_in(asked.mask)) stop(text(thread) + " with a mask in which it is not");
    for (int lane = 0; lane < kLanes; ++lane) {
      const Thread* other = live(lane);
      if (other == nullptr || !other->named_in(asked.mask)) continue;
      if (other->state != State::at_exchange) return false;
      if (other->asked.mask != asked.mask || other->asked.kind != asked.kind || !(other->asked.where == asked.where))
        stop(text(thread) + " for a lane that does something else: " + text(*other));
    }
    return true;
  }

  void answer(const Exchange& asked) const {
    uint64_t given[kLanes] = {}, ballot = 0;
    const auto takes_part = [&](int lane) { return live(lane) != nullptr && live(lane)->named_in(asked.mask); };
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!takes_part(lane)) continue;
      given[lane] = first[lane].asked.value;
      ballot |= (given[lane] & 1) << lane;
    }
    for (int lane = 0; lane < count; ++lane) {
      if (!takes_part(lane)) continue;
      Thread& thread = first[lane];
      const int source = thread.asked.source_lane;
      if (asked.kind == Together::shuffle && !takes_part(source))
        stop(text(thread) + " and reads lane " + std::to_string(source) + ", which takes no part");
      thread.asked.value = asked.kind == Together::ballot ? ballot : given[source];
      thread.state = State::ready;
    }
  }

  [[noreturn]] void stop_for_missing(const Thread& thread) const {
    for (int lane = 0; lane < count; ++lane)
      if (first[lane].state == State::at_barrier && first[lane].named_in(thread.asked.mask))
        stop(text(thread) + " for a lane that does not come: " + text(first[lane]));
    std::abort();  // release() would have let it go
  }
};

// ---- blocks ------------------------------------------------------------------------------------------------

// Past __syncthreads(), when every warp is there; false where no thread is left. As on a device since Volta, threads
// that have returned are not waited for.
bool release_block() {
  const Thread* waiting = nullptr;
  for (const Thread& thread : threads) {
    if (thread.state == State::exited) continue;
    if (waiting != nullptr && !(thread.barrier == waiting->barrier))
      stop("not one barrier for all: " + text(thread) + ", " + text(*waiting));
    waiting = &thread;
  }
  for (Thread& thread : threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
  return waiting != nullptr;
}

void run_block(const Configuration& configuration) {
  ++block_number;
  shared_memory.begin_block(configuration.dynamic_shared);
  threads.clear();
  const Index& extent = configuration.block;
  for (unsigned z = 0; z < extent.z; ++z)
    for (unsigned y = 0; y < extent.y; ++y)
      for (unsigned x = 0; x < extent.x; ++x)
        threads.push_back({{x, y, z}, static_cast<int>(threads.size() % kLanes)});
  const int count = static_cast<int>(threads.size());
  do {
    const std::vector<int> turns = order.of((count + kLanes - 1) / kLanes);
    for (int warp : turns) Warp{&threads[warp * kLanes], std::min(kLanes, count - warp * kLanes)}.run_alone();
  } while (release_block());
  if (const char* name = shared_memory.hurt()) stop(std::string("written beside the shared variable ") + name);
}

}  // namespace

void run_grid(const Body& asked, const Configuration& configuration) {
  body = &asked;
  block_extent = configuration.block;
  grid_extent = configuration.grid;
  const Index& grid = grid_extent;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  order.begin_launch();
  const Order::Walk walk = order.walk(blocks);
  try {
    uint64_t number = walk.first;
    for (uint64_t i = 0; i < blocks; ++i, number = (number + walk.step) % blocks) {
      block_index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                     static_cast<unsigned>(number / grid.x / grid.y)};
      run_block(configuration);
    }
  } catch (...) {  // the failed block's threads are abandoned where they are
    failure.clear();
    idle.clear();
    fibers.clear();
    throw;
  }
}

void set_order(uint64_t seed) { order.set(seed); }

int lane() { return current->lane; }

void fail(const char* message) {
  failure = message;
  current->fiber->leave_for(scheduler);
  std::abort();  // nobody comes back
}

void block_barrier(Where where) {
  current->barrier = where;
  wait(State::at_barrier);
}

uint64_t exchange(Exchange asked) {
  current->asked = asked;
  wait(State::at_exchange);
  return current->asked.value;
}

void claim(Shared& variable, size_t bytes, const char* name) {
  variable.address = shared_memory.add(bytes, name);
  if (variable.address == nullptr) fail("more than 48 kB of static __shared__ memory");
  variable.block = block_number;
}

// When a copy arrives is not known before it is waited for; it may be at once.
void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  const auto misaligned = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes || misaligned % bytes != 0)
    fail("an asynchronous copy of another size or alignment than 4, 8 or 16 bytes");
  const Copy copy{to, from, bytes - zeros, zeros, current->groups};
  if (order.is_late())
    current->copies.push_back(copy);
  else
    copy.arrive();
}

void end_copy_group() { ++current->groups; }

void wait_for_copies(int newest) {
  std::vector<Copy>& copies = current->copies;
  const auto awaited = [&](const Copy& copy) { return copy.group < current->groups - newest; };
  for (const Copy& copy : copies)
    if (awaited(copy)) copy.arrive();
  copies.erase(std::remove_if(copies.begin(), copies.end(), awaited), copies.end());
}

void* dynamic_shared() { return shared_memory.dynamic(); }

}  // namespace emulator
