// Runs of a packed tensor: logical neighbours that are evenly spaced in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "pocketzo/kernels.h"

namespace pocketzo {

inline constexpr std::uint64_t kPanel = 16;  // columns

// Where element (k, n) of the factor lies.
inline std::uint64_t place(const Packing& p, std::uint64_t k, std::uint64_t n) noexcept {
  const std::uint64_t top = k / p.depth * p.depth;
  const std::uint64_t height = std::min(p.depth, p.rows - top);
  return top * p.stride + n / kPanel * kPanel * height + (k - top) * kPanel + n % kPanel;
}

// Calls f(at, i, count, step) for logical elements e .. e + size - 1: elements e + i + j lie at at + j * step,
// j = 0 .. count - 1.
template <typename F>
void for_runs(const Packing& p, std::uint64_t e, std::uint64_t size, F&& f) noexcept {
  const std::uint64_t width = p.transposed ? p.rows : p.columns;
  std::uint64_t row = e / width, column = e % width;
  for (std::uint64_t i = 0; i < size;) {
    const std::uint64_t whole = p.transposed ? p.depth : kPanel;
    const std::uint64_t count = std::min({size - i, width - column, whole - column % whole});
    const std::uint64_t at = p.transposed ? place(p, column, row) : place(p, row, column);
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
