// Writes the kernels' noise to standard output, without end, for statistical test batteries. See `stream --help`.

#include <pocketzo/kernels.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_set.h"

namespace {

using pocketzo::Distribution;

constexpr const char* kHelp =
    "usage: stream words|normals|rademacher [option ...]\n"
    "\n"
    "Writes the noise of the PocketZO kernels to standard output as little-endian 32-bit units, without end:\n"
    "  words        the raw words behind the normals, block by block: 16 lanes of x0, of x1, of x2, of x3\n"
    "  normals      fp32 values in the order of their elements\n"
    "  rademacher   32 elements a unit, the first in the lowest bit; a bit is 1 where the element is -1\n"
    "\n"
    "  --seed N          64 bits, default 0        --tensor N   32 bits, default 0\n"
    "  --draw N          64 bits, default 0        --block N    first block of 64 elements, default 0; below 2^57\n"
    "  --interleave WHAT N\n"
    "                    draws, tensors or seeds: one unit of each of N streams in turn, numbered up from --draw,\n"
    "                    --tensor or --seed; N is 1 to 4096\n"
    "  --count N         stop after N units, rounded up to as many of each stream (default: never)\n"
    "  --set NAME        scalar, neon, avx2 or avx512; default: the best this processor can run\n"
    "Numbers may be decimal or 0x.\n"
    "\n"
    "With PractRand, for example:\n"
    "  stream words --seed 1 | RNG_test stdin32 -tlmin 1GB -tlmax 64GB\n"
    "  stream words --interleave draws 64 | RNG_test stdin32\n"
    "  stream rademacher --interleave tensors 2 | RNG_test stdin32\n"
    "TestU01 and others read the same through a generator that calls fread(&word, 4, 1, stdin). Normals are not "
    "uniform\n"
    "bits: feed them to tests of normal values.\n";

struct Stream {
  std::uint64_t seed, draw;
  std::uint32_t tensor;
};

struct Options {
  std::string kind, interleave;
  Stream start{0, 0, 0};
  std::uint64_t block = 0, streams = 1, count = 0;
  const pocketzo::KernelSet* set = &pocketzo::current();
};

std::uint64_t number(const std::string& option, const char* text, std::uint64_t most) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text, &end, 0);
  if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || value > most) {
    throw std::invalid_argument(option + ": expected a whole number up to " + std::to_string(most) + ", got '" + text +
                                "'");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options o;
  const auto value = [&](int& i) {
    if (++i >= argc) throw std::invalid_argument(std::string(argv[i - 1]) + ": a value is missing");
    return argv[i];
  };
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "words" || arg == "normals" || arg == "rademacher") {
      if (!o.kind.empty()) throw std::invalid_argument("one of words, normals, rademacher, not two");
      o.kind = arg;
    } else if (arg == "--seed") {
      o.start.seed = number(arg, value(i), UINT64_MAX);
    } else if (arg == "--draw") {
      o.start.draw = number(arg, value(i), UINT64_MAX);
    } else if (arg == "--tensor") {
      o.start.tensor = static_cast<std::uint32_t>(number(arg, value(i), UINT32_MAX));
    } else if (arg == "--block") {
      o.block = number(arg, value(i), (std::uint64_t{1} << 57) - 1);
    } else if (arg == "--count") {
      o.count = number(arg, value(i), UINT64_MAX);
    } else if (arg == "--interleave") {
      o.interleave = value(i);
      if (o.interleave != "draws" && o.interleave != "tensors" && o.interleave != "seeds") {
        throw std::invalid_argument("--interleave: expected draws, tensors or seeds, got '" + o.interleave + "'");
      }
      o.streams = number(arg, value(i), 4096);
      if (o.streams == 0) throw std::invalid_argument("--interleave: at least one stream");
    } else if (arg == "--set") {
      const char* name = value(i);
      o.set = pocketzo::find(name);
      if (o.set == nullptr) {
        throw std::invalid_argument("--set: this build or this processor has no '" + std::string(name) + "'");
      }
    } else {
      throw std::invalid_argument("unknown argument '" + arg + "'");
    }
  }
  if (o.kind.empty()) throw std::invalid_argument("expected words, normals or rademacher");
  return o;
}

Stream nth(const Options& o, std::uint64_t i) {
  Stream s = o.start;
  if (o.interleave == "draws") s.draw += i;
  if (o.interleave == "seeds") s.seed += i;
  if (o.interleave == "tensors") s.tensor += static_cast<std::uint32_t>(i);
  return s;
}

// Fills `out` with `blocks` blocks of 64 units of one stream, from block `first` on.
void fill(const Options& o, const Stream& s, std::uint64_t first, std::size_t blocks, std::uint32_t* out) {
  constexpr std::size_t kUnits = 64;
  if (o.kind == "words") {
    for (std::size_t i = 0; i < blocks;) {  // a subkey covers a window of 2^28 blocks
      const std::uint64_t window = (first + i) >> 28;
      const std::uint64_t left = ((window + 1) << 28) - (first + i);
      const auto now = static_cast<std::size_t>(left < blocks - i ? left : blocks - i);
      const auto key = pocketzo::subkey(s.seed, s.tensor, s.draw, static_cast<std::uint32_t>(window));
      o.set->words(out + i * kUnits, first + i, now, key);
      i += now;
    }
    return;
  }
  std::vector<float> z(blocks * kUnits);
  if (o.kind == "normals") {
    pocketzo::generate({z.data(), z.size(), first * kUnits, s.tensor}, s.seed, s.draw, Distribution::gaussian);
    std::memcpy(out, z.data(), z.size() * sizeof(float));
    return;
  }
  for (std::size_t part = 0; part < 32; ++part) {  // z holds a 32nd of the elements
    const std::uint64_t offset = o.block * kUnits + ((first - o.block) * 32 + part * blocks) * kUnits;
    pocketzo::generate({z.data(), z.size(), offset, s.tensor}, s.seed, s.draw, Distribution::rademacher);
    for (std::size_t unit = 0; unit < z.size() / 32; ++unit) {
      std::uint32_t word = 0;
      for (std::size_t bit = 0; bit < 32; ++bit) word |= (z[32 * unit + bit] < 0 ? 1u : 0u) << bit;
      out[part * (z.size() / 32) + unit] = word;
    }
  }
}

bool write(const std::vector<std::uint32_t>& units) {
  std::vector<unsigned char> bytes(4 * units.size());
  for (std::size_t i = 0; i < units.size(); ++i) {
    for (std::size_t b = 0; b < 4; ++b) bytes[4 * i + b] = static_cast<unsigned char>(units[i] >> (8 * b));
  }
  return std::fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size();
}

int run(const Options& o) {
  pocketzo::use(*o.set);
  const auto streams = static_cast<std::size_t>(o.streams);
  const std::size_t blocks = 1 + 4096 / streams;
  const std::uint64_t per_stream = (o.count + streams - 1) / streams;
  std::vector<std::uint32_t> one(blocks * 64), all(one.size() * streams);
  for (std::uint64_t done = 0; o.count == 0 || done < per_stream; done += one.size()) {
    for (std::size_t s = 0; s < streams; ++s) {
      fill(o, nth(o, s), o.block + done / 64, blocks, one.data());
      for (std::size_t i = 0; i < one.size(); ++i) all[i * streams + s] = one[i];
    }
    const std::uint64_t left = (per_stream - done) * streams;
    if (o.count != 0 && left < all.size()) all.resize(static_cast<std::size_t>(left));
    if (!write(all)) return 1;  // the reader has closed the pipe
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0)) {
    std::fputs(kHelp, stdout);
    return 0;
  }
  try {
    return run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stream: %s\nsee stream --help\n", error.what());
    return 2;
  }
}
