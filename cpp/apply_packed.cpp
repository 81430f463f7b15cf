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

// A unit is up to 256 columns of one block of rows: with blocks of 256 rows, kUnit elements.
constexpr std::uint64_t kUnitColumns = 256;

std::uint64_t units_across(const Packing& p) noexcept { return (p.columns + kUnitColumns - 1) / kUnitColumns; }

struct Part {
  std::uint64_t top, height, left, right;

  Part(const Packing& p, std::uint64_t unit) noexcept
      : top(unit / units_across(p) * p.depth),
        height(std::min(p.depth, p.rows - top)),
        left(unit % units_across(p) * kUnitColumns),
        right(std::min(left + kUnitColumns, p.columns)) {}
};

void apply_rows(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const Packing& p = *s.packing;
  const auto [top, height, left, right] = Part(p, unit);
  const Keys keys(job, s.tensor, 0);
  const std::uint64_t tile = job.term_count == 1 ? p.depth : kTile / kBlock;
  for (std::uint64_t n = left; n < right; n += kBlock)
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

// A term in tiles of 64 elements of each of 16 rows, by way of the transposed noise. The last panel may have padding,
// which stays what it is: then each row of the panel is a vector.
void apply_transposed(const Job& job, const Term& term, const Key& key, const Across& across,
                      std::uint64_t lanes) noexcept {
  const std::uint64_t vectors = lanes == kPanel ? 1 : kBlock, length = lanes == kPanel ? kPanel * kBlock : lanes;
  alignas(64) float noise[kPanel * kBlock] = {}, z[kPanel * kBlock];
  for (std::uint64_t tile = 0; tile < across.tiles; ++tile) {
    const Walk walk = {noise, kPanel, kBlock, across.first + tile, across.apart, static_cast<std::size_t>(lanes)};
    kernel_of(*job.set, term.distribution, 0)(walk, key, nullptr);
    job.set->transpose(z, noise);
    for (std::uint64_t i = 0; i < vectors; ++i)
      for (unsigned scale = 0; scale < term.count; ++scale)
        job.set->axpy(across.base + (tile * kBlock + i) * kPanel, z + i * kPanel, term.scale[scale], length);
  }
}

void apply_transposed_rows(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const Packing& p = *s.packing;
  const Part part(p, unit);
  const Keys keys(job, s.tensor, 0);
  for (std::uint64_t n = part.left; n < part.right; n += kPanel) {
    const std::uint64_t lanes = std::min(kPanel, p.columns - n);
    const Across across = {static_cast<float*>(s.data) + packed_index(p, part.top, n), (n * p.rows + part.top) / kBlock,
                           p.rows / kBlock, static_cast<std::size_t>(part.height / kBlock)};
    for (std::size_t t = 0; t < job.term_count; ++t) {
      const Term& term = job.terms[t];
      if (job.uses_noise(term)) {
        if (term.distribution == Distribution::gaussian && lanes == kPanel)
          job.set->gaussian_across[term.count - 1](across, keys[t], term.scale);
        else
          apply_transposed(job, term, keys[t], across, lanes);
      }
      if (term.decay == 0.0f) continue;
      for (std::uint64_t i = 0; i < part.height; ++i) job.set->shrink(across.base + i * kPanel, lanes, term.decay);
    }
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
  if (by_rows(p) || by_transposed_rows(p)) return ((p.rows + p.depth - 1) / p.depth) * units_across(p);
  return ranges_of(s);
}

void apply_packed(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  if (job.momentum) return apply_gathered(job, s, unit);
  if (by_rows(*s.packing)) return apply_rows(job, s, unit);
  if (by_transposed_rows(*s.packing)) return apply_transposed_rows(job, s, unit);
  apply_gathered(job, s, unit);
}

}  // namespace pocketzo
