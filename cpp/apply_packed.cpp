// Segments with a packing.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "job.h"
#include "packing.h"

namespace pocketzo {
namespace {

// Whole blocks of a packed matrix are worked on where they lie if each is four panels of one row, or, of a transposed
// one, in a tile that is turned round. Else elements are gathered: small matrices, and a vocabulary of odd size.
bool in_rows(const Packing& p) noexcept { return !p.transposed && p.columns % kBlock == 0; }
bool in_transposed_rows(const Packing& p) noexcept { return p.transposed && p.rows % kBlock == 0; }

constexpr std::uint64_t kGroup = 256;  // columns of a unit: with blocks of 256 rows, as many elements as kUnit
constexpr std::uint64_t kHeight = kUnit / kPanel;  // rows of a unit that is part of one panel

// Up to 256 columns of one block of rows.
void apply_rows(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const Packing& p = *s.packing;
  const std::uint64_t across = (p.columns + kGroup - 1) / kGroup;
  const std::uint64_t top = number / across * p.depth, left = number % across * kGroup;
  const std::uint64_t height = std::min(p.depth, p.rows - top);
  const Keys keys(job, s.tensor, 0);
  const std::uint64_t tile = job.term_count == 1 ? p.depth : kTile / kBlock;
  for (std::uint64_t n = left; n < std::min(left + kGroup, p.columns); n += kBlock)
    for (std::uint64_t k = 0; k < height; k += tile) {
      const auto count = static_cast<std::size_t>(std::min(tile, height - k));
      const auto apart = static_cast<std::ptrdiff_t>(kPanel * height);
      const Walk walk = {static_cast<float*>(s.data) + place(p, top + k, n),
                         apart,
                         static_cast<std::ptrdiff_t>(kPanel),
                         ((top + k) * p.columns + n) / kBlock,
                         p.columns / kBlock,
                         count};
      for (std::size_t t = 0; t < job.term_count; ++t) {
        const Term& term = job.terms[t];
        if (job.moves(term)) kernel_of(*job.set, term)(walk, keys[t], term.scale);
        for (std::ptrdiff_t run = 0; run < 4 && term.decay != 0.0f; ++run)
          job.set->shrink(walk.base + run * apart, count * kPanel, term.decay);
      }
    }
}

// Up to 4096 elements of 16 rows of the transposed tensor, in tiles of 64 elements each.
void apply_transposed_rows(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const Packing& p = *s.packing;
  const std::uint64_t along = (p.rows + kHeight - 1) / kHeight;
  const std::uint64_t first = number / along * kPanel, lanes = std::min(kPanel, p.columns - first);
  const std::uint64_t begin = number % along * kHeight, end = std::min(begin + kHeight, p.rows);
  const Keys keys(job, s.tensor, 0);
  alignas(64) float tile[kPanel * kBlock];
  for (std::uint64_t k = begin; k < end; k += kBlock) {
    float* const w = static_cast<float*>(s.data) + place(p, k, first);
    for (std::uint64_t n = 0; n < kPanel; ++n)
      for (std::uint64_t i = 0; i < kBlock; ++i) tile[n * kBlock + i] = w[i * kPanel + n];
    const Walk walk = {
        tile, kPanel, kBlock, (first * p.rows + k) / kBlock, p.rows / kBlock, static_cast<std::size_t>(lanes)};
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      if (job.moves(term)) kernel_of(*job.set, term)(walk, keys[t], term.scale);
      if (term.decay != 0.0f) job.set->shrink(tile, lanes * kBlock, term.decay);
    }
    for (std::uint64_t i = 0; i < kBlock; ++i)
      for (std::uint64_t n = 0; n < kPanel; ++n) w[i * kPanel + n] = tile[n * kBlock + i];
  }
}

// Elements that are gathered, and scattered afterwards.
void apply_gathered(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  const auto [begin, end] = range_of(s, number);
  const Keys keys(job, s.tensor, begin);
  auto* const data = static_cast<float*>(s.data);
  alignas(64) float gathered[kTile];
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, kTile - e % kTile);
    gather(data, *s.packing, gathered, e, n);
    apply_terms(job, keys, gathered, e, n);
    scatter(data, *s.packing, gathered, e, n);
    e += n;
  }
}

}  // namespace

std::uint64_t packed_units_of(const Segment& s) noexcept {
  const Packing& p = *s.packing;
  if (in_rows(p)) return ((p.rows + p.depth - 1) / p.depth) * ((p.columns + kGroup - 1) / kGroup);
  if (in_transposed_rows(p)) return ((p.columns + kPanel - 1) / kPanel) * ((p.rows + kHeight - 1) / kHeight);
  return ranges_of(s);
}

void apply_packed(const Job& job, const Segment& s, std::uint64_t number) noexcept {
  if (in_rows(*s.packing)) return apply_rows(job, s, number);
  if (in_transposed_rows(*s.packing)) return apply_transposed_rows(job, s, number);
  apply_gathered(job, s, number);
}

}  // namespace pocketzo
