// One call of `apply` or `generate`, and how its elements are divided: segments into units, which threads take one by
// one, units into tiles, which stay in the first-level cache, tiles into blocks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernel_set.h"
#include "pocketzo/kernels.h"

namespace pocketzo {

inline constexpr std::uint64_t kBlock = 64;       // elements
inline constexpr std::uint64_t kTile = 1u << 12;  // 16 KiB: fits the L1 of an in-order core beside the stack
inline constexpr std::uint64_t kUnit = 1u << 16;  // 256 KiB: 25 us of a fast core, so a slow one never holds up the end
inline constexpr std::size_t kKeptKeys = 8;  // a unit keeps the subkeys of so many terms instead of making them a tile

struct Job {
  const KernelSet* set;
  const Segment* segments;
  std::size_t segment_count;
  const Term* terms;
  std::size_t term_count;
  bool write;  // the single term's z is stored

  bool moves(const Term& term) const noexcept { return write || term.count != 0; }
};

inline KernelSet::Kernel kernel_of(const KernelSet& set, Distribution distribution, unsigned scale_count) noexcept {
  return (distribution == Distribution::gaussian ? set.gaussian : set.rademacher)[scale_count];
}
inline KernelSet::Kernel kernel_of(const KernelSet& set, const Term& term) noexcept {
  return kernel_of(set, term.distribution, term.count);
}

// A subkey serves 2^34 elements of normals (and of bits to round by) and 2^39 of signs; units are cut at multiples of
// kUnit and straddle neither.
inline Key key_at(const Term& term, std::uint32_t tensor, std::uint64_t element) noexcept {
  const std::uint32_t window = term.distribution == Distribution::gaussian
                                   ? static_cast<std::uint32_t>(element >> 34)
                                   : static_cast<std::uint32_t>(element >> 39) | 0x80000000u;
  return subkey(term.seed, tensor, term.draw, window);
}

// The subkeys of a job's terms for one unit.
class Keys {
 public:
  Keys(const Job& job, std::uint32_t tensor, std::uint64_t element) noexcept
      : job_(job), tensor_(tensor), element_(element), keep_(job.term_count <= kKeptKeys) {
    for (std::size_t t = 0; keep_ && t < job.term_count; ++t) kept_[t] = key_at(job.terms[t], tensor, element);
  }
  Key operator[](std::size_t t) const noexcept { return keep_ ? kept_[t] : key_at(job_.terms[t], tensor_, element_); }

 private:
  const Job& job_;
  std::uint32_t tensor_;
  std::uint64_t element_;
  bool keep_;
  Key kept_[kKeptKeys];
};

// The elements of a unit of neighbours.
struct Range {
  std::uint64_t begin, end;
};

// Of a segment that is not empty.
inline std::uint64_t ranges_of(const Segment& s) noexcept {
  return (s.offset + s.size - 1) / kUnit - s.offset / kUnit + 1;
}

inline Range range_of(const Segment& s, std::uint64_t number) noexcept {
  constexpr std::uint64_t kMaxElement = ~std::uint64_t{0};
  const std::uint64_t grid = (s.offset / kUnit + number) * kUnit, last = s.offset + s.size;
  return {std::max(s.offset, grid), grid > kMaxElement - kUnit ? last : std::min(last, grid + kUnit)};
}

// Applies the terms of a job to n neighbours in memory, from logical element e on.
void apply_terms(const Job& job, const Keys& keys, float* w, std::uint64_t e, std::uint64_t n) noexcept;

// Segments with a packing: how many units they have, and one of them.
std::uint64_t packed_units_of(const Segment& s) noexcept;
void apply_packed(const Job& job, const Segment& s, std::uint64_t number) noexcept;

// One unit, that is range, of 16-bit weights.
void apply_16bit(const Job& job, const Segment& s, std::uint64_t number) noexcept;

}  // namespace pocketzo
