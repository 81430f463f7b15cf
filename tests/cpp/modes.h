// The floating-point modes of the calling thread.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pocketzo::test {

// The control bits only, without the sticky exception flags.
#if defined(__x86_64__)
constexpr std::uint64_t kFlush = 0x8040;  // flush to zero, denormals are zero
inline std::uint64_t mode() { return _mm_getcsr() & 0xFFC0u; }
inline void set_mode(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
constexpr std::uint64_t kRoundings[] = {0x2000, 0x4000, 0x6000};
#elif defined(__aarch64__)
constexpr std::uint64_t kFlush = std::uint64_t{1} << 24;
inline std::uint64_t mode() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
inline void set_mode(std::uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
constexpr std::uint64_t kRoundings[] = {1u << 22, 2u << 22, 3u << 22};
#else
#error "the modes of this processor are not known here"
#endif

}  // namespace pocketzo::test
