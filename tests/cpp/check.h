// Tests, which register themselves, and checks, which report a difference and continue.
#pragma once

#include <atomic>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace pocketzo::test {

// ---- tests: run once for each set, with that set in use ----------------------------------------------------------

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> list;
  return list;
}

struct Registration {
  Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

#define TEST(name)                                 \
  void name();                                     \
  const Registration register_##name(#name, name); \
  void name()

// ---- checks ------------------------------------------------------------------------------------------------------

inline std::atomic<int> failures{0};
inline std::string testing;       // the set
inline const char* running = "";  // the test

inline void fail(const char* file, int line, const std::string& message) {
  if (++failures <= 50) std::printf("%s:%d: [%s] %s: %s\n", file, line, testing.c_str(), running, message.c_str());
}

#define FAIL(message) fail(__FILE__, __LINE__, message)

#define CHECK(condition)                \
  do {                                  \
    if (!(condition)) FAIL(#condition); \
  } while (false)

#define CHECK_SAME(got, want, n, what) check_same(__FILE__, __LINE__, got, want, n, what)

template <typename... Parts>
std::string say(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::uint32_t bits(float x) {
  std::uint32_t pattern;
  std::memcpy(&pattern, &x, sizeof pattern);
  return pattern;
}

inline float from_bits(std::uint32_t pattern) {
  float x;
  std::memcpy(&x, &pattern, sizeof x);
  return x;
}

inline std::string hex(std::uint32_t word) {
  char text[9];
  std::snprintf(text, sizeof text, "%08" PRIx32, word);
  return text;
}

// Compares bit for bit; reports the first element that differs.
inline void check_same(const char* file, int line, const float* got, const float* want, std::size_t n,
                       const std::string& what) {
  if (n == 0 || std::memcmp(got, want, n * sizeof(float)) == 0) return;
  std::size_t first = 0;
  while (bits(got[first]) == bits(want[first])) ++first;
  std::size_t different = 0;
  for (std::size_t i = first; i < n; ++i) different += bits(got[i]) != bits(want[i]);
  fail(file, line,
       say(what, ": element ", first, " is ", hex(bits(got[first])), " (", got[first], "), expected ",
           hex(bits(want[first])), " (", want[first], "); ", different, " of ", n, " differ"));
}

}  // namespace pocketzo::test
