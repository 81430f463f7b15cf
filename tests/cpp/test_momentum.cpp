// `apply` with terms of the momentum: pieces, threads, modes, alignment and packings change no bit.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "modes.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

// A step with two directions, of which the first is returned from, and the shift of the next step.
std::vector<Term> momentum_terms() {
  return {with_role(Role::gather, term(Distribution::gaussian, 3, 0, {}, 0.1f)),
          term(Distribution::gaussian, 3, 1, {1e-3f}),
          with_role(Role::gather, term(Distribution::gaussian, 3, 1, {-0.25f, 1e-3f}, 0.01f)),
          with_role(Role::gather, term(Distribution::rademacher, 3, 2, {0.5f})),
          with_role(Role::gather, term(Distribution::gaussian, 3, 2, {0.5f})),
          with_role(Role::follow, term(Distribution::gaussian, 3, 2, {-1e-2f, 0x1p-140f}, 1e-3f)),
          term(Distribution::gaussian, 3, 3, {1e-3f})};
}

// In 16 bits, the same with every rounding.
std::vector<Term> momentum_terms16() {
  auto terms = momentum_terms();
  terms[4].rounding = Rounding::stochastic;  // ignored
  terms[5].rounding = Rounding::stochastic;
  terms.push_back(with_role(Role::follow, term(Distribution::rademacher, 3, 4, {1e-4f})));
  terms.back().rounding = Rounding::later;
  terms.push_back(with_role(Role::gather, term(Distribution::gaussian, 3, 5, {1e-4f})));
  return terms;
}

std::vector<float> momenta(std::size_t n) {
  auto m = weights(n);
  std::reverse(m.begin(), m.end());
  return m;
}

TEST(momentum_of_every_length) {
  constexpr std::size_t kMost = 130;
  Guarded memory(kMost), beside(kMost);
  for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{33}, std::uint64_t{4000},
                                     (std::uint64_t{1} << 34) - 70, (std::uint64_t{1} << 39) - 70}) {
    for (std::size_t n = 0; n <= kMost; ++n) {
      auto w = weights(n), m = momenta(n);
      expect_applied(w, m, 9, offset, momentum_terms());
      for (const bool at_end : {false, true}) {
        float *got = memory.take(n, at_end), *moved = beside.take(n, !at_end);
        const auto before = weights(n), moving = momenta(n);
        std::copy(before.begin(), before.end(), got);
        std::copy(moving.begin(), moving.end(), moved);
        const Segment segment{got, n, offset, 9, nullptr, Storage::float32, moved};
        const auto terms = momentum_terms();
        apply(&segment, 1, terms.data(), terms.size());
        const std::string what = say(n, " elements at offset ", offset);
        CHECK_SAME(got, w.data(), n, "weights, " + what);
        CHECK_SAME(moved, m.data(), n, "momentum, " + what);
        CHECK(memory.intact() && beside.intact());
      }
    }
  }
}

TEST(momentum_in_pieces) {
  // More than a unit; each round on another number of threads, in pieces of another length, in other modes.
  constexpr std::size_t n = 150'011;
  std::mt19937 random(5);
  const std::uint64_t usual = mode();
  const std::uint64_t modes[] = {usual, usual | kFlush, usual | kRoundings[0], usual | kRoundings[2] | kFlush};
  for (const std::uint64_t offset : {std::uint64_t{37}, (std::uint64_t{1} << 34) - 77'777}) {
    auto want = weights(n), moved = momenta(n);
    expect_applied(want, moved, 1, offset, momentum_terms());
    for (std::size_t round = 0; round < 8; ++round) {
      CHECK(set_threads(1 + static_cast<unsigned>(round) % 3));
      auto w = weights(n), m = momenta(n);
      std::vector<Segment> segments;
      for (std::size_t at = 0; at < n;) {
        const auto size = round < 2 ? n : std::min<std::size_t>(random() % (round % 2 == 0 ? 101 : 9001), n - at);
        segments.push_back({w.data() + at, size, offset + at, 1, nullptr, Storage::float32, m.data() + at});
        at += size;
      }
      std::shuffle(segments.begin(), segments.end(), random);
      const auto terms = momentum_terms();
      set_mode(modes[round % std::size(modes)]);
      apply(segments.data(), segments.size(), terms.data(), terms.size());
      set_mode(usual);
      CHECK_SAME(w.data(), want.data(), n, say("weights in pieces, offset ", offset, ", round ", round));
      CHECK_SAME(m.data(), moved.data(), n, say("momentum in pieces, offset ", offset, ", round ", round));
      w = weights(n), m = momenta(n);
      for (const Term& t : terms) {  // a pass for each term
        const Segment whole{w.data(), n, offset, 1, nullptr, Storage::float32, m.data()};
        apply(&whole, 1, &t, 1);
      }
      CHECK_SAME(w.data(), want.data(), n, say("weights in passes, offset ", offset));
      CHECK_SAME(m.data(), moved.data(), n, say("momentum in passes, offset ", offset));
    }
  }
}

TEST(momentum_of_packed_weights) {
  const Packing cases[] = {{300, 128, 128, 256, false}, {257, 64, 96, 128, false}, {128, 21, 32, 64, true},
                           {320, 48, 48, 256, true},    {70, 100, 112, 64, false}, {2000, 37, 48, 256, false}};
  for (const Packing& p : cases) {
    const auto n = static_cast<std::size_t>(p.rows * p.columns), size = static_cast<std::size_t>(p.rows * p.stride);
    auto want = weights(n), moved = momenta(n);
    expect_applied(want, moved, 31, 0, momentum_terms());
    for (const unsigned threads : {1u, 3u}) {
      CHECK(set_threads(threads));
      std::vector<float> packed(size, 7.0f), out(n);
      auto m = momenta(n);
      pack(packed.data(), p, weights(n).data(), 0, n);
      const Segment segment{packed.data(), n, 0, 31, &p, Storage::float32, m.data()};
      const auto terms = momentum_terms();
      apply(&segment, 1, terms.data(), terms.size());
      unpack(packed.data(), p, out.data(), 0, n);
      CHECK_SAME(out.data(), want.data(), n, say("packed ", p.rows, " x ", p.columns));
      CHECK_SAME(m.data(), moved.data(), n, say("momentum of packed ", p.rows, " x ", p.columns));
      CHECK(static_cast<std::size_t>(std::count(packed.begin(), packed.end(), 7.0f)) == size - n);  // the padding
    }
  }
}

TEST(momentum_of_16_bit_weights) {
  // The scalar set on one thread in one piece, which test_answers.cpp checks, gives the expected bits.
  constexpr std::size_t n = 20'011;
  const auto terms = momentum_terms16();
  std::mt19937 random(3);
  Guarded memory(n), beside(n);
  for (const Storage storage : {Storage::float16, Storage::bfloat16})
    for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{37}, (std::uint64_t{1} << 34) - 7777}) {
      const auto before = weights16(n, storage);
      auto want = before;
      auto moved = momenta(n);
      CHECK(set_threads(1));
      const KernelSet& set = current();
      use(scalar());
      const Segment whole{want.data(), n, offset, 9, nullptr, storage, moved.data()};
      apply(&whole, 1, terms.data(), terms.size());
      use(set);
      for (int round = 0; round < 6; ++round) {
        CHECK(set_threads(1 + static_cast<unsigned>(round) % 3));
        const bool at_end = round % 2 == 0;
        // Guarded hands out floats; 16-bit weights end at its edge, too.
        auto* const w = reinterpret_cast<std::uint16_t*>(memory.take((n + 1) / 2, at_end)) + n % 2;
        float* const m = beside.take(n, at_end);
        std::copy(before.begin(), before.end(), w);
        const auto moving = momenta(n);
        std::copy(moving.begin(), moving.end(), m);
        for (std::size_t at = 0; at < n;) {
          const auto size = std::min<std::size_t>(random() % (at_end ? 71 : 5001), n - at);
          const Segment piece{w + at, size, offset + at, 9, nullptr, storage, m + at};
          apply(&piece, 1, terms.data(), terms.size());
          at += size;
        }
        CHECK(std::memcmp(w, want.data(), n * 2) == 0);
        CHECK_SAME(m, moved.data(), n, say("momentum of 16-bit weights, offset ", offset));
        CHECK(memory.intact() && beside.intact());
      }
    }
}

}  // namespace
}  // namespace pocketzo::test
