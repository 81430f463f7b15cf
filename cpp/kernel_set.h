// One implementation of the kernels, for one instruction set, and the choice among those that there are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pocketzo {

// The four subkey words K[0..3] of SPEC.md.
struct Key {
  std::uint32_t word[4];
};
Key subkey(std::uint64_t seed, std::uint32_t tensor, std::uint64_t draw, std::uint32_t window) noexcept;

// Where 64-element blocks lie, kept apart from which logical blocks they are. A block is four runs of 16 logical
// neighbours; run r of the i-th block visited lies at base + i * block_stride + r * run_stride (in elements).
// Its logical number is first + i * step (block b holds elements 64 b .. 64 b + 63 of the tensor).
// Contiguous memory is {base, 16, 64, first, 1, count}.
struct Walk {
  float* base;
  std::ptrdiff_t run_stride;
  std::ptrdiff_t block_stride;
  std::uint64_t first;
  std::uint64_t step;
  std::size_t count;
};

// The operations of one set on 16-bit weights of one format, all over n elements, a multiple of 64. Values are worked
// on in fp32.
struct Format16 {
  // To fp32: exact.
  void (*widen)(float* out, const std::uint16_t* in, std::size_t n) noexcept;
  // From fp32: rounded to nearest even.
  void (*narrow)(std::uint16_t* out, const float* in, std::size_t n) noexcept;
  // Round fp32 values in place to values of the format: to nearest even, or stochastically, by the words of the same
  // elements' blocks.
  void (*round_nearest)(float* w, std::size_t n) noexcept;
  void (*round_stochastic)(float* w, const std::uint32_t* words, std::size_t n) noexcept;
};

// One implementation of the operations on whole blocks, in the caller's floating-point modes. All blocks of a walk
// share the subkey (the caller cuts at its windows: 2^28 blocks for gaussian and words, 2^33 for rademacher).
struct KernelSet {
  // Writes z, or applies it, once for each of the scales, as Term says.
  using Kernel = void (*)(const Walk& walk, const Key& key, const float* scale) noexcept;

  const char* name;
  // Raw words: out[64 i + 16 j + lane] = x[j] of quad 16 (first + i) + lane.
  void (*words)(std::uint32_t* out, std::uint64_t first, std::size_t count, const Key& key) noexcept;
  // By the number of scales: [0] writes z, [1] .. [3] apply it.
  Kernel gaussian[4], rademacher[4];
  // w = fma(-decay, w, w) over n contiguous elements.
  void (*shrink)(float* w, std::size_t n, float decay) noexcept;
  // w = fma(scale, z, w) over n contiguous elements, a multiple of 64.
  void (*axpy)(float* w, const float* z, float scale, std::size_t n) noexcept;
  Format16 fp16, bf16;
};

// The set called `name`, or nullptr if this build or this processor lacks it.
const KernelSet* find(const char* name) noexcept;
// The set in use. `set` must outlive its use.
const KernelSet& current() noexcept;
void use(const KernelSet& set) noexcept;

}  // namespace pocketzo
