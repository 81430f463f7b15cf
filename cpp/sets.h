// The sets of this build, each in the file of its name; those of other architectures are not compiled. dispatch.cpp
// decides which of them this CPU can run.
#pragma once

#include "kernel_set.h"

namespace pocketzo {

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
