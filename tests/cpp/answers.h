// Reads the answer file that tests/vectors/generate.py writes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace pocketzo::test {

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

inline std::vector<Answer> read_answers(const char* path) {
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

// The answers of the file named on the command line.
inline std::vector<Answer>& answers() {
  static std::vector<Answer> list;
  return list;
}

inline std::uint32_t crc32(const void* data, std::size_t size) {
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

}  // namespace pocketzo::test
