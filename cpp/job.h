// One call of `apply` or `generate`, and the division of its elements: segments into units, which threads take one by
// one; units into tiles, which fit the L1 cache; tiles into blocks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernel_set.h"
#include "pocketzo/kernels.h"

namespace pocketzo {

inline constexpr std::uint64_t kBlock = 64;       // elements
inline constexpr std::uint64_t kTile = 1u << 12;  // 16 KiB: fits the L1 cache of an in-order core, with the stack
inline constexpr std::uint64_t kTileMomentum = kTile / 2;  // weights, momentum and noise
inline constexpr std::uint64_t kSection = kTile / 2;       // of two vectors; SPEC.md, section 6, sums by it
inline constexpr std::uint64_t kUnit = 1u << 16;  // 256 KiB: 25 us on a fast core, so a slow one never delays the end
inline constexpr std::size_t kKeptKeys = 8;  // up to so many terms, subkeys are computed once a unit, not once a tile

struct Job {
  const KernelSet* set;
  const Segment* segments;
  std::size_t segment_count;
  const Term* terms;
  std::size_t term_count;
  bool write;     // store the single term's z instead of applying it
  bool momentum;  // a term gathers or follows the momentum
  bool low_rank;  // the terms have a rank

  bool uses_noise(const Term& term) const noexcept { return write || (term.count != 0 && term.role != Role::follow); }
  // Whether the term after term t applies the same z.
  bool repeats(std::size_t t) const noexcept {
    if (t + 1 >= term_count || !uses_noise(terms[t]) || !uses_noise(terms[t + 1])) return false;
    const Term &a = terms[t], &b = terms[t + 1];
    return a.draw == b.draw && a.seed == b.seed && a.distribution == b.distribution;
  }
  // The momentum of a segment's element e.
  float* momentum_at(const Segment& s, std::uint64_t e) const noexcept {
    return momentum ? s.momentum + (e - s.offset) : nullptr;
  }
};

inline KernelSet::Kernel kernel_of(const KernelSet& set, Distribution distribution, unsigned scale_count) noexcept {
  return (distribution == Distribution::gaussian ? set.gaussian : set.rademacher)[scale_count];
}
inline KernelSet::Kernel kernel_of(const KernelSet& set, const Term& term) noexcept {
  return kernel_of(set, term.distribution, term.count);
}

// A subkey covers 2^34 elements of normals (and of random bits for rounding) and 2^39 of signs. Units end at multiples
// of kUnit, so none crosses such a window.
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

// Segments in logical order are divided at the multiples of kUnit: the elements of one such unit, and the number of
// units of a segment that is not empty.
struct Range {
  std::uint64_t begin, end;
};

inline std::uint64_t ranges_of(const Segment& s) noexcept {
  return (s.offset + s.size - 1) / kUnit - s.offset / kUnit + 1;
}

inline Range range_of(const Segment& s, std::uint64_t unit) noexcept {
  constexpr std::uint64_t kMaxElement = ~std::uint64_t{0};
  const std::uint64_t grid = (s.offset / kUnit + unit) * kUnit, last = s.offset + s.size;
  return {std::max(s.offset, grid), grid > kMaxElement - kUnit ? last : std::min(last, grid + kUnit)};
}

// Applies the terms of a job to n contiguous elements, the first of which is logical element e, and to their momentum.
// Of a job with momentum, the elements are within a multiple of kTileMomentum and the next.
void apply_terms(const Job& job, const Keys& keys, float* w, float* m, std::uint64_t e, std::uint64_t n) noexcept;

// The number of units of a segment with a packing, and the work on one of them.
std::uint64_t packed_units_of(const Job& job, const Segment& s) noexcept;
void apply_packed(const Job& job, const Segment& s, std::uint64_t unit) noexcept;

// The same of a matrix, for terms with a rank.
inline bool is_low_rank(const Job& job, const Segment& s) noexcept {
  return job.low_rank && (s.packing != nullptr || s.columns != 0);
}
std::uint64_t low_rank_units_of(const Segment& s) noexcept;
void apply_low_rank(const Job& job, const Segment& s, std::uint64_t unit) noexcept;

// The work on one unit of 16-bit weights.
void apply_16bit(const Job& job, const Segment& s, std::uint64_t unit) noexcept;

}  // namespace pocketzo
