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

// Two that SIMDe 0.7.4 lacks.
inline simde__m512 pocketzo_cvtepi32_ps(simde__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512_private to;
  for (int half = 0; half < 2; ++half) to.m256[half] = _mm256_cvtepi32_ps(from.m256i[half]);
  return simde__m512_from_private(to);
}
#define _mm512_cvtepi32_ps(a) pocketzo_cvtepi32_ps(a)

inline simde__m512 pocketzo_getexp_ps(simde__m512 a) {  // of normal numbers
  const simde__m512i_private from = simde__m512i_to_private(simde_mm512_castps_si512(a));
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = static_cast<float>((from.i32[i] >> 23 & 0xFF) - 127);
  return simde__m512_from_private(to);
}
#define _mm512_getexp_ps(a) pocketzo_getexp_ps(a)
