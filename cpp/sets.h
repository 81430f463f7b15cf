// The implementations that this build holds. Each stands in the file of its name; those for another architecture are
// not compiled. Whether the processor can run one is dispatch.cpp's to know.
#pragma once

#include <cstddef>

#include "kernel_set.h"

namespace pocketzo {

// Blocks between the one that is worked on and the one that memory is asked for: 4 KiB on contiguous memory, 1 KiB in
// each of a packed walk's four streams. AVX-512, Zen 5, 1 GiB: two terms in a pass 0.48 -> 0.43 ns, on two threads 0.27
// -> 0.22.
inline constexpr std::ptrdiff_t kAhead = 16;

extern const KernelSet kScalar;
#if defined(__aarch64__) || defined(_M_ARM64)
#define POCKETZO_AARCH64 1
extern const KernelSet kNeon;
#elif defined(__x86_64__) || defined(_M_X64)
#define POCKETZO_X86_64 1
extern const KernelSet kAvx2;
extern const KernelSet kAvx512;
#endif

}  // namespace pocketzo
