// `apply`, `pack` and `unpack` on memory in the layout of onnxruntime's matrix product.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

// The index of every element, by the formula of kernels.h.
std::vector<std::size_t> packed_places(const Packing& p) {
  std::vector<std::size_t> at(static_cast<std::size_t>(p.rows * p.columns));
  for (std::uint64_t k = 0; k < p.rows; ++k)
    for (std::uint64_t n = 0; n < p.columns; ++n) {
      const std::uint64_t block = k / p.depth;
      const std::uint64_t height = std::min(p.depth, p.rows - block * p.depth);
      const std::uint64_t logical = p.transposed ? n * p.rows + k : k * p.columns + n;
      at[logical] = block * p.depth * p.stride + (n / 16) * 16 * height + (k % p.depth) * 16 + n % 16;
    }
  return at;
}

// Packed memory gets the same bits as contiguous memory. Nothing beyond its end and none of its padding is written.
TEST(packed) {
  const Packing cases[] = {
      {300, 128, 128, 256, false},                              // whole blocks along rows, a last block of fewer rows
      {64, 320, 320, 64, false},                                // more columns than a unit takes
      {257, 64, 96, 128, false},                                // padding of whole panels
      {128, 21, 32, 64, true},                                  // transposed rows, a panel with padding
      {320, 48, 48, 256, true},    {70, 100, 112, 64, false},   // elements are gathered
      {70, 100, 112, 64, true},    {2000, 37, 48, 256, false},  // gathered, more than a unit takes
      {1, 1, 16, 64, false},       {8256, 21, 32, 256, true},   // more transposed rows than a unit takes
  };
  for (const Packing& p : cases) {
    const auto n = static_cast<std::size_t>(p.rows * p.columns), size = static_cast<std::size_t>(p.rows * p.stride);
    const auto places = packed_places(p);
    Guarded memory(size);
    for (const auto& terms : {mixed_terms(), std::vector<Term>{term(Distribution::gaussian, 5, 6, {0.25f})},
                              std::vector<Term>{term(Distribution::rademacher, 5, 6, {0.25f, -1.0f}, 0.5f)}})
      for (const unsigned threads : {1u, 3u}) {
        auto want = weights(n);
        std::vector<float> packed(size, 7.0f);  // the padding
        for (std::size_t i = 0; i < n; ++i) packed[places[i]] = want[i];
        float* got = memory.take(size, true);
        std::copy(packed.begin(), packed.end(), got);
        CHECK(set_threads(threads));
        const Segment segment{got, n, 0, 31, &p};
        apply(&segment, 1, terms.data(), terms.size());
        expect_applied(want, 31, 0, terms);
        for (std::size_t i = 0; i < n; ++i) packed[places[i]] = want[i];
        CHECK_SAME(
            got, packed.data(), size,
            say("packed ", p.rows, " x ", p.columns, p.transposed ? ", transposed, " : ", ", threads, " threads"));
        std::vector<float> out(n);
        unpack(got, p, out.data(), 0, n);
        CHECK_SAME(out.data(), want.data(), n, "unpacked");
        std::fill(got, got + size, 7.0f);
        pack(got, p, want.data(), 0, n);
        CHECK_SAME(got, packed.data(), size, "packed again");
        CHECK(memory.intact());
      }
  }
}

}  // namespace
}  // namespace pocketzo::test
