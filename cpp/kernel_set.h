// An implementation of the kernels for one instruction set, and the choice among the available ones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pocketzo/kernels.h"  // kMaxRank

namespace pocketzo {

// The four subkey words K[0..3] of SPEC.md.
struct Key {
  std::uint32_t word[4];
};
Key subkey(std::uint64_t seed, std::uint32_t tensor, std::uint64_t draw, std::uint32_t window) noexcept;

// A sequence of 64-element blocks: their addresses, and separately their numbers in the tensor. A block is four runs of
// 16 logical neighbours. Run r of the i-th block is at base + i * block_stride + r * run_stride (in elements). The
// block's number is first + i * step; block b holds elements 64 b .. 64 b + 63 of the tensor. Contiguous memory is
// {base, 16, 64, first, 1, count}.
struct Walk {
  float* base;
  std::ptrdiff_t run_stride;
  std::ptrdiff_t block_stride;
  std::uint64_t first;
  std::uint64_t step;
  std::size_t count;
};

// Blocks across sixteen rows of a transposed matrix, whose element (row, i) is at base + 16 i + row. The rows' first
// block numbers are first + row * apart. A tile is a block of each row.
struct Across {
  float* base;
  std::uint64_t first, apart;
  std::size_t tiles;
};

// A rectangle of a matrix and the factors of its z. Element (row, column) is at w + row * stride + column; its z is the
// sum of a[k * kStrideA + row] * b[k * kStrideB + column] over k = 0 .. rank - 1, as SPEC.md, section 7, says.
struct Outer {
  float* w;
  std::size_t stride, rows, columns;
  const float *a, *b;
  unsigned rank;
};
inline constexpr std::size_t kStrideA = 256, kStrideB = 1024 + 16;  // not the same place of each page for every k

// A set's operations on 16-bit weights of one format, over n elements, a multiple of 64. Values are processed in fp32.
struct Format16 {
  // To fp32, exactly.
  void (*widen)(float* out, const std::uint16_t* in, std::size_t n) noexcept;
  // From fp32, rounded to nearest even.
  void (*narrow)(std::uint16_t* out, const float* in, std::size_t n) noexcept;
  // Round fp32 values in place to values of the format: to nearest even, or stochastically with the words of the
  // elements' blocks.
  void (*round_nearest)(float* w, std::size_t n) noexcept;
  void (*round_stochastic)(float* w, const std::uint32_t* words, std::size_t n) noexcept;
};

// The operations on whole blocks, in the caller's floating-point modes. All blocks of a walk share the subkey: the
// caller splits walks at the subkey's windows (2^28 blocks for gaussian and words, 2^33 for rademacher).
struct KernelSet {
  // Writes z, or applies it with each of the scales in turn, as Term specifies.
  using Kernel = void (*)(const Walk& walk, const Key& key, const float* scale) noexcept;

  const char* name;
  // Raw words: out[64 i + 16 j + lane] = x[j] of quad 16 (first + i) + lane.
  void (*words)(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept;
  // By the number of scales: [0] writes z, [1] .. [3] apply it.
  Kernel gaussian[4], rademacher[4];
  // Applies gaussians to tiles, by the number of scales less one.
  void (*gaussian_across[3])(const Across& across, const Key& key, const float* scale) noexcept;
  // w = fma(-decay, w, w) over n contiguous elements.
  void (*shrink)(float* w, std::size_t n, float decay) noexcept;
  // w = fma(scale, z, w) over n contiguous elements.
  void (*axpy)(float* w, const float* z, float scale, std::size_t n) noexcept;
  // sums[lane] += a[i] b[i] in fp64, in the order of i, with lane = i % 16; n is a multiple of 16. The product is
  // exact.
  void (*dot)(double* sums, const float* a, const float* b, std::size_t n) noexcept;
  // As `gaussian`, on a rectangle with the given factors.
  void (*outer[4])(const Outer& outer, const float* scale) noexcept;
  // out[16 i + lane] = in[64 lane + i]: sixteen blocks, one in a lane.
  void (*transpose)(float* out, const float* in) noexcept;
  Format16 fp16, bf16;
};

// The set called `name`, or nullptr if this build or this CPU lacks it.
const KernelSet* find(const char* name) noexcept;
// The set in use. `set` must outlive its use.
const KernelSet& current() noexcept;
void use(const KernelSet& set) noexcept;

}  // namespace pocketzo
