// The answer file: results of an independent implementation of the specification.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "answers.h"
#include "check.h"
#include "expected.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"

namespace pocketzo::test {
namespace {

constexpr std::size_t kCrcBlock = std::size_t{1} << 16;
constexpr std::size_t kApplyValues = 64;

void check_crc(const Answer& a, std::size_t field, std::size_t block, const float* data, std::size_t n) {
  const std::uint32_t crc = crc32(data, n * sizeof(float)), want = Answer::word(a.answer.at(field));
  if (crc != want) {
    FAIL(say(a.where(), ": the CRC of block ", block, " (from element ", block * kCrcBlock, ") is ", hex(crc),
             ", expected ", hex(want)));
  }
}

// For answers that consist of the first values and the CRCs of all blocks.
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
    const Key key = subkey(in[4] | std::uint64_t{in[5]} << 32, in[2], in[0] | std::uint64_t{in[1]} << 32, in[3]);
    for (std::size_t j = 0; j < 4; ++j) CHECK(key.word[j] == Answer::word(a.answer.at(j)));
  } else if (in[3] == 0) {  // the kernels' fourth counter word is 0
    std::array<std::uint32_t, 64> out{};
    set.words(out.data(), in[0] / 16, 1, Key{{in[4], in[5], in[1], in[2]}});
    for (std::size_t j = 0; j < 4; ++j) CHECK(out[16 * j + in[0] % 16] == Answer::word(a.answer.at(j)));
  }
}

void check_stretch(const KernelSet& set, const Answer& a, Distribution distribution) {
  const std::uint64_t seed = a.integer(0), draw = a.integer(2), offset = a.integer(3);
  const auto n = static_cast<std::size_t>(a.integer(4));
  std::vector<float> want;
  if (distribution == Distribution::gaussian) {
    want = a.floats();
  } else {
    for (const char sign : a.answer.at(0)) want.push_back(sign == '+' ? 1.0f : -1.0f);
  }
  CHECK(want.size() == n);
  CHECK_SAME(noise_by(set, distribution, seed, a.tensor(1), draw, offset, n).data(), want.data(), n,
             a.where() + " (KernelSet)");
  std::vector<float> z(n);
  generate({z.data(), n, offset, a.tensor(1)}, seed, draw, distribution);
  CHECK_SAME(z.data(), want.data(), n, a.where() + " (generate)");
}

void check_crcs(const Answer& a, Distribution distribution) {
  std::vector<float> z(kCrcBlock * 16);
  const auto blocks = static_cast<std::size_t>(a.integer(4));
  CHECK(a.answer.size() == blocks);
  for (std::size_t done = 0; done < blocks;) {
    const std::size_t now = std::min<std::size_t>(16, blocks - done);
    generate({z.data(), now * kCrcBlock, a.integer(3) + done * kCrcBlock, a.tensor(1)}, a.integer(0), a.integer(2),
             distribution);
    for (std::size_t b = 0; b < now; ++b) check_crc(a, done + b, done + b, z.data() + b * kCrcBlock, kCrcBlock);
    done += now;
  }
}

// Reads a term from field `at` of a request on, and advances `at`.
Term term_at(const Answer& a, std::size_t& at) {
  const Distribution distribution = a.request.at(at) == "normal" ? Distribution::gaussian : Distribution::rademacher;
  std::vector<float> scales;
  for (std::size_t k = 0; k < a.integer(at + 4); ++k) scales.push_back(a.fp32(at + 5 + k));
  const Term result = term(distribution, a.integer(at + 1), a.integer(at + 2), scales, a.fp32(at + 3));
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

void check_products(const Answer& a) {
  std::vector<Term> terms;
  std::vector<std::size_t> counts;
  std::size_t at = 4;
  for (std::uint64_t i = 0; i < a.integer(3); ++i) {
    counts.push_back(static_cast<std::size_t>(a.integer(at++)));
    for (std::size_t k = 0; k < counts.back(); ++k) terms.push_back(term_at(a, at));
  }
  CHECK(at == a.request.size());
  const auto got = products_of(a.tensor(0), a.integer(1), a.integer(2), terms, counts);
  CHECK(a.answer.size() == got.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    const std::uint64_t want = std::stoull(a.answer.at(i), nullptr, 16);
    if (std::memcmp(&got[i], &want, sizeof want) != 0) FAIL(say(a.where(), ": product ", i, " is ", got[i]));
  }
}

Storage storage_of(const std::string& name) {
  return name == "float16" ? Storage::float16 : name == "bfloat16" ? Storage::bfloat16 : Storage::float32;
}

Rounding rounding_of(const std::string& name) {
  return name == "stochastic" ? Rounding::stochastic : name == "later" ? Rounding::later : Rounding::nearest;
}

void check_crcs_of(const Answer& a, std::size_t field, const void* data, std::size_t n, std::size_t size) {
  for (std::size_t b = 0; b * kCrcBlock < n; ++b) {
    const auto* block = static_cast<const unsigned char*>(data) + b * kCrcBlock * size;
    if (crc32(block, std::min(kCrcBlock, n - b * kCrcBlock) * size) != Answer::word(a.answer.at(field + b)))
      FAIL(say(a.where(), ": the CRC of block ", b, " differs, field ", field));
  }
}

// The answer has first values and CRCs of the momentum, then of the weights.
void check_momentum(const Answer& a) {
  const Storage storage = storage_of(a.request.at(0));
  std::vector<Term> terms;
  std::size_t at = 5;
  for (std::uint64_t i = 0; i < a.integer(4); ++i) {
    const std::string& role = a.request.at(at++);
    terms.push_back(term_at(a, at));
    terms.back().role = role == "gather" ? Role::gather : role == "follow" ? Role::follow : Role::shift;
    terms.back().rounding = rounding_of(a.request.at(at++));
  }
  CHECK(at == a.request.size());
  const auto n = static_cast<std::size_t>(a.integer(3));
  auto m = weights(n), w = m;
  std::reverse(m.begin(), m.end());
  auto w16 = weights16(storage == Storage::float32 ? 0 : n, storage);
  Segment segment{w.data(), n, a.integer(2), a.tensor(1), nullptr, storage, m.data()};
  if (storage != Storage::float32) segment.data = w16.data();
  apply(&segment, 1, terms.data(), terms.size());
  const std::size_t blocks = (n + kCrcBlock - 1) / kCrcBlock, second = kApplyValues + blocks;
  const auto words = a.floats();
  CHECK(words.size() == 2 * second);
  CHECK_SAME(m.data(), words.data(), kApplyValues, a.where());
  check_crcs_of(a, kApplyValues, m.data(), n, sizeof(float));
  for (std::size_t i = 0; i < kApplyValues; ++i) {
    const std::uint32_t got = storage == Storage::float32 ? bits(w[i]) : w16[i];
    if (got != bits(words[second + i])) FAIL(say(a.where(), ": weight ", i, " is ", hex(got)));
  }
  const void* data = segment.data;
  check_crcs_of(a, second + kApplyValues, data, n, storage == Storage::float32 ? sizeof(float) : 2);
}

void check_apply16(const Answer& a) {
  const Storage storage = storage_of(a.request.at(0));
  std::vector<Term> terms;
  std::size_t at = 5;
  for (std::uint64_t i = 0; i < a.integer(4); ++i) {
    terms.push_back(term_at(a, at));
    terms.back().rounding = rounding_of(a.request.at(at++));
  }
  CHECK(at == a.request.size());
  CHECK(a.integer(1) == 9);
  const auto n = static_cast<std::size_t>(a.integer(3));
  auto w = weights16(n, storage);
  apply_to(w.data(), n, storage, a.integer(2), terms);
  for (std::size_t i = 0; i < kApplyValues; ++i)
    if (w[i] != Answer::word(a.answer.at(i)))
      FAIL(say(a.where(), ": element ", i, " is ", hex(w[i]), ", expected ", a.answer.at(i)));
  check_crcs_of(a, kApplyValues, w.data(), n, sizeof(std::uint16_t));
}

void check_low_rank(const Answer& a) {
  const Storage storage = storage_of(a.request.at(0));
  std::vector<Term> terms;
  std::size_t at = 5;
  for (std::uint64_t i = 0; i < a.integer(4); ++i, at += 3) {
    Term t = term_at(a, at);
    t.rounding = rounding_of(a.request.at(at));
    terms.push_back(with_rank(static_cast<unsigned>(a.integer(at + 1)), a.integer(at + 2), t));
  }
  CHECK(at == a.request.size());
  const auto n = static_cast<std::size_t>(a.integer(2) * a.integer(3));
  auto w = weights(n);
  auto w16 = weights16(storage == Storage::float32 ? 0 : n, storage);
  Segment segment{w.data(), n, 0, a.tensor(1), nullptr, storage, nullptr, a.integer(3)};
  if (storage != Storage::float32) segment.data = w16.data();
  apply(&segment, 1, terms.data(), terms.size());
  if (storage == Storage::float32) return check_values_and_crcs(a, w);
  for (std::size_t i = 0; i < std::min(n, kApplyValues); ++i)
    if (w16[i] != Answer::word(a.answer.at(i))) FAIL(say(a.where(), ": element ", i, " is ", hex(w16[i])));
  check_crcs_of(a, kApplyValues, w16.data(), n, sizeof(std::uint16_t));
}

TEST(answers_of_the_specification) {
  const KernelSet& set = current();
  for (const Answer& a : answers()) {
    if (a.kind == "philox") {
      check_philox(set, a);
    } else if (a.kind == "subkey") {
      const Key key = subkey(a.integer(0), a.tensor(1), a.integer(2), static_cast<std::uint32_t>(a.integer(3)));
      for (std::size_t j = 0; j < 4; ++j) CHECK(key.word[j] == Answer::word(a.answer.at(j)));
    } else if (a.kind == "words") {
      const std::uint64_t block = a.integer(3);
      const Key key = subkey(a.integer(0), a.tensor(1), a.integer(2), static_cast<std::uint32_t>(block >> 28));
      std::array<std::uint32_t, 64> out{};
      set.words(out.data(), block, 1, key);
      for (std::size_t j = 0; j < 64; ++j) CHECK(out[j] == Answer::word(a.answer.at(j)));
    } else if (a.kind == "normal") {
      check_stretch(set, a, Distribution::gaussian);
    } else if (a.kind == "rademacher") {
      check_stretch(set, a, Distribution::rademacher);
    } else if (a.kind == "normal_crc") {
      check_crcs(a, Distribution::gaussian);
    } else if (a.kind == "rademacher_crc") {
      check_crcs(a, Distribution::rademacher);
    } else if (a.kind == "shrink") {
      auto w = weights(static_cast<std::size_t>(a.integer(1)));
      set.shrink(w.data(), w.size(), a.fp32(0));
      check_values_and_crcs(a, w);
    } else if (a.kind == "apply") {
      check_apply(a);
    } else if (a.kind == "apply16") {
      check_apply16(a);
    } else if (a.kind == "momentum") {
      check_momentum(a);
    } else if (a.kind == "products") {
      check_products(a);
    } else if (a.kind == "low_rank") {
      check_low_rank(a);
    } else {
      FAIL(a.where() + ": unknown kind");
    }
  }
}

}  // namespace
}  // namespace pocketzo::test
