// In which order the threads of a block run between barriers, and the blocks of a launch; and whether what may take a
// while does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace emulator {

class Order {
 public:
  // 0: ascending, 1: descending, else shuffled by that seed, anew each time.
  void set(uint64_t seed) { seed_ = seed; }
  void begin_launch() { random_.seed(static_cast<unsigned>(seed_)); }

  // The numbers below count in this order.
  const std::vector<int>& of(int count) {
    numbers_.resize(count);
    std::iota(numbers_.begin(), numbers_.end(), 0);
    if (seed_ == 1) std::reverse(numbers_.begin(), numbers_.end());
    if (seed_ > 1) std::shuffle(numbers_.begin(), numbers_.end(), random_);
    return numbers_;
  }

  // The same for more numbers than one would store: number = (first + step * i) % count.
  struct Walk {
    uint64_t first, step;
  };
  Walk walk(uint64_t count) {
    if (seed_ == 0 || count < 2) return {0, 1};
    if (seed_ == 1) return {count - 1, count - 1};
    Walk found{random_() % count, 1 + random_() % (count - 1)};
    while (std::gcd(found.step, count) != 1) found.step = found.step % (count - 1) + 1;
    return found;
  }

  // Whether something happens as late as it may, or at once.
  bool is_late() { return seed_ == 1 || (seed_ > 1 && random_() % 2 == 1); }

 private:
  uint64_t seed_ = 0;
  std::mt19937 random_;
  std::vector<int> numbers_;
};

}  // namespace emulator
