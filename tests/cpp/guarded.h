// Memory in which any access beyond the end is detected.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace pocketzo::test {

// Room for `capacity` floats between two inaccessible pages. `take` places n floats so that they end (at_end) or begin
// exactly at such a page, and fills the remaining room with a pattern that `intact` verifies.
class Guarded {
 public:
  explicit Guarded(std::size_t capacity) {
    page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    room_ = (capacity * sizeof(float) + page_ - 1) / page_ * page_ + page_;
    void* memory = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("mmap failed");
    all_ = static_cast<unsigned char*>(memory);
    if (mprotect(all_ + page_, room_, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect failed");
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(all_, room_ + 2 * page_); }

  float* take(std::size_t n, bool at_end) {
    size_ = n * sizeof(float);
    start_ = at_end ? room_ - size_ : 0;
    std::memset(all_ + page_, kCanary, room_);
    return reinterpret_cast<float*>(all_ + page_ + start_);
  }

  bool intact() const {
    const unsigned char* room = all_ + page_;
    const auto untouched = [](unsigned char byte) { return byte == kCanary; };
    return std::all_of(room, room + start_, untouched) && std::all_of(room + start_ + size_, room + room_, untouched);
  }

 private:
  static constexpr unsigned char kCanary = 0xA5;
  unsigned char* all_ = nullptr;
  std::size_t page_ = 0, room_ = 0, start_ = 0, size_ = 0;
};

// A copy of exactly n floats on the heap, for AddressSanitizer.
inline std::unique_ptr<float[]> exact(const float* values, std::size_t n) {
  auto copy = std::make_unique<float[]>(n);
  std::copy_n(values, n, copy.get());
  return copy;
}

}  // namespace pocketzo::test
