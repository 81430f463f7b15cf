// 16-bit weights: the conversions of a set, and `apply`.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "kernel_set.h"
#include "modes.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

std::vector<Term> mixed_terms16() {
  std::vector<Term> terms = mixed_terms();
  terms[0].rounding = Rounding::stochastic;
  terms[1].rounding = Rounding::later;
  terms[2].rounding = Rounding::stochastic;
  terms.push_back(term(Distribution::rademacher, 9, 9, {1e-6f}, 1e-3f));
  terms.back().rounding = Rounding::stochastic;
  return terms;
}

// Every 16-bit pattern survives the round trip, and fp32 values around every boundary are rounded as by the scalar set.
TEST(conversions) {
  const KernelSet& set = current();
  constexpr std::size_t n = 1 << 16;
  std::vector<std::uint16_t> all(n), back(n);
  for (std::size_t i = 0; i < n; ++i) all[i] = static_cast<std::uint16_t>(i);
  std::vector<float> wide(n), want(n);
  for (const Storage storage : {Storage::float16, Storage::bfloat16}) {
    Format16 KernelSet::* const format = storage == Storage::float16 ? &KernelSet::fp16 : &KernelSet::bf16;
    const unsigned nan = storage == Storage::float16 ? 0x7C00 : 0x7F80;
    const auto number = [&](std::size_t i) { return (i & 0x7FFF) <= nan; };
    (set.*format).widen(wide.data(), all.data(), n);
    (set.*format).narrow(back.data(), wide.data(), n);
    for (std::size_t i = 0; i < n; ++i) {
      if (number(i)) CHECK(back[i] == all[i]);
      if (!number(i)) CHECK(std::isnan(wide[i]) && (back[i] & 0x7FFF) > nan);
    }
    std::vector<std::uint32_t> words(n);
    set.words(words.data(), 5, n / kBlock, Key{{1, 2, 3, 4}});
    for (const int off : {-1, 0, 1, 0x7FF, 0x800, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001})
      for (const std::uint32_t* random : {static_cast<std::uint32_t*>(nullptr), words.data()}) {
        std::vector<float> got(n);
        for (std::size_t i = 0; i < n; ++i)
          got[i] = number(i) ? from_bits(bits(wide[i]) + static_cast<std::uint32_t>(off)) : 0.0f;
        for (float& w : got)
          if (std::isnan(w)) w = 0.0f;
        want = got;
        if (random == nullptr) {
          (set.*format).round_nearest(got.data(), n);
          (scalar().*format).round_nearest(want.data(), n);
        } else {
          (set.*format).round_stochastic(got.data(), random, n);
          (scalar().*format).round_stochastic(want.data(), random, n);
        }
        CHECK_SAME(got.data(), want.data(), n, say("rounding ", off, " beside a 16-bit value"));
      }
  }
}

TEST(weights_of_16_bits) {
  // The scalar set on one thread in one piece, which test_answers.cpp checks, gives the expected bits. Pieces, threads
  // and floating-point modes must not change them.
  constexpr std::size_t n = 20'011;
  const auto terms = mixed_terms16();
  std::mt19937 random(3);
  Guarded memory(n);
  for (const Storage storage : {Storage::float16, Storage::bfloat16})
    for (const std::uint64_t offset :
         {std::uint64_t{0}, std::uint64_t{37}, (std::uint64_t{1} << 34) - 7777, (std::uint64_t{1} << 39) - 7777}) {
      const auto before = weights16(n, storage);
      CHECK(set_threads(1));
      auto want = before;
      const KernelSet& set = current();
      use(scalar());
      apply_to(want.data(), n, storage, offset, terms);
      use(set);
      for (int round = 0; round < 8; ++round) {
        CHECK(set_threads(1 + static_cast<unsigned>(round) % 3));
        const std::uint64_t longest = round % 2 == 0 ? 70 : 5000;
        // Guarded hands out floats; 16-bit weights end at its edge, too.
        auto* const got = reinterpret_cast<std::uint16_t*>(memory.take((n + 1) / 2, round % 4 < 2)) + n % 2;
        std::copy(before.begin(), before.end(), got);
        const std::uint16_t beside = got[-1];
        for (std::size_t at = 0; at < n;) {
          const std::size_t size = std::min<std::size_t>(random() % (longest + 1), n - at);
          apply_to(got + at, size, storage, offset + at, terms);
          at += size;
        }
        CHECK(std::memcmp(got, want.data(), n * 2) == 0);
        CHECK(memory.intact());
        CHECK(got[-1] == beside);
      }
      const std::uint64_t usual = mode();
      for (const std::uint64_t strange : {usual | kFlush, usual | kRoundings[0], usual | kRoundings[2] | kFlush}) {
        auto got = before;
        set_mode(strange);
        apply_to(got.data(), n, storage, offset, terms);
        set_mode(usual);
        CHECK(got == want);
      }
    }
}

}  // namespace
}  // namespace pocketzo::test
