// NEON (ASIMD, every ARMv8), four lanes. An in-order core (Cortex-A55) executes instructions in program order, so the
// loops are scheduled by hand and barriers make the compiler keep that order. bench/cycles.py counts the cycles.
#include <arm_neon.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "sets.h"

namespace pocketzo {
namespace {

// A constant in every lane, in memory.
template <typename T>
struct alignas(16) Splat {
  T lane[4];
  constexpr Splat(T x) noexcept : lane{x, x, x, x} {}
};
inline float32x4_t load(const Splat<float>& s) noexcept { return vld1q_f32(s.lane); }
inline int32x4_t load(const Splat<std::int32_t>& s) noexcept { return vld1q_s32(s.lane); }
inline uint32x4_t load(const Splat<std::uint32_t>& s) noexcept { return vld1q_u32(s.lane); }

// Constants that the loops load for every use: FMLA overwrites its addend, so each step of Horner's rule needs a fresh
// copy of its coefficient, and a load, unlike a `mov`, takes no vector pipe. Constants that are used together are not
// adjacent, or the compiler would load them by one LDP, which the A55 executes slower than two LDR (llvm-mca 19: 6
// cycles, not 2).
struct Constants {
  Splat<std::int32_t> sqrt_half = kSqrtHalf;
  Splat<float> cos1 = kCos[1];
  Splat<std::int32_t> exponent = ~kMantissa;
  Splat<float> cos2 = kCos[2], one = 1.0f, cos3 = kCos[3], log1 = kLog[1], cos4 = kCos[4], log2 = kLog[2];
  Splat<float> sin1 = kSin[1], log3 = kLog[3], sin2 = kSin[2], log4 = kLog[4];
  Splat<std::uint32_t> sign = kSign;
  Splat<float> log5 = kLog[5], sin3 = kSin[3], log6 = kLog[6], sin4 = kSin[4];
};
constexpr Constants kConstants;

// Philox's round keys: too many to stay in registers.
struct Keys {
  Splat<std::uint32_t> a1, b0, c2, k1[5], b2, k0[5];

  explicit Keys(const Schedule& s) noexcept
      : a1(s.a1),
        b0(s.b0),
        c2(s.c2),
        k1{s.k1[0], s.k1[1], s.k1[2], s.k1[3], s.k1[4]},
        b2(s.b2),
        k0{s.k0[0], s.k0[1], s.k0[2], s.k0[3], s.k0[4]} {}
};

// Hides the pointer from the optimizer, so that loads through it are not folded into constants.
template <typename T>
inline void hide(T*& pointer) noexcept {
#if defined(__GNUC__) || defined(__clang__)
  __asm__("" : "+r"(pointer));
#endif
}

// The pointers that `gaussian` loads through: one for each of its two transforms, which would otherwise share loads and
// copy registers.
struct Sources {
  const Constants *a, *b;
  const Keys* keys;
};

// Scheduling barrier (emits nothing): uses of the arguments, loads included, stay after it, their definitions before
// it. It keeps the interleaved chains of `gaussian` together. Without it, clang 22 keeps the constants in registers,
// copies them and spills the rest: 15.1 / 6.5 / 3.1 cycles an element instead of 11.2 / 4.7 / 2.5 (llvm-mca 19, w += s
// z).
template <typename V>
inline void barrier(Sources& from, uint32x4_t& p, uint32x4_t& q, V& a, V& b) noexcept {
#if defined(__GNUC__) || defined(__clang__)
  __asm__("" : "+r"(from.a), "+r"(from.b), "+r"(from.keys), "+w"(p), "+w"(q), "+w"(a), "+w"(b));
#endif
}

// The words of four quads, one quad in a lane.
struct Words {
  uint32x4_t x[4];
};

struct Product {
  uint32x4_t high, low;
};

inline Product unzip(uint64x2_t p, uint64x2_t q) noexcept {
  const uint32x4_t a = vreinterpretq_u32_u64(p), b = vreinterpretq_u32_u64(q);
  return {vuzp2q_u32(a, b), vuzp1q_u32(a, b)};
}

// M0 q of four quads. Adding gives the products of later quads, as q does not wrap within a window.
struct Counter {
  uint64x2_t p, q;

  void add(uint64x2_t product) noexcept {
    p = vaddq_u64(p, product);
    q = vaddq_u64(q, product);
  }
};

class Philox {
 public:
  Philox() noexcept {
    static constexpr std::uint32_t kMul[2] = {kMul0, kMul1};
    const std::uint32_t* mul = kMul;
    hide(mul);
    m_ = vld1_u32(mul);
  }

  Counter counter(std::uint32_t q, std::uint32_t lane = 1) const noexcept {
    static constexpr std::uint32_t kLane[4] = {0, 1, 2, 3};
    const uint32x4_t quads = vmlaq_n_u32(vdupq_n_u32(q), vld1q_u32(kLane), lane);
    return {vmull_lane_u32(vget_low_u32(quads), m_, 0), vmull_high_lane_u32(quads, m_, 0)};
  }

  // Rounds 1, 2 and 3. In between, x[0] and x[2] hold the factors of the next products.
  void first(const Counter& c, const Keys& keys, Words& k) const noexcept {
    const Product pq = unzip(c.p, c.q);
    k.x[0] = veorq_u32(pq.high, load(keys.a1));
    k.x[2] = veorq_u32(pq.low, load(keys.b2));
  }
  void second(const Keys& keys, Words& k) const noexcept {
    const Product p = multiply<1>(k.x[0]), p1 = multiply<1>(k.x[2]);
    k.x[0] = veorq_u32(p.high, load(keys.b0));
    k.x[1] = p1.low;
    k.x[2] = veorq_u32(p1.high, veorq_u32(p.low, load(keys.k0[0])));
  }
  void third(const Keys& keys, Words& k) const noexcept {
    const Product p0 = multiply<0>(k.x[0]);
    k.x[0] = k.x[2];
    k.x[2] = veorq_u32(p0.high, load(keys.c2));
    k.x[3] = p0.low;
  }

  // Rounds 4 .. 7.
  void round(int r, const Keys& keys, Words& k) const noexcept {
    const Product p0 = multiply<0>(k.x[0]), p1 = multiply<1>(k.x[2]);
    k.x[0] = veorq_u32(p1.high, veorq_u32(k.x[1], load(keys.k0[r - 3])));
    k.x[2] = veorq_u32(p0.high, veorq_u32(k.x[3], load(keys.k1[r - 3])));
    k.x[1] = p1.low;
    k.x[3] = p0.low;
  }

  // The words of quads q, q + lane, .. , q + (4 N - 1) lane, by N interleaved chains.
  template <unsigned N>
  std::array<Words, N> words(std::uint32_t q, const Keys& keys, std::uint32_t lane = 1) const noexcept {
    std::array<Words, N> k;
    for (unsigned n = 0; n < N; ++n) first(counter(q + 4 * n * lane, lane), keys, k[n]);
    for (unsigned n = 0; n < N; ++n) second(keys, k[n]);
    for (unsigned n = 0; n < N; ++n) third(keys, k[n]);
    for (int r = 4; r <= kRounds; ++r)
      for (unsigned n = 0; n < N; ++n) round(r, keys, k[n]);
    return k;
  }

 private:
  // Two widening products and two unzips: 7.3 instructions a word. The x86 form (words in 64-bit lanes) needs 12.5 on
  // NEON, which has no 32-bit product that reads every second lane.
  template <int Multiplier>
  Product multiply(uint32x4_t x) const noexcept {
    return unzip(vmull_lane_u32(vget_low_u32(x), m_, Multiplier), vmull_high_lane_u32(x, m_, Multiplier));
  }

  uint32x2_t m_;
};

// The factors that a transform takes by lane. Among them are the leading coefficients, which FMLA only multiplies and
// so does not overwrite.
enum Factor { kLog0, kCos0, kSin0, kExponent };
inline float32x4_t factors() noexcept {
  static constexpr float kFactors[4] = {kLog[0], kCos[0], kSin[0], kMinusTwoLn2};
  const float* factors = kFactors;
  hide(factors);
  return vld1q_f32(factors);
}

// Box-Muller of one pair of words, in steps that `gaussian` interleaves with the rounds of the next words. The names
// are those of SPEC.md.
struct Transform {
  uint32x4_t x, y;
  int32x4_t v, e;
  float32x4_t ex, f, log, r, angle, t, cosine, sine;

  Transform(const Words& k, unsigned pair) noexcept
      : x(vorrq_u32(k.x[2 * pair], vdupq_n_u32(1))), y(k.x[2 * pair + 1]) {}

  // v is scaled by 2^-31, which does not change d; e is (d >> 23) * 2^23.
  void split(const Constants& c) noexcept {
    static_assert(kSqrtHalf2p31 - (31 << 23) == kSqrtHalf);
    v = vreinterpretq_s32_f32(vabsq_f32(vcvtq_n_f32_s32(vreinterpretq_s32_u32(x), 31)));
    e = vandq_s32(vsubq_s32(v, load(c.sqrt_half)), load(c.exponent));
  }
  void log1(const Constants& c, float32x4_t factor) noexcept {
    f = vsubq_f32(vreinterpretq_f32_s32(vsubq_s32(v, e)), load(c.one));
    ex = vmulq_laneq_f32(vcvtq_n_f32_s32(e, 23), factor, kExponent);
    log = vfmaq_laneq_f32(load(c.log1), f, factor, kLog0);
  }
  void log23(const Constants& c) noexcept {
    log = vfmaq_f32(load(c.log2), log, f);
    log = vfmaq_f32(load(c.log3), log, f);
  }
  void log456(const Constants& c) noexcept {
    log = vfmaq_f32(load(c.log4), log, f);
    log = vfmaq_f32(load(c.log5), log, f);
    log = vfmaq_f32(load(c.log6), log, f);
  }
  void root() noexcept { r = vsqrtq_f32(vfmaq_f32(ex, log, f)); }
  void square() noexcept {
    angle = vcvtq_n_f32_s32(vreinterpretq_s32_u32(y), 31);  // times 2^-31
    t = vmulq_f32(angle, angle);
  }
  void cos123(const Constants& c, float32x4_t factor) noexcept {
    cosine = vfmaq_laneq_f32(load(c.cos1), t, factor, kCos0);
    cosine = vfmaq_f32(load(c.cos2), cosine, t);
    cosine = vfmaq_f32(load(c.cos3), cosine, t);
  }
  void cos4_sin12(const Constants& c, float32x4_t factor) noexcept {
    cosine = vfmaq_f32(load(c.cos4), cosine, t);
    sine = vfmaq_laneq_f32(load(c.sin1), t, factor, kSin0);
    sine = vfmaq_f32(load(c.sin2), sine, t);
  }
  void sin34(const Constants& c) noexcept {
    sine = vfmaq_f32(load(c.sin3), sine, t);
    sine = vmulq_f32(angle, vfmaq_f32(load(c.sin4), sine, t));
  }
  void finish(const Constants& c, float32x4_t* z) noexcept {
    const float32x4_t signed_r = vbslq_f32(load(c.sign), vreinterpretq_f32_u32(x), r);
    z[0] = vmulq_f32(signed_r, cosine);
    z[1] = vmulq_f32(signed_r, sine);
  }
};

template <unsigned Count>
struct Scales {
  float32x4_t s[Count == 0 ? 1 : Count];
  explicit Scales(const float* scale) noexcept {
    for (unsigned i = 0; i < Count; ++i) s[i] = vdupq_n_f32(scale[i]);
  }
};

// Four vectors of weights, `apart` from each other.
template <unsigned Count>
inline void update(float* w, std::ptrdiff_t apart, const float32x4_t (&z)[4], const Scales<Count>& scale) noexcept {
  float32x4_t v[4] = {z[0], z[1], z[2], z[3]};
  if constexpr (Count != 0) {
    for (int n = 0; n < 4; ++n) v[n] = vld1q_f32(w + n * apart);
    for (unsigned i = 0; i < Count; ++i)
      for (int n = 0; n < 4; ++n) v[n] = vfmaq_f32(v[n], scale.s[i], z[n]);
  }
  for (int n = 0; n < 4; ++n) vst1q_f32(w + n * apart, v[n]);
}

inline void prefetch(const float* block, std::ptrdiff_t ahead, std::ptrdiff_t run_stride) noexcept {
#if defined(__GNUC__) || defined(__clang__)
  for (int run = 0; run < 4; ++run) __builtin_prefetch(block + ahead + run * run_stride, 1);
#endif
}

void words(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept {
  const Keys keys{Schedule(key)};
  const Philox philox;
  for (std::size_t i = 0; i < count; ++i)
    for (unsigned half = 0; half < 16; half += 8) {
      const auto k = philox.words<2>(static_cast<std::uint32_t>((first + i) * 16 + half), keys);
      for (unsigned j = 0; j < 4; ++j)
        for (unsigned n = 0; n < 2; ++n) vst1q_u32(out + 64 * i + 16 * j + half + 4 * n, k[n].x[j]);
    }
}

// Software-pipelined: the steps of the transforms of four quads are interleaved with the rounds of the next four. Every
// sixteenth block is followed by `skip` more elements.
template <unsigned Count>
inline void gaussian(const Walk& walk, const Key& key, const float* scale, std::uint64_t q0, std::uint64_t lane_q,
                     std::uint64_t next_q, std::ptrdiff_t skip) noexcept {
  const std::ptrdiff_t ahead = kAhead * walk.block_stride + skip;
  const Keys keys{Schedule(key)};
  const Scales<Count> scales(scale);
  const Philox philox;
  const float32x4_t factor = factors();
  const std::ptrdiff_t run_stride = walk.run_stride, block_stride = walk.block_stride;
  const uint64x2_t next_four = vdupq_n_u64(4 * lane_q * kMul0);
  const uint64x2_t next_block = vdupq_n_u64((next_q - 12 * lane_q) * kMul0);
  const auto q = static_cast<std::uint32_t>(q0), apart = static_cast<std::uint32_t>(lane_q);
  Words k = philox.words<1>(q, keys, apart)[0];
  Counter counter = philox.counter(q, apart);
  Sources from = {&kConstants, &kConstants, &keys};
  float* block = walk.base;
  for (std::size_t i = 1; i <= walk.count; ++i, block += block_stride + (i % 16 == 1 ? skip : 0)) {
    prefetch(block, ahead, run_stride);
#if defined(__GNUC__) || defined(__clang__)
#pragma GCC unroll 4
#endif
    for (unsigned lane = 0; lane < 16; lane += 4) {
      Transform a(k, 0), b(k, 1);
      Words n;
      counter.add(lane < 12 ? next_four : next_block);
      a.split(*from.a);
      b.split(*from.b);
      philox.first(counter, *from.keys, n);
      barrier(from, n.x[0], n.x[2], a.e, b.e);
      philox.second(*from.keys, n);
      a.log1(*from.a, factor);
      b.log1(*from.b, factor);
      barrier(from, n.x[0], n.x[2], a.log, b.log);
      philox.third(*from.keys, n);
      a.log23(*from.a);
      b.log23(*from.b);
      a.square();
      b.square();
      barrier(from, n.x[0], n.x[2], a.log, b.log);
      philox.round(4, *from.keys, n);
      a.log456(*from.a);
      b.log456(*from.b);
      barrier(from, n.x[0], n.x[2], a.log, b.log);
      philox.round(5, *from.keys, n);
      a.root();
      a.cos123(*from.a, factor);
      b.cos123(*from.b, factor);
      barrier(from, n.x[0], n.x[2], a.cosine, b.cosine);
      philox.round(6, *from.keys, n);
      b.root();
      a.cos4_sin12(*from.a, factor);
      b.cos4_sin12(*from.b, factor);
      barrier(from, n.x[0], n.x[2], a.sine, b.sine);
      philox.round(7, *from.keys, n);
      a.sin34(*from.a);
      b.sin34(*from.b);
      float32x4_t z[4];
      a.finish(*from.a, z);
      b.finish(*from.b, z + 2);
      update(block + lane, run_stride, z, scales);
      k = n;
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
  const Keys keys{Schedule(key)};
  const Scales<Count> scales(scale);
  const Philox philox;
  const uint32x4_t one = vdupq_n_u32(0x3F800000u << 1);  // the bits of 1.0 without the sign
  std::array<Words, 2> bits[2] = {};                     // the words of one superblock of 32 blocks, by halves
  std::uint64_t held = ~std::uint64_t{0};
  const auto [base, run_stride, block_stride, first, step, count] = walk;
  float* block = base;
  std::uint64_t b = first;
  for (std::size_t i = 0; i < count; ++i, block += block_stride, b += step) {
    if (b >> 5 != held) {
      held = b >> 5;
      for (unsigned half = 0; half < 2; ++half)
        bits[half] = philox.words<2>(static_cast<std::uint32_t>(held * 16 + half * 8), keys);
    }
    const unsigned row = static_cast<unsigned>(b & 31) * 4;  // the 4 rows of a block share a word
    const int32x4_t shift = vdupq_n_s32(static_cast<int>(row & 31));
    uint32x4_t k[4];
    for (unsigned g = 0; g < 4; ++g) k[g] = vshlq_u32(bits[g / 2][g % 2].x[row >> 5], shift);
    prefetch(block, kAhead * block_stride, run_stride);
    for (int run = 0; run < 4; ++run) {
      float32x4_t z[4];
      for (unsigned g = 0; g < 4; ++g) {
        z[g] = vreinterpretq_f32_u32(vsriq_n_u32(k[g], one, 1));  // 1.0 with the top bit of k as its sign
        k[g] = vaddq_u32(k[g], k[g]);
      }
      update(block + run * run_stride, 4, z, scales);
    }
  }
}

void shrink(float* w, std::size_t n, float decay) noexcept {
  const float32x4_t c = vdupq_n_f32(decay);
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    float32x4_t v[4];
    for (unsigned g = 0; g < 4; ++g) v[g] = vld1q_f32(w + i + 4 * g);
    for (unsigned g = 0; g < 4; ++g) vst1q_f32(w + i + 4 * g, vfmsq_f32(v[g], c, v[g]));
  }
  shrink_rest(w + i, n - i, decay);
}

void axpy(float* w, const float* z, float scale, std::size_t n) noexcept {
  const float32x4_t s = vdupq_n_f32(scale);
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    float32x4_t v[4];
    for (unsigned g = 0; g < 4; ++g) v[g] = vfmaq_f32(vld1q_f32(w + i + 4 * g), s, vld1q_f32(z + i + 4 * g));
    for (unsigned g = 0; g < 4; ++g) vst1q_f32(w + i + 4 * g, v[g]);
  }
  axpy_rest(w + i, z + i, scale, n - i);
}

void dot(double* sums, const float* a, const float* b, std::size_t n) noexcept {
  float64x2_t s[8];
  for (unsigned g = 0; g < 8; ++g) s[g] = vld1q_f64(sums + 2 * g);
  for (std::size_t i = 0; i < n; i += 16)
    for (unsigned g = 0; g < 4; ++g) {
      const float32x4_t x = vld1q_f32(a + i + 4 * g), y = vld1q_f32(b + i + 4 * g);
      s[2 * g] = vfmaq_f64(s[2 * g], vcvt_f64_f32(vget_low_f32(x)), vcvt_f64_f32(vget_low_f32(y)));
      s[2 * g + 1] = vfmaq_f64(s[2 * g + 1], vcvt_high_f64_f32(x), vcvt_high_f64_f32(y));
    }
  for (unsigned g = 0; g < 8; ++g) vst1q_f64(sums + 2 * g, s[g]);
}

// For `outer`.
struct Rows {
  template <unsigned Count, unsigned Rank>
  static void outer(const Outer& o, const float* scale) noexcept {
    const unsigned rank = Rank != 0 ? Rank : o.rank;
    const std::ptrdiff_t ahead = outer_ahead(o);
    const Scales<Count> scales(scale);
    for (std::size_t row = 0; row < o.rows; ++row) {
      float32x4_t a[Rank != 0 ? Rank : kMaxRank];
      for (unsigned k = 0; k < rank; ++k) a[k] = vdupq_n_f32(o.a[k * kStrideA + row]);
      float* const w = o.w + row * o.stride;
      std::size_t i = 0;
      for (; i + 16 <= o.columns; i += 16) {
#if defined(__GNUC__) || defined(__clang__)
        __builtin_prefetch(w + i + ahead, 1);
#endif
        float32x4_t z[4];
        for (unsigned g = 0; g < 4; ++g) z[g] = vmulq_f32(a[0], vld1q_f32(o.b + i + 4 * g));
        for (unsigned k = 1; k < rank; ++k)
          for (unsigned g = 0; g < 4; ++g) z[g] = vfmaq_f32(z[g], a[k], vld1q_f32(o.b + k * kStrideB + i + 4 * g));
        update(w + i, 4, z, scales);
      }
      for (; i + 4 <= o.columns; i += 4) {
        float32x4_t z = vmulq_f32(a[0], vld1q_f32(o.b + i));
        for (unsigned k = 1; k < rank; ++k) z = vfmaq_f32(z, a[k], vld1q_f32(o.b + k * kStrideB + i));
        if constexpr (Count != 0) {
          float32x4_t v = vld1q_f32(w + i);
          for (unsigned s = 0; s < Count; ++s) v = vfmaq_f32(v, scales.s[s], z);
          z = v;
        }
        vst1q_f32(w + i, z);
      }
      outer_rest<Count>(o, scale, row, i);
    }
  }
};

void transpose(float* out, const float* in) noexcept {
  for (std::size_t lane = 0; lane < 16; lane += 4)
    for (std::size_t i = 0; i < 64; i += 4) {  // 4 x 4: pairs of rows, then pairs of these
      float64x2_t pair[4];
      for (std::size_t r = 0; r < 4; r += 2) {
        const float32x4_t a = vld1q_f32(in + 64 * (lane + r) + i), b = vld1q_f32(in + 64 * (lane + r + 1) + i);
        pair[r] = vreinterpretq_f64_f32(vtrn1q_f32(a, b));      // columns 0 and 2
        pair[r + 1] = vreinterpretq_f64_f32(vtrn2q_f32(a, b));  // columns 1 and 3
      }
      for (std::size_t c = 0; c < 2; ++c) {
        vst1q_f32(out + 16 * (i + c) + lane, vreinterpretq_f32_f64(vtrn1q_f64(pair[c], pair[c + 2])));
        vst1q_f32(out + 16 * (i + c + 2) + lane, vreinterpretq_f32_f64(vtrn2q_f64(pair[c], pair[c + 2])));
      }
    }
}

// ---- 16-bit storage ----------------------------------------------------------------------------------------------

// With the conversions that every ARMv8 has.
struct Fp16 {
  static float32x4_t widen(uint16x4_t h) noexcept { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
  static uint16x4_t narrow(float32x4_t w) noexcept { return vreinterpret_u16_f16(vcvt_f16_f32(w)); }
  static float32x4_t nearest(float32x4_t w) noexcept { return widen(narrow(w)); }
  static float32x4_t stochastic(float32x4_t w, uint32x4_t r) noexcept {
    const uint32x4_t m = vreinterpretq_u32_f32(vabsq_f32(w));
    r = vshrq_n_u32(r, 3);  // one random bit for each bit that is cut off
    const uint32x4_t up = vaddq_u32(m, r);
    const uint32x4_t large = vcgeq_u32(up, vdupq_n_u32(kFp16TooLarge));
    const uint32x4_t beyond = vmaxq_u32(m, vdupq_n_u32(kInfinity));  // a NaN stays a NaN
    const uint32x4_t normal = vbslq_u32(large, beyond, vbicq_u32(up, vdupq_n_u32(0x1FFF)));
    // Subnormal results, in units of 2^-24.
    const float32x4_t units = vfmaq_f32(vcvtq_n_f32_u32(r, 13), vreinterpretq_f32_u32(m), vdupq_n_f32(0x1p24f));
    const float32x4_t small = vcvtq_n_f32_u32(vcvtq_u32_f32(units), 24);
    const uint32x4_t is_small = vcltq_u32(m, vdupq_n_u32(kFp16Normal));
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
void widen(float* out, const std::uint16_t* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8) {
    const uint16x8_t h = vld1q_u16(in + i);
    vst1q_f32(out + i, Format::widen(vget_low_u16(h)));
    vst1q_f32(out + i + 4, Format::widen(vget_high_u16(h)));
  }
}

template <typename Format>
void narrow(std::uint16_t* out, const float* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 8)
    vst1q_u16(out + i, vcombine_u16(Format::narrow(vld1q_f32(in + i)), Format::narrow(vld1q_f32(in + i + 4))));
}

template <typename Format>
void round_nearest(float* w, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 4) vst1q_f32(w + i, Format::nearest(vld1q_f32(w + i)));
}

template <typename Format>
void round_stochastic(float* w, const std::uint32_t* words, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; i += 32)  // two runs, which share a pair of words
    for (std::size_t lane = i; lane < i + 16; lane += 4) {
      uint32x4_t k = vaddq_u32(vld1q_u32(words + lane), vld1q_u32(words + lane + 16));
      k = vmulq_n_u32(k, kDither[i / 32 % 2]);
      k = veorq_u32(k, vshrq_n_u32(k, 16));
      float *const even = w + lane, *const odd = even + 16;
      vst1q_f32(even, Format::stochastic(vld1q_f32(even), vandq_u32(k, vdupq_n_u32(0xFFFF))));
      vst1q_f32(odd, Format::stochastic(vld1q_f32(odd), vshrq_n_u32(k, 16)));
    }
}

}  // namespace

const KernelSet kNeon = {
    "neon",
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
