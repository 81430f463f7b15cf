// The caller's floating-point modes change no result, and are restored.
#include <cstddef>
#include <cstdint>
#include <ios>
#include <string>
#include <vector>

#include "check.h"
#include "expected.h"
#include "modes.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

TEST(floating_point_modes) {
  constexpr std::size_t n = 200'003;
  const std::uint64_t usual = mode();
  const std::vector<Term> terms{term(Distribution::gaussian, 1, 1, {0x1p-130f, -0x1p-128f, 1e-3f}, 1e-3f),
                                term(Distribution::gaussian, 1, 2, {-1e-3f, 0x1p-149f}),
                                term(Distribution::rademacher, 1, 3, {0x1p-140f}, 0x1p-3f),
                                term(Distribution::rademacher, 1, 4, {1e-3f, 1e-7f})};
  auto before = weights(n);
  for (std::size_t i = 0; i < n; i += 3) before[i] *= 0x1p-125f;  // many subnormals
  auto want = before;
  expect_applied(want, 7, 0, terms);
  const auto z = noise_by(scalar(), Distribution::gaussian, 1, 7, 2, 0, n);
  std::vector<std::uint64_t> modes{usual | kFlush};
  for (const std::uint64_t rounding : kRoundings) {
    modes.push_back(usual | rounding);
    modes.push_back(usual | rounding | kFlush);
  }
  for (const std::uint64_t strange : modes) {
    for (const unsigned threads : {1u, 3u}) {
      for (const bool inherited : {false, true}) {  // threads inherit the modes of the thread that starts them
        auto got = before, generated = before;
        CHECK(set_threads(inherited ? 1 : threads));
        set_mode(strange);
        const bool started = set_threads(threads);
        const std::uint64_t started_mode = mode();
        apply_to(got.data(), n, 7, 0, terms);
        const std::uint64_t applied_mode = mode();
        generate({generated.data(), n, 0, 7}, 1, 2, Distribution::gaussian);
        const std::uint64_t generated_mode = mode();
        set_mode(usual);
        CHECK(started);
        CHECK(started_mode == strange);
        CHECK(applied_mode == strange);
        CHECK(generated_mode == strange);
        const std::string what = say("with mode ", std::hex, strange, std::dec, ", ", threads, " threads",
                                     inherited ? " started in it" : "");
        CHECK_SAME(got.data(), want.data(), n, "apply " + what);
        CHECK_SAME(generated.data(), z.data(), n, "generate " + what);
      }
    }
  }
}

}  // namespace
}  // namespace pocketzo::test
