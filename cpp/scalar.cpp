// The specification as code: one element at a time, no trick. Every other set must give these bits.
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
  // copysign, not negation: the root of the smallest square is -0.
  const float r = std::copysign(std::sqrt(square), std::bit_cast<float>(x));
  const float angle = static_cast<float>(static_cast<std::int32_t>(y)) * 0x1p-31f;
  const float t = angle * angle;
  return {r * horner(kCos, t), r * (angle * horner(kSin, t))};
}

float apply_scales(float w, float z, const float* scale, unsigned count) noexcept {
  if (count == 0) return z;
  for (unsigned i = 0; i < count; ++i) w = std::fma(scale[i], z, w);
  return w;
}

void words(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept {
  for (std::size_t i = 0; i < count; ++i)
    for (unsigned lane = 0; lane < 16; ++lane) {
      const Quad k = quad(key, (first + i) * 16 + lane);
      for (unsigned j = 0; j < 4; ++j) out[64 * i + 16 * j + lane] = k.x[j];
    }
}

void gaussian(const Walk& walk, const Key& key, const float* scale, unsigned scale_count) noexcept {
  for (std::size_t i = 0; i < walk.count; ++i) {
    float* block = walk.base + static_cast<std::ptrdiff_t>(i) * walk.block_stride;
    for (unsigned lane = 0; lane < 16; ++lane) {
      const Quad k = quad(key, (walk.first + i * walk.step) * 16 + lane);
      const Pair a = box_muller(k.x[0], k.x[1]), b = box_muller(k.x[2], k.x[3]);
      const float z[4] = {a.cosine, a.sine, b.cosine, b.sine};
      for (unsigned slot = 0; slot < 4; ++slot) {
        float& w = block[slot * walk.run_stride + lane];
        w = apply_scales(w, z[slot], scale, scale_count);
      }
    }
  }
}

void rademacher(const Walk& walk, const Key& key, const float* scale, unsigned scale_count) noexcept {
  for (std::size_t i = 0; i < walk.count; ++i) {
    float* block = walk.base + static_cast<std::ptrdiff_t>(i) * walk.block_stride;
    const std::uint64_t b = walk.first + i * walk.step;
    for (unsigned lane = 0; lane < 16; ++lane) {
      const Quad k = quad(key, (b >> 5) * 16 + lane);
      for (unsigned run = 0; run < 4; ++run) {
        const unsigned j = static_cast<unsigned>(b & 31) * 4 + run;
        const float u = (k.x[j >> 5] >> (31 - (j & 31)) & 1) != 0 ? -1.0f : 1.0f;
        float& w = block[run * walk.run_stride + lane];
        w = apply_scales(w, u, scale, scale_count);
      }
    }
  }
}

void shrink(float* w, std::size_t n, float decay) noexcept {
  for (std::size_t i = 0; i < n; ++i) w[i] = std::fma(-decay, w[i], w[i]);
}

}  // namespace

Key subkey(std::uint64_t seed, std::uint32_t tensor, std::uint64_t draw, std::uint32_t window) noexcept {
  const Quad k = philox({{static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(draw >> 32), tensor, window}},
                        static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32), kKeyRounds);
  return {{k.x[0], k.x[1], k.x[2], k.x[3]}};
}

const KernelSet kScalar = {"scalar", words, gaussian, rademacher, shrink};

}  // namespace pocketzo
