// Terms with a rank, on matrices. Work is divided into rectangles, for which the factors are regenerated: where these
// have 16 rows of 1024 columns, rank * 64 elements of U for 16384 of z, and V is kept for the rectangles below.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "job.h"
#include "packing.h"

namespace pocketzo {
namespace {

// A matrix in memory: in panels of `panel` columns, which are contiguous in the rows of a unit. Packed memory may hold
// the transpose of the tensor. A unit is `across` columns of `unit_rows` rows, and worked on `down` rows at a time.
struct Matrix {
  std::uint64_t rows, columns, panel, across, down, unit_rows;
  bool transposed;

  std::uint64_t units_across() const noexcept { return (columns + across - 1) / across; }
};

Matrix matrix_of(const Segment& s) noexcept {
  constexpr std::uint64_t kSize = 1u << 14;  // of a rectangle, 64 KiB
  if (const Packing* const p = s.packing)
    return {p->rows, p->columns, kPanel, 256, kSize / 256, p->depth, p->transposed};
  // Rows as long as possible: memory is read faster than in short pieces. Conversion to fp32 takes 64 columns anyway.
  std::uint64_t across = s.storage == Storage::float32 ? 1024 : 256;
  while (across > kBlock && across / 2 >= s.columns) across /= 2;
  const std::uint64_t down = std::min<std::uint64_t>(kSize / across, kStrideA);
  return {s.size / s.columns, s.columns, across, across, down, std::max(4 * down, kBlock), false};
}

// Elements of one of the factors of a term: element (i, k) is at [k * Stride + i].
template <std::size_t Stride>
class Factor {
 public:
  Factor(const KernelSet& set, std::uint32_t tensor, bool is_u, std::uint64_t length) noexcept
      : set_(set), tensor_(tensor), is_u_(is_u), blocks_((length + kBlock - 1) / kBlock) {}

  // Regenerates the elements i = from .. from + n - 1 for each k, unless they are there from the last call. Returns the
  // address of the first one. Their blocks are at most Stride / kBlock.
  const float* of(const Term& term, std::uint64_t from, std::uint64_t n) noexcept {
    const std::uint64_t first = from / kBlock * kBlock, count = (from + n - first + kBlock - 1) / kBlock * kBlock;
    regenerate(term, first, count);
    return data_ + (from - first);
  }

 private:
  void regenerate(const Term& term, std::uint64_t first, std::uint64_t count) noexcept {
    const std::uint64_t draw = is_u_ ? term.draw : term.basis;
    if (first == first_ && count == count_ && draw == draw_ && term.seed == seed_ && term.distribution == distribution_)
      return;
    first_ = first;
    count_ = count;
    draw_ = draw;
    seed_ = term.seed;
    distribution_ = term.distribution;
    const std::uint32_t window = (term.distribution == Distribution::gaussian ? 0x40000000u : 0xC0000000u) + !is_u_;
    const Key key = subkey(term.seed, tensor_, draw, window);
    const float scale = 1.0f / std::sqrt(static_cast<float>(term.rank));
    for (std::uint64_t k = 0; k < term.rank; ++k) {
      float* const out = data_ + k * Stride;
      kernel_of(set_, term.distribution, 0)(
          {out, 16, kBlock, k * blocks_ + first / kBlock, 1, static_cast<std::size_t>(count / kBlock)}, key, nullptr);
      for (std::size_t i = 0; i < count && is_u_; ++i) out[i] *= scale;
    }
  }

  const KernelSet& set_;
  std::uint32_t tensor_;
  bool is_u_;
  std::uint64_t blocks_;  // of the elements for one k
  std::uint64_t first_ = 0, count_ = 0, draw_ = 0, seed_ = 0;
  Distribution distribution_{};
  alignas(64) float data_[kMaxRank * Stride];
};

using RowFactor = Factor<kStrideA>;
using ColumnFactor = Factor<kStrideB>;

// What is worked on at a time: rows `top` .. `top + rows` - 1, and columns likewise.
struct Rectangle {
  std::uint64_t top, rows, left, columns;
};

// 16-bit weights, in tiles of up to 64 columns that are converted to fp32. A row takes the blocks of its elements, as
// the random bits for rounding come by the block: one or, if rows do not begin at blocks, two.
void apply_16bit(const Job& job, const Segment& s, const Rectangle& r, RowFactor& down, ColumnFactor& across) noexcept {
  constexpr std::uint64_t kTile16 = 1u << 11;
  const KernelSet& set = *job.set;
  const Format16& format = s.storage == Storage::float16 ? set.fp16 : set.bf16;
  const std::uint64_t slot = s.columns % kBlock == 0 ? kBlock : 2 * kBlock;
  auto* const data = static_cast<std::uint16_t*>(s.data);
  alignas(64) float w[kTile16];
  alignas(64) float z[kTile16] = {};
  alignas(64) std::uint32_t words[kTile16];
  std::uint16_t stored[kTile16] = {};
  for (std::uint64_t c = 0; c < r.columns; c += kBlock)
    for (std::uint64_t top = 0; top < r.rows; top += kTile16 / slot) {
      const std::uint64_t rows = std::min(kTile16 / slot, r.rows - top), width = std::min(kBlock, r.columns - c);
      const std::uint64_t size = rows * slot;
      const auto element = [&](std::uint64_t row) { return (r.top + top + row) * s.columns + r.left + c; };
      const auto place = [&](std::uint64_t row) { return row * slot + element(row) % kBlock; };
      for (std::uint64_t row = 0; row < rows; ++row)
        std::memcpy(stored + place(row), data + element(row), width * sizeof *stored);
      format.widen(w, stored, size);
      for (std::size_t t = 0; t < job.term_count; ++t) {
        const Term& term = job.terms[t];
        const float* const a = down.of(term, r.top, r.rows) + top;
        const float* const b = across.of(term, r.left, r.columns) + c;
        for (std::uint64_t row = 0; row < rows; ++row)
          set.outer[0]({z + place(row), slot, 1, width, a + row, b, term.rank}, nullptr);
        for (unsigned i = 0; i < term.count; ++i) {
          if (i != 0) format.round_nearest(w, size);
          set.axpy(w, z, term.scale[i], size);
        }
        if (term.decay != 0.0f) set.shrink(w, size, term.decay);
        if (term.rounding == Rounding::stochastic) {
          for (std::uint64_t row = 0; row < rows; ++row)
            for (std::uint64_t i = 0; i < slot / kBlock; ++i) {
              const std::uint64_t block = element(row) / kBlock + i;
              const Key key = subkey(term.seed, s.tensor, term.draw, static_cast<std::uint32_t>(block >> 28));
              set.words(words + row * slot + i * kBlock, block, 1, key);
            }
          format.round_stochastic(w, words, size);
        } else if (term.rounding == Rounding::nearest && t + 1 != job.term_count) {  // narrow rounds after the last
          format.round_nearest(w, size);
        }
      }
      format.narrow(stored, w, size);
      for (std::uint64_t row = 0; row < rows; ++row)
        std::memcpy(data + element(row), stored + place(row), width * sizeof *stored);
    }
}

void apply_32bit(const Job& job, const Segment& s, const Matrix& m, const Rectangle& r, RowFactor& down,
                 ColumnFactor& across) noexcept {
  for (std::size_t t = 0; t < job.term_count; ++t) {
    const Term& term = job.terms[t];
    const float *const a = down.of(term, r.top, r.rows), *const b = across.of(term, r.left, r.columns);
    for (std::uint64_t c = 0; c < r.columns; c += m.panel) {
      const std::uint64_t width = std::min(m.panel, r.columns - c), n = r.left + c;
      const std::uint64_t at = s.packing ? packed_index(*s.packing, r.top, n) : r.top * m.columns + n;
      const std::uint64_t stride = s.packing ? kPanel : m.columns;
      float* const w = static_cast<float*>(s.data) + at;
      if (term.count != 0) job.set->outer[term.count]({w, stride, r.rows, width, a, b + c, term.rank}, term.scale);
      for (std::uint64_t row = 0; row < r.rows && term.decay != 0.0f; ++row)
        job.set->shrink(w + row * stride, width, term.decay);
    }
  }
}

}  // namespace

std::uint64_t low_rank_units_of(const Segment& s) noexcept {
  const Matrix m = matrix_of(s);
  return (m.rows + m.unit_rows - 1) / m.unit_rows * m.units_across();
}

void apply_low_rank(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const Matrix m = matrix_of(s);
  const std::uint64_t top = unit / m.units_across() * m.unit_rows, bottom = std::min(top + m.unit_rows, m.rows);
  const std::uint64_t left = unit % m.units_across() * m.across, columns = std::min(m.across, m.columns - left);
  RowFactor down(*job.set, s.tensor, !m.transposed, m.rows);
  ColumnFactor across(*job.set, s.tensor, m.transposed, m.columns);
  for (std::uint64_t row = top; row < bottom; row += m.down) {
    const Rectangle r = {row, std::min(m.down, bottom - row), left, columns};
    if (s.storage == Storage::float32)
      apply_32bit(job, s, m, r, down, across);
    else
      apply_16bit(job, s, r, down, across);
  }
}

}  // namespace pocketzo
