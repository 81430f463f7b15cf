// The header that cpp/avx512.cpp finds in place of the compiler's own where POCKETZO_EMULATE_AVX512 is on: SIMDe
// (Debian's libsimde-dev) gives the AVX-512 intrinsics by pairs of AVX2 ones. So the set's code, unchanged, is tested
// on processors without AVX-512. What it cannot show is the compiler's own AVX-512 code.
#pragma once

#include_next <immintrin.h>

#if !defined(__AVX2__) || !defined(__FMA__)
#error "SIMDe would round twice where no fma instruction is allowed"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Three that SIMDe 0.7.4 lacks.
inline simde__m512 pocketzo_cvtepi32_ps(simde__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512_private to;
  for (int half = 0; half < 2; ++half) to.m256[half] = _mm256_cvtepi32_ps(from.m256i[half]);
  return simde__m512_from_private(to);
}
#define _mm512_cvtepi32_ps(a) pocketzo_cvtepi32_ps(a)

inline simde__m512i pocketzo_srai_epi32(simde__m512i a, unsigned count) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512i_private to;
  for (int half = 0; half < 2; ++half) to.m256i[half] = _mm256_srai_epi32(from.m256i[half], static_cast<int>(count));
  return simde__m512i_from_private(to);
}
#define _mm512_srai_epi32(a, count) pocketzo_srai_epi32(a, count)

inline simde__m512i pocketzo_mask_shuffle_epi32(simde__m512i src, unsigned mask, simde__m512i a, unsigned order) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512i_private to = simde__m512i_to_private(src);
  for (unsigned i = 0; i < 16; ++i)
    if ((mask >> i & 1) != 0) to.i32[i] = from.i32[(i & ~3u) + (order >> 2 * (i & 3) & 3)];
  return simde__m512i_from_private(to);
}
#define _mm512_mask_shuffle_epi32(src, mask, a, order) pocketzo_mask_shuffle_epi32(src, mask, a, order)
