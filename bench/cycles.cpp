// Traced by cycles.py: `cycles OPERATION N` runs an operation of the NEON set on N blocks, `two` on N tiles.
#include <cstdlib>
#include <cstring>

#include "sets.h"

using namespace pocketzo;

namespace {

constexpr std::size_t kTile = 64;  // blocks; the tile of a pass of several terms (job.h)
alignas(64) float w[64 * kTile];
constexpr Key kKey = {{1, 2, 3, 4}};
constexpr float kScale[3] = {1e-3f, -2e-3f, 1e-3f};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const char* operation = argv[1];
  const auto n = static_cast<std::size_t>(std::atoi(argv[2]));
  if (n > kTile) return 2;
  const Walk walk = {w, 16, 64, 0, 1, n};
  const Walk tile = {w, 16, 64, 0, 1, kTile};
  const char last = operation[std::strlen(operation) - 1];
  const auto scales = static_cast<unsigned>(last - '0');
  if (std::strcmp(operation, "words") == 0) {
    kNeon.words(reinterpret_cast<std::uint32_t*>(w), 0, n, kKey);
  } else if (std::strcmp(operation, "shrink") == 0) {
    kNeon.shrink(w, 64 * n, 1e-3f);
  } else if (std::strncmp(operation, "gaussian", 8) == 0 && scales <= 3) {
    kNeon.gaussian[scales](walk, kKey, kScale);
  } else if (std::strncmp(operation, "rademacher", 10) == 0 && scales <= 3) {
    kNeon.rademacher[scales](walk, kKey, kScale);
  } else if (std::strcmp(operation, "two") == 0) {
    for (std::size_t i = 0; i < 2 * n; ++i) kNeon.gaussian[1](tile, kKey, kScale);
  } else {
    return 2;
  }
  return 0;
}
