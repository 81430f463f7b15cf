// `apply` and `generate` on contiguous memory, against the definition.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

const std::vector<std::uint64_t>& offsets() {
  static const std::vector<std::uint64_t> list{0,
                                               1,
                                               15,
                                               16,
                                               17,
                                               31,
                                               33,
                                               63,
                                               64,
                                               65,
                                               2040,
                                               (1ull << 32) - 40,
                                               (1ull << 34) - 70,
                                               (1ull << 39) - 70,
                                               (1ull << 63) - 70,
                                               ~0ull - 130};
  return list;
}

TEST(lengths) {
  constexpr std::size_t kMost = 130;
  Guarded memory(kMost);
  const auto before = weights(kMost);
  for (unsigned threads = 1; threads <= 3; ++threads) {
    CHECK(set_threads(threads));
    for (const std::uint64_t offset : offsets()) {
      auto applied = before;
      expect_applied(applied, 9, offset, mixed_terms());
      const auto z = noise_by(scalar(), Distribution::gaussian, 8, 9, 10, offset, kMost);
      const auto u = noise_by(scalar(), Distribution::rademacher, 8, 9, 10, offset, kMost);
      for (std::size_t n = 0; n <= kMost; ++n) {
        const std::string what = say(n, " elements at offset ", offset, ", ", threads, " threads");
        for (const bool at_end : {false, true}) {
          float* got = memory.take(n, at_end);
          std::copy_n(before.begin(), n, got);
          apply_to(got, n, 9, offset, mixed_terms());
          CHECK_SAME(got, applied.data(), n, "apply, " + what);
          CHECK(memory.intact());
          got = memory.take(n, at_end);
          generate({got, n, offset, 9}, 8, 10, Distribution::gaussian);
          CHECK_SAME(got, z.data(), n, "generate gaussian, " + what);
          CHECK(memory.intact());
          got = memory.take(n, at_end);
          generate({got, n, offset, 9}, 8, 10, Distribution::rademacher);
          CHECK_SAME(got, u.data(), n, "generate rademacher, " + what);
          CHECK(memory.intact());
        }
        const auto heap = exact(before.data(), n);
        apply_to(heap.get(), n, 9, offset, mixed_terms());
        CHECK_SAME(heap.get(), applied.data(), n, "apply on the heap, " + what);
        generate({heap.get(), n, offset, 9}, 8, 10, Distribution::gaussian);
        CHECK_SAME(heap.get(), z.data(), n, "generate on the heap, " + what);
      }
    }
  }
}

TEST(cuts) {
  constexpr std::size_t n = 20'011;
  std::mt19937 random(1);
  for (const std::uint64_t offset :
       {std::uint64_t{0}, (std::uint64_t{1} << 34) - 7777, (std::uint64_t{1} << 39) - 7777}) {
    const auto before = weights(n);
    auto want = before;
    expect_applied(want, 1, offset, mixed_terms());
    for (int round = 0; round < 12; ++round) {
      CHECK(set_threads(1 + static_cast<unsigned>(round) % 3));
      const std::uint64_t longest = round % 2 == 0 ? 100 : 3000;
      auto apart = before, together = before, generated = before;
      std::vector<Segment> segments;
      for (std::size_t at = 0; at < n;) {
        const std::size_t size = std::min<std::size_t>(random() % (longest + 1), n - at);
        segments.push_back({together.data() + at, size, offset + at, 1});
        apply_to(apart.data() + at, size, 1, offset + at, mixed_terms());
        generate({generated.data() + at, size, offset + at, 1}, 2, 3, Distribution::gaussian);
        at += size;
      }
      std::shuffle(segments.begin(), segments.end(), random);
      const auto terms = mixed_terms();
      pocketzo::apply(segments.data(), segments.size(), terms.data(), terms.size());
      CHECK_SAME(apart.data(), want.data(), n, say("pieces, a call each, offset ", offset, ", round ", round));
      CHECK_SAME(together.data(), want.data(), n, say("pieces in one call, offset ", offset, ", round ", round));
      CHECK_SAME(generated.data(), noise_by(scalar(), Distribution::gaussian, 2, 1, 3, offset, n).data(), n,
                 say("pieces generated, offset ", offset, ", round ", round));
    }
  }
}

TEST(segments_of_many_tensors) {
  CHECK(set_threads(3));
  apply(nullptr, 0, nullptr, 0);
  const auto terms = mixed_terms();
  apply(nullptr, 0, terms.data(), terms.size());
  const std::size_t sizes[] = {1, 0, 7000, 64, 16, 100'000, 3, 0, 40'001};
  std::vector<std::vector<float>> got, want;
  std::vector<Segment> segments;
  for (std::size_t i = 0; i < std::size(sizes); ++i) {
    got.push_back(weights(sizes[i]));
    want.push_back(got.back());
    const std::uint64_t offset = i * 1001;
    const auto tensor = static_cast<std::uint32_t>(0xFFFFFFFFu - i);
    segments.push_back({sizes[i] != 0 ? got.back().data() : nullptr, sizes[i], offset, tensor});
    expect_applied(want.back(), tensor, offset, terms);
  }
  apply(segments.data(), segments.size(), nullptr, 0);
  apply(segments.data(), segments.size(), terms.data(), terms.size());
  for (std::size_t i = 0; i < std::size(sizes); ++i) {
    CHECK_SAME(got[i].data(), want[i].data(), sizes[i], say("segment ", i, " of many"));
  }
}

TEST(terms) {
  CHECK(set_threads(2));
  const std::vector<float> scales{1e-3f, -2e-3f, 1.0625e-3f};
  const std::uint64_t offset = 1'000'003;
  constexpr std::size_t n = 5003;
  for (const Distribution distribution : kDistributions) {
    for (std::ptrdiff_t count = 0; count <= 3; ++count) {
      for (const float decay : {0.0f, -0.0f, 1e-3f, -1e-3f, 1.0f, 1e-40f}) {
        for (const float factor : {1.0f, 0x1p-126f, 0x1p-140f, 0.0f}) {
          std::vector<float> scaled(scales.begin(), scales.begin() + count);
          for (float& scale : scaled) scale *= factor;
          const std::vector<Term> terms{term(distribution, 1ull << 40, 1ull << 33, scaled, decay)};
          auto got = weights(n), want = got;
          expect_applied(want, 2, offset, terms);
          apply_to(got.data(), n, 2, offset, terms);
          CHECK_SAME(got.data(), want.data(), n,
                     say(name(distribution), " term, ", count, " scales times ", factor, ", decay ", decay));
        }
      }
    }
  }
}

TEST(long_programs) {
  // One call with a thousand terms, as in a replay, equals a thousand calls.
  constexpr std::size_t n = 3001;
  const std::uint64_t offset = (1ull << 34) - 1234;
  std::mt19937 random(7);
  std::vector<Term> terms;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    std::vector<float> scales(random() % 4);
    for (float& scale : scales) scale = static_cast<float>(random() % 2001) * 1e-6f - 1e-3f;
    terms.push_back(term(kDistributions[random() % 4 == 0], 99, i / 2, scales, random() % 3 == 0 ? 1e-5f : 0.0f));
  }
  auto want = weights(n);
  CHECK(set_threads(1));
  for (const Term& t : terms) apply_to(want.data(), n, 4, offset, {t});
  for (const unsigned threads : {1u, 3u}) {
    CHECK(set_threads(threads));
    auto got = weights(n);
    apply_to(got.data(), n, 4, offset, terms);
    CHECK_SAME(got.data(), want.data(), n, say("1,000 terms, ", threads, " threads"));
  }
  want.resize(300);  // compare some elements with the definition, too
  auto defined = weights(300);
  expect_applied(defined, 4, offset, terms);
  CHECK_SAME(want.data(), defined.data(), defined.size(), "1,000 terms by the definition");
}

TEST(not_finite) {
  constexpr std::size_t n = 1003;
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<Term> terms{term(Distribution::gaussian, 1, 1, {1e-3f, 2e-3f}),
                                term(Distribution::rademacher, 1, 2, {0.5f})};
  auto want = weights(n);
  expect_applied(want, 8, 3, terms);
  auto got = weights(n);
  for (std::size_t i = 0; i < n; i += 5) {
    want[i] = got[i] = i % 3 == 0 ? from_bits(0x7FC12345u) : i % 3 == 1 ? inf : -inf;
  }
  CHECK(set_threads(2));
  apply_to(got.data(), n, 8, 3, terms);
  CHECK_SAME(got.data(), want.data(), n, "weights that are not finite");
}

}  // namespace
}  // namespace pocketzo::test
