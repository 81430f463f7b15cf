// The sets that this CPU can run, and the one in use.
#include <atomic>
#include <cstddef>
#include <cstring>

#include "kernel_set.h"
#include "pocketzo/kernels.h"
#include "sets.h"

#if defined(POCKETZO_X86_64) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#elif defined(POCKETZO_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pocketzo {
namespace {

#if defined(POCKETZO_X86_64) && defined(_MSC_VER)
// CPUID feature bits, and OS support for saving ymm and zmm state (XCR0 bits 1-2 and 5-7).
bool cpuid_bit(int leaf, int reg, int bit) noexcept {
  int r[4];
  __cpuidex(r, leaf, 0);
  return (r[reg] >> bit & 1) != 0;
}
bool saved(unsigned long long mask) noexcept { return cpuid_bit(1, 2, 27) && (_xgetbv(0) & mask) == mask; }
bool has_avx2() noexcept {  // with FMA and F16C
  return saved(0x06) && cpuid_bit(1, 2, 12) && cpuid_bit(1, 2, 29) && cpuid_bit(7, 1, 5);
}
bool has_avx512() noexcept {  // with FMA
  return saved(0xE6) && cpuid_bit(1, 2, 12) && cpuid_bit(7, 1, 16);
}
#elif defined(POCKETZO_X86_64)
bool has_avx2() noexcept {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#if defined(POCKETZO_EMULATE_AVX512)  // tests only
bool has_avx512() noexcept { return has_avx2(); }
#else
bool has_avx512() noexcept { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma"); }
#endif
#endif

// Best first.
struct Available {
  const KernelSet* set[4];
  std::size_t count = 0;

  Available() noexcept {
#if defined(POCKETZO_X86_64)
    if (has_avx512()) set[count++] = &kAvx512;
    if (has_avx2()) set[count++] = &kAvx2;
#elif defined(POCKETZO_AARCH64)
    set[count++] = &kNeon;
#endif
    set[count++] = &kScalar;
  }
};

const Available& sets() noexcept {
  static const Available known;
  return known;
}

std::atomic<const KernelSet*>& in_use() noexcept {
  static std::atomic<const KernelSet*> set{sets().set[0]};
  return set;
}

}  // namespace

const KernelSet* find(const char* name) noexcept {
  for (std::size_t i = 0; i < sets().count; ++i)
    if (std::strcmp(sets().set[i]->name, name) == 0) return sets().set[i];
  return nullptr;
}

const KernelSet& current() noexcept { return *in_use().load(std::memory_order_relaxed); }

void use(const KernelSet& set) noexcept { in_use().store(&set, std::memory_order_relaxed); }

std::size_t available(const char** names, std::size_t capacity) noexcept {
  for (std::size_t i = 0; i < sets().count && i < capacity; ++i) names[i] = sets().set[i]->name;
  return sets().count;
}

const char* instruction_set() noexcept { return current().name; }

bool use(const char* name) noexcept {
  const KernelSet* set = find(name);
  if (set != nullptr) use(*set);
  return set != nullptr;
}

bool has_fp16_arithmetic() noexcept {
#if defined(POCKETZO_AARCH64) && defined(__linux__)
  constexpr unsigned long kAsimdHp = 1ul << 10;
  return (getauxval(AT_HWCAP) & kAsimdHp) != 0;
#elif defined(POCKETZO_AARCH64) && defined(__APPLE__)
  return true;
#else
  return false;
#endif
}

}  // namespace pocketzo
