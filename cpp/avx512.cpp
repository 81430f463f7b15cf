// AVX-512F and FMA, sixteen lanes: a block is four registers. Compiled with -mavx512f -mfma; runs only where
// dispatch.cpp found both. No other part of AVX-512 is used.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "sets.h"

namespace pocketzo {
namespace {

// The words of sixteen quads, one quad in a lane.
struct Words {
  __m512i x[4];
};

constexpr std::int32_t kOne = 0x3F800000;  // bits of 1
constexpr int kXor3 = 0x96;                // a ^ b ^ c
constexpr int kSelect = 0xCA;              // a ? b : c

inline __m512i broadcast(std::uint32_t v) noexcept { return _mm512_set1_epi32(static_cast<int>(v)); }
inline __m512i high(__m512i p) noexcept { return _mm512_srli_epi64(p, 32); }
inline __m512i xor3(__m512i a, __m512i b, __m512i c) noexcept { return _mm512_ternarylogic_epi32(a, b, c, kXor3); }

// As in avx2.cpp: rounds on 64-bit lanes with the word in the low 32 bits; quads 0, 1, 4, 5, 8, .. form half a and
// quads 2, 3, 6, 7, 10, .. half b, until the last step joins them.
struct Half {
  __m512i x0, x1, x2, x3;
};
struct State {
  Half a, b;
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

  // M0 q of the quads in half a: in lane l of the words is q + l * lane. Adding stride(n) gives the product n quads
  // later, as q does not wrap within a window.
  __m512i product(std::uint64_t q, std::uint64_t lane = 1) const noexcept {
    const __m512i lanes = _mm512_mul_epu32(_mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), all(lane));
    return _mm512_mul_epu32(m0_, _mm512_add_epi64(all(q), lanes));
  }
  static __m512i stride(std::uint64_t n) noexcept { return all(n * kMul0); }

  // Rounds 1 to 3; `to_b` is stride(2 * lane). To be followed by round(1), round(2), round(3) and `finish`.
  State start(__m512i product, __m512i to_b = stride(2)) const noexcept {
    return {begin(product), begin(_mm512_add_epi64(product, to_b))};
  }

  void round(int r, State& s) const noexcept {
    round(r, s.a);
    round(r, s.b);
  }

  Words finish(const State& s) const noexcept {
    const Half &a = s.a, &b = s.b;
    const __m512i p0a = _mm512_mul_epu32(m0_, a.x0), p1a = _mm512_mul_epu32(m1_, a.x2);
    const __m512i p0b = _mm512_mul_epu32(m0_, b.x0), p1b = _mm512_mul_epu32(m1_, b.x2);
    return {{xor3(join<0xDD>(p1a, p1b), join<0x88>(a.x1, b.x1), k0_[4]), join<0x88>(p1a, p1b),
             xor3(join<0xDD>(p0a, p0b), join<0x88>(a.x3, b.x3), k1_[4]), join<0x88>(p0a, p0b)}};
  }

  Words words(__m512i product) const noexcept {
    State s = start(product);
    for (int r = 1; r < 4; ++r) round(r, s);
    return finish(s);
  }

 private:
  static __m512i all(std::uint64_t n) noexcept { return _mm512_set1_epi64(static_cast<long long>(n)); }

  template <int Control>
  static __m512i join(__m512i a, __m512i b) noexcept {
    return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), Control));
  }

  void round(int r, Half& s) const noexcept {
    const __m512i p0 = _mm512_mul_epu32(m0_, s.x0), p1 = _mm512_mul_epu32(m1_, s.x2);
    s.x0 = xor3(high(p1), s.x1, k0_[r]);
    s.x2 = xor3(high(p0), s.x3, k1_[r]);
    s.x1 = p1;
    s.x3 = p0;
  }

  Half begin(__m512i pq) const noexcept {
    const __m512i p = _mm512_mul_epu32(m1_, _mm512_xor_si512(high(pq), a1_));
    const __m512i x0 = _mm512_xor_si512(high(p), b0_), x2 = _mm512_xor_si512(pq, b2_);
    const __m512i p0 = _mm512_mul_epu32(m0_, x0), p1 = _mm512_mul_epu32(m1_, x2);
    return {xor3(high(p1), p, k0_[0]), p1, _mm512_xor_si512(high(p0), c2_), p0};
  }

  __m512i m0_ = _mm512_set1_epi64(kMul0), m1_ = _mm512_set1_epi64(kMul1);
  __m512i a1_, b0_, b2_, c2_, k0_[5], k1_[5];
};

// Continues Horner's rule from p with coefficients `From` .. `To` - 1.
template <int From, int To, int N>
inline __m512 horner(__m512 p, const float (&coefficient)[N], __m512 t) noexcept {
  for (int i = From; i < To; ++i) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(coefficient[i]));
  return p;
}

// Box-Muller of one pair of words, in steps that `gaussian` interleaves with the rounds of the next words.
class Transform {
 public:
  Transform(__m512i x, __m512i y) noexcept : x_(x), y_(y) {}

  void split() noexcept {  // 2 ^ ex (1 + f)
    // d of SPEC.md minus the bits of 1.0, so that getexp, which ignores the sign as |..| does there, gives d >> 23.
    const __m512i n = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_or_si512(x_, _mm512_set1_epi32(1))));
    const __m512i d = _mm512_sub_epi32(n, _mm512_set1_epi32(kSqrtHalf2p31 - kOne));
    const __m512i m = _mm512_add_epi32(_mm512_and_si512(d, _mm512_set1_epi32(kMantissa)), _mm512_set1_epi32(kSqrtHalf));
    r_ = _mm512_mul_ps(_mm512_getexp_ps(_mm512_castsi512_ps(d)), _mm512_set1_ps(kMinusTwoLn2));
    f_ = _mm512_sub_ps(_mm512_castsi512_ps(m), _mm512_set1_ps(1.0f));
    p_ = _mm512_set1_ps(kLog[0]);
  }
  void log_half() noexcept { p_ = horner<1, 4>(p_, kLog, f_); }
  void root() noexcept {
    p_ = horner<4, 7>(p_, kLog, f_);
    r_ = _mm512_sqrt_ps(_mm512_fmadd_ps(p_, f_, r_));
  }
  void angle() noexcept {
    f_ = _mm512_mul_ps(_mm512_cvtepi32_ps(y_), _mm512_set1_ps(0x1p-31f));
    p_ = _mm512_mul_ps(f_, f_);
    c_ = horner<1, 5>(_mm512_set1_ps(kCos[0]), kCos, p_);
  }
  void finish(__m512& cosine, __m512& sine) noexcept {
    const __m512 s = horner<1, 5>(_mm512_set1_ps(kSin[0]), kSin, p_);
    const __m512 r =
        _mm512_castsi512_ps(_mm512_ternarylogic_epi32(broadcast(kSign), x_, _mm512_castps_si512(r_), kSelect));
    cosine = _mm512_mul_ps(r, c_);
    sine = _mm512_mul_ps(r, _mm512_mul_ps(f_, s));
  }

 private:
  __m512i x_, y_;
  __m512 r_, f_, p_, c_;
};

template <unsigned Count>
struct Scales {
  __m512 s[Count == 0 ? 1 : Count];
  explicit Scales(const float* scale) noexcept {
    for (unsigned i = 0; i < Count; ++i) s[i] = _mm512_set1_ps(scale[i]);
  }
};

// Four vectors of weights, `apart` from each other: all are loaded before one is stored, as a load right after a store
// to the same place of another page waits for it.
template <unsigned Count>
inline void update(float* w, std::ptrdiff_t apart, const __m512 (&z)[4], const Scales<Count>& scale) noexcept {
  __m512 v[4] = {z[0], z[1], z[2], z[3]};
  if constexpr (Count != 0) {
    for (int n = 0; n < 4; ++n) v[n] = _mm512_loadu_ps(w + n * apart);
    for (unsigned i = 0; i < Count; ++i)
      for (int n = 0; n < 4; ++n) v[n] = _mm512_fmadd_ps(scale.s[i], z[n], v[n]);
  }
  for (int n = 0; n < 4; ++n) _mm512_storeu_ps(w + n * apart, v[n]);
}

void words(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept {
  const Philox philox(key);
  for (std::size_t i = 0; i < count; ++i) {
    const Words k = philox.words(philox.product((first + i) * 16));
    for (unsigned j = 0; j < 4; ++j) _mm512_storeu_si512(out + 64 * i + 16 * j, k.x[j]);
  }
}

inline void prefetch(const float* w, std::ptrdiff_t ahead, std::ptrdiff_t run_stride) noexcept {
  for (std::ptrdiff_t run = 0; run < 4; ++run)
    _mm_prefetch(reinterpret_cast<const char*>(w + ahead + run * run_stride), _MM_HINT_T0);
}

// Software-pipelined: transforms a block while finishing the words of the next and starting those after them, because a
// chain of rounds (48 cycles on Zen 5) takes longer than an iteration. The scheduler sees about a hundred instructions,
// so their order matters: 46 cycles a block in cache; other orders take up to 55. Every sixteenth block is followed by
// `skip` more elements.
template <unsigned Count>
inline void gaussian(const Walk& walk, const Key& key, const float* scale, std::uint64_t q, std::uint64_t lane,
                     std::uint64_t next_q, std::ptrdiff_t skip) noexcept {
  const std::ptrdiff_t ahead = kAhead * walk.block_stride + skip;
  const Philox philox(key);
  const Scales<Count> scales(scale);
  const __m512i stride = Philox::stride(next_q), to_b = Philox::stride(2 * lane);
  __m512i product = philox.product(q, lane);
  State state = philox.start(product, to_b);
  for (int r = 1; r < 4; ++r) philox.round(r, state);
  Words k = philox.finish(state);
  product = _mm512_add_epi64(product, stride);
  state = philox.start(product, to_b);
  philox.round(1, state);
  float* w = walk.base;
  for (std::size_t i = 1; i <= walk.count; ++i, w += walk.block_stride + (i % 16 == 1 ? skip : 0)) {
    prefetch(w, ahead, walk.run_stride);
    Transform a(k.x[0], k.x[1]), b(k.x[2], k.x[3]);
    product = _mm512_add_epi64(product, stride);
    philox.round(2, state);
    a.split();
    b.split();
    State next = philox.start(product, to_b);
    a.log_half();
    b.log_half();
    a.root();
    b.root();
    philox.round(3, state);
    k = philox.finish(state);
    philox.round(1, next);
    a.angle();
    b.angle();
    __m512 z[4];
    a.finish(z[0], z[1]);
    b.finish(z[2], z[3]);
    update(w, walk.run_stride, z, scales);
    state = next;
  }
}

template <unsigned Count>
void gaussian(const Walk& walk, const Key& key, const float* scale) noexcept {
  gaussian<Count>(walk, key, scale, walk.first * 16, 1, walk.step * 16, 0);
}

// A quad in each row: its four elements are 16 apart, and those of the next quad follow them.
template <unsigned Count>
void gaussian_across(const Across& across, const Key& key, const float* scale) noexcept {
  const Walk walk = {across.base, 16 * 16, 16, 0, 0, across.tiles * 16};
  gaussian<Count>(walk, key, scale, across.first * 16, across.apart * 16, 1, 3 * 16 * 16);
}

template <unsigned Count>
void rademacher(const Walk& walk, const Key& key, const float* scale) noexcept {
  const Philox philox(key);
  const Scales<Count> scales(scale);
  const __m512i sign = broadcast(kSign);
  Words bits{};  // the words of one superblock of 32 blocks
  std::uint64_t held = ~std::uint64_t{0};
  float* block = walk.base;
  std::uint64_t b = walk.first;
  for (std::size_t i = 0; i < walk.count; ++i, block += walk.block_stride, b += walk.step) {
    if (b >> 5 != held) {
      held = b >> 5;
      bits = philox.words(philox.product(held * 16));
    }
    const unsigned row = static_cast<unsigned>(b & 31) * 4;  // the 4 rows of a block share a word
    __m512i k = _mm512_sll_epi32(bits.x[row >> 5], _mm_cvtsi32_si128(static_cast<int>(row & 31)));
    float* w = block;
    prefetch(block, kAhead * walk.block_stride, walk.run_stride);
    for (unsigned run = 0; run < 4; ++run, w += walk.run_stride, k = _mm512_add_epi32(k, k)) {
      const __m512i flip = _mm512_and_si512(k, sign);
      if constexpr (Count == 0) {
        _mm512_storeu_si512(w, _mm512_xor_si512(flip, _mm512_castps_si512(_mm512_set1_ps(1.0f))));
      } else {  // fma(s, +-1, w) is w +- s
        __m512 v = _mm512_loadu_ps(w);
        for (unsigned s = 0; s < Count; ++s)
          v = _mm512_add_ps(v, _mm512_castsi512_ps(_mm512_xor_si512(flip, _mm512_castps_si512(scales.s[s]))));
        _mm512_storeu_ps(w, v);
      }
    }
  }
}

void shrink(float* w, std::size_t n, float decay) noexcept {
  const __m512 c = _mm512_set1_ps(decay);
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(w + i);
    _mm512_storeu_ps(w + i, _mm512_fnmadd_ps(c, v, v));
  }
  shrink_rest(w + i, n - i, decay);
}

void axpy(float* w, const float* z, float scale, std::size_t n) noexcept {
  const __m512 s = _mm512_set1_ps(scale);
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(w + i, _mm512_fmadd_ps(s, _mm512_loadu_ps(z + i), _mm512_loadu_ps(w + i)));
  axpy_rest(w + i, z + i, scale, n - i);
}

void dot(double* sums, const float* a, const float* b, std::size_t n) noexcept {
  __m512d s[2] = {_mm512_loadu_pd(sums), _mm512_loadu_pd(sums + 8)};
  for (std::size_t i = 0; i < n; i += 16)
    for (std::size_t g = 0; g < 2; ++g)
      s[g] = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(a + i + 8 * g)),
                             _mm512_cvtps_pd(_mm256_loadu_ps(b + i + 8 * g)), s[g]);
  for (std::size_t g = 0; g < 2; ++g) _mm512_storeu_pd(sums + 8 * g, s[g]);
}

// For `outer`.
struct Rows {
  template <unsigned Count, unsigned Rank>
  static void outer(const Outer& o, const float* scale) noexcept {
    const unsigned rank = Rank != 0 ? Rank : o.rank;
    const std::ptrdiff_t ahead = outer_ahead(o);
    const Scales<Count> scales(scale);
    for (std::size_t row = 0; row < o.rows; ++row) {
      __m512 a[Rank != 0 ? Rank : kMaxRank];
      for (unsigned k = 0; k < rank; ++k) a[k] = _mm512_set1_ps(o.a[k * kStrideA + row]);
      float* const w = o.w + row * o.stride;
      std::size_t i = 0;
      for (; i + 16 <= o.columns; i += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(w + i + ahead), _MM_HINT_T0);
        __m512 z = _mm512_mul_ps(a[0], _mm512_loadu_ps(o.b + i));
        for (unsigned k = 1; k < rank; ++k) z = _mm512_fmadd_ps(a[k], _mm512_loadu_ps(o.b + k * kStrideB + i), z);
        if constexpr (Count != 0) {
          __m512 v = _mm512_loadu_ps(w + i);
          for (unsigned s = 0; s < Count; ++s) v = _mm512_fmadd_ps(scales.s[s], z, v);
          z = v;
        }
        _mm512_storeu_ps(w + i, z);
      }
      if (i + 8 <= o.columns) {  // matrices of 8 columns, as those of LoRA
        __m256 z = _mm256_mul_ps(_mm512_castps512_ps256(a[0]), _mm256_loadu_ps(o.b + i));
        for (unsigned k = 1; k < rank; ++k)
          z = _mm256_fmadd_ps(_mm512_castps512_ps256(a[k]), _mm256_loadu_ps(o.b + k * kStrideB + i), z);
        if constexpr (Count != 0) {
          __m256 v = _mm256_loadu_ps(w + i);
          for (unsigned s = 0; s < Count; ++s) v = _mm256_fmadd_ps(_mm512_castps512_ps256(scales.s[s]), z, v);
          z = v;
        }
        _mm256_storeu_ps(w + i, z);
        i += 8;
      }
      outer_rest<Count>(o, scale, row, i);
    }
  }
};

void transpose(float* out, const float* in) noexcept {
  for (std::size_t i = 0; i < 64; i += 16) {  // 16 x 16: pairs of rows, quarters of registers, then those among them
    __m512 a[16], b[16];
    for (std::size_t r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(in + 64 * r + i);
    for (std::size_t r = 0; r < 16; r += 2) {
      b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    for (std::size_t r = 0; r < 16; r += 4)
      for (std::size_t h = 0; h < 2; ++h) {
        a[r + 2 * h] = _mm512_shuffle_ps(b[r + h], b[r + h + 2], 0x44);
        a[r + 2 * h + 1] = _mm512_shuffle_ps(b[r + h], b[r + h + 2], 0xEE);
      }
    for (std::size_t r = 0; r < 4; ++r) {  // a[r + 4 j] has, in quarter q, column r + 4 q of rows 4 j .. 4 j + 3
      const __m512 even0 = _mm512_shuffle_f32x4(a[r], a[r + 4], 0x88),
                   odd0 = _mm512_shuffle_f32x4(a[r], a[r + 4], 0xDD);
      const __m512 even1 = _mm512_shuffle_f32x4(a[r + 8], a[r + 12], 0x88);
      const __m512 odd1 = _mm512_shuffle_f32x4(a[r + 8], a[r + 12], 0xDD);
      _mm512_storeu_ps(out + 16 * (i + r), _mm512_shuffle_f32x4(even0, even1, 0x88));
      _mm512_storeu_ps(out + 16 * (i + r + 4), _mm512_shuffle_f32x4(odd0, odd1, 0x88));
      _mm512_storeu_ps(out + 16 * (i + r + 8), _mm512_shuffle_f32x4(even0, even1, 0xDD));
      _mm512_storeu_ps(out + 16 * (i + r + 12), _mm512_shuffle_f32x4(odd0, odd1, 0xDD));
    }
  }
}

// ---- 16-bit storage ----------------------------------------------------------------------------------------------

struct Fp16 {
  static __m512 widen(__m256i h) noexcept { return _mm512_cvtph_ps(h); }
  static __m256i narrow(__m512 w) noexcept { return _mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT); }
  static __m512 nearest(__m512 w) noexcept { return widen(narrow(w)); }
  static __m512 stochastic(__m512 w, __m512i r) noexcept {
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(w), broadcast(kSign));
    const __m512i m = _mm512_xor_si512(_mm512_castps_si512(w), sign);
    r = _mm512_srli_epi32(r, 3);  // one random bit for each bit that is cut off
    const __m512i up = _mm512_add_epi32(m, r);
    const __mmask16 large = _mm512_cmpge_epu32_mask(up, broadcast(kFp16TooLarge));
    const __m512i cut_off = _mm512_andnot_si512(broadcast(0x1FFF), up);
    const __m512i normal = _mm512_mask_max_epu32(cut_off, large, m, broadcast(kInfinity));  // a NaN stays a NaN
    // Subnormal results, in units of 2^-24.
    const __m512 units = _mm512_fmadd_ps(_mm512_castsi512_ps(m), _mm512_set1_ps(0x1p24f),
                                         _mm512_mul_ps(_mm512_cvtepi32_ps(r), _mm512_set1_ps(0x1p-13f)));
    const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvttps_epi32(units)), _mm512_set1_ps(0x1p-24f));
    const __mmask16 is_small = _mm512_cmpgt_epi32_mask(broadcast(kFp16Normal), m);
    const __m512i cut = _mm512_mask_blend_epi32(is_small, normal, _mm512_castps_si512(small));
    return _mm512_castsi512_ps(_mm512_or_si512(sign, cut));
  }
};

struct Bf16 {
  static __m512 widen(__m256i h) noexcept {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static __m256i narrow(__m512 w) noexcept {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(nearest(w)), 16));
  }
  static __m512 nearest(__m512 w) noexcept {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(w), 16), broadcast(1));
    return stochastic(w, _mm512_add_epi32(odd, broadcast(0x7FFF)));
  }
  static __m512 stochastic(__m512 w, __m512i r) noexcept {
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(w), r);
    return _mm512_castsi512_ps(_mm512_and_si512(up, broadcast(0xFFFF0000u)));
  }
};

template <typename Format>
void widen(float* out, const std::uint16_t* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 16)
    _mm512_storeu_ps(out + i, Format::widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
}

template <typename Format>
void narrow(std::uint16_t* out, const float* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), Format::narrow(_mm512_loadu_ps(in + i)));
}

template <typename Format>
void round_nearest(float* w, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 16) _mm512_storeu_ps(w + i, Format::nearest(_mm512_loadu_ps(w + i)));
}

template <typename Format>
void round_stochastic(float* w, const std::uint32_t* words, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 32) {  // two runs, which share a pair of words
    __m512i k = _mm512_add_epi32(_mm512_loadu_si512(words + i), _mm512_loadu_si512(words + i + 16));
    k = _mm512_mullo_epi32(k, broadcast(kDither[i / 32 % 2]));
    k = _mm512_xor_si512(k, _mm512_srli_epi32(k, 16));
    float *const even = w + i, *const odd = even + 16;
    _mm512_storeu_ps(even, Format::stochastic(_mm512_loadu_ps(even), _mm512_and_si512(k, broadcast(0xFFFF))));
    _mm512_storeu_ps(odd, Format::stochastic(_mm512_loadu_ps(odd), _mm512_srli_epi32(k, 16)));
  }
}

}  // namespace

const KernelSet kAvx512 = {
    "avx512",
    words,
    {gaussian<0>, gaussian<1>, gaussian<2>, gaussian<3>},
    {rademacher<0>, rademacher<1>, rademacher<2>, rademacher<3>},
    {gaussian_across<1>, gaussian_across<2>, gaussian_across<3>},
    shrink,
    axpy,
    dot,
    {outer<Rows, 0>, outer<Rows, 1>, outer<Rows, 2>, outer<Rows, 3>},
    transpose,
    {widen<Fp16>, narrow<Fp16>, round_nearest<Fp16>, round_stochastic<Fp16>},
    {widen<Bf16>, narrow<Bf16>, round_nearest<Bf16>, round_stochastic<Bf16>},
};

}  // namespace pocketzo
