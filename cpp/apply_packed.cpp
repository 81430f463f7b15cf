// Segments with a packing. Whole blocks are processed where they are if each block is one row of four panels or, in a
// transposed matrix, after transposing a tile. The other matrices (small ones, vocabularies of odd size, and those with
// momentum, which is in logical order) are gathered.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "job.h"
#include "packing.h"

namespace pocketzo {
namespace {

bool by_rows(const Packing& p) noexcept { return !p.transposed && p.columns % kBlock == 0; }
bool by_transposed_rows(const Packing& p) noexcept { return p.transposed && p.rows % kBlock == 0; }

constexpr std::uint64_t kUnitColumns = 256;          // with blocks of 256 rows, kUnit elements
constexpr std::uint64_t kUnitRows = kUnit / kPanel;  // of one panel

// A unit is up to 256 columns of one block of rows.
void apply_rows(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const Packing& p = *s.packing;
  const std::uint64_t across = (p.columns + kUnitColumns - 1) / kUnitColumns;
  const std::uint64_t top = unit / across * p.depth, left = unit % across * kUnitColumns;
  const std::uint64_t height = std::min(p.depth, p.rows - top);
  const Keys keys(job, s.tensor, 0);
  const std::uint64_t tile = job.term_count == 1 ? p.depth : kTile / kBlock;
  for (std::uint64_t n = left; n < std::min(left + kUnitColumns, p.columns); n += kBlock)
    for (std::uint64_t k = 0; k < height; k += tile) {
      const auto count = static_cast<std::size_t>(std::min(tile, height - k));
      const auto apart = static_cast<std::ptrdiff_t>(kPanel * height);
      const Walk walk = {static_cast<float*>(s.data) + packed_index(p, top + k, n),
                         apart,
                         static_cast<std::ptrdiff_t>(kPanel),
                         ((top + k) * p.columns + n) / kBlock,
                         p.columns / kBlock,
                         count};
      for (std::size_t t = 0; t < job.term_count; ++t) {
        const Term& term = job.terms[t];
        if (job.uses_noise(term)) kernel_of(*job.set, term)(walk, keys[t], term.scale);
        for (std::ptrdiff_t run = 0; run < 4 && term.decay != 0.0f; ++run)
          job.set->shrink(walk.base + run * apart, count * kPanel, term.decay);
      }
    }
}

// A unit is up to 4096 elements of each of 16 rows of the tensor, in tiles of 64 elements of each.
void apply_transposed_rows(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const Packing& p = *s.packing;
  const std::uint64_t along = (p.rows + kUnitRows - 1) / kUnitRows;
  const std::uint64_t first = unit / along * kPanel, lanes = std::min(kPanel, p.columns - first);
  const std::uint64_t begin = unit % along * kUnitRows, end = std::min(begin + kUnitRows, p.rows);
  const Keys keys(job, s.tensor, 0);
  alignas(64) float tile[kPanel * kBlock];
  for (std::uint64_t k = begin; k < end; k += kBlock) {
    float* const w = static_cast<float*>(s.data) + packed_index(p, k, first);
    for (std::uint64_t n = 0; n < kPanel; ++n)
      for (std::uint64_t i = 0; i < kBlock; ++i) tile[n * kBlock + i] = w[i * kPanel + n];
    const Walk walk = {
        tile, kPanel, kBlock, (first * p.rows + k) / kBlock, p.rows / kBlock, static_cast<std::size_t>(lanes)};
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      if (job.uses_noise(term)) kernel_of(*job.set, term)(walk, keys[t], term.scale);
      if (term.decay != 0.0f) job.set->shrink(tile, lanes * kBlock, term.decay);
    }
    for (std::uint64_t i = 0; i < kBlock; ++i)
      for (std::uint64_t n = 0; n < kPanel; ++n) w[i * kPanel + n] = tile[n * kBlock + i];
  }
}

void apply_gathered(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const auto [begin, end] = range_of(s, unit);
  const Keys keys(job, s.tensor, begin);
  auto* const data = static_cast<float*>(s.data);
  const std::uint64_t tile = job.momentum ? kTileMomentum : kTile;
  alignas(64) float gathered[kTile];
  for (std::uint64_t e = begin; e < end;) {
    const std::uint64_t n = std::min(end - e, tile - e % tile);
    gather(data, *s.packing, gathered, e, n);
    apply_terms(job, keys, gathered, job.momentum_at(s, e), e, n);
    scatter(data, *s.packing, gathered, e, n);
    e += n;
  }
}

}  // namespace

std::uint64_t packed_units_of(const Job& job, const Segment& s) noexcept {
  const Packing& p = *s.packing;
  if (job.momentum) return ranges_of(s);
  if (by_rows(p)) return ((p.rows + p.depth - 1) / p.depth) * ((p.columns + kUnitColumns - 1) / kUnitColumns);
  if (by_transposed_rows(p)) return ((p.columns + kPanel - 1) / kPanel) * ((p.rows + kUnitRows - 1) / kUnitRows);
  return ranges_of(s);
}

void apply_packed(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  if (job.momentum) return apply_gathered(job, s, unit);
  if (by_rows(*s.packing)) return apply_rows(job, s, unit);
  if (by_transposed_rows(*s.packing)) return apply_transposed_rows(job, s, unit);
  apply_gathered(job, s, unit);
}

}  // namespace pocketzo
