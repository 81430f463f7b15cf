// A small pool: the caller and the other threads take units of work from one counter, so that a slow core takes fewer.
// Nothing spins between jobs: on a phone the forward pass wants the cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace pocketzo {

class Units {
 public:
  explicit Units(std::uint64_t count) noexcept : count_(count) {}
  // The next unit that nobody took; false when there is none. A thread sees ascending numbers.
  bool take(std::uint64_t& unit) noexcept {
    unit = next_.fetch_add(1, std::memory_order_relaxed);
    return unit < count_;
  }

 private:
  std::atomic<std::uint64_t> next_{0};
  std::uint64_t count_;
};

// Called once on each thread that takes part: the caller, and those that wake up while there is something left.
using Work = void (*)(Units& units, const void* context) noexcept;

// Returns when every unit is done. Calls from several threads run one after another.
void run(std::uint64_t units, Work work, const void* context) noexcept;

}  // namespace pocketzo
