// Tests of the kernels, for every instruction set that this processor can run:
//
//   test_kernels answers.txt [set ...]
//
// answers.txt comes from tests/vectors/generate.py, an independent implementation of the specification. A set that is
// named but cannot run is a failure. The exit code is 0 if all is well, 1 if a check failed, 2 for wrong usage.

#include <pocketzo/kernels.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernel_set.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__has_feature)  // clang
#define POCKETZO_HAS_FEATURE(x) __has_feature(x)
#else
#define POCKETZO_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_THREAD__) || POCKETZO_HAS_FEATURE(thread_sanitizer)
#define POCKETZO_TSAN
#endif
#if defined(__SANITIZE_ADDRESS__) || POCKETZO_HAS_FEATURE(address_sanitizer)
#define POCKETZO_ASAN
#endif

namespace {

using pocketzo::Direction;
using pocketzo::Format16;
using pocketzo::KernelSet;
using pocketzo::Key;
using pocketzo::Packing;
using pocketzo::Rounding;
using pocketzo::Segment;
using pocketzo::Storage;
using pocketzo::Term;
using pocketzo::Walk;

constexpr std::uint64_t kBlock = 64;
constexpr Direction kDirections[] = {Direction::gaussian, Direction::rademacher};

// ---- checks ------------------------------------------------------------------------------------------------------

std::atomic<int> failures{0};
std::string testing;       // the set
const char* running = "";  // the test

void fail(int line, const std::string& message) {
  if (++failures <= 50) std::printf("%s:%d: [%s] %s\n", __FILE__, line, testing.c_str(), message.c_str());
}

#define CHECK(condition)                          \
  do {                                            \
    if (!(condition)) fail(__LINE__, #condition); \
  } while (false)

template <typename... Parts>
std::string say(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::uint32_t bits(float x) {
  std::uint32_t pattern;
  std::memcpy(&pattern, &x, sizeof pattern);
  return pattern;
}

float from_bits(std::uint32_t pattern) {
  float x;
  std::memcpy(&x, &pattern, sizeof x);
  return x;
}

std::string hex(std::uint32_t word) {
  char text[9];
  std::snprintf(text, sizeof text, "%08" PRIx32, word);
  return text;
}

// Compares bit for bit; reports the first element that differs.
void check_same(int line, const float* got, const float* want, std::size_t n, const std::string& what) {
  if (n == 0 || std::memcmp(got, want, n * sizeof(float)) == 0) return;
  std::size_t first = 0;
  while (bits(got[first]) == bits(want[first])) ++first;
  std::size_t different = 0;
  for (std::size_t i = first; i < n; ++i) different += bits(got[i]) != bits(want[i]);
  fail(line, say(what, ": element ", first, " is ", hex(bits(got[first])), " (", got[first], "), expected ",
                 hex(bits(want[first])), " (", want[first], "); ", different, " of ", n, " differ"));
}

#define CHECK_SAME(got, want, n, what) check_same(__LINE__, got, want, n, what)

const char* name(Direction direction) { return direction == Direction::gaussian ? "gaussian" : "rademacher"; }

// ---- memory that notices ------------------------------------------------------------------------------------------

// Room for `capacity` floats between two pages that cannot be touched. `take` places n floats so that they end
// (at_end) or begin exactly at such a page, and fills all other room with a pattern that `intact` verifies.
class Guarded {
 public:
  explicit Guarded(std::size_t capacity) {
    page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    room_ = (capacity * sizeof(float) + page_ - 1) / page_ * page_ + page_;
    void* memory = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("mmap failed");
    all_ = static_cast<unsigned char*>(memory);
    if (mprotect(all_ + page_, room_, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect failed");
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(all_, room_ + 2 * page_); }

  float* take(std::size_t n, bool at_end) {
    size_ = n * sizeof(float);
    start_ = at_end ? room_ - size_ : 0;
    std::memset(all_ + page_, kCanary, room_);
    return reinterpret_cast<float*>(all_ + page_ + start_);
  }

  bool intact() const {
    const unsigned char* room = all_ + page_;
    const auto untouched = [](unsigned char byte) { return byte == kCanary; };
    return std::all_of(room, room + start_, untouched) && std::all_of(room + start_ + size_, room + room_, untouched);
  }

 private:
  static constexpr unsigned char kCanary = 0xA5;
  unsigned char* all_ = nullptr;
  std::size_t page_ = 0, room_ = 0, start_ = 0, size_ = 0;
};

// Exactly n floats on the heap, for AddressSanitizer.
std::unique_ptr<float[]> exact(const float* values, std::size_t n) {
  auto copy = std::make_unique<float[]>(n);
  std::copy_n(values, n, copy.get());
  return copy;
}

// ---- what is expected ---------------------------------------------------------------------------------------------

// The weight pattern of answers.txt.
std::vector<float> weights(std::size_t n) {
  std::vector<float> w(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto h = static_cast<std::uint32_t>(static_cast<std::uint64_t>(i) * 2654435761u);
    w[i] = static_cast<float>(static_cast<std::int64_t>(h) - (std::int64_t{1} << 31)) * 0x1p-33f;
    if (i % 61 == 7) w[i] = from_bits(h & 0x807FFFFFu);
    if (i % 61 == 13) w[i] = 0.0f;
    if (i % 61 == 14) w[i] = -0.0f;
  }
  return w;
}

// The same for 16 bits, over the range of fp16.
std::vector<std::uint16_t> weights16(std::size_t n, Storage storage) {
  const std::size_t whole = (n + kBlock - 1) / kBlock * kBlock;
  std::vector<float> w = weights(whole);
  for (std::size_t i = 0; i < whole; ++i) w[i] = std::ldexp(w[i], 17 - 2 * static_cast<int>(i % 18));
  std::vector<std::uint16_t> halves(whole);
  const KernelSet& set = *pocketzo::find("scalar");
  (storage == Storage::float16 ? set.fp16 : set.bf16).narrow(halves.data(), w.data(), whole);
  halves.resize(n);
  return halves;
}

std::uint32_t crc32(const void* data, std::size_t size) {
  static const auto table = [] {
    std::array<std::uint32_t, 256> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      t[i] = i;
      for (int k = 0; k < 8; ++k) t[i] = (t[i] >> 1) ^ (t[i] & 1 ? 0xEDB88320u : 0);
    }
    return t;
  }();
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint32_t crc = ~0u;
  for (std::size_t i = 0; i < size; ++i) crc = table[(crc ^ bytes[i]) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

// A stretch of a direction through the whole-block function of one set; the windows are cut here.
std::vector<float> direction_by(const KernelSet& set, Direction direction, std::uint64_t seed, std::uint32_t tensor,
                                std::uint64_t draw, std::uint64_t offset, std::size_t n) {
  if (n == 0) return {};
  const bool gaussian = direction == Direction::gaussian;
  const int window_bits = gaussian ? 28 : 33;
  const std::uint64_t first = offset / kBlock, last = (offset + (n - 1)) / kBlock;
  std::vector<float> blocks(static_cast<std::size_t>(last - first + 1) * kBlock);
  for (std::uint64_t at = first; at <= last;) {
    const std::uint64_t window = at >> window_bits;
    const std::uint64_t stop = std::min(last, ((window + 1) << window_bits) - 1);
    const Key key =
        pocketzo::subkey(seed, tensor, draw, static_cast<std::uint32_t>(window) | (gaussian ? 0 : 1u << 31));
    const Walk walk{blocks.data() + (at - first) * kBlock, 16, 64, at, 1, static_cast<std::size_t>(stop - at + 1)};
    (gaussian ? set.gaussian : set.rademacher)[0](walk, key, nullptr);
    at = stop + 1;
  }
  const auto begin = blocks.begin() + static_cast<std::ptrdiff_t>(offset - first * kBlock);
  return {begin, begin + static_cast<std::ptrdiff_t>(n)};
}

const KernelSet& scalar() {
  const KernelSet* set = pocketzo::find("scalar");
  if (set == nullptr) throw std::runtime_error("there is no scalar set");
  return *set;
}

Term term(Direction direction, std::uint64_t seed, std::uint64_t draw, std::vector<float> scales, float decay = 0) {
  Term t{};
  t.seed = seed;
  t.draw = draw;
  std::copy(scales.begin(), scales.end(), t.scale);
  t.decay = decay;
  t.count = static_cast<std::uint8_t>(scales.size());
  t.direction = direction;
  return t;
}

// What `apply` has to do, element by element, with std::fma; z from the scalar set.
void expect_applied(std::vector<float>& w, std::uint32_t tensor, std::uint64_t offset, const std::vector<Term>& terms) {
  for (const Term& t : terms) {
    const auto z = direction_by(scalar(), t.direction, t.seed, tensor, t.draw, offset, w.size());
    for (std::size_t i = 0; i < w.size(); ++i) {
      for (unsigned k = 0; k < t.count; ++k) w[i] = std::fma(t.scale[k], z[i], w[i]);
      if (t.decay != 0) w[i] = std::fma(-t.decay, w[i], w[i]);
    }
  }
}

void apply_to(float* data, std::size_t n, std::uint32_t tensor, std::uint64_t offset, const std::vector<Term>& terms) {
  const Segment segment{data, n, offset, tensor};
  pocketzo::apply(&segment, 1, terms.data(), terms.size());
}

std::vector<Term> mixed_terms() {
  return {term(Direction::gaussian, 3, 1, {1e-3f, -2e-3f}, 1e-3f), term(Direction::rademacher, 3, 2, {0.5f}),
          term(Direction::gaussian, 4, 2, {}, 0.125f), term(Direction::gaussian, 4, 3, {1e-3f, 1e-3f, 3e-3f})};
}

// ---- the answer file ------------------------------------------------------------------------------------------------

struct Answer {
  int line = 0;
  std::string kind;
  std::vector<std::string> request, answer;

  // Integer and fp32 fields of the request, and word fields of the answer.
  std::uint64_t integer(std::size_t i) const { return std::stoull(request.at(i), nullptr, 0); }
  std::uint32_t tensor(std::size_t i) const { return static_cast<std::uint32_t>(integer(i)); }
  float fp32(std::size_t i) const { return from_bits(word(request.at(i))); }
  std::string where() const { return say("answers.txt:", line, " ", kind); }
  static std::uint32_t word(const std::string& text) {
    return static_cast<std::uint32_t>(std::stoul(text, nullptr, 16));
  }
  std::vector<float> floats() const {
    std::vector<float> values;
    for (const std::string& text : answer) values.push_back(from_bits(word(text)));
    return values;
  }
};

std::vector<Answer> read_answers(const char* path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(say("cannot read ", path));
  std::vector<Answer> answers;
  std::string text;
  for (int line = 1; std::getline(file, text); ++line) {
    if (text.empty() || text[0] == '#') continue;
    Answer a;
    a.line = line;
    std::istringstream fields(text);
    std::string field;
    fields >> a.kind;
    while (fields >> field && field != "=") a.request.push_back(field);
    while (fields >> field) a.answer.push_back(field);
    if (a.answer.empty()) throw std::runtime_error(say(path, ":", line, ": no answer"));
    answers.push_back(std::move(a));
  }
  if (answers.size() < 100) throw std::runtime_error(say(path, " is incomplete"));
  return answers;
}

constexpr std::size_t kCrcBlock = std::size_t{1} << 16;
constexpr std::size_t kApplyValues = 64;

void check_crc(const Answer& a, std::size_t field, std::size_t block, const float* data, std::size_t n) {
  const std::uint32_t crc = crc32(data, n * sizeof(float)), want = Answer::word(a.answer.at(field));
  if (crc != want) {
    fail(__LINE__, say(a.where(), ": the CRC of block ", block, " (from element ", block * kCrcBlock, ") is ", hex(crc),
                       ", expected ", hex(want)));
  }
}

// An answer that is the first values and the CRCs of all.
void check_values_and_crcs(const Answer& a, const std::vector<float>& w) {
  auto want = a.floats();
  CHECK_SAME(w.data(), want.data(), kApplyValues, a.where());
  const std::size_t blocks = (w.size() + kCrcBlock - 1) / kCrcBlock;
  CHECK(a.answer.size() == kApplyValues + blocks);
  for (std::size_t b = 0; b < blocks; ++b) {
    check_crc(a, kApplyValues + b, b, w.data() + b * kCrcBlock, std::min(kCrcBlock, w.size() - b * kCrcBlock));
  }
}

void check_philox(const KernelSet& set, const Answer& a) {
  std::array<std::uint32_t, 6> in{};  // counter, key
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = Answer::word(a.request.at(i + 1));
  if (a.request.at(0) == "10") {
    const Key key =
        pocketzo::subkey(in[4] | std::uint64_t{in[5]} << 32, in[2], in[0] | std::uint64_t{in[1]} << 32, in[3]);
    for (std::size_t j = 0; j < 4; ++j) CHECK(key.word[j] == Answer::word(a.answer.at(j)));
  } else if (in[3] == 0) {  // the kernels' fourth counter word is 0
    std::array<std::uint32_t, 64> out{};
    set.words(out.data(), in[0] / 16, 1, Key{{in[4], in[5], in[1], in[2]}});
    for (std::size_t j = 0; j < 4; ++j) CHECK(out[16 * j + in[0] % 16] == Answer::word(a.answer.at(j)));
  }
}

void check_stretch(const KernelSet& set, const Answer& a, Direction direction) {
  const std::uint64_t seed = a.integer(0), draw = a.integer(2), offset = a.integer(3);
  const auto n = static_cast<std::size_t>(a.integer(4));
  std::vector<float> want;
  if (direction == Direction::gaussian) {
    want = a.floats();
  } else {
    for (const char sign : a.answer.at(0)) want.push_back(sign == '+' ? 1.0f : -1.0f);
  }
  CHECK(want.size() == n);
  CHECK_SAME(direction_by(set, direction, seed, a.tensor(1), draw, offset, n).data(), want.data(), n,
             a.where() + " (KernelSet)");
  std::vector<float> z(n);
  pocketzo::generate({z.data(), n, offset, a.tensor(1)}, seed, draw, direction);
  CHECK_SAME(z.data(), want.data(), n, a.where() + " (generate)");
}

void check_crcs(const Answer& a, Direction direction) {
  std::vector<float> z(kCrcBlock * 16);
  const auto blocks = static_cast<std::size_t>(a.integer(4));
  CHECK(a.answer.size() == blocks);
  for (std::size_t done = 0; done < blocks;) {
    const std::size_t now = std::min<std::size_t>(16, blocks - done);
    pocketzo::generate({z.data(), now * kCrcBlock, a.integer(3) + done * kCrcBlock, a.tensor(1)}, a.integer(0),
                       a.integer(2), direction);
    for (std::size_t b = 0; b < now; ++b) check_crc(a, done + b, done + b, z.data() + b * kCrcBlock, kCrcBlock);
    done += now;
  }
}

// A term of a request, from field `at` on, which is moved behind it.
Term term_at(const Answer& a, std::size_t& at) {
  const Direction direction = a.request.at(at) == "normal" ? Direction::gaussian : Direction::rademacher;
  std::vector<float> scales;
  for (std::size_t k = 0; k < a.integer(at + 4); ++k) scales.push_back(a.fp32(at + 5 + k));
  const Term result = term(direction, a.integer(at + 1), a.integer(at + 2), scales, a.fp32(at + 3));
  at += 5 + scales.size();
  return result;
}

void check_apply(const Answer& a) {
  std::vector<Term> terms;
  std::size_t at = 4;
  for (std::uint64_t i = 0; i < a.integer(3); ++i) terms.push_back(term_at(a, at));
  CHECK(at == a.request.size());
  auto w = weights(static_cast<std::size_t>(a.integer(2)));
  apply_to(w.data(), w.size(), a.tensor(0), a.integer(1), terms);
  check_values_and_crcs(a, w);
}

void apply_to(std::uint16_t* data, std::size_t n, Storage storage, std::uint64_t offset,
              const std::vector<Term>& terms) {
  const Segment segment{data, n, offset, 9, nullptr, storage};
  pocketzo::apply(&segment, 1, terms.data(), terms.size());
}

void check_apply16(const Answer& a) {
  const Storage storage = a.request.at(0) == "float16" ? Storage::float16 : Storage::bfloat16;
  std::vector<Term> terms;
  std::size_t at = 5;
  for (std::uint64_t i = 0; i < a.integer(4); ++i) {
    terms.push_back(term_at(a, at));
    const std::string& rounding = a.request.at(at++);
    terms.back().rounding = rounding == "stochastic" ? Rounding::stochastic
                            : rounding == "later"    ? Rounding::later
                                                     : Rounding::nearest;
  }
  CHECK(at == a.request.size());
  CHECK(a.integer(1) == 9);
  const auto n = static_cast<std::size_t>(a.integer(3));
  auto w = weights16(n, storage);
  apply_to(w.data(), n, storage, a.integer(2), terms);
  for (std::size_t i = 0; i < kApplyValues; ++i)
    if (w[i] != Answer::word(a.answer.at(i)))
      fail(__LINE__, say(a.where(), ": element ", i, " is ", hex(w[i]), ", expected ", a.answer.at(i)));
  for (std::size_t b = 0; b * kCrcBlock < n; ++b) {
    const std::size_t size = std::min(kCrcBlock, n - b * kCrcBlock);
    if (crc32(w.data() + b * kCrcBlock, size * 2) != Answer::word(a.answer.at(kApplyValues + b)))
      fail(__LINE__, say(a.where(), ": the CRC of block ", b, " is another"));
  }
}

void test_answers(const KernelSet& set, const std::vector<Answer>& answers) {
  for (const Answer& a : answers) {
    if (a.kind == "philox") {
      check_philox(set, a);
    } else if (a.kind == "subkey") {
      const Key key =
          pocketzo::subkey(a.integer(0), a.tensor(1), a.integer(2), static_cast<std::uint32_t>(a.integer(3)));
      for (std::size_t j = 0; j < 4; ++j) CHECK(key.word[j] == Answer::word(a.answer.at(j)));
    } else if (a.kind == "words") {
      const std::uint64_t block = a.integer(3);
      const Key key =
          pocketzo::subkey(a.integer(0), a.tensor(1), a.integer(2), static_cast<std::uint32_t>(block >> 28));
      std::array<std::uint32_t, 64> out{};
      set.words(out.data(), block, 1, key);
      for (std::size_t j = 0; j < 64; ++j) CHECK(out[j] == Answer::word(a.answer.at(j)));
    } else if (a.kind == "normal") {
      check_stretch(set, a, Direction::gaussian);
    } else if (a.kind == "rademacher") {
      check_stretch(set, a, Direction::rademacher);
    } else if (a.kind == "normal_crc") {
      check_crcs(a, Direction::gaussian);
    } else if (a.kind == "rademacher_crc") {
      check_crcs(a, Direction::rademacher);
    } else if (a.kind == "shrink") {
      auto w = weights(static_cast<std::size_t>(a.integer(1)));
      set.shrink(w.data(), w.size(), a.fp32(0));
      check_values_and_crcs(a, w);
    } else if (a.kind == "apply") {
      check_apply(a);
    } else if (a.kind == "apply16") {
      check_apply16(a);
    } else {
      fail(__LINE__, a.where() + ": unknown kind");
    }
  }
}

// ---- the functions of a set, against scalar and against themselves
// -----------------------------------------------------

void test_whole_blocks() {
  // Counts around every unrolling, at blocks where the quad number carries or ends its window.
  constexpr std::size_t kMost = 70;
  const KernelSet& set = pocketzo::current();
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
      for (const Direction direction : kDirections) {
        const auto run = direction == Direction::gaussian ? &KernelSet::gaussian : &KernelSet::rademacher;
        for (unsigned k = 0; k <= 3; ++k) {
          std::copy_n(before.begin(), n, want.begin());
          (scalar().*run)[k]({want.data(), 16, 64, first, 1, count}, key, scales);
          float* got = memory.take(n, k % 2 == 0);
          std::copy_n(before.begin(), n, got);
          (set.*run)[k]({got, 16, 64, first, 1, count}, key, scales);
          CHECK_SAME(got, want.data(), n, say(name(direction), " with ", k, " scales, ", what));
          CHECK(memory.intact());
        }
      }
    }
  }
}

void test_words_make_rademacher() {
  // The two are defined by the same words, so that each checks the other.
  const KernelSet& set = pocketzo::current();
  const Key key = pocketzo::subkey(5, 6, 7, 1u << 31);
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

void test_shrink() {
  const KernelSet& set = pocketzo::current();
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

struct Layout {
  const char* name;
  std::ptrdiff_t run_stride, block_stride;
  std::uint64_t step;
  std::size_t count;
};

void test_walks() {
  // Where blocks lie and which blocks they are: packed panels of 16 columns, 256 rows high, walked along a row and down
  // a column; backwards; spread out; at addresses that are aligned to nothing but a float.
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
  // Around what is in flight at once and the height of a panel; what lies between the runs must stay as it is.
  for (const std::size_t count : {0, 1, 2, 3, 4, 5, 15, 16, 17, 255})
    layouts.push_back({"some rows of a panel", 16 * 256, 16, 48, count});
  layouts.push_back({"a row more", 16 * 257, 16, 48, 257});
  const KernelSet& set = pocketzo::current();
  const float scales[] = {1e-2f, -3e-2f, 0.7f};
  const Key key = pocketzo::subkey(11, 12, 13, 0);
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
        for (const Direction direction : kDirections) {
          const auto run = direction == Direction::gaussian ? &KernelSet::gaussian : &KernelSet::rademacher;
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
                       say(name(direction), " walk, ", layout.name, ", ", layout.count, " blocks, ", k,
                           " scales, misaligned by ", misaligned));
          }
        }
      }
    }
  }
}

// ---- apply and generate
// -------------------------------------------------------------------------------------------------

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

void test_lengths() {
  constexpr std::size_t kMost = 130;
  Guarded memory(kMost);
  const auto before = weights(kMost);
  for (unsigned threads = 1; threads <= 3; ++threads) {
    CHECK(pocketzo::set_threads(threads));
    for (const std::uint64_t offset : offsets()) {
      auto applied = before;
      expect_applied(applied, 9, offset, mixed_terms());
      const auto z = direction_by(scalar(), Direction::gaussian, 8, 9, 10, offset, kMost);
      const auto u = direction_by(scalar(), Direction::rademacher, 8, 9, 10, offset, kMost);
      for (std::size_t n = 0; n <= kMost; ++n) {
        const std::string what = say(n, " elements at offset ", offset, ", ", threads, " threads");
        for (const bool at_end : {false, true}) {
          float* got = memory.take(n, at_end);
          std::copy_n(before.begin(), n, got);
          apply_to(got, n, 9, offset, mixed_terms());
          CHECK_SAME(got, applied.data(), n, "apply, " + what);
          CHECK(memory.intact());
          got = memory.take(n, at_end);
          pocketzo::generate({got, n, offset, 9}, 8, 10, Direction::gaussian);
          CHECK_SAME(got, z.data(), n, "generate gaussian, " + what);
          CHECK(memory.intact());
          got = memory.take(n, at_end);
          pocketzo::generate({got, n, offset, 9}, 8, 10, Direction::rademacher);
          CHECK_SAME(got, u.data(), n, "generate rademacher, " + what);
          CHECK(memory.intact());
        }
        const auto heap = exact(before.data(), n);
        apply_to(heap.get(), n, 9, offset, mixed_terms());
        CHECK_SAME(heap.get(), applied.data(), n, "apply on the heap, " + what);
        pocketzo::generate({heap.get(), n, offset, 9}, 8, 10, Direction::gaussian);
        CHECK_SAME(heap.get(), z.data(), n, "generate on the heap, " + what);
      }
    }
  }
}

void test_cuts() {
  constexpr std::size_t n = 20'011;
  std::mt19937 random(1);
  for (const std::uint64_t offset :
       {std::uint64_t{0}, (std::uint64_t{1} << 34) - 7777, (std::uint64_t{1} << 39) - 7777}) {
    const auto before = weights(n);
    auto want = before;
    expect_applied(want, 1, offset, mixed_terms());
    for (int round = 0; round < 12; ++round) {
      CHECK(pocketzo::set_threads(1 + static_cast<unsigned>(round) % 3));
      const std::uint64_t longest = round % 2 == 0 ? 100 : 3000;
      auto apart = before, together = before, generated = before;
      std::vector<Segment> segments;
      for (std::size_t at = 0; at < n;) {
        const std::size_t size = std::min<std::size_t>(random() % (longest + 1), n - at);
        segments.push_back({together.data() + at, size, offset + at, 1});
        apply_to(apart.data() + at, size, 1, offset + at, mixed_terms());
        pocketzo::generate({generated.data() + at, size, offset + at, 1}, 2, 3, Direction::gaussian);
        at += size;
      }
      std::shuffle(segments.begin(), segments.end(), random);
      const auto terms = mixed_terms();
      pocketzo::apply(segments.data(), segments.size(), terms.data(), terms.size());
      CHECK_SAME(apart.data(), want.data(), n, say("pieces, a call each, offset ", offset, ", round ", round));
      CHECK_SAME(together.data(), want.data(), n, say("pieces in one call, offset ", offset, ", round ", round));
      CHECK_SAME(generated.data(), direction_by(scalar(), Direction::gaussian, 2, 1, 3, offset, n).data(), n,
                 say("pieces generated, offset ", offset, ", round ", round));
    }
  }
}

void test_segments_of_many_tensors() {
  CHECK(pocketzo::set_threads(3));
  pocketzo::apply(nullptr, 0, nullptr, 0);
  const auto terms = mixed_terms();
  pocketzo::apply(nullptr, 0, terms.data(), terms.size());
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
  pocketzo::apply(segments.data(), segments.size(), nullptr, 0);
  pocketzo::apply(segments.data(), segments.size(), terms.data(), terms.size());
  for (std::size_t i = 0; i < std::size(sizes); ++i) {
    CHECK_SAME(got[i].data(), want[i].data(), sizes[i], say("segment ", i, " of many"));
  }
}

// The layout as kernels.h describes it, by a table of every element.
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

// Packed memory gets the bits of contiguous memory, ends exactly where it says, and its padding stays.
void test_packed() {
  const Packing cases[] = {
      {300, 128, 128, 256, false},                              // whole blocks along rows, a low last block of rows
      {64, 320, 320, 64, false},                                // more columns than a unit takes
      {257, 64, 96, 128, false},                                // padding of whole panels
      {128, 21, 32, 64, true},                                  // turned rows, a panel with padding
      {320, 48, 48, 256, true},    {70, 100, 112, 64, false},   // neither: elements are gathered
      {70, 100, 112, 64, true},    {2000, 37, 48, 256, false},  // and more of them than a unit takes
      {1, 1, 16, 64, false},       {8256, 21, 32, 256, true},   // more turned rows than a unit takes
  };
  for (const Packing& p : cases) {
    const auto n = static_cast<std::size_t>(p.rows * p.columns), size = static_cast<std::size_t>(p.rows * p.stride);
    const auto places = packed_places(p);
    Guarded memory(size);
    for (const auto& terms : {mixed_terms(), std::vector<Term>{term(Direction::gaussian, 5, 6, {0.25f})},
                              std::vector<Term>{term(Direction::rademacher, 5, 6, {0.25f, -1.0f}, 0.5f)}})
      for (const unsigned threads : {1u, 3u}) {
        auto want = weights(n);
        std::vector<float> packed(size, 7.0f);  // the padding
        for (std::size_t i = 0; i < n; ++i) packed[places[i]] = want[i];
        float* got = memory.take(size, true);
        std::copy(packed.begin(), packed.end(), got);
        CHECK(pocketzo::set_threads(threads));
        const Segment segment{got, n, 0, 31, &p};
        pocketzo::apply(&segment, 1, terms.data(), terms.size());
        expect_applied(want, 31, 0, terms);
        for (std::size_t i = 0; i < n; ++i) packed[places[i]] = want[i];
        CHECK_SAME(
            got, packed.data(), size,
            say("packed ", p.rows, " x ", p.columns, p.transposed ? ", transposed, " : ", ", threads, " threads"));
        std::vector<float> out(n);
        pocketzo::unpack(got, p, out.data(), 0, n);
        CHECK_SAME(out.data(), want.data(), n, "unpacked");
        std::fill(got, got + size, 7.0f);
        pocketzo::pack(got, p, want.data(), 0, n);
        CHECK_SAME(got, packed.data(), size, "packed again");
        CHECK(memory.intact());
      }
  }
}

void test_terms() {
  CHECK(pocketzo::set_threads(2));
  const std::vector<float> scales{1e-3f, -2e-3f, 1.0625e-3f};
  const std::uint64_t offset = 1'000'003;
  constexpr std::size_t n = 5003;
  for (const Direction direction : kDirections) {
    for (std::ptrdiff_t count = 0; count <= 3; ++count) {
      for (const float decay : {0.0f, -0.0f, 1e-3f, -1e-3f, 1.0f, 1e-40f}) {
        for (const float factor : {1.0f, 0x1p-126f, 0x1p-140f, 0.0f}) {
          std::vector<float> scaled(scales.begin(), scales.begin() + count);
          for (float& scale : scaled) scale *= factor;
          const std::vector<Term> terms{term(direction, 1ull << 40, 1ull << 33, scaled, decay)};
          auto got = weights(n), want = got;
          expect_applied(want, 2, offset, terms);
          apply_to(got.data(), n, 2, offset, terms);
          CHECK_SAME(got.data(), want.data(), n,
                     say(name(direction), " term, ", count, " scales times ", factor, ", decay ", decay));
        }
      }
    }
  }
}

void test_long_programs() {
  // A thousand terms in one call, as replay makes it, equal a thousand calls.
  constexpr std::size_t n = 3001;
  const std::uint64_t offset = (1ull << 34) - 1234;
  std::mt19937 random(7);
  std::vector<Term> terms;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    std::vector<float> scales(random() % 4);
    for (float& scale : scales) scale = static_cast<float>(random() % 2001) * 1e-6f - 1e-3f;
    terms.push_back(term(kDirections[random() % 4 == 0], 99, i / 2, scales, random() % 3 == 0 ? 1e-5f : 0.0f));
  }
  auto want = weights(n);
  CHECK(pocketzo::set_threads(1));
  for (const Term& t : terms) apply_to(want.data(), n, 4, offset, {t});
  for (const unsigned threads : {1u, 3u}) {
    CHECK(pocketzo::set_threads(threads));
    auto got = weights(n);
    apply_to(got.data(), n, 4, offset, terms);
    CHECK_SAME(got.data(), want.data(), n, say("1,000 terms, ", threads, " threads"));
  }
  want.resize(300);  // and by the definition, for some elements
  auto defined = weights(300);
  expect_applied(defined, 4, offset, terms);
  CHECK_SAME(want.data(), defined.data(), defined.size(), "1,000 terms by the definition");
}

void test_threads() {
  // Enough elements for many chunks; every count of threads writes the same.
  constexpr std::size_t n = 1'500'007;
  const auto terms = mixed_terms();
  auto want = weights(n);
  expect_applied(want, 5, 12'345, terms);
  const auto z = direction_by(scalar(), Direction::gaussian, 1, 5, 2, 12'345, n);
  for (const unsigned threads : {1u, 2u, 3u, 7u, 2u, 1u}) {
    CHECK(pocketzo::set_threads(threads));
    CHECK(pocketzo::threads() == threads);
    auto got = weights(n);
    apply_to(got.data(), n, 5, 12'345, terms);
    CHECK_SAME(got.data(), want.data(), n, say("apply, ", threads, " threads"));
    pocketzo::generate({got.data(), n, 12'345, 5}, 1, 2, Direction::gaussian);
    CHECK_SAME(got.data(), z.data(), n, say("generate, ", threads, " threads"));
  }
  CHECK(pocketzo::set_threads(3));
  CHECK(!pocketzo::set_threads(0));
  CHECK(!pocketzo::set_threads(pocketzo::kMaxThreads + 1));
  CHECK(pocketzo::threads() == 3);
}

// A set whose gaussian keeps the first thread beside the main one in its first call until the others have done all but
// one unit, and the main thread until there is such a thread.
namespace held_up {

constexpr std::uint64_t kUnitBlocks = (1u << 16) / kBlock;
const KernelSet* inner;
pthread_t main_thread, other_thread;
std::uint64_t enough;  // blocks
std::atomic<std::uint64_t> done;
std::atomic<bool> entered;

template <typename Condition>
bool comes_true(const Condition& condition) {  // in the time that a loaded machine or an emulator may take
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

void gaussian(const Walk& walk, const Key& key, const float* scale) noexcept {
  if (pthread_equal(pthread_self(), main_thread) != 0) {
    if (!comes_true([] { return entered.load(); })) {
      fail(__LINE__, "no other thread took part");
      entered = true;
    }
  } else if (!entered.load()) {
    other_thread = pthread_self();
    entered = true;
    if (!comes_true([] { return done.load() >= enough; }))
      fail(__LINE__, say("a slow thread has more than a unit to itself: ", done.load(), " blocks done, not ", enough));
  }
  inner->gaussian[1](walk, key, scale);
  done += walk.count;
}

void apply(const KernelSet& set, const std::vector<Segment>& segments) {
  inner = &set;
  main_thread = pthread_self();
  entered = false;
  done = enough = 0;
  for (const Segment& s : segments) enough += s.size / kBlock;
  enough -= kUnitBlocks;
  KernelSet holding = set;
  holding.gaussian[1] = gaussian;
  pocketzo::use(holding);
  const Term shift = term(Direction::gaussian, 1, 2, {0.5f});
  pocketzo::apply(segments.data(), segments.size(), &shift, 1);
  pocketzo::use(set);
}

}  // namespace held_up

void test_a_slow_thread_takes_small_units(const KernelSet& set) {
  CHECK(pocketzo::set_threads(2));
  const Packing rows{1024, 256, 256, 256, false}, turned{16384, 16, 32, 256, true};
  std::vector<float> plain(5 * held_up::kUnitBlocks * kBlock), in_rows(1024 * 256), in_turned_rows(16384 * 32);
  const Segment segments[] = {{plain.data(), plain.size(), 0, 7},
                              {in_rows.data(), 1024 * 256, 0, 8, &rows},
                              {in_turned_rows.data(), 16384 * 16, 0, 9, &turned}};
  for (const Segment& segment : segments) held_up::apply(set, {segment});
}

std::atomic<bool> stopped, released;

extern "C" void stop_here(int) {
  stopped = true;
  while (!released) poll(nullptr, 0, 1);
}

void test_a_thread_that_cannot_run_is_not_waited_for(const KernelSet& set) {
  CHECK(pocketzo::set_threads(2));
  std::vector<float> w(4 * held_up::kUnitBlocks * kBlock);
  held_up::apply(set, {{w.data(), w.size(), 0, 7}});  // tells which thread the other one is
  stopped = released = false;
  const auto before = std::signal(SIGUSR1, stop_here);
  CHECK(pthread_kill(held_up::other_thread, SIGUSR1) == 0);
  CHECK(held_up::comes_true([] { return stopped.load(); }));
  std::atomic<bool> returned{false};
  std::thread caller([&] {
    apply_to(w.data(), w.size(), 7, 0, mixed_terms());
    returned = true;
  });
  CHECK(held_up::comes_true([&] { return returned.load(); }));
  released = true;
  caller.join();
  std::signal(SIGUSR1, before);
}

void test_callers_at_once() {
  CHECK(pocketzo::set_threads(3));
  constexpr std::size_t n = 70'001;
  const auto terms = mixed_terms();
  const auto work = [&](std::uint32_t tensor) {
    auto want = weights(n);
    expect_applied(want, tensor, 0, terms);
    const auto z = direction_by(scalar(), Direction::rademacher, 1, tensor, 2, 0, n);
    for (int round = 0; round < 20; ++round) {
      auto got = weights(n);
      apply_to(got.data(), n, tensor, 0, terms);
      CHECK_SAME(got.data(), want.data(), n, say("apply beside another thread, round ", round));
      pocketzo::generate({got.data(), n, 0, tensor}, 1, 2, Direction::rademacher);
      CHECK_SAME(got.data(), z.data(), n, say("generate beside another thread, round ", round));
    }
  };
  std::thread other(work, 1), third(work, 2);
  work(3);
  other.join();
  third.join();
}

void test_fork() {
#ifndef POCKETZO_TSAN
  CHECK(pocketzo::set_threads(3));
  constexpr std::size_t n = 300'001;
  const auto terms = mixed_terms();
  auto want = weights(n);
  expect_applied(want, 6, 0, terms);
  auto got = weights(n);
  apply_to(got.data(), n, 6, 0, terms);
  CHECK_SAME(got.data(), want.data(), n, "apply before fork");
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(120);  // a pool that waits for threads which the child does not have would wait for ever
    bool good = true;
    for (const unsigned threads : {0u, 2u, 1u}) {
      if (threads != 0) good = good && pocketzo::set_threads(threads);
      auto again = weights(n);
      apply_to(again.data(), n, 6, 0, terms);
      good = good && std::memcmp(again.data(), want.data(), n * sizeof(float)) == 0;
    }
    _exit(good ? 0 : 1);
  }
  CHECK(child > 0);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    fail(__LINE__, WIFSIGNALED(status) ? say("the child of fork died of signal ", WTERMSIG(status))
                                       : std::string("the child of fork computed something else"));
  }
  got = weights(n);
  apply_to(got.data(), n, 6, 0, terms);
  CHECK_SAME(got.data(), want.data(), n, "apply after fork, in the parent");
#endif
}

// ---- the caller's floating-point mode
// --------------------------------------------------------------------------------

// Control bits only: not the sticky exception flags.
#if defined(__x86_64__)
constexpr std::uint64_t kFlush = 0x8040;  // flush to zero, denormals are zero
std::uint64_t mode() { return _mm_getcsr() & 0xFFC0u; }
void set_mode(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
constexpr std::uint64_t kRoundings[] = {0x2000, 0x4000, 0x6000};
#elif defined(__aarch64__)
constexpr std::uint64_t kFlush = std::uint64_t{1} << 24;
std::uint64_t mode() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_mode(std::uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
constexpr std::uint64_t kRoundings[] = {1u << 22, 2u << 22, 3u << 22};
#endif

void test_floating_point_modes() {
#if defined(__x86_64__) || defined(__aarch64__)
  constexpr std::size_t n = 200'003;
  const std::uint64_t usual = mode();
  const std::vector<Term> terms{term(Direction::gaussian, 1, 1, {0x1p-130f, -0x1p-128f, 1e-3f}, 1e-3f),
                                term(Direction::gaussian, 1, 2, {-1e-3f, 0x1p-149f}),
                                term(Direction::rademacher, 1, 3, {0x1p-140f}, 0x1p-3f),
                                term(Direction::rademacher, 1, 4, {1e-3f, 1e-7f})};
  auto before = weights(n);
  for (std::size_t i = 0; i < n; i += 3) before[i] *= 0x1p-125f;  // many subnormals
  auto want = before;
  expect_applied(want, 7, 0, terms);
  const auto z = direction_by(scalar(), Direction::gaussian, 1, 7, 2, 0, n);
  std::vector<std::uint64_t> modes{usual | kFlush};
  for (const std::uint64_t rounding : kRoundings) {
    modes.push_back(usual | rounding);
    modes.push_back(usual | rounding | kFlush);
  }
  for (const std::uint64_t strange : modes) {
    for (const unsigned threads : {1u, 3u}) {
      for (const bool inherited : {false, true}) {  // threads take over the mode of the thread that starts them
        auto got = before, generated = before;
        CHECK(pocketzo::set_threads(inherited ? 1 : threads));
        set_mode(strange);
        const bool started = pocketzo::set_threads(threads);
        const std::uint64_t started_mode = mode();
        apply_to(got.data(), n, 7, 0, terms);
        const std::uint64_t applied_mode = mode();
        pocketzo::generate({generated.data(), n, 0, 7}, 1, 2, Direction::gaussian);
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
#endif
}

void test_not_finite() {
  constexpr std::size_t n = 1003;
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<Term> terms{term(Direction::gaussian, 1, 1, {1e-3f, 2e-3f}),
                                term(Direction::rademacher, 1, 2, {0.5f})};
  auto want = weights(n);
  expect_applied(want, 8, 3, terms);
  auto got = weights(n);
  for (std::size_t i = 0; i < n; i += 5) {
    want[i] = got[i] = i % 3 == 0 ? from_bits(0x7FC12345u) : i % 3 == 1 ? inf : -inf;
  }
  CHECK(pocketzo::set_threads(2));
  apply_to(got.data(), n, 8, 3, terms);
  CHECK_SAME(got.data(), want.data(), n, "weights that are not finite");
}

// ---- 16-bit weights
// --------------------------------------------------------------------------------------------------

std::vector<Term> mixed_terms16() {
  std::vector<Term> terms = mixed_terms();
  terms[0].rounding = Rounding::stochastic;
  terms[1].rounding = Rounding::later;
  terms[2].rounding = Rounding::stochastic;
  terms.push_back(term(Direction::rademacher, 9, 9, {1e-6f}, 1e-3f));
  terms.back().rounding = Rounding::stochastic;
  return terms;
}

// Every pattern of 16 bits keeps its value, and fp32 values around every boundary are rounded as by the scalar set.
void test_conversions() {
  const KernelSet& set = pocketzo::current();
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
        CHECK_SAME(got.data(), want.data(), n, say("rounding ", off, " beside what 16 bits hold"));
      }
  }
}

void test_halves() {
  // By one thread in one piece, which test_answers has proved; then in pieces, by threads, in strange modes.
  constexpr std::size_t n = 20'011;
  const auto terms = mixed_terms16();
  std::mt19937 random(3);
  Guarded memory(n);
  for (const Storage storage : {Storage::float16, Storage::bfloat16})
    for (const std::uint64_t offset :
         {std::uint64_t{0}, std::uint64_t{37}, (std::uint64_t{1} << 34) - 7777, (std::uint64_t{1} << 39) - 7777}) {
      const auto before = weights16(n, storage);
      CHECK(pocketzo::set_threads(1));
      auto want = before;
      const KernelSet& set = pocketzo::current();
      pocketzo::use(scalar());
      apply_to(want.data(), n, storage, offset, terms);
      pocketzo::use(set);
      for (int round = 0; round < 8; ++round) {
        CHECK(pocketzo::set_threads(1 + static_cast<unsigned>(round) % 3));
        const std::uint64_t longest = round % 2 == 0 ? 70 : 5000;
        // Guarded hands out floats; a half may end at its edge all the same.
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
#if defined(__x86_64__) || defined(__aarch64__)
      const std::uint64_t usual = mode();
      for (const std::uint64_t strange : {usual | kFlush, usual | kRoundings[0], usual | kRoundings[2] | kFlush}) {
        auto got = before;
        set_mode(strange);
        apply_to(got.data(), n, storage, offset, terms);
        set_mode(usual);
        CHECK(got == want);
      }
#endif
    }
}

// ---- choosing a set
// -----------------------------------------------------------------------------------------------------

void test_choice() {
  std::array<const char*, 8> names{};
  const std::size_t count = pocketzo::available(names.data(), names.size());
  CHECK(count >= 1 && count <= 4);
  CHECK(std::strcmp(pocketzo::instruction_set(), names[0]) == 0);  // the best, until `use`
  CHECK(&pocketzo::current() == pocketzo::find(names[0]));
  CHECK(std::strcmp(names[count - 1], "scalar") == 0);
  CHECK(pocketzo::available(nullptr, 0) == count);
  const char* marker = "marker";
  std::array<const char*, 2> one{nullptr, marker};
  CHECK(pocketzo::available(one.data(), 1) == count);
  CHECK(one[0] == names[0] && one[1] == marker);
  for (std::size_t i = 0; i < std::min(count, names.size()); ++i) {
    const KernelSet* set = pocketzo::find(names[i]);
    CHECK(set != nullptr && std::strcmp(set->name, names[i]) == 0);
    CHECK(pocketzo::use(names[i]));
    CHECK(&pocketzo::current() == set);
    CHECK(std::strcmp(pocketzo::instruction_set(), names[i]) == 0);
  }
  for (const char* unknown : {"", "Scalar", "scalar ", "avx", "avx2x", "sse2"}) {
    CHECK(pocketzo::find(unknown) == nullptr);
    CHECK(!pocketzo::use(unknown));
    CHECK(std::strcmp(pocketzo::instruction_set(), "scalar") == 0);  // the last of the loop above
  }
}

#define RUN(call)    \
  do {               \
    running = #call; \
    call;            \
  } while (false)

// A guard page was touched, most likely.
extern "C" void on_fault(int) {
  const std::string message = "[" + testing + "] memory fault in " + running + "\n";
  [[maybe_unused]] const auto written = write(STDOUT_FILENO, message.data(), message.size());
  _exit(1);
}

void test_set(const KernelSet& set, const std::vector<Answer>& answers) {
  testing = set.name;
  pocketzo::use(set);
  CHECK(&pocketzo::current() == &set);
  CHECK(pocketzo::set_threads(2));
  RUN(test_answers(set, answers));
  RUN(test_whole_blocks());
  RUN(test_words_make_rademacher());
  RUN(test_shrink());
  RUN(test_walks());
  RUN(test_lengths());
  RUN(test_cuts());
  RUN(test_segments_of_many_tensors());
  RUN(test_packed());
  RUN(test_terms());
  RUN(test_long_programs());
  RUN(test_threads());
  RUN(test_a_slow_thread_takes_small_units(set));
  RUN(test_a_thread_that_cannot_run_is_not_waited_for(set));
  RUN(test_callers_at_once());
  RUN(test_floating_point_modes());
  RUN(test_not_finite());
  RUN(test_conversions());
  RUN(test_halves());
  RUN(test_fork());
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s answers.txt [scalar|neon|avx2|avx512 ...]\n", argv[0]);
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
#ifndef POCKETZO_ASAN  // which tells more
  std::signal(SIGSEGV, on_fault);
  std::signal(SIGBUS, on_fault);
#endif
  const auto answers = read_answers(argv[1]);
  testing = "choice";
  test_choice();

  std::vector<std::string> names(argv + 2, argv + argc);
  if (names.empty()) {
    std::array<const char*, 8> sets{};
    const std::size_t count = std::min(pocketzo::available(sets.data(), sets.size()), sets.size());
    names.assign(sets.begin(), sets.begin() + count);
  }
  for (const std::string& wanted : names) {
    const KernelSet* set = pocketzo::find(wanted.c_str());
    if (set == nullptr) {
      testing = wanted;
      fail(__LINE__, "was asked for, but this build or this processor lacks it");
      continue;
    }
    const int earlier = failures;
    test_set(*set, answers);
    std::printf("%-8s %s\n", set->name, failures == earlier ? "passed" : "FAILED");
  }
  for (const char* known : {"scalar", "neon", "avx2", "avx512"}) {
    if (std::find(names.begin(), names.end(), known) != names.end()) continue;
    std::printf("%-8s not run: %s\n", known,
                pocketzo::find(known) != nullptr ? "not asked for" : "this build or this processor lacks it");
  }
  if (failures != 0) std::printf("%d checks failed\n", failures.load());
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "test_kernels: %s\n", error.what());
  return 1;
}
