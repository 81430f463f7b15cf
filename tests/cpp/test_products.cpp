// `products`: threads, modes and the set's `dot` change no bit, and no memory is touched but the results.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "modes.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

std::vector<Term> product_terms() {
  return {term(Distribution::gaussian, 3, 0, {0.25f}), term(Distribution::rademacher, 3, 1, {-0.5f}),
          term(Distribution::gaussian, 3, 2, {1.0f}), term(Distribution::rademacher, 3, 1, {1.0f})};
}
const std::vector<std::size_t> kCounts = {2, 1, 1};

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

TEST(products_of_every_length) {
  for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{33}, std::uint64_t{2000},
                                     (std::uint64_t{1} << 34) - 70, ~std::uint64_t{0} - 140}) {
    for (std::size_t n = 1; n <= 140; ++n) {
      // In the lanes of SPEC.md; no more than two sections.
      double want[3][2] = {};
      const auto terms = product_terms();
      std::vector<float> x[3] = {std::vector<float>(n), std::vector<float>(n), std::vector<float>(n)};
      expect_applied(x[0], 9, offset, {terms[0], terms[1]});
      expect_applied(x[1], 9, offset, {terms[2]});
      expect_applied(x[2], 9, offset, {terms[3]});
      for (std::size_t i = 0; i < 3; ++i)
        for (std::size_t j = 0; j < 2; ++j) {
          const std::vector<float>& other = j == 0 ? x[0] : x[i];
          double lanes[2][16] = {};
          for (std::size_t k = 0; k < n; ++k)
            lanes[(offset + k) / 2048 - offset / 2048][(offset + k) % 16] += double{other[k]} * double{x[i][k]};
          for (auto& sums : lanes) {
            for (std::size_t half = 8; half != 0; half /= 2)
              for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
          }
          const bool in_two_units = (offset + n - 1) / 65536 != offset / 65536;
          want[i][j] = in_two_units ? (0.0 + lanes[0][0]) + lanes[1][0] : lanes[0][0] + lanes[1][0];
        }
      const auto got = products_of(9, offset, n, terms, kCounts);
      if (std::memcmp(got.data(), want, sizeof want) != 0) FAIL(say(n, " elements at offset ", offset));
    }
  }
}

TEST(products_on_threads_and_in_modes) {
  constexpr std::uint64_t n = 300'017;
  const std::uint64_t usual = mode();
  for (const std::uint64_t offset : {std::uint64_t{37}, (std::uint64_t{1} << 34) - 77'777}) {
    const auto want = products_of(9, offset, n, product_terms(), kCounts);
    for (unsigned threads = 1; threads <= 5; ++threads) {
      CHECK(set_threads(threads));
      set_mode(threads % 2 == 0 ? usual | kFlush : usual | kRoundings[threads % 3]);
      const auto got = products_of(9, offset, n, product_terms(), kCounts);
      set_mode(usual);
      CHECK(same(got, want));
    }
  }
}

TEST(products_write_their_results_only) {
  // In fp32 elements, of which a result takes two.
  Guarded results(12), sums(48);
  const auto terms = product_terms();
  for (const std::uint64_t n : {std::uint64_t{1}, std::uint64_t{70'000}}) {
    const std::uint64_t offset = 65'000;
    const auto room = static_cast<std::size_t>(products_room(offset, n, kCounts.size()));
    CHECK(room == (n == 1 ? 6 : 18));
    for (const bool at_end : {false, true}) {
      auto* out = reinterpret_cast<double*>(results.take(12, at_end));
      auto* partial = reinterpret_cast<double*>(sums.take(2 * room, at_end));
      products(9, offset, n, terms.data(), kCounts.data(), kCounts.size(), out, partial);
      CHECK(same({out, out + 6}, products_of(9, offset, n, terms, kCounts)));
      CHECK(results.intact() && sums.intact());
    }
  }
}

TEST(dot_reads_its_arguments_only) {
  Guarded left(64), right(64);
  for (const bool at_end : {false, true}) {
    for (std::size_t n = 16; n <= 64; n += 16) {
      const auto values = weights(n);
      float *a = left.take(n, at_end), *b = right.take(n, !at_end);
      std::memcpy(a, values.data(), n * sizeof(float));
      std::memcpy(b, values.data(), n * sizeof(float));
      double got[16], want[16];
      for (std::size_t lane = 0; lane < 16; ++lane) got[lane] = want[lane] = 1.0 / static_cast<double>(lane + 3);
      current().dot(got, a, b, n);
      scalar().dot(want, a, b, n);
      CHECK(std::memcmp(got, want, sizeof want) == 0);
      CHECK(left.intact() && right.intact());
    }
  }
}

}  // namespace
}  // namespace pocketzo::test
