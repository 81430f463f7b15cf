// Shared by the sets: the numbers of SPEC.md, the parts of the generator that are constant over a call, and code that
// needs no intrinsics.
//
// Everything is in an anonymous namespace, as is everything in a set's file except the set itself. This header is
// compiled with the flags of each set. If an inline function had external linkage, the linker would keep one of its
// definitions, perhaps the one with AVX-512 instructions, for all callers. For the same reason the sets' files call no
// inline function of the standard library (std::fmaf, not std::fma). The test sets_define_no_weak_symbols checks this.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernel_set.h"

namespace pocketzo {
namespace {

// Philox4x32: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
constexpr std::uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 7;      // words
constexpr int kKeyRounds = 10;  // subkey

// -2 ln(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], and sin and cos of (pi/2) X as X S(X^2) and C(X^2) on [-1, 1].
// Highest degree first, in the order of Horner's rule.
constexpr float kLog[7] = {-0x1.e743b2p-3f, 0x1.7e5152p-2f, -0x1.a3c3ccp-2f, 0x1.fe26ccp-2f,
                           -0x1.5523fcp-1f, 0x1.000176p+0f, -0x1.00001p+1f};
constexpr float kSin[5] = {0x1.3c4b2cp-13f, -0x1.3232fap-8f, 0x1.46676ep-4f, -0x1.4abbb6p-1f, 0x1.921fb4p+0f};
constexpr float kCos[5] = {0x1.c1f066p-11f, -0x1.54f61ap-6f, 0x1.03bd06p-2f, -0x1.3bd3a6p+0f, 0x1.fffffep-1f};
constexpr float kMinusTwoLn2 = -1.38629436f;
constexpr std::int32_t kSqrtHalf = 0x3F3504F3;      // bits of sqrt(1/2)
constexpr std::int32_t kSqrtHalf2p31 = 0x4EB504F3;  // bits of sqrt(1/2) * 2^31
constexpr std::int32_t kMantissa = 0x007FFFFF;
constexpr std::uint32_t kSign = 0x80000000u;

// Random bits for stochastic rounding (SPEC.md, section 5): the sum of two words, multiplied and folded.
constexpr std::uint32_t kDither[2] = {0xAC4C1B51u, 0x31848BABu};
constexpr std::uint32_t kFp16Normal = 0x38800000u;    // bits of 2^-14, the smallest normal number of fp16
constexpr std::uint32_t kFp16TooLarge = 0x47800000u;  // bits of 2^16
constexpr std::uint32_t kInfinity = 0x7F800000u;

// The counter of a quad is (q, K2, K3, 0) and only q varies, so half of the first two rounds is the same for every
// quad. The rest, where hi and lo are the halves of a product:
//   round 1: x2 = hi(M0 q) ^ a1                        x3 = lo(M0 q)
//   round 2: x0 = hi(M1 x2) ^ b0   x1 = lo(M1 x2)      x2 = x3 ^ b2
//   round 3: x0' = hi(M1 x2) ^ x1 ^ k0[0]              x2' = hi(M0 x0) ^ c2
//   rounds 4 .. 7: plain, with k0[r - 3] and k1[r - 3]
struct Schedule {
  std::uint32_t a1, b0, b2, c2;
  std::uint32_t k0[5], k1[5];  // k1[0] is not used: it is part of c2

  explicit Schedule(const Key& key) noexcept {
    const std::uint64_t m1k3 = std::uint64_t{kMul1} * key.word[3];
    const std::uint32_t x0 = static_cast<std::uint32_t>(m1k3 >> 32) ^ key.word[2] ^ key.word[0];
    const std::uint64_t m0x0 = std::uint64_t{kMul0} * x0;
    a1 = key.word[1];
    b0 = static_cast<std::uint32_t>(m1k3) ^ (key.word[0] + kWeyl0);
    b2 = static_cast<std::uint32_t>(m0x0 >> 32) ^ (key.word[1] + kWeyl1);
    for (std::uint32_t r = 0; r < 5; ++r) {
      k0[r] = key.word[0] + (r + 2) * kWeyl0;
      k1[r] = key.word[1] + (r + 2) * kWeyl1;
    }
    c2 = static_cast<std::uint32_t>(m0x0) ^ k1[0];
  }
};

// Prefetch distance in blocks: 4 KiB in contiguous memory, 1 KiB in each of a packed walk's four streams. Effect on an
// element with AVX-512, Zen 5, 1 GiB, two terms in a pass: 0.48 -> 0.43 ns, on two threads 0.27 -> 0.22 ns.
constexpr std::ptrdiff_t kAhead = 16;

// Likewise of `outer`, in elements from a row on: the next row, or 4 KiB in the panels of packed memory.
inline std::ptrdiff_t outer_ahead(const Outer& o) noexcept {
  return static_cast<std::ptrdiff_t>(o.stride < 64 ? 1024 : o.stride);
}

// `shrink` for the last elements, too few for a vector.
inline void shrink_rest(float* w, std::size_t n, float decay) noexcept {
  for (std::size_t i = 0; i < n; ++i) w[i] = std::fmaf(-decay, w[i], w[i]);
}

// `axpy` likewise.
inline void axpy_rest(float* w, const float* z, float scale, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) w[i] = std::fmaf(scale, z[i], w[i]);
}

// The columns of a row of `outer` from `column` on, likewise.
template <unsigned Count>
inline void outer_rest(const Outer& o, const float* scale, std::size_t row, std::size_t column) noexcept {
  for (; column < o.columns; ++column) {
    float z = o.a[row] * o.b[column];
    for (std::size_t k = 1; k < o.rank; ++k) z = std::fmaf(o.a[k * kStrideA + row], o.b[k * kStrideB + column], z);
    float& w = o.w[row * o.stride + column];
    if (Count == 0) w = z;
    for (unsigned i = 0; i < Count; ++i) w = std::fmaf(scale[i], z, w);
  }
}

// The operation `outer` of a set whose Rows have it by rank; of rank 0, the rank is not known at compile time.
template <class Rows, unsigned Count>
void outer(const Outer& o, const float* scale) noexcept {
  switch (o.rank) {
    case 1:
      return Rows::template outer<Count, 1>(o, scale);
    case 2:
      return Rows::template outer<Count, 2>(o, scale);
    case 4:
      return Rows::template outer<Count, 4>(o, scale);
    default:
      return Rows::template outer<Count, 0>(o, scale);
  }
}

}  // namespace
}  // namespace pocketzo
