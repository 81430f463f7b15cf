// Copies between a tensor's own order and onnxruntime's, and the hash by which onnxruntime identifies a packed buffer.
#include "packing.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "pocketzo/kernels.h"
#include "pool.h"

namespace pocketzo {
namespace {

constexpr std::uint64_t kPiece = 1u << 16;  // elements: a unit, as in job.h

struct Copy {
  float* packed;
  const Packing* packing;
  float* values;
  std::uint64_t offset, n;
  void (*copy)(const Copy& job, std::uint64_t at, std::uint64_t n) noexcept;
};

void work(Units& units, const void* context) noexcept {
  const Copy& job = *static_cast<const Copy*>(context);
  std::uint64_t unit = 0;
  while (units.take(unit)) job.copy(job, unit * kPiece, std::min(kPiece, job.n - unit * kPiece));
}

std::uint32_t word(const unsigned char* data) noexcept {
  std::uint32_t w;
  std::memcpy(&w, data, sizeof w);
  return w;
}

std::uint32_t mixed(std::uint32_t h) noexcept {
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}

}  // namespace

void pack(float* packed, const Packing& packing, const float* values, std::uint64_t offset, std::uint64_t n) noexcept {
  const Copy job = {packed,
                    &packing,
                    const_cast<float*>(values),
                    offset,
                    n,
                    [](const Copy& c, std::uint64_t at, std::uint64_t count) noexcept {
                      scatter(c.packed, *c.packing, c.values + at, c.offset + at, count);
                    }};
  run((n + kPiece - 1) / kPiece, work, &job);
}

void unpack(const float* packed, const Packing& packing, float* values, std::uint64_t offset,
            std::uint64_t n) noexcept {
  const Copy job = {const_cast<float*>(packed),
                    &packing,
                    values,
                    offset,
                    n,
                    [](const Copy& c, std::uint64_t at, std::uint64_t count) noexcept {
                      gather(c.packed, *c.packing, c.values + at, c.offset + at, count);
                    }};
  run((n + kPiece - 1) / kPiece, work, &job);
}

void take(const float* packed, const Packing& packing, const std::uint64_t* rows, std::uint64_t count,
          float* values) noexcept {
  const std::uint64_t width = packing.transposed ? packing.rows : packing.columns;
  for (std::uint64_t i = 0; i < count; ++i) gather(packed, packing, values + i * width, rows[i] * width, width);
}

// MurmurHash3_x86_128 (Austin Appleby, public domain), for the sizes of packed buffers, which are multiples of 16.
std::uint64_t packed_hash(const void* data, std::size_t bytes) noexcept {
  constexpr std::uint32_t kFactor[4] = {0x239B961Bu, 0xAB0E9789u, 0x38B34AE5u, 0xA1E38B93u};
  constexpr std::uint32_t kSum[4] = {0x561CCD1Bu, 0x0BCAA747u, 0x96CD1C35u, 0x32AC3B17u};
  constexpr int kInner[4] = {15, 16, 17, 18}, kOuter[4] = {19, 17, 15, 13};
  std::uint32_t h[4] = {};
  const auto* at = static_cast<const unsigned char*>(data);
  for (const unsigned char* end = at + bytes; at != end; at += 16)
    for (int i = 0; i < 4; ++i) {
      h[i] ^= std::rotl(word(at + 4 * i) * kFactor[i], kInner[i]) * kFactor[(i + 1) % 4];
      h[i] = (std::rotl(h[i], kOuter[i]) + h[(i + 1) % 4]) * 5 + kSum[i];
    }
  const auto stir = [&h] {
    for (int i = 1; i < 4; ++i) h[0] += h[i];
    for (int i = 1; i < 4; ++i) h[i] += h[0];
  };
  for (std::uint32_t& part : h) part ^= static_cast<std::uint32_t>(bytes);
  stir();
  for (std::uint32_t& part : h) part = mixed(part);
  stir();
  return std::uint64_t{h[1]} << 32 | (h[0] & ~7u);
}

}  // namespace pocketzo
