// The floating-point modes that the kernels need.
#pragma once

#include <cstdint>

#include "sets.h"

#if defined(POCKETZO_X86_64)
#include <immintrin.h>
#endif

namespace pocketzo {

// A scope in which the calling thread keeps subnormals and rounds to nearest. Its own modes are restored at the end.
class FloatMode {
 public:
#if defined(POCKETZO_X86_64)
  FloatMode() noexcept : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(POCKETZO_AARCH64) && (defined(__GNUC__) || defined(__clang__))
  FloatMode() noexcept {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
  }
  ~FloatMode() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  std::uint64_t before_;
#else
  FloatMode() noexcept {}
#endif
 public:
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
};

}  // namespace pocketzo
