// Terms with a rank, on matrices. Work is divided into rectangles, for which the factors are regenerated: rank * (64 +
// 256) elements for 64 x 256 of z, and fewer where neighbouring rectangles or terms share one.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "job.h"
#include "packing.h"

namespace pocketzo {
namespace {

constexpr std::uint64_t kAcross = kFactorStride, kDown = 64;  // of a rectangle, 64 KiB
constexpr std::uint64_t kUnitRows = kUnit / kAcross;

// A matrix in memory: in panels of `panel` columns, which are contiguous in the rows of a unit. Packed memory may hold
// the transpose of the tensor.
struct Matrix {
  std::uint64_t rows, columns, unit_rows, panel;
  bool transposed;

  explicit Matrix(const Segment& s) noexcept {
    if (const Packing* const p = s.packing)
      *this = {p->rows, p->columns, p->depth, kPanel, p->transposed};
    else
      *this = {s.size / s.columns, s.columns, kUnitRows, kAcross, false};
  }

  std::uint64_t units_across() const noexcept { return (columns + kAcross - 1) / kAcross; }

 private:
  Matrix(std::uint64_t r, std::uint64_t c, std::uint64_t u, std::uint64_t p, bool t) noexcept
      : rows(r), columns(c), unit_rows(u), panel(p), transposed(t) {}
};

// Elements of one of the factors of a term: element (i, k) is at data()[k * kFactorStride + i - first], for i from
// `first`, a multiple of kBlock, on.
class Factor {
 public:
  Factor(const KernelSet& set, std::uint32_t tensor, bool is_u, std::uint64_t length) noexcept
      : set_(set), tensor_(tensor), is_u_(is_u), blocks_((length + kBlock - 1) / kBlock) {}

  // Regenerates `count` elements, at most kFactorStride, for each k; those of the last call are kept.
  const float* of(const Term& term, std::uint64_t first, std::uint64_t count) noexcept {
    const std::uint64_t draw = is_u_ ? term.draw : term.basis;
    if (first == first_ && count == count_ && draw == draw_ && term.seed == seed_ && term.distribution == distribution_)
      return data_;
    first_ = first;
    count_ = count;
    draw_ = draw;
    seed_ = term.seed;
    distribution_ = term.distribution;
    const std::uint32_t window = (term.distribution == Distribution::gaussian ? 0x40000000u : 0xC0000000u) + !is_u_;
    const Key key = subkey(term.seed, tensor_, draw, window);
    const std::size_t here = static_cast<std::size_t>((count + kBlock - 1) / kBlock);
    const float scale = 1.0f / std::sqrt(static_cast<float>(term.rank));
    for (std::uint64_t k = 0; k < term.rank; ++k) {
      float* const out = data_ + k * kFactorStride;
      kernel_of(set_, term.distribution, 0)({out, 16, kBlock, k * blocks_ + first / kBlock, 1, here}, key, nullptr);
      for (std::size_t i = 0; i < here * kBlock && is_u_; ++i) out[i] *= scale;
    }
    return data_;
  }

 private:
  const KernelSet& set_;
  std::uint32_t tensor_;
  bool is_u_;
  std::uint64_t blocks_;  // of the elements for one k
  std::uint64_t first_ = 0, count_ = 0, draw_ = 0, seed_ = 0;
  Distribution distribution_{};
  alignas(64) float data_[kMaxRank * kFactorStride];
};

// What is worked on at a time: rows `top` .. `top + rows` - 1, and columns likewise.
struct Rectangle {
  std::uint64_t top, rows, left, columns;
};

// 16-bit weights, in tiles of up to 64 columns that are converted to fp32. A row takes the blocks of its elements, as
// the random bits for rounding come by the block: one or, if rows do not begin at blocks, two.
void apply_16bit(const Job& job, const Segment& s, const Rectangle& r, Factor& down, Factor& across) noexcept {
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

void apply_32bit(const Job& job, const Segment& s, const Matrix& m, const Rectangle& r, Factor& down,
                 Factor& across) noexcept {
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
  const Matrix m(s);
  return (m.rows + m.unit_rows - 1) / m.unit_rows * m.units_across();
}

void apply_low_rank(const Job& job, const Segment& s, std::uint64_t unit) noexcept {
  const Matrix m(s);
  const std::uint64_t top = unit / m.units_across() * m.unit_rows, bottom = std::min(top + m.unit_rows, m.rows);
  const std::uint64_t left = unit % m.units_across() * kAcross, columns = std::min(kAcross, m.columns - left);
  Factor down(*job.set, s.tensor, !m.transposed, m.rows), across(*job.set, s.tensor, m.transposed, m.columns);
  for (std::uint64_t row = top; row < bottom; row += kDown) {
    const Rectangle r = {row, std::min(kDown, bottom - row), left, columns};
    if (s.storage == Storage::float32)
      apply_32bit(job, s, m, r, down, across);
    else
      apply_16bit(job, s, r, down, across);
  }
}

}  // namespace pocketzo
