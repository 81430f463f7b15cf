// Replaces the compiler's header for cpp/avx512.cpp if POCKETZO_EMULATE_AVX512 is on. SIMDe (Debian's libsimde-dev)
// implements AVX-512 intrinsics by pairs of AVX2 ones, so the set's source is tested unchanged on CPUs without AVX-512.
// The machine code that the compiler generates for AVX-512 is not.
#pragma once

#include_next <immintrin.h>

#if !defined(__AVX2__) || !defined(__FMA__)
#error "without fma instructions, SIMDe rounds twice"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Missing in SIMDe 0.7.4.
inline simde__m512 pocketzo_cvtepi32_ps(simde__m512i a) {
  const simde__m512i_private from = simde__m512i_to_private(a);
  simde__m512_private to;
  for (int half = 0; half < 2; ++half) to.m256[half] = _mm256_cvtepi32_ps(from.m256i[half]);
  return simde__m512_from_private(to);
}
#define _mm512_cvtepi32_ps(a) pocketzo_cvtepi32_ps(a)

inline simde__m512d pocketzo_cvtps_pd(__m256 a) {
  simde__m512d_private to;
  to.m256d[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
  to.m256d[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
  return simde__m512d_from_private(to);
}
#define _mm512_cvtps_pd(a) pocketzo_cvtps_pd(a)

inline simde__m512 pocketzo_getexp_ps(simde__m512 a) {  // of normal numbers
  const simde__m512i_private from = simde__m512i_to_private(simde_mm512_castps_si512(a));
  simde__m512_private to;
  for (int i = 0; i < 16; ++i) to.f32[i] = static_cast<float>((from.i32[i] >> 23 & 0xFF) - 127);
  return simde__m512_from_private(to);
}
#define _mm512_getexp_ps(a) pocketzo_getexp_ps(a)

inline simde__m512 pocketzo_cvtph_ps(__m256i h) {
  simde__m512_private to;
  to.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
  to.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  return simde__m512_from_private(to);
}
#define _mm512_cvtph_ps(h) pocketzo_cvtph_ps(h)

template <int Mode>
__m256i pocketzo_cvtps_ph(simde__m512 w) {
  const simde__m512_private from = simde__m512_to_private(w);
  return _mm256_set_m128i(_mm256_cvtps_ph(from.m256[1], Mode), _mm256_cvtps_ph(from.m256[0], Mode));
}
#define _mm512_cvtps_ph(w, mode) pocketzo_cvtps_ph<mode>(w)

inline simde__m512i pocketzo_cvtepu16_epi32(__m256i h) {
  simde__m512i_private to;
  to.m256i[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h));
  to.m256i[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return simde__m512i_from_private(to);
}
#define _mm512_cvtepu16_epi32(h) pocketzo_cvtepu16_epi32(h)

inline __m256i pocketzo_cvtepi32_epi16(simde__m512i w) {
  const simde__m512i_private from = simde__m512i_to_private(w);
  const __m256i low = _mm256_set1_epi32(0xFFFF);
  const __m256i pairs = _mm256_packus_epi32(_mm256_and_si256(from.m256i[0], low), _mm256_and_si256(from.m256i[1], low));
  return _mm256_permute4x64_epi64(pairs, 0xD8);
}
#define _mm512_cvtepi32_epi16(w) pocketzo_cvtepi32_epi16(w)

inline simde__m512i pocketzo_cvttps_epi32(simde__m512 w) {
  const simde__m512_private from = simde__m512_to_private(w);
  simde__m512i_private to;
  for (int half = 0; half < 2; ++half) to.m256i[half] = _mm256_cvttps_epi32(from.m256[half]);
  return simde__m512i_from_private(to);
}
#define _mm512_cvttps_epi32(w) pocketzo_cvttps_epi32(w)

template <int Control>
simde__m512 pocketzo_shuffle_f32x4(simde__m512 a, simde__m512 b) {
  const simde__m512_private x = simde__m512_to_private(a), y = simde__m512_to_private(b);
  simde__m512_private to;
  for (int quarter = 0; quarter < 4; ++quarter)
    to.m128[quarter] = (quarter < 2 ? x : y).m128[Control >> 2 * quarter & 3];
  return simde__m512_from_private(to);
}
#define _mm512_shuffle_f32x4(a, b, control) pocketzo_shuffle_f32x4<control>(a, b)
