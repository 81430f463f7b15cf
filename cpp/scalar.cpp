// The specification as code: one element at a time, no tricks. Every other set must give the same bits.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "sets.h"

namespace pocketzo {
namespace {

struct Quad {
  std::uint32_t x[4];
};

Quad philox(Quad counter, std::uint32_t k0, std::uint32_t k1, int rounds) noexcept {
  Quad c = counter;
  for (int r = 0; r < rounds; ++r) {
    const std::uint64_t p0 = std::uint64_t{kMul0} * c.x[0];
    const std::uint64_t p1 = std::uint64_t{kMul1} * c.x[2];
    c = {{static_cast<std::uint32_t>(p1 >> 32) ^ c.x[1] ^ k0, static_cast<std::uint32_t>(p1),
          static_cast<std::uint32_t>(p0 >> 32) ^ c.x[3] ^ k1, static_cast<std::uint32_t>(p0)}};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

Quad quad(const Key& key, std::uint64_t q) noexcept {
  return philox({{static_cast<std::uint32_t>(q), key.word[2], key.word[3], 0}}, key.word[0], key.word[1], kRounds);
}

template <int N>
float horner(const float (&coefficient)[N], float t) noexcept {
  float p = coefficient[0];
  for (int i = 1; i < N; ++i) p = std::fma(p, t, coefficient[i]);
  return p;
}

struct Pair {
  float cosine, sine;
};

Pair box_muller(std::uint32_t x, std::uint32_t y) noexcept {
  const float v = std::fabs(static_cast<float>(static_cast<std::int32_t>(x | 1)));
  const std::int32_t d = std::bit_cast<std::int32_t>(v) - kSqrtHalf2p31;
  const float ex = static_cast<float>(d >> 23);
  const float f = std::bit_cast<float>((d & kMantissa) + kSqrtHalf) - 1.0f;
  const float square = std::fma(horner(kLog, f), f, ex * kMinusTwoLn2);
  // copysign, not negation: the root may be -0 (SPEC.md, section 2).
  const float r = std::copysign(std::sqrt(square), std::bit_cast<float>(x));
  const float angle = static_cast<float>(static_cast<std::int32_t>(y)) * 0x1p-31f;
  const float t = angle * angle;
  return {r * horner(kCos, t), r * (angle * horner(kSin, t))};
}

template <unsigned Count>
float apply_scales(float w, float z, const float* scale) noexcept {
  if (Count == 0) return z;
  for (unsigned i = 0; i < Count; ++i) w = std::fma(scale[i], z, w);
  return w;
}

void words(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept {
  for (std::size_t i = 0; i < count; ++i)
    for (unsigned lane = 0; lane < 16; ++lane) {
      const Quad k = quad(key, (first + i) * 16 + lane);
      for (unsigned j = 0; j < 4; ++j) out[64 * i + 16 * j + lane] = k.x[j];
    }
}

template <unsigned Count>
void gaussian(const Walk& walk, const Key& key, const float* scale) noexcept {
  for (std::size_t i = 0; i < walk.count; ++i) {
    float* block = walk.base + static_cast<std::ptrdiff_t>(i) * walk.block_stride;
    for (unsigned lane = 0; lane < 16; ++lane) {
      const Quad k = quad(key, (walk.first + i * walk.step) * 16 + lane);
      const Pair a = box_muller(k.x[0], k.x[1]), b = box_muller(k.x[2], k.x[3]);
      const float z[4] = {a.cosine, a.sine, b.cosine, b.sine};
      for (unsigned slot = 0; slot < 4; ++slot) {
        float& w = block[slot * walk.run_stride + lane];
        w = apply_scales<Count>(w, z[slot], scale);
      }
    }
  }
}

template <unsigned Count>
void gaussian_across(const Across& across, const Key& key, const float* scale) noexcept {
  for (std::size_t tile = 0; tile < across.tiles; ++tile)
    for (std::size_t row = 0; row < 16; ++row)
      for (std::size_t lane = 0; lane < 16; ++lane) {
        const Quad k = quad(key, (across.first + tile + row * across.apart) * 16 + lane);
        const Pair a = box_muller(k.x[0], k.x[1]), b = box_muller(k.x[2], k.x[3]);
        const float z[4] = {a.cosine, a.sine, b.cosine, b.sine};
        for (std::size_t slot = 0; slot < 4; ++slot) {
          float& w = across.base[(tile * 64 + slot * 16 + lane) * 16 + row];
          w = apply_scales<Count>(w, z[slot], scale);
        }
      }
}

template <unsigned Count>
void rademacher(const Walk& walk, const Key& key, const float* scale) noexcept {
  for (std::size_t i = 0; i < walk.count; ++i) {
    float* block = walk.base + static_cast<std::ptrdiff_t>(i) * walk.block_stride;
    const std::uint64_t b = walk.first + i * walk.step;
    for (unsigned lane = 0; lane < 16; ++lane) {
      const Quad k = quad(key, (b >> 5) * 16 + lane);
      for (unsigned run = 0; run < 4; ++run) {
        const unsigned j = static_cast<unsigned>(b & 31) * 4 + run;
        const float u = (k.x[j >> 5] >> (31 - (j & 31)) & 1) != 0 ? -1.0f : 1.0f;
        float& w = block[run * walk.run_stride + lane];
        w = apply_scales<Count>(w, u, scale);
      }
    }
  }
}

void shrink(float* w, std::size_t n, float decay) noexcept {
  for (std::size_t i = 0; i < n; ++i) w[i] = std::fma(-decay, w[i], w[i]);
}

void axpy(float* w, const float* z, float scale, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) w[i] = std::fma(scale, z[i], w[i]);
}

void dot(double* sums, const float* a, const float* b, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) sums[i % 16] = std::fma(double{a[i]}, double{b[i]}, sums[i % 16]);
}

template <unsigned Count>
void outer(const Outer& o, const float* scale) noexcept {
  for (std::size_t row = 0; row < o.rows; ++row) outer_rest<Count>(o, scale, row, 0);
}

void transpose(float* out, const float* in) noexcept {
  for (std::size_t i = 0; i < 64; ++i)
    for (std::size_t lane = 0; lane < 16; ++lane) out[16 * i + lane] = in[64 * lane + i];
}

// ---- 16-bit storage: w are the bits of fp32 values, r is uniform in 0 .. 2^16 - 1 ---------------------------------

struct Fp16 {
  static std::uint32_t widen(std::uint16_t h) noexcept {
    const std::uint32_t sign = (h & 0x8000u) << 16, m = h & 0x7FFFu;
    if (m < 0x0400) return sign | std::bit_cast<std::uint32_t>(static_cast<float>(m) * 0x1p-24f);
    if (m >= 0x7C00) return sign | kInfinity | (m & 0x3FF) << 13;
    return sign | ((m << 13) + (112u << 23));
  }
  static std::uint16_t narrow(std::uint32_t w) noexcept {
    const std::uint32_t sign = w >> 16 & 0x8000u, m = w & ~kSign;
    std::uint32_t h;
    if (m > kInfinity)
      h = 0x7E00;              // a NaN
    else if (m < kFp16Normal)  // subnormal: adding 0.5, whose unit is 2^-24, rounds
      h = std::bit_cast<std::uint32_t>(std::bit_cast<float>(m) + 0.5f) - std::bit_cast<std::uint32_t>(0.5f);
    else
      h = m >= kFp16TooLarge ? 0x7C00 : (m + 0xFFF + (m >> 13 & 1) - (112u << 23)) >> 13;
    return static_cast<std::uint16_t>(sign | h);
  }
  static std::uint32_t nearest(std::uint32_t w) noexcept { return widen(narrow(w)); }
  static std::uint32_t stochastic(std::uint32_t w, std::uint32_t r) noexcept {
    const std::uint32_t sign = w & kSign, m = w & ~kSign;
    r >>= 3;  // one random bit for each bit that is cut off
    if (m < kFp16Normal) {
      const float units = std::fma(std::bit_cast<float>(m), 0x1p24f, static_cast<float>(r) * 0x1p-13f);
      const float cut = static_cast<float>(static_cast<std::int32_t>(units));
      return sign | std::bit_cast<std::uint32_t>(cut * 0x1p-24f);
    }
    return sign | (m + r >= kFp16TooLarge ? std::max(m, kInfinity) : (m + r) & ~0x1FFFu);
  }
};

struct Bf16 {
  static std::uint32_t widen(std::uint16_t h) noexcept { return std::uint32_t{h} << 16; }
  static std::uint16_t narrow(std::uint32_t w) noexcept { return static_cast<std::uint16_t>(nearest(w) >> 16); }
  static std::uint32_t nearest(std::uint32_t w) noexcept { return stochastic(w, 0x7FFF + (w >> 16 & 1)); }
  static std::uint32_t stochastic(std::uint32_t w, std::uint32_t r) noexcept { return (w + r) & 0xFFFF0000u; }
};

template <typename Format>
void widen(float* out, const std::uint16_t* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) out[i] = std::bit_cast<float>(Format::widen(in[i]));
}

template <typename Format>
void narrow(std::uint16_t* out, const float* in, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) out[i] = Format::narrow(std::bit_cast<std::uint32_t>(in[i]));
}

template <typename Format>
void round_nearest(float* w, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) w[i] = std::bit_cast<float>(Format::nearest(std::bit_cast<std::uint32_t>(w[i])));
}

template <typename Format>
void round_stochastic(float* w, const std::uint32_t* words, std::size_t n) noexcept {
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t slot = i / 16 % 4, pair = slot / 2;
    const std::uint32_t* x = words + (i / 64 * 64 + 32 * pair + i % 16);
    std::uint32_t k = (x[0] + x[16]) * kDither[pair];
    k ^= k >> 16;
    const std::uint32_t r = slot % 2 == 0 ? k & 0xFFFF : k >> 16;
    w[i] = std::bit_cast<float>(Format::stochastic(std::bit_cast<std::uint32_t>(w[i]), r));
  }
}

}  // namespace

Key subkey(std::uint64_t seed, std::uint32_t tensor, std::uint64_t draw, std::uint32_t window) noexcept {
  const Quad k = philox({{static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(draw >> 32), tensor, window}},
                        static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32), kKeyRounds);
  return {{k.x[0], k.x[1], k.x[2], k.x[3]}};
}

const KernelSet kScalar = {
    "scalar",
    words,
    {gaussian<0>, gaussian<1>, gaussian<2>, gaussian<3>},
    {rademacher<0>, rademacher<1>, rademacher<2>, rademacher<3>},
    {gaussian_across<1>, gaussian_across<2>, gaussian_across<3>},
    shrink,
    axpy,
    dot,
    {outer<0>, outer<1>, outer<2>, outer<3>},
    transpose,
    {widen<Fp16>, narrow<Fp16>, round_nearest<Fp16>, round_stochastic<Fp16>},
    {widen<Bf16>, narrow<Bf16>, round_nearest<Bf16>, round_stochastic<Bf16>},
};

}  // namespace pocketzo
