// Tests the kernels:
//
//   test_kernels answers.txt [set ...]
//
// Without names it tests every instruction set that this CPU can run. answers.txt comes from tests/vectors/generate.py,
// an independent implementation of the specification. The last line for each set is `<set> passed` or `<set> FAILED`.
// The exit code is 0 on success, 1 if a check failed, 2 for wrong usage, and 77 if a named set cannot run here, which
// ctest reports as a skipped test.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "answers.h"
#include "check.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"
#include "sanitizers.h"

namespace pocketzo::test {
namespace {

constexpr int kCannotRun = 77;

// To be called before any set is selected. Leaves the scalar set in use.
void test_choice() {
  std::array<const char*, 8> names{};
  const std::size_t count = available(names.data(), names.size());
  CHECK(count >= 1 && count <= 4);
  CHECK(std::strcmp(instruction_set(), names[0]) == 0);  // the best, as none was selected
  CHECK(&current() == find(names[0]));
  CHECK(std::strcmp(names[count - 1], "scalar") == 0);
  CHECK(available(nullptr, 0) == count);
  const char* marker = "marker";
  std::array<const char*, 2> one{nullptr, marker};
  CHECK(available(one.data(), 1) == count);
  CHECK(one[0] == names[0] && one[1] == marker);
  for (std::size_t i = 0; i < std::min(count, names.size()); ++i) {
    const KernelSet* set = find(names[i]);
    CHECK(set != nullptr && std::strcmp(set->name, names[i]) == 0);
    CHECK(use(names[i]));
    CHECK(&current() == set);
    CHECK(std::strcmp(instruction_set(), names[i]) == 0);
  }
  for (const char* unknown : {"", "Scalar", "scalar ", "avx", "avx2x", "sse2"}) {
    CHECK(find(unknown) == nullptr);
    CHECK(!use(unknown));
    CHECK(std::strcmp(instruction_set(), "scalar") == 0);  // selected last above
  }
}

// Most likely a guard page was touched.
extern "C" void on_fault(int) {
  const std::string message = "[" + testing + "] memory fault in " + running + "\n";
  [[maybe_unused]] const auto written = write(STDOUT_FILENO, message.data(), message.size());
  _exit(1);
}

void test_set(const KernelSet& set) {
  testing = set.name;
  const int earlier = failures;
  CHECK(!all_tests().empty());
  for (const Test& test : all_tests()) {
    use(set);
    CHECK(set_threads(2));
    running = test.name;
    test.run();
    CHECK(&current() == &set);
  }
  std::printf("%-8s %s\n", set.name, failures == earlier ? "passed" : "FAILED");
}

int run(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
#ifndef POCKETZO_ASAN  // whose own report says more
  std::signal(SIGSEGV, on_fault);
  std::signal(SIGBUS, on_fault);
#endif
  answers() = read_answers(argv[1]);
  testing = running = "choice";
  test_choice();

  std::vector<std::string> names(argv + 2, argv + argc);
  if (names.empty()) {
    std::array<const char*, 8> sets{};
    names.assign(sets.begin(), sets.begin() + available(sets.data(), sets.size()));
  }
  bool missing = false;
  for (const std::string& name : names) {
    if (const KernelSet* set = find(name.c_str())) {
      test_set(*set);
    } else {
      std::printf("%-8s cannot run: this build or this processor lacks it\n", name.c_str());
      missing = true;
    }
  }
  if (failures != 0) std::printf("%d checks failed\n", failures.load());
  return failures != 0 ? 1 : missing ? kCannotRun : 0;
}

}  // namespace
}  // namespace pocketzo::test

int main(int argc, char** argv) {
  const std::vector<std::string> known{"scalar", "neon", "avx2", "avx512"};
  const auto is_known = [&](const char* name) { return std::find(known.begin(), known.end(), name) != known.end(); };
  if (argc < 2 || !std::all_of(argv + 2, argv + argc, is_known)) {
    std::fprintf(stderr, "usage: %s answers.txt [scalar|neon|avx2|avx512 ...]\n", argv[0]);
    return 2;
  }
  try {
    return pocketzo::test::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "test_kernels: %s\n", error.what());
    return 1;
  }
}
