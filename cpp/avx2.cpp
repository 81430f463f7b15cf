// AVX2 and FMA, eight lanes. Compiled with -mavx2 -mfma, run only where dispatch.cpp saw both.
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "sets.h"

namespace pocketzo {
namespace {

// The words of eight quads, one quad a lane.
struct Words {
  __m256i x[4];
};

inline __m256i broadcast(std::uint32_t v) noexcept { return _mm256_set1_epi32(static_cast<int>(v)); }
inline __m256i high(__m256i p) noexcept { return _mm256_srli_epi64(p, 32); }

// Rounds are computed on 64-bit lanes, four quads a register, with the word in the low half: vpmuludq reads only that
// half and leaves the next low word in place, so no shuffle is needed until the end. The even quads of the eight are
// in one state, the odd ones in another; the last step interleaves them.
struct State {
  __m256i x0, x1, x2, x3;
};

class Philox {
 public:
  explicit Philox(const Key& key) noexcept {
    const Schedule s(key);
    a1_ = broadcast(s.a1);
    b0_ = broadcast(s.b0);
    b2_ = broadcast(s.b2);
    c2_ = broadcast(s.c2);
    for (int r = 0; r < 5; ++r) {
      k0_[r] = broadcast(s.k0[r]);
      k1_[r] = broadcast(s.k1[r]);
    }
  }

  // The first three rounds of quads q .. q + 7; then `round` 1, 2 and 3, and `finish`.
  void start(std::uint64_t q, State& even, State& odd) const noexcept {
    const __m256i base = _mm256_set1_epi64x(static_cast<long long>(q));
    even = begin(_mm256_add_epi64(base, _mm256_setr_epi64x(0, 2, 4, 6)));
    odd = begin(_mm256_add_epi64(base, _mm256_setr_epi64x(1, 3, 5, 7)));
  }

  void round(int r, State& s) const noexcept {
    const __m256i p0 = _mm256_mul_epu32(m0_, s.x0), p1 = _mm256_mul_epu32(m1_, s.x2);
    s.x0 = _mm256_xor_si256(high(p1), _mm256_xor_si256(s.x1, k0_[r]));
    s.x2 = _mm256_xor_si256(high(p0), _mm256_xor_si256(s.x3, k1_[r]));
    s.x1 = p1;
    s.x3 = p0;
  }

  Words finish(const State& e, const State& o) const noexcept {
    const __m256i p0e = _mm256_mul_epu32(m0_, e.x0), p1e = _mm256_mul_epu32(m1_, e.x2);
    const __m256i p0o = _mm256_mul_epu32(m0_, o.x0), p1o = _mm256_mul_epu32(m1_, o.x2);
    return {{_mm256_xor_si256(_mm256_xor_si256(join_high(p1e, p1o), join_low(e.x1, o.x1)), k0_[4]), join_low(p1e, p1o),
             _mm256_xor_si256(_mm256_xor_si256(join_high(p0e, p0o), join_low(e.x3, o.x3)), k1_[4]),
             join_low(p0e, p0o)}};
  }

  Words words(std::uint64_t q) const noexcept {
    State even, odd;
    start(q, even, odd);
    for (int r = 1; r < 4; ++r) {
      round(r, even);
      round(r, odd);
    }
    return finish(even, odd);
  }

 private:
  static __m256i join_low(__m256i even, __m256i odd) noexcept {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }
  static __m256i join_high(__m256i even, __m256i odd) noexcept { return _mm256_blend_epi32(high(even), odd, 0xAA); }

  State begin(__m256i q) const noexcept {
    const __m256i pq = _mm256_mul_epu32(m0_, q);
    const __m256i p = _mm256_mul_epu32(m1_, _mm256_xor_si256(high(pq), a1_));
    const __m256i x0 = _mm256_xor_si256(high(p), b0_), x2 = _mm256_xor_si256(pq, b2_);
    const __m256i p0 = _mm256_mul_epu32(m0_, x0), p1 = _mm256_mul_epu32(m1_, x2);
    return {_mm256_xor_si256(high(p1), _mm256_xor_si256(p, k0_[0])), p1, _mm256_xor_si256(high(p0), c2_), p0};
  }

  __m256i m0_ = _mm256_set1_epi64x(kMul0), m1_ = _mm256_set1_epi64x(kMul1);
  __m256i a1_, b0_, b2_, c2_, k0_[5], k1_[5];
};

// Horner's rule over coefficients `From` .. `To` - 1, going on from p.
template <int From, int To, int N>
inline __m256 horner(__m256 p, const float (&coefficient)[N], __m256 t) noexcept {
  for (int i = From; i < To; ++i) p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(coefficient[i]));
  return p;
}

// Box-Muller of one pair of words, in parts that gaussian_n puts between the rounds of the next words.
class Transform {
 public:
  Transform(__m256i x, __m256i y) noexcept : x_(x), y_(y) {}

  void split() noexcept {  // 2 ^ ex (1 + f)
    const __m256 v = _mm256_andnot_ps(sign(), _mm256_cvtepi32_ps(_mm256_or_si256(x_, _mm256_set1_epi32(1))));
    const __m256i d = _mm256_sub_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(kSqrtHalf2p31));
    const __m256i m = _mm256_add_epi32(_mm256_and_si256(d, _mm256_set1_epi32(kMantissa)), _mm256_set1_epi32(kSqrtHalf));
    r_ = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(d, 23)), _mm256_set1_ps(kMinusTwoLn2));
    f_ = _mm256_sub_ps(_mm256_castsi256_ps(m), _mm256_set1_ps(1.0f));
    p_ = _mm256_set1_ps(kLog[0]);
  }
  void log_half() noexcept { p_ = horner<1, 4>(p_, kLog, f_); }
  void root() noexcept {
    p_ = horner<4, 7>(p_, kLog, f_);
    r_ = _mm256_sqrt_ps(_mm256_fmadd_ps(p_, f_, r_));
  }
  void angle() noexcept {
    f_ = _mm256_mul_ps(_mm256_cvtepi32_ps(y_), _mm256_set1_ps(0x1p-31f));
    p_ = _mm256_mul_ps(f_, f_);
    c_ = horner<1, 5>(_mm256_set1_ps(kCos[0]), kCos, p_);
  }
  void finish(__m256& cosine, __m256& sine) noexcept {
    const __m256 s = horner<1, 5>(_mm256_set1_ps(kSin[0]), kSin, p_);
    const __m256 r = _mm256_or_ps(_mm256_andnot_ps(sign(), r_), _mm256_and_ps(sign(), _mm256_castsi256_ps(x_)));
    cosine = _mm256_mul_ps(r, c_);
    sine = _mm256_mul_ps(r, _mm256_mul_ps(f_, s));
  }

 private:
  static __m256 sign() noexcept { return _mm256_castsi256_ps(broadcast(kSign)); }
  __m256i x_, y_;
  __m256 r_, f_, p_, c_;
};

template <unsigned Count>
struct Scales {
  __m256 s[Count == 0 ? 1 : Count];
  explicit Scales(const float* scale) noexcept {
    for (unsigned i = 0; i < Count; ++i) s[i] = _mm256_set1_ps(scale[i]);
  }
};

inline void prefetch(const float* block, const Walk& walk) noexcept {
  for (int run = 0; run < 4; ++run)
    _mm_prefetch(reinterpret_cast<const char*>(block + kAhead * walk.block_stride + run * walk.run_stride),
                 _MM_HINT_T0);
}

template <unsigned Count>
inline void update(float* w, __m256 z, const Scales<Count>& scale) noexcept {
  if constexpr (Count != 0) {
    __m256 v = _mm256_loadu_ps(w);
    for (unsigned i = 0; i < Count; ++i) v = _mm256_fmadd_ps(scale.s[i], z, v);
    z = v;
  }
  _mm256_storeu_ps(w, z);
}

void words(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept {
  const Philox philox(key);
  for (std::size_t i = 0; i < count; ++i)
    for (unsigned half = 0; half < 16; half += 8) {
      const Words k = philox.words((first + i) * 16 + half);
      for (unsigned j = 0; j < 4; ++j)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 64 * i + 16 * j + half), k.x[j]);
    }
}

// Software-pipelined: between the rounds of the next eight quads, which wait for multiplications, stand the parts of
// the transform of these eight, which wait for fused multiply-adds and the root.
template <unsigned Count>
void gaussian_n(const Walk& walk, const Key& key, const float* scale) noexcept {
  const Philox philox(key);
  const Scales<Count> scales(scale);
  float* block = walk.base;
  std::uint64_t q = walk.first * 16;
  Words k = philox.words(q);
  for (std::size_t i = 0; i < walk.count; ++i, block += walk.block_stride, q += walk.step * 16) {
    prefetch(block, walk);
    for (unsigned half = 0; half < 16; half += 8) {
      float* w = block + half;
      Transform a(k.x[0], k.x[1]), b(k.x[2], k.x[3]);
      State even, odd;
      philox.start(half == 0 ? q + 8 : q + walk.step * 16, even, odd);
      a.split();
      b.split();
      philox.round(1, even);
      philox.round(1, odd);
      a.log_half();
      b.log_half();
      philox.round(2, even);
      philox.round(2, odd);
      a.root();
      b.root();
      philox.round(3, even);
      philox.round(3, odd);
      a.angle();
      b.angle();
      k = philox.finish(even, odd);
      __m256 cosine, sine;
      a.finish(cosine, sine);
      update(w, cosine, scales);
      update(w + walk.run_stride, sine, scales);
      b.finish(cosine, sine);
      update(w + 2 * walk.run_stride, cosine, scales);
      update(w + 3 * walk.run_stride, sine, scales);
    }
  }
}

template <unsigned Count>
void rademacher_n(const Walk& walk, const Key& key, const float* scale) noexcept {
  const Scales<Count> scales(scale);
  const __m256i sign = broadcast(kSign);
  alignas(32) std::uint32_t bits[64];  // the words of one superblock of 32 blocks
  std::uint64_t held = ~std::uint64_t{0};
  float* block = walk.base;
  std::uint64_t b = walk.first;
  for (std::size_t i = 0; i < walk.count; ++i, block += walk.block_stride, b += walk.step) {
    if (b >> 5 != held) {
      held = b >> 5;
      words(bits, held, 1, key);
    }
    const unsigned row = static_cast<unsigned>(b & 31) * 4;  // 4 rows of a block never straddle two words
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(row & 31));
    for (unsigned half = 0; half < 16; half += 8) {
      const auto* at = reinterpret_cast<const __m256i*>(bits + (row >> 5) * 16 + half);
      __m256i k = _mm256_sll_epi32(_mm256_load_si256(at), shift);
      float* w = block + half;
      for (unsigned run = 0; run < 4; ++run, w += walk.run_stride, k = _mm256_add_epi32(k, k)) {
        const __m256 flip = _mm256_castsi256_ps(_mm256_and_si256(k, sign));
        if constexpr (Count == 0) {
          _mm256_storeu_ps(w, _mm256_xor_ps(flip, _mm256_set1_ps(1.0f)));
        } else {  // fma(s, +-1, w) is w +- s
          __m256 v = _mm256_loadu_ps(w);
          for (unsigned s = 0; s < Count; ++s) v = _mm256_add_ps(v, _mm256_xor_ps(flip, scales.s[s]));
          _mm256_storeu_ps(w, v);
        }
      }
    }
  }
}

void gaussian(const Walk& walk, const Key& key, const float* scale, unsigned scale_count) noexcept {
  constexpr decltype(&gaussian_n<0>) kByCount[] = {gaussian_n<0>, gaussian_n<1>, gaussian_n<2>, gaussian_n<3>};
  kByCount[scale_count](walk, key, scale);
}

void rademacher(const Walk& walk, const Key& key, const float* scale, unsigned scale_count) noexcept {
  constexpr decltype(&rademacher_n<0>) kByCount[] = {rademacher_n<0>, rademacher_n<1>, rademacher_n<2>,
                                                     rademacher_n<3>};
  kByCount[scale_count](walk, key, scale);
}

void shrink(float* w, std::size_t n, float decay) noexcept {
  const __m256 c = _mm256_set1_ps(decay);
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(w + i);
    _mm256_storeu_ps(w + i, _mm256_fnmadd_ps(c, v, v));
  }
  for (; i < n; ++i) w[i] = std::fma(-decay, w[i], w[i]);
}

}  // namespace

const KernelSet kAvx2 = {"avx2", words, gaussian, rademacher, shrink};

}  // namespace pocketzo
