// NEON (ASIMD, every ARMv8), four lanes. Eight quads are in flight at a time: two independent chains of each kind hide
// the latencies of an in-order core (Cortex-A55), and an out-of-order one does not mind.
#include <arm_neon.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "sets.h"

namespace pocketzo {
namespace {

// The words of eight quads, one quad a lane: x[j][0] holds quads 0 .. 3, x[j][1] quads 4 .. 7.
struct Words {
  uint32x4_t x[4][2];
};

struct Product {
  uint32x4_t high, low;
};

// Two widening products and two unzips. The x86 form (words left in 64-bit lanes) needs 12.5 instructions a word on
// NEON, this one 7.3, as there is no 32-bit product that reads every second lane.
inline Product multiply(uint32x4_t a, uint32x2_t m) noexcept {
  const uint32x4_t p = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), m));
  const uint32x4_t q = vreinterpretq_u32_u64(vmull_u32(vget_high_u32(a), m));
  return {vuzp2q_u32(p, q), vuzp1q_u32(p, q)};
}

// Eight quads between their rounds.
class Philox {
 public:
  explicit Philox(const Key& key) noexcept : s_(key) {}

  // The first three rounds of quads q .. q + 7; then `round` 1, 2, 3 and 4.
  void start(std::uint32_t q, Words& k) const noexcept {
    static constexpr std::uint32_t kLane[4] = {0, 1, 2, 3};
    for (unsigned g = 0; g < 2; ++g) {
      const uint32x4_t counter = vaddq_u32(vdupq_n_u32(q + 4 * g), vld1q_u32(kLane));
      const Product pq = multiply(counter, m0());
      const Product p = multiply(veorq_u32(pq.high, vdupq_n_u32(s_.a1)), m1());
      const Product p0 = multiply(veorq_u32(p.high, vdupq_n_u32(s_.b0)), m0());
      const Product p1 = multiply(veorq_u32(pq.low, vdupq_n_u32(s_.b2)), m1());
      k.x[0][g] = veorq_u32(p1.high, veorq_u32(p.low, vdupq_n_u32(s_.k0[0])));
      k.x[1][g] = p1.low;
      k.x[2][g] = veorq_u32(p0.high, vdupq_n_u32(s_.c2));
      k.x[3][g] = p0.low;
    }
  }

  void round(unsigned r, Words& k) const noexcept {
    for (unsigned g = 0; g < 2; ++g) {
      const Product p0 = multiply(k.x[0][g], m0()), p1 = multiply(k.x[2][g], m1());
      k.x[0][g] = veorq_u32(p1.high, veorq_u32(k.x[1][g], vdupq_n_u32(s_.k0[r])));
      k.x[2][g] = veorq_u32(p0.high, veorq_u32(k.x[3][g], vdupq_n_u32(s_.k1[r])));
      k.x[1][g] = p1.low;
      k.x[3][g] = p0.low;
    }
  }

  Words words(std::uint32_t q) const noexcept {
    Words k;
    start(q, k);
    for (unsigned r = 1; r < 5; ++r) round(r, k);
    return k;
  }

 private:
  static uint32x2_t m0() noexcept { return vdup_n_u32(kMul0); }
  static uint32x2_t m1() noexcept { return vdup_n_u32(kMul1); }

  Schedule s_;
};

template <int N>
inline float32x4_t horner(const float (&coefficient)[N], float32x4_t t) noexcept {
  float32x4_t p = vdupq_n_f32(coefficient[0]);
  for (int i = 1; i < N; ++i) p = vfmaq_f32(vdupq_n_f32(coefficient[i]), p, t);
  return p;
}

// Box-Muller of one pair of words, in parts that gaussian_n puts between the rounds of the next words.
class Transform {
 public:
  Transform(uint32x4_t x, uint32x4_t y) noexcept : x_(x), y_(y) {}

  void root() noexcept {
    const int32x4_t odd = vreinterpretq_s32_u32(vorrq_u32(x_, vdupq_n_u32(1)));
    const int32x4_t v = vreinterpretq_s32_f32(vabsq_f32(vcvtq_f32_s32(odd)));
    const int32x4_t d = vsubq_s32(v, vdupq_n_s32(kSqrtHalf2p31));
    const float32x4_t ex = vcvtq_f32_s32(vshrq_n_s32(d, 23));
    const int32x4_t m = vaddq_s32(vandq_s32(d, vdupq_n_s32(kMantissa)), vdupq_n_s32(kSqrtHalf));
    const float32x4_t f = vsubq_f32(vreinterpretq_f32_s32(m), vdupq_n_f32(1.0f));
    r_ = vsqrtq_f32(vfmaq_f32(vmulq_f32(ex, vdupq_n_f32(kMinusTwoLn2)), horner(kLog, f), f));
  }
  void angle() noexcept {
    const float32x4_t angle = vcvtq_n_f32_s32(vreinterpretq_s32_u32(y_), 31);  // times 2^-31
    const float32x4_t t = vmulq_f32(angle, angle);
    c_ = horner(kCos, t);
    s_ = vmulq_f32(angle, horner(kSin, t));
  }
  void finish(float32x4_t& cosine, float32x4_t& sine) const noexcept {
    const float32x4_t r = vbslq_f32(vdupq_n_u32(kSign), vreinterpretq_f32_u32(x_), r_);
    cosine = vmulq_f32(r, c_);
    sine = vmulq_f32(r, s_);
  }

 private:
  uint32x4_t x_, y_;
  float32x4_t r_, c_, s_;
};

template <unsigned Count>
struct Scales {
  float32x4_t s[Count == 0 ? 1 : Count];
  explicit Scales(const float* scale) noexcept {
    for (unsigned i = 0; i < Count; ++i) s[i] = vdupq_n_f32(scale[i]);
  }
};

inline void prefetch(const float* block, const Walk& walk) noexcept {
#if defined(__GNUC__) || defined(__clang__)
  for (int run = 0; run < 4; ++run) __builtin_prefetch(block + kAhead * walk.block_stride + run * walk.run_stride, 1);
#endif
}

template <unsigned Count>
inline void update(float* w, float32x4_t z, const Scales<Count>& scale) noexcept {
  if constexpr (Count != 0) {
    float32x4_t v = vld1q_f32(w);
    for (unsigned i = 0; i < Count; ++i) v = vfmaq_f32(v, scale.s[i], z);
    z = v;
  }
  vst1q_f32(w, z);
}

void words(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept {
  const Philox philox(key);
  for (std::size_t i = 0; i < count; ++i)
    for (unsigned half = 0; half < 16; half += 8) {
      const Words k = philox.words(static_cast<std::uint32_t>((first + i) * 16 + half));
      for (unsigned j = 0; j < 4; ++j)
        for (unsigned g = 0; g < 2; ++g) vst1q_u32(out + 64 * i + 16 * j + half + 4 * g, k.x[j][g]);
    }
}

// Software-pipelined: between the rounds of the next eight quads stand the parts of the transform of these eight.
template <unsigned Count>
void gaussian_n(const Walk& walk, const Key& key, const float* scale) noexcept {
  const Philox philox(key);
  const Scales<Count> scales(scale);
  float* block = walk.base;
  auto q = static_cast<std::uint32_t>(walk.first * 16);
  const auto next = static_cast<std::uint32_t>(walk.step * 16);
  Words k = philox.words(q);
  for (std::size_t i = 0; i < walk.count; ++i, block += walk.block_stride, q += next) {
    prefetch(block, walk);
    for (unsigned half = 0; half < 16; half += 8) {
      Words n;
      philox.start(half == 0 ? q + 8 : q + next, n);
      for (unsigned pair = 0; pair < 2; ++pair) {
        float* w = block + 2 * pair * walk.run_stride + half;
        Transform a(k.x[2 * pair][0], k.x[2 * pair + 1][0]), b(k.x[2 * pair][1], k.x[2 * pair + 1][1]);
        a.root();
        b.root();
        philox.round(2 * pair + 1, n);
        a.angle();
        b.angle();
        philox.round(2 * pair + 2, n);
        float32x4_t cosine, sine;
        a.finish(cosine, sine);
        update(w, cosine, scales);
        update(w + walk.run_stride, sine, scales);
        b.finish(cosine, sine);
        update(w + 4, cosine, scales);
        update(w + walk.run_stride + 4, sine, scales);
      }
      k = n;
    }
  }
}

template <unsigned Count>
void rademacher_n(const Walk& walk, const Key& key, const float* scale) noexcept {
  const Philox philox(key);
  const Scales<Count> scales(scale);
  const uint32x4_t sign = vdupq_n_u32(kSign);
  Words bits[2] = {};  // the words of one superblock of 32 blocks, by halves
  std::uint64_t held = ~std::uint64_t{0};
  float* block = walk.base;
  std::uint64_t b = walk.first;
  for (std::size_t i = 0; i < walk.count; ++i, block += walk.block_stride, b += walk.step) {
    if (b >> 5 != held) {
      held = b >> 5;
      for (unsigned half = 0; half < 2; ++half)
        bits[half] = philox.words(static_cast<std::uint32_t>(held * 16 + half * 8));
    }
    const unsigned row = static_cast<unsigned>(b & 31) * 4;  // 4 rows of a block never straddle two words
    const int32x4_t shift = vdupq_n_s32(static_cast<int>(row & 31));
    uint32x4_t k[4];
    for (unsigned g = 0; g < 4; ++g) k[g] = vshlq_u32(bits[g / 2].x[row >> 5][g % 2], shift);
    float* w = block;
    prefetch(block, walk);
    for (unsigned run = 0; run < 4; ++run, w += walk.run_stride)
      for (unsigned g = 0; g < 4; ++g) {
        const uint32x4_t flip = vandq_u32(k[g], sign);
        k[g] = vaddq_u32(k[g], k[g]);
        if constexpr (Count == 0) {
          vst1q_f32(w + 4 * g, vreinterpretq_f32_u32(veorq_u32(flip, vreinterpretq_u32_f32(vdupq_n_f32(1.0f)))));
        } else {  // fma(s, +-1, w) is w +- s
          float32x4_t v = vld1q_f32(w + 4 * g);
          for (unsigned s = 0; s < Count; ++s)
            v = vaddq_f32(v, vreinterpretq_f32_u32(veorq_u32(flip, vreinterpretq_u32_f32(scales.s[s]))));
          vst1q_f32(w + 4 * g, v);
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
  const float32x4_t c = vdupq_n_f32(decay);
  std::size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float32x4_t v = vld1q_f32(w + i);
    vst1q_f32(w + i, vfmsq_f32(v, c, v));
  }
  for (; i < n; ++i) w[i] = std::fma(-decay, w[i], w[i]);
}

// ---- 16-bit storage ----------------------------------------------------------------------------------------------

// The conversions are those that every ARMv8 has.
struct Fp16 {
  static float32x4_t widen(uint16x4_t h) noexcept { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
  static uint16x4_t narrow(float32x4_t w) noexcept { return vreinterpret_u16_f16(vcvt_f16_f32(w)); }
  static float32x4_t nearest(float32x4_t w) noexcept { return widen(narrow(w)); }
  static float32x4_t stochastic(float32x4_t w, uint32x4_t r) noexcept {
    const uint32x4_t m = vreinterpretq_u32_f32(vabsq_f32(w));
    r = vshrq_n_u32(r, 3);  // as many bits as are cut off
    const uint32x4_t up = vaddq_u32(m, r);
    const uint32x4_t large = vcgeq_u32(up, vdupq_n_u32(kHalfTooLarge));
    const uint32x4_t normal = vbslq_u32(large, vdupq_n_u32(kInfinity), vbicq_u32(up, vdupq_n_u32(0x1FFF)));
    // Subnormal ones are whole numbers of units.
    const float32x4_t units = vfmaq_f32(vcvtq_n_f32_u32(r, 13), vreinterpretq_f32_u32(m), vdupq_n_f32(0x1p24f));
    const float32x4_t small = vcvtq_n_f32_u32(vcvtq_u32_f32(units), 24);
    const uint32x4_t is_small = vcltq_u32(m, vdupq_n_u32(kHalfNormal));
    const uint32x4_t cut = vbslq_u32(is_small, vreinterpretq_u32_f32(small), normal);
    return vbslq_f32(vdupq_n_u32(kSign), w, vreinterpretq_f32_u32(cut));
  }
};

struct Bf16 {
  static float32x4_t widen(uint16x4_t h) noexcept { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
  static uint16x4_t narrow(float32x4_t w) noexcept { return vshrn_n_u32(vreinterpretq_u32_f32(nearest(w)), 16); }
  static float32x4_t nearest(float32x4_t w) noexcept {
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(vreinterpretq_u32_f32(w), 16), vdupq_n_u32(1));
    return stochastic(w, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  }
  static float32x4_t stochastic(float32x4_t w, uint32x4_t r) noexcept {
    return vreinterpretq_f32_u32(vandq_u32(vaddq_u32(vreinterpretq_u32_f32(w), r), vdupq_n_u32(0xFFFF0000u)));
  }
};

template <typename Format>
void widen_n(float* out, const std::uint16_t* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8) {
    const uint16x8_t h = vld1q_u16(in + i);
    vst1q_f32(out + i, Format::widen(vget_low_u16(h)));
    vst1q_f32(out + i + 4, Format::widen(vget_high_u16(h)));
  }
}

template <typename Format>
void narrow_n(std::uint16_t* out, const float* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8)
    vst1q_u16(out + i, vcombine_u16(Format::narrow(vld1q_f32(in + i)), Format::narrow(vld1q_f32(in + i + 4))));
}

template <typename Format>
void round_nearest(float* w, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 4) vst1q_f32(w + i, Format::nearest(vld1q_f32(w + i)));
}

template <typename Format>
void round_stochastic(float* w, const std::uint32_t* words, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 32)  // two runs, that is a pair of words
    for (std::size_t lane = i; lane < i + 16; lane += 4) {
      uint32x4_t k = vaddq_u32(vld1q_u32(words + lane), vld1q_u32(words + lane + 16));
      k = vmulq_n_u32(k, kDither[i / 32 % 2]);
      k = veorq_u32(k, vshrq_n_u32(k, 16));
      float *const even = w + lane, *const odd = even + 16;
      vst1q_f32(even, Format::stochastic(vld1q_f32(even), vandq_u32(k, vdupq_n_u32(0xFFFF))));
      vst1q_f32(odd, Format::stochastic(vld1q_f32(odd), vshrq_n_u32(k, 16)));
    }
}

void widen(float* out, const std::uint16_t* in, std::size_t n, Storage storage) noexcept {
  (storage == Storage::float16 ? widen_n<Fp16> : widen_n<Bf16>)(out, in, n);
}

void narrow(std::uint16_t* out, const float* in, std::size_t n, Storage storage) noexcept {
  (storage == Storage::float16 ? narrow_n<Fp16> : narrow_n<Bf16>)(out, in, n);
}

void round(float* w, const std::uint32_t* words, std::size_t n, Storage storage) noexcept {
  if (words == nullptr)
    (storage == Storage::float16 ? round_nearest<Fp16> : round_nearest<Bf16>)(w, n);
  else
    (storage == Storage::float16 ? round_stochastic<Fp16> : round_stochastic<Bf16>)(w, words, n);
}

void axpy(float* w, const float* z, float scale, std::size_t n) noexcept {
  const float32x4_t s = vdupq_n_f32(scale);
  for (std::size_t i = 0; i < n; i += 4) vst1q_f32(w + i, vfmaq_f32(vld1q_f32(w + i), s, vld1q_f32(z + i)));
}

}  // namespace

const KernelSet kNeon = {"neon", words, gaussian, rademacher, shrink, widen, narrow, round, axpy};

}  // namespace pocketzo
