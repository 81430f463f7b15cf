// Indexing of packed tensors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "pocketzo/kernels.h"

namespace pocketzo {

inline constexpr std::uint64_t kPanel = 16;  // columns

// The index of element (k, n) of the factor.
inline std::uint64_t packed_index(const Packing& p, std::uint64_t k, std::uint64_t n) noexcept {
  const std::uint64_t top = k / p.depth * p.depth;
  const std::uint64_t height = std::min(p.depth, p.rows - top);
  return top * p.stride + n / kPanel * kPanel * height + (k - top) * kPanel + n % kPanel;
}

// Divides logical elements e .. e + size - 1 into runs that are evenly spaced in memory, and calls f(at, i, count,
// step) for each: element e + i + j has the index at + j * step, j = 0 .. count - 1.
template <typename F>
void for_runs(const Packing& p, std::uint64_t e, std::uint64_t size, F&& f) noexcept {
  const std::uint64_t width = p.transposed ? p.rows : p.columns;
  std::uint64_t row = e / width, column = e % width;
  for (std::uint64_t i = 0; i < size;) {
    const std::uint64_t whole = p.transposed ? p.depth : kPanel;
    const std::uint64_t count = std::min({size - i, width - column, whole - column % whole});
    const std::uint64_t at = p.transposed ? packed_index(p, column, row) : packed_index(p, row, column);
    f(at, i, count, p.transposed ? kPanel : std::uint64_t{1});
    i += count;
    column += count;
    if (column == width) {
      column = 0;
      ++row;
    }
  }
}

inline void gather(const float* packed, const Packing& p, float* out, std::uint64_t e, std::uint64_t n) noexcept {
  for_runs(p, e, n, [&](std::uint64_t at, std::uint64_t i, std::uint64_t count, std::uint64_t step) {
    for (std::uint64_t j = 0; j < count; ++j) out[i + j] = packed[at + j * step];
  });
}

inline void scatter(float* packed, const Packing& p, const float* values, std::uint64_t e, std::uint64_t n) noexcept {
  for_runs(p, e, n, [&](std::uint64_t at, std::uint64_t i, std::uint64_t count, std::uint64_t step) {
    for (std::uint64_t j = 0; j < count; ++j) packed[at + j * step] = values[i + j];
  });
}

}  // namespace pocketzo
