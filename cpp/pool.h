// A thread pool. The caller and the other threads take units of work from one counter, so that a slow core takes fewer.
// Threads sleep between jobs and never spin: on a phone the forward pass needs the cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace pocketzo {

class Units {
 public:
  explicit Units(std::uint64_t count) noexcept : count_(count) {}
  // Takes the next unit; false if none is left. A thread gets ascending numbers.
  bool take(std::uint64_t& unit) noexcept {
    unit = next_.fetch_add(1, std::memory_order_relaxed);
    return unit < count_;
  }

 private:
  std::atomic<std::uint64_t> next_{0};
  std::uint64_t count_;
};

// Called once on each participating thread: the caller, and those that wake up while units are left.
using Work = void (*)(Units& units, const void* context) noexcept;

// Returns when all units are done. Concurrent calls run one after another.
void run(std::uint64_t units, Work work, const void* context) noexcept;

}  // namespace pocketzo
