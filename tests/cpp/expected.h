// The expected results, computed element by element, and the inputs and calls to be tested.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {

constexpr std::uint64_t kBlock = 64;
constexpr Distribution kDistributions[] = {Distribution::gaussian, Distribution::rademacher};

inline const char* name(Distribution distribution) {
  return distribution == Distribution::gaussian ? "gaussian" : "rademacher";
}

// The weight pattern of answers.txt.
inline std::vector<float> weights(std::size_t n) {
  std::vector<float> w(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto h = static_cast<std::uint32_t>(static_cast<std::uint64_t>(i) * 2654435761u);
    w[i] = static_cast<float>(static_cast<std::int64_t>(h) - (std::int64_t{1} << 31)) * 0x1p-33f;
    if (i % 61 == 7) w[i] = from_bits(h & 0x807FFFFFu);
    if (i % 61 == 13) w[i] = 0.0f;
    if (i % 61 == 14) w[i] = -0.0f;
  }
  return w;
}

// The same in 16 bits, over the range of fp16.
inline std::vector<std::uint16_t> weights16(std::size_t n, Storage storage) {
  const std::size_t whole = (n + kBlock - 1) / kBlock * kBlock;
  std::vector<float> w = weights(whole);
  for (std::size_t i = 0; i < whole; ++i) w[i] = std::ldexp(w[i], 17 - 2 * static_cast<int>(i % 18));
  std::vector<std::uint16_t> halves(whole);
  const KernelSet& set = *find("scalar");
  (storage == Storage::float16 ? set.fp16 : set.bf16).narrow(halves.data(), w.data(), whole);
  halves.resize(n);
  return halves;
}

// n elements of z by one set's function on whole blocks; splits at the subkey's windows.
inline std::vector<float> noise_by(const KernelSet& set, Distribution distribution, std::uint64_t seed,
                                   std::uint32_t tensor, std::uint64_t draw, std::uint64_t offset, std::size_t n) {
  if (n == 0) return {};
  const bool gaussian = distribution == Distribution::gaussian;
  const int window_bits = gaussian ? 28 : 33;
  const std::uint64_t first = offset / kBlock, last = (offset + (n - 1)) / kBlock;
  std::vector<float> blocks(static_cast<std::size_t>(last - first + 1) * kBlock);
  for (std::uint64_t at = first; at <= last;) {
    const std::uint64_t window = at >> window_bits;
    const std::uint64_t stop = std::min(last, ((window + 1) << window_bits) - 1);
    const Key key = subkey(seed, tensor, draw, static_cast<std::uint32_t>(window) | (gaussian ? 0 : 1u << 31));
    const Walk walk{blocks.data() + (at - first) * kBlock, 16, 64, at, 1, static_cast<std::size_t>(stop - at + 1)};
    (gaussian ? set.gaussian : set.rademacher)[0](walk, key, nullptr);
    at = stop + 1;
  }
  const auto begin = blocks.begin() + static_cast<std::ptrdiff_t>(offset - first * kBlock);
  return {begin, begin + static_cast<std::ptrdiff_t>(n)};
}

inline const KernelSet& scalar() {
  const KernelSet* set = find("scalar");
  if (set == nullptr) throw std::runtime_error("there is no scalar set");
  return *set;
}

inline Term term(Distribution distribution, std::uint64_t seed, std::uint64_t draw, std::vector<float> scales,
                 float decay = 0) {
  Term t{};
  t.seed = seed;
  t.draw = draw;
  std::copy(scales.begin(), scales.end(), t.scale);
  t.decay = decay;
  t.count = static_cast<std::uint8_t>(scales.size());
  t.distribution = distribution;
  return t;
}

inline Term with_rank(unsigned rank, std::uint64_t basis, Term t) {
  t.rank = static_cast<std::uint8_t>(rank);
  t.basis = basis;
  return t;
}

inline Term with_role(Role role, Term t) {
  t.role = role;
  return t;
}

// z of a matrix, by SPEC.md, section 7, from the scalar set's z of its factors.
inline std::vector<float> low_rank_noise(const Term& t, std::uint32_t tensor, std::size_t rows, std::size_t columns) {
  const bool gaussian = t.distribution == Distribution::gaussian;
  const auto factor = [&](std::uint64_t draw, std::uint32_t window, std::size_t length) {
    const std::size_t blocks = t.rank * ((length + kBlock - 1) / kBlock);
    std::vector<float> z(blocks * kBlock);
    const Key key = subkey(t.seed, tensor, draw, (1u << 30 | window) | (gaussian ? 0 : 1u << 31));
    (gaussian ? scalar().gaussian : scalar().rademacher)[0]({z.data(), 16, 64, 0, 1, blocks}, key, nullptr);
    return z;
  };
  auto u = factor(t.draw, 0, rows), v = factor(t.basis, 1, columns);
  for (float& value : u) value *= 1 / std::sqrt(static_cast<float>(t.rank));
  std::vector<float> z(rows * columns);
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < columns; ++j) {
      float& sum = z[i * columns + j];
      for (std::size_t k = 0; k < t.rank; ++k) {
        const float a = u[u.size() / t.rank * k + i], b = v[v.size() / t.rank * k + j];
        sum = k == 0 ? a * b : std::fma(a, b, sum);
      }
    }
  return z;
}

inline void expect_low_rank(std::vector<float>& w, std::uint32_t tensor, std::size_t columns,
                            const std::vector<Term>& terms) {
  for (const Term& t : terms) {
    const auto z = low_rank_noise(t, tensor, w.size() / columns, columns);
    for (std::size_t i = 0; i < w.size(); ++i) {
      for (unsigned k = 0; k < t.count; ++k) w[i] = std::fma(t.scale[k], z[i], w[i]);
      if (t.decay != 0) w[i] = std::fma(-t.decay, w[i], w[i]);
    }
  }
}

// The definition of `apply`, with std::fma and the scalar set's z.
inline void expect_applied(std::vector<float>& w, std::vector<float>& m, std::uint32_t tensor, std::uint64_t offset,
                           const std::vector<Term>& terms) {
  for (const Term& t : terms) {
    const auto z =
        t.role == Role::follow ? m : noise_by(scalar(), t.distribution, t.seed, tensor, t.draw, offset, w.size());
    auto& target = t.role == Role::gather ? m : w;
    for (std::size_t i = 0; i < target.size(); ++i) {
      for (unsigned k = 0; k < t.count; ++k) target[i] = std::fma(t.scale[k], z[i], target[i]);
      if (t.decay != 0) target[i] = std::fma(-t.decay, target[i], target[i]);
    }
  }
}

inline void expect_applied(std::vector<float>& w, std::uint32_t tensor, std::uint64_t offset,
                           const std::vector<Term>& terms) {
  std::vector<float> none(w.size());
  expect_applied(w, none, tensor, offset, terms);
}

inline void apply_to(float* data, std::size_t n, std::uint32_t tensor, std::uint64_t offset,
                     const std::vector<Term>& terms) {
  const Segment segment{data, n, offset, tensor};
  apply(&segment, 1, terms.data(), terms.size());
}

inline std::vector<double> products_of(std::uint32_t tensor, std::uint64_t offset, std::uint64_t n,
                                       const std::vector<Term>& terms, const std::vector<std::size_t>& counts) {
  std::vector<double> out(2 * counts.size()), partial(products_room(offset, n, counts.size()));
  products(tensor, offset, n, terms.data(), counts.data(), counts.size(), out.data(), partial.data());
  return out;
}

inline std::vector<Term> mixed_terms() {
  return {term(Distribution::gaussian, 3, 1, {1e-3f, -2e-3f}, 1e-3f), term(Distribution::rademacher, 3, 2, {0.5f}),
          term(Distribution::gaussian, 4, 2, {}, 0.125f), term(Distribution::gaussian, 4, 3, {1e-3f, 1e-3f, 3e-3f})};
}

inline void apply_to(std::uint16_t* data, std::size_t n, Storage storage, std::uint64_t offset,
                     const std::vector<Term>& terms) {
  const Segment segment{data, n, offset, 9, nullptr, storage};
  apply(&segment, 1, terms.data(), terms.size());
}

}  // namespace pocketzo::test
