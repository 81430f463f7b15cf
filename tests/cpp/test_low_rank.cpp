// Terms with a rank: every shape and layout gives the bits of the definition, and no other memory is written.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "modes.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

std::vector<Term> low_rank_terms(unsigned rank) {
  return {with_rank(rank, 5, term(Distribution::gaussian, 3, 1, {1e-3f, -2e-3f}, 1e-3f)),
          with_rank(rank, 5, term(Distribution::gaussian, 3, 2, {0.5f})),
          with_rank(rank, 6, term(Distribution::gaussian, 4, 2, {}, 0.125f)),
          with_rank(rank, 6, term(Distribution::rademacher, 4, 3, {1e-3f, 1e-3f, 3e-3f}))};
}

TEST(low_rank_rectangles) {
  // Columns around every unrolling, all ranks that are unrolled and one that is not; the stride leaves memory between.
  constexpr std::size_t kRows = 3, kMost = 70;
  const float scales[] = {1e-3f, -2e-3f, 1.5e-3f};
  const auto before = weights(kRows * (kMost + 5)), factors = weights(kMaxRank * (kStrideA + kStrideB));
  Guarded memory(kRows * (kMost + 5));
  for (std::size_t columns = 1; columns <= kMost; ++columns)
    for (const unsigned rank : {1u, 2u, 3u, 4u, kMaxRank})
      for (unsigned count = 0; count <= 3; ++count) {
        const std::size_t stride = columns + rank % 5, size = (kRows - 1) * stride + columns;
        auto want = before;
        const float *a = factors.data() + 1, *b = factors.data() + kMaxRank * kStrideA;
        scalar().outer[count]({want.data(), stride, kRows, columns, a, b, rank}, scales);
        float* got = memory.take(size, count % 2 == 0);
        std::copy_n(before.begin(), size, got);
        current().outer[count]({got, stride, kRows, columns, a, b, rank}, scales);
        CHECK_SAME(got, want.data(), size, say(columns, " columns, rank ", rank, ", ", count, " scales"));
        CHECK(memory.intact());
      }
}

TEST(low_rank_matrices) {
  const std::size_t shapes[][2] = {{1, 1}, {1, 700}, {700, 1}, {65, 16}, {64, 257}, {300, 130}, {513, 31}};
  const std::uint64_t usual = mode();
  for (const auto& [rows, columns] : shapes)
    for (const unsigned rank : {1u, 2u, 3u, 4u, 16u}) {
      const std::size_t n = rows * columns;
      const auto all = low_rank_terms(rank);
      for (const auto& terms : {all, std::vector<Term>{all[0]}}) {
        auto want = weights(n);
        expect_low_rank(want, 31, columns, terms);
        Guarded memory(n);
        for (const unsigned threads : {1u, 3u}) {
          const auto before = weights(n);
          float* got = memory.take(n, threads == 1);
          std::copy_n(before.begin(), n, got);
          CHECK(set_threads(threads));
          const Segment segment{got, n, 0, 31, nullptr, Storage::float32, nullptr, columns};
          set_mode(threads == 1 ? usual : usual | kFlush | kRoundings[1]);
          apply(&segment, 1, terms.data(), terms.size());
          set_mode(usual);
          CHECK_SAME(got, want.data(), n, say(rows, " x ", columns, ", rank ", rank));
          CHECK(memory.intact());
        }
      }
    }
}

TEST(low_rank_vectors_are_as_without_a_rank) {
  auto got = weights(1000), want = got;
  const auto terms = low_rank_terms(2);
  apply_to(got.data(), got.size(), 7, 0, terms);
  expect_applied(want, 7, 0, terms);
  CHECK_SAME(got.data(), want.data(), want.size(), "a vector");
}

TEST(low_rank_packed) {
  const Packing cases[] = {
      {300, 128, 128, 256, false}, {257, 64, 96, 128, false},  {128, 21, 32, 64, true}, {320, 48, 48, 256, true},
      {70, 100, 112, 64, true},    {130, 300, 304, 64, false}, {1, 1, 16, 64, false},   {2000, 37, 48, 256, true},
  };
  for (const Packing& p : cases) {
    const auto n = static_cast<std::size_t>(p.rows * p.columns), size = static_cast<std::size_t>(p.rows * p.stride);
    Guarded memory(size);
    for (const unsigned rank : {2u, 3u}) {
      const auto terms = low_rank_terms(rank);
      const auto before = weights(n);
      auto want = before;
      expect_low_rank(want, 31, static_cast<std::size_t>(p.transposed ? p.rows : p.columns), terms);
      std::vector<float> packed(size, 7.0f);  // the padding
      pack(packed.data(), p, before.data(), 0, n);
      float* got = memory.take(size, true);
      std::copy(packed.begin(), packed.end(), got);
      const Segment segment{got, n, 0, 31, &p};
      apply(&segment, 1, terms.data(), terms.size());
      pack(packed.data(), p, want.data(), 0, n);
      CHECK_SAME(got, packed.data(), size, say(p.rows, " x ", p.columns, p.transposed ? ", transposed" : ""));
      CHECK(memory.intact());
    }
  }
}

}  // namespace
}  // namespace pocketzo::test
