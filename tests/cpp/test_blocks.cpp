// The functions of a set on whole blocks, against the scalar set.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "expected.h"
#include "guarded.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

TEST(whole_blocks) {
  // Counts around every unrolling; blocks at which the quad number carries or its window ends.
  constexpr std::size_t kMost = 70;
  const KernelSet& set = current();
  const float scales[] = {1e-3f, -2e-3f, 1.5e-3f};
  const auto before = weights(kMost * kBlock);
  Guarded memory(kMost * kBlock);
  for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{31}, (std::uint64_t{1} << 28) - kMost,
                                    (std::uint64_t{5} << 28) + 3, (std::uint64_t{1} << 57) + 1}) {
    const Key key{{0x01234567u ^ static_cast<std::uint32_t>(first), 0x89ABCDEFu, 0xDEADBEEFu, 0xCAFEF00Du}};
    for (std::size_t count = 0; count <= kMost; ++count) {
      const std::size_t n = count * kBlock;
      const std::string what = say("first block ", first, ", ", count, " blocks");
      std::vector<float> want(n);
      for (const bool at_end : {false, true}) {
        float* got = memory.take(n, at_end);
        scalar().words(reinterpret_cast<std::uint32_t*>(want.data()), first, count, key);
        set.words(reinterpret_cast<std::uint32_t*>(got), first, count, key);
        CHECK_SAME(got, want.data(), n, "words, " + what);
        CHECK(memory.intact());
      }
      for (const Distribution distribution : kDistributions) {
        const auto run = distribution == Distribution::gaussian ? &KernelSet::gaussian : &KernelSet::rademacher;
        for (unsigned k = 0; k <= 3; ++k) {
          std::copy_n(before.begin(), n, want.begin());
          (scalar().*run)[k]({want.data(), 16, 64, first, 1, count}, key, scales);
          float* got = memory.take(n, k % 2 == 0);
          std::copy_n(before.begin(), n, got);
          (set.*run)[k]({got, 16, 64, first, 1, count}, key, scales);
          CHECK_SAME(got, want.data(), n, say(name(distribution), " with ", k, " scales, ", what));
          CHECK(memory.intact());
        }
      }
    }
  }
}

TEST(words_make_rademacher) {
  // Both are defined by the same words, so each checks the other.
  const KernelSet& set = current();
  const Key key = subkey(5, 6, 7, 1u << 31);
  constexpr std::size_t kGroups = 3;
  std::vector<std::uint32_t> x(kGroups * kBlock);
  set.words(x.data(), 0, kGroups, key);
  std::vector<float> u(kGroups * 2048), want(u.size());
  set.rademacher[0]({u.data(), 16, 64, 0, 1, u.size() / kBlock}, key, nullptr);
  for (std::size_t e = 0; e < want.size(); ++e) {
    const std::size_t j = e / 16 % 128;
    want[e] = x[64 * (e / 2048) + 16 * (j / 32) + e % 16] >> (31 - j % 32) & 1 ? -1.0f : 1.0f;
  }
  CHECK_SAME(u.data(), want.data(), u.size(), "rademacher from words");
}

TEST(shrink) {
  const KernelSet& set = current();
  Guarded memory(200);
  for (std::size_t n = 0; n <= 200; ++n) {
    const auto before = weights(n);
    for (const float decay : {1e-3f, -0.5f, 1e-42f, 1.0f}) {
      std::vector<float> want = before;
      for (float& w : want) w = std::fma(-decay, w, w);
      for (const bool at_end : {false, true}) {
        float* got = memory.take(n, at_end);
        std::copy(before.begin(), before.end(), got);
        set.shrink(got, n, decay);
        CHECK_SAME(got, want.data(), n, say("shrink of ", n));
        CHECK(memory.intact());
      }
    }
  }
}

TEST(axpy) {
  const KernelSet& set = current();
  Guarded memory(200), noise(200);
  for (std::size_t n = 0; n <= 200; ++n) {
    const auto before = weights(n), z = noise_by(scalar(), Distribution::gaussian, 1, 2, 3, 5, n);
    for (const float scale : {1e-3f, -0.5f, 1e-42f, 0.0f}) {
      std::vector<float> want = before;
      for (std::size_t i = 0; i < n; ++i) want[i] = std::fma(scale, z[i], want[i]);
      for (const bool at_end : {false, true}) {
        float *got = memory.take(n, at_end), *along = noise.take(n, at_end);
        std::copy(before.begin(), before.end(), got);
        std::copy(z.begin(), z.end(), along);
        set.axpy(got, along, scale, n);
        CHECK_SAME(got, want.data(), n, say("axpy of ", n));
        CHECK(memory.intact() && noise.intact());
      }
    }
  }
}

TEST(transpose) {
  const KernelSet& set = current();
  Guarded memory(16 * kBlock), noise(16 * kBlock);
  const auto in = weights(16 * kBlock);
  for (const bool at_end : {false, true}) {
    float *got = memory.take(in.size(), at_end), *from = noise.take(in.size(), at_end);
    std::copy(in.begin(), in.end(), from);
    std::vector<float> want(in.size());
    for (std::size_t lane = 0; lane < 16; ++lane)
      for (std::size_t i = 0; i < kBlock; ++i) want[16 * i + lane] = in[kBlock * lane + i];
    set.transpose(got, from);
    CHECK_SAME(got, want.data(), in.size(), "transposed");
    CHECK(memory.intact() && noise.intact());
  }
}

TEST(across) {
  const KernelSet& set = current();
  const Key key = subkey(3, 5, 7, 0);
  const float scales[3] = {1e-3f, -0.25f, 3.0f};
  for (const std::uint64_t first : {0ull, 11ull, (1ull << 28) - 400})
    for (const std::uint64_t apart : {1ull, 5ull, 24ull})
      for (const std::size_t tiles : {1u, 4u, 7u})
        for (unsigned count = 1; count <= 3; ++count) {
          const auto before = weights(tiles * 16 * kBlock);
          auto got = before, want = before;
          set.gaussian_across[count - 1]({got.data(), first, apart, tiles}, key, scales);
          for (std::size_t row = 0; row < 16; ++row) {  // by the scalar set, along each row
            std::vector<float> along(tiles * kBlock);
            for (std::size_t i = 0; i < along.size(); ++i) along[i] = before[16 * i + row];
            scalar().gaussian[count]({along.data(), 16, 64, first + row * apart, 1, tiles}, key, scales);
            for (std::size_t i = 0; i < along.size(); ++i) want[16 * i + row] = along[i];
          }
          CHECK_SAME(got.data(), want.data(), got.size(), say("across, ", tiles, " tiles, ", count, " scales"));
        }
}

struct Layout {
  const char* name;
  std::ptrdiff_t run_stride, block_stride;
  std::uint64_t step;
  std::size_t count;
};

TEST(walks) {
  // Any addresses and numbers of blocks: packed panels of 16 columns and 256 rows, along a row and down a column;
  // backwards; spread out; at addresses aligned only to a float.
  std::vector<Layout> layouts = {
      {"panels, along a row", 16 * 256, 4 * 16 * 256, 1, 3},
      {"panels, down the rows", 16 * 256, 16, 3, 256},
      {"panels of one row", 16, 64, 12, 37},
      {"backwards", 16, -64, 1, 41},
      {"runs backwards", -16, 64, 1, 9},
      {"spread", 19, 131, 7, 23},
      {"one block", 33, 0, 0, 1},
      {"interleaved runs", 16 * 5, 16, 2, 5},
  };
  // Counts around the number of blocks in flight and the height of a panel. Memory between the runs must not change.
  for (const std::size_t count : {0, 1, 2, 3, 4, 5, 15, 16, 17, 255})
    layouts.push_back({"some rows of a panel", 16 * 256, 16, 48, count});
  layouts.push_back({"a row more", 16 * 257, 16, 48, 257});
  const KernelSet& set = current();
  const float scales[] = {1e-2f, -3e-2f, 0.7f};
  const Key key = subkey(11, 12, 13, 0);
  for (const Layout& layout : layouts) {
    std::ptrdiff_t low = 0, high = 0;
    const auto last = std::max(static_cast<std::ptrdiff_t>(layout.count) - 1, std::ptrdiff_t{0});
    for (const std::ptrdiff_t block : {std::ptrdiff_t{0}, last}) {
      for (const std::ptrdiff_t run : {0, 3}) {
        low = std::min(low, block * layout.block_stride + run * layout.run_stride);
        high = std::max(high, block * layout.block_stride + run * layout.run_stride + 16);
      }
    }
    for (const std::ptrdiff_t misaligned : {0, 1, 7, 13}) {
      for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{77}, (std::uint64_t{3} << 28) + 29}) {
        for (const Distribution distribution : kDistributions) {
          const auto run = distribution == Distribution::gaussian ? &KernelSet::gaussian : &KernelSet::rademacher;
          for (unsigned k = 0; k <= 3; ++k) {
            const auto before = weights(static_cast<std::size_t>(high - low + misaligned) + 16);
            std::vector<float> got = before, want = before;
            const std::ptrdiff_t base = misaligned - low;
            (set.*run)[k]({got.data() + base, layout.run_stride, layout.block_stride, first, layout.step, layout.count},
                          key, scales);
            for (std::size_t i = 0; i < layout.count; ++i) {  // block by block, in contiguous memory, by the scalar set
              std::array<float, kBlock> block;
              const auto at = [&](std::size_t e) -> float& {
                return want[static_cast<std::size_t>(base + static_cast<std::ptrdiff_t>(i) * layout.block_stride +
                                                     static_cast<std::ptrdiff_t>(e / 16) * layout.run_stride) +
                            e % 16];
              };
              for (std::size_t e = 0; e < kBlock; ++e) block[e] = at(e);
              (scalar().*run)[k]({block.data(), 16, 64, first + i * layout.step, 1, 1}, key, scales);
              for (std::size_t e = 0; e < kBlock; ++e) at(e) = block[e];
            }
            CHECK_SAME(got.data(), want.data(), want.size(),
                       say(name(distribution), " walk, ", layout.name, ", ", layout.count, " blocks, ", k,
                           " scales, misaligned by ", misaligned));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pocketzo::test
