// AVX2, FMA and F16C, eight lanes. Compiled with -mavx2 -mfma -mf16c; runs only where dispatch.cpp found all three.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "sets.h"

namespace pocketzo {
namespace {

// The words of eight quads, one quad in a lane.
struct Words {
  __m256i x[4];
};

inline __m256i broadcast(std::uint32_t v) noexcept { return _mm256_set1_epi32(static_cast<int>(v)); }
inline __m256i high(__m256i p) noexcept { return _mm256_srli_epi64(p, 32); }

// Rounds are computed on 64-bit lanes, four quads in a register, with the word in the low 32 bits: vpmuludq reads only
// those and leaves the next low word in place, so no shuffle is needed until the end. Quads 0, 1, 4 and 5 of the eight
// form one half, quads 2, 3, 6 and 7 the other: the order that the final shuffle joins.
struct Half {
  __m256i x0, x1, x2, x3;
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
  __m256i product(std::uint64_t q, std::uint64_t lane = 1) const noexcept {
    const __m256i lanes = _mm256_mul_epu32(_mm256_setr_epi64x(0, 1, 4, 5), all(lane));
    return _mm256_mul_epu32(m0_, _mm256_add_epi64(all(q), lanes));
  }
  static __m256i stride(std::uint64_t n) noexcept { return all(n * kMul0); }

  // Rounds 1 to 3 of eight quads; `to_b` is stride(2 * lane). To be followed by round(1), round(2), round(3) and
  // `finish`.
  State start(__m256i product, __m256i to_b = stride(2)) const noexcept {
    return {begin(product), begin(_mm256_add_epi64(product, to_b))};
  }

  void round(int r, State& s) const noexcept {
    round(r, s.a);
    round(r, s.b);
  }

  Words finish(const State& s) const noexcept {
    const Half &a = s.a, &b = s.b;
    const __m256i p0a = _mm256_mul_epu32(m0_, a.x0), p1a = _mm256_mul_epu32(m1_, a.x2);
    const __m256i p0b = _mm256_mul_epu32(m0_, b.x0), p1b = _mm256_mul_epu32(m1_, b.x2);
    return {{_mm256_xor_si256(_mm256_xor_si256(join<0xDD>(p1a, p1b), join<0x88>(a.x1, b.x1)), k0_[4]),
             join<0x88>(p1a, p1b),
             _mm256_xor_si256(_mm256_xor_si256(join<0xDD>(p0a, p0b), join<0x88>(a.x3, b.x3)), k1_[4]),
             join<0x88>(p0a, p0b)}};
  }

  Words words(__m256i product) const noexcept {
    State s = start(product);
    for (int r = 1; r < 4; ++r) round(r, s);
    return finish(s);
  }

 private:
  static __m256i all(std::uint64_t n) noexcept { return _mm256_set1_epi64x(static_cast<long long>(n)); }

  template <int Control>
  static __m256i join(__m256i a, __m256i b) noexcept {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), Control));
  }

  void round(int r, Half& s) const noexcept {
    const __m256i p0 = _mm256_mul_epu32(m0_, s.x0), p1 = _mm256_mul_epu32(m1_, s.x2);
    s.x0 = _mm256_xor_si256(high(p1), _mm256_xor_si256(s.x1, k0_[r]));
    s.x2 = _mm256_xor_si256(high(p0), _mm256_xor_si256(s.x3, k1_[r]));
    s.x1 = p1;
    s.x3 = p0;
  }

  Half begin(__m256i pq) const noexcept {
    const __m256i p = _mm256_mul_epu32(m1_, _mm256_xor_si256(high(pq), a1_));
    const __m256i x0 = _mm256_xor_si256(high(p), b0_), x2 = _mm256_xor_si256(pq, b2_);
    const __m256i p0 = _mm256_mul_epu32(m0_, x0), p1 = _mm256_mul_epu32(m1_, x2);
    return {_mm256_xor_si256(high(p1), _mm256_xor_si256(p, k0_[0])), p1, _mm256_xor_si256(high(p0), c2_), p0};
  }

  __m256i m0_ = _mm256_set1_epi64x(kMul0), m1_ = _mm256_set1_epi64x(kMul1);
  __m256i a1_, b0_, b2_, c2_, k0_[5], k1_[5];
};

// Continues Horner's rule from p with coefficients `From` .. `To` - 1.
template <int From, int To, int N>
inline __m256 horner(__m256 p, const float (&coefficient)[N], __m256 t) noexcept {
  for (int i = From; i < To; ++i) p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(coefficient[i]));
  return p;
}

// Box-Muller of one pair of words, in steps that `gaussian` interleaves with the rounds of the next words.
class Transform {
 public:
  Transform(__m256i x, __m256i y) noexcept : x_(x), y_(y) {}

  void split() noexcept {  // 2 ^ ex (1 + f)
    const __m256 v = _mm256_andnot_ps(sign(), _mm256_cvtepi32_ps(_mm256_or_si256(x_, _mm256_set1_epi32(1))));
    // 2^23 - 1 minus the d of SPEC.md, which gives -ex. Product and root are then never -0, so that `or` sets the sign.
    const __m256i d = _mm256_sub_epi32(_mm256_set1_epi32(kSqrtHalf2p31 + kMantissa), _mm256_castps_si256(v));
    const __m256i m =
        _mm256_add_epi32(_mm256_andnot_si256(d, _mm256_set1_epi32(kMantissa)), _mm256_set1_epi32(kSqrtHalf));
    r_ = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(d, 23)), _mm256_set1_ps(-kMinusTwoLn2));
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
    const __m256 r = _mm256_or_ps(r_, _mm256_and_ps(sign(), _mm256_castsi256_ps(x_)));
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

inline void prefetch(const float* block, std::ptrdiff_t ahead, std::ptrdiff_t run_stride) noexcept {
  for (std::ptrdiff_t run = 0; run < 4; ++run)
    _mm_prefetch(reinterpret_cast<const char*>(block + ahead + run * run_stride), _MM_HINT_T0);
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
  __m256i product = philox.product(first * 16);
  for (std::size_t i = 0; i < 2 * count; ++i, product = _mm256_add_epi64(product, Philox::stride(8))) {
    const Words k = philox.words(product);
    for (unsigned j = 0; j < 4; ++j)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2 * 64 + 16 * j + i % 2 * 8), k.x[j]);
  }
}

// Software-pipelined: transforms eight quads while finishing the words of the next eight and starting those after them.
// The order, that of avx512.cpp, matters here too: 110 cycles a block in cache on Zen 5; other orders take up to 125.
// Every sixteenth block is followed by `skip` more elements.
template <unsigned Count>
inline void gaussian(const Walk& walk, const Key& key, const float* scale, std::uint64_t q, std::uint64_t lane,
                     std::uint64_t next_q, std::ptrdiff_t skip) noexcept {
  const std::ptrdiff_t ahead = kAhead * walk.block_stride + skip;
  const Philox philox(key);
  const Scales<Count> scales(scale);
  const __m256i to_other_half = Philox::stride(8 * lane), to_next_block = Philox::stride(next_q - 8 * lane);
  const __m256i to_b = Philox::stride(2 * lane);
  __m256i product = philox.product(q, lane);
  State state = philox.start(product, to_b);
  for (int r = 1; r < 4; ++r) philox.round(r, state);
  Words k = philox.finish(state);
  product = _mm256_add_epi64(product, to_other_half);
  state = philox.start(product, to_b);
  philox.round(1, state);
  float* block = walk.base;
  for (std::size_t i = 1; i <= walk.count; ++i, block += walk.block_stride + (i % 16 == 1 ? skip : 0)) {
    prefetch(block, ahead, walk.run_stride);
    for (unsigned half = 0; half < 16; half += 8) {
      float* w = block + half;
      Transform a(k.x[0], k.x[1]), b(k.x[2], k.x[3]);
      product = _mm256_add_epi64(product, half == 0 ? to_next_block : to_other_half);
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
      __m256 cosine, sine;
      a.finish(cosine, sine);
      update(w, cosine, scales);
      update(w + walk.run_stride, sine, scales);
      b.finish(cosine, sine);
      update(w + 2 * walk.run_stride, cosine, scales);
      update(w + 3 * walk.run_stride, sine, scales);
      state = next;
    }
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
  const __m256i sign = broadcast(kSign);
  Words bits[2] = {};  // the words of one superblock of 32 blocks, by halves
  std::uint64_t held = ~std::uint64_t{0};
  float* block = walk.base;
  std::uint64_t b = walk.first;
  for (std::size_t i = 0; i < walk.count; ++i, block += walk.block_stride, b += walk.step) {
    if (b >> 5 != held) {
      held = b >> 5;
      for (unsigned half = 0; half < 2; ++half) bits[half] = philox.words(philox.product(held * 16 + half * 8));
    }
    const unsigned row = static_cast<unsigned>(b & 31) * 4;  // the 4 rows of a block share a word
    prefetch(block, kAhead * walk.block_stride, walk.run_stride);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(row & 31));
    for (unsigned half = 0; half < 2; ++half) {
      __m256i k = _mm256_sll_epi32(bits[half].x[row >> 5], shift);
      float* w = block + half * 8;
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

void shrink(float* w, std::size_t n, float decay) noexcept {
  const __m256 c = _mm256_set1_ps(decay);
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(w + i);
    _mm256_storeu_ps(w + i, _mm256_fnmadd_ps(c, v, v));
  }
  shrink_rest(w + i, n - i, decay);
}

void axpy(float* w, const float* z, float scale, std::size_t n) noexcept {
  const __m256 s = _mm256_set1_ps(scale);
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(w + i, _mm256_fmadd_ps(s, _mm256_loadu_ps(z + i), _mm256_loadu_ps(w + i)));
  axpy_rest(w + i, z + i, scale, n - i);
}

void dot(double* sums, const float* a, const float* b, std::size_t n) noexcept {
  __m256d s[4];
  for (std::size_t g = 0; g < 4; ++g) s[g] = _mm256_loadu_pd(sums + 4 * g);
  for (std::size_t i = 0; i < n; i += 16)
    for (std::size_t g = 0; g < 4; ++g)
      s[g] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + i + 4 * g)), _mm256_cvtps_pd(_mm_loadu_ps(b + i + 4 * g)),
                             s[g]);
  for (std::size_t g = 0; g < 4; ++g) _mm256_storeu_pd(sums + 4 * g, s[g]);
}

// For `outer`.
struct Rows {
  template <unsigned Count, unsigned Rank>
  static void outer(const Outer& o, const float* scale) noexcept {
    const unsigned rank = Rank != 0 ? Rank : o.rank;
    const std::ptrdiff_t ahead = outer_ahead(o);
    const Scales<Count> scales(scale);
    for (std::size_t row = 0; row < o.rows; ++row) {
      __m256 a[Rank != 0 ? Rank : kMaxRank];
      for (unsigned k = 0; k < rank; ++k) a[k] = _mm256_set1_ps(o.a[k * kStrideA + row]);
      float* const w = o.w + row * o.stride;
      std::size_t i = 0;
      for (; i + 8 <= o.columns; i += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(w + i + ahead), _MM_HINT_T0);
        __m256 z = _mm256_mul_ps(a[0], _mm256_loadu_ps(o.b + i));
        for (unsigned k = 1; k < rank; ++k) z = _mm256_fmadd_ps(a[k], _mm256_loadu_ps(o.b + k * kStrideB + i), z);
        update(w + i, z, scales);
      }
      outer_rest<Count>(o, scale, row, i);
    }
  }
};

void transpose(float* out, const float* in) noexcept {
  for (std::size_t lane = 0; lane < 16; lane += 8)
    for (std::size_t i = 0; i < 64; i += 8) {  // 8 x 8: pairs of rows, quarters, then halves
      __m256 a[8], b[8];
      for (std::size_t r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(in + 64 * (lane + r) + i);
      for (std::size_t r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
      }
      for (std::size_t r = 0; r < 8; r += 4)
        for (std::size_t h = 0; h < 2; ++h) {
          a[r + 2 * h] = _mm256_shuffle_ps(b[r + h], b[r + h + 2], 0x44);
          a[r + 2 * h + 1] = _mm256_shuffle_ps(b[r + h], b[r + h + 2], 0xEE);
        }
      for (std::size_t r = 0; r < 4; ++r) {
        _mm256_storeu_ps(out + 16 * (i + r) + lane, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
        _mm256_storeu_ps(out + 16 * (i + r + 4) + lane, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
      }
    }
}

// ---- 16-bit storage ----------------------------------------------------------------------------------------------

struct Fp16 {
  static __m256 widen(__m128i h) noexcept { return _mm256_cvtph_ps(h); }
  static __m128i narrow(__m256 w) noexcept { return _mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT); }
  static __m256 nearest(__m256 w) noexcept { return widen(narrow(w)); }
  static __m256 stochastic(__m256 w, __m256i r) noexcept {
    const __m256i sign = _mm256_and_si256(_mm256_castps_si256(w), broadcast(kSign));
    const __m256i m = _mm256_xor_si256(_mm256_castps_si256(w), sign);
    r = _mm256_srli_epi32(r, 3);  // one random bit for each bit that is cut off
    const __m256i up = _mm256_add_epi32(m, r);
    const __m256i large = _mm256_cmpgt_epi32(up, broadcast(kFp16TooLarge - 1));
    const __m256i beyond = _mm256_max_epi32(m, broadcast(kInfinity));  // a NaN stays a NaN
    const __m256i normal = _mm256_blendv_epi8(_mm256_andnot_si256(broadcast(0x1FFF), up), beyond, large);
    // Subnormal results, in units of 2^-24.
    const __m256 units = _mm256_fmadd_ps(_mm256_castsi256_ps(m), _mm256_set1_ps(0x1p24f),
                                         _mm256_mul_ps(_mm256_cvtepi32_ps(r), _mm256_set1_ps(0x1p-13f)));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvttps_epi32(units)), _mm256_set1_ps(0x1p-24f));
    const __m256i is_small = _mm256_cmpgt_epi32(broadcast(kFp16Normal), m);
    const __m256i cut = _mm256_blendv_epi8(normal, _mm256_castps_si256(small), is_small);
    return _mm256_castsi256_ps(_mm256_or_si256(sign, cut));
  }
};

struct Bf16 {
  static __m256 widen(__m128i h) noexcept {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static __m128i narrow(__m256 w) noexcept {
    const __m256i top = _mm256_srli_epi32(_mm256_castps_si256(nearest(w)), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  }
  static __m256 nearest(__m256 w) noexcept {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(w), 16), broadcast(1));
    return stochastic(w, _mm256_add_epi32(odd, broadcast(0x7FFF)));
  }
  static __m256 stochastic(__m256 w, __m256i r) noexcept {
    const __m256i up = _mm256_add_epi32(_mm256_castps_si256(w), r);
    return _mm256_castsi256_ps(_mm256_and_si256(up, broadcast(0xFFFF0000u)));
  }
};

template <typename Format>
void widen(float* out, const std::uint16_t* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8)
    _mm256_storeu_ps(out + i, Format::widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
}

template <typename Format>
void narrow(std::uint16_t* out, const float* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), Format::narrow(_mm256_loadu_ps(in + i)));
}

template <typename Format>
void round_nearest(float* w, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8) _mm256_storeu_ps(w + i, Format::nearest(_mm256_loadu_ps(w + i)));
}

template <typename Format>
void round_stochastic(float* w, const std::uint32_t* words, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 32)  // two runs, which share a pair of words
    for (std::size_t half = i; half < i + 16; half += 8) {
      const auto* x = reinterpret_cast<const __m256i*>(words + half);
      __m256i k = _mm256_add_epi32(_mm256_loadu_si256(x), _mm256_loadu_si256(x + 2));
      k = _mm256_mullo_epi32(k, broadcast(kDither[i / 32 % 2]));
      k = _mm256_xor_si256(k, _mm256_srli_epi32(k, 16));
      float *const even = w + half, *const odd = even + 16;
      _mm256_storeu_ps(even, Format::stochastic(_mm256_loadu_ps(even), _mm256_and_si256(k, broadcast(0xFFFF))));
      _mm256_storeu_ps(odd, Format::stochastic(_mm256_loadu_ps(odd), _mm256_srli_epi32(k, 16)));
    }
}

}  // namespace

const KernelSet kAvx2 = {
    "avx2",
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
