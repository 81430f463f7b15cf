// Threads: any number of them, slow ones, concurrent callers, fork.
#include <poll.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "expected.h"
#include "kernel_set.h"
#include "pocketzo/kernels.h"
#include "sanitizers.h"

namespace pocketzo::test {
namespace {

TEST(the_number_of_threads) {
  // Enough elements for many units. The bits do not depend on the number of threads.
  constexpr std::size_t n = 1'500'007;
  const auto terms = mixed_terms();
  auto want = weights(n);
  expect_applied(want, 5, 12'345, terms);
  const auto z = noise_by(scalar(), Distribution::gaussian, 1, 5, 2, 12'345, n);
  for (const unsigned threads : {1u, 2u, 3u, 7u, 2u, 1u}) {
    CHECK(set_threads(threads));
    CHECK(pocketzo::threads() == threads);
    auto got = weights(n);
    apply_to(got.data(), n, 5, 12'345, terms);
    CHECK_SAME(got.data(), want.data(), n, say("apply, ", threads, " threads"));
    generate({got.data(), n, 12'345, 5}, 1, 2, Distribution::gaussian);
    CHECK_SAME(got.data(), z.data(), n, say("generate, ", threads, " threads"));
  }
  CHECK(set_threads(3));
  CHECK(!set_threads(0));
  CHECK(!set_threads(kMaxThreads + 1));
  CHECK(pocketzo::threads() == 3);
}

// A set whose `gaussian` blocks: the first other thread in its first call, until all but one unit are done; the main
// thread, until such a thread exists.
namespace held_up {

constexpr std::uint64_t kUnitBlocks = (1u << 16) / kBlock;
const KernelSet* inner;
pthread_t main_thread, other_thread;
std::uint64_t enough;  // blocks
std::atomic<std::uint64_t> done;
std::atomic<bool> entered;

template <typename Condition>
bool comes_true(const Condition& condition) {  // within a time that suffices on a loaded machine or an emulator
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
      FAIL("no other thread took part");
      entered = true;
    }
  } else if (!entered.load()) {
    other_thread = pthread_self();
    entered = true;
    if (!comes_true([] { return done.load() >= enough; }))
      FAIL(say("a slow thread has more than a unit to itself: ", done.load(), " blocks done, not ", enough));
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
  use(holding);
  const Term shift = term(Distribution::gaussian, 1, 2, {0.5f});
  pocketzo::apply(segments.data(), segments.size(), &shift, 1);
  use(set);
}

}  // namespace held_up

TEST(a_slow_thread_takes_small_units) {
  const KernelSet& set = current();
  CHECK(set_threads(2));
  const Packing rows{1024, 256, 256, 256, false}, transposed{16384, 16, 32, 256, true};
  std::vector<float> plain(5 * held_up::kUnitBlocks * kBlock), in_rows(1024 * 256), in_transposed_rows(16384 * 32);
  const Segment segments[] = {{plain.data(), plain.size(), 0, 7},
                              {in_rows.data(), 1024 * 256, 0, 8, &rows},
                              {in_transposed_rows.data(), 16384 * 16, 0, 9, &transposed}};
  for (const Segment& segment : segments) held_up::apply(set, {segment});
}

std::atomic<bool> stopped, released;

extern "C" void stop_here(int) {
  stopped = true;
  while (!released) poll(nullptr, 0, 1);
}

TEST(a_thread_that_cannot_run_is_not_waited_for) {
  const KernelSet& set = current();
  CHECK(set_threads(2));
  std::vector<float> w(4 * held_up::kUnitBlocks * kBlock);
  held_up::apply(set, {{w.data(), w.size(), 0, 7}});  // sets other_thread
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

TEST(callers_at_once) {
  CHECK(set_threads(3));
  constexpr std::size_t n = 70'001;
  const auto terms = mixed_terms();
  const auto work = [&](std::uint32_t tensor) {
    auto want = weights(n);
    expect_applied(want, tensor, 0, terms);
    const auto z = noise_by(scalar(), Distribution::rademacher, 1, tensor, 2, 0, n);
    for (int round = 0; round < 20; ++round) {
      auto got = weights(n);
      apply_to(got.data(), n, tensor, 0, terms);
      CHECK_SAME(got.data(), want.data(), n, say("apply beside another thread, round ", round));
      generate({got.data(), n, 0, tensor}, 1, 2, Distribution::rademacher);
      CHECK_SAME(got.data(), z.data(), n, say("generate beside another thread, round ", round));
    }
  };
  std::thread other(work, 1), third(work, 2);
  work(3);
  other.join();
  third.join();
}

#ifndef POCKETZO_TSAN  // which allows no new threads in a child forked by a process with threads
TEST(a_forked_child_has_threads_of_its_own) {
  CHECK(set_threads(3));
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
    alarm(120);  // a pool waiting for threads that the child lacks would hang
    bool good = true;
    for (const unsigned threads : {0u, 2u, 1u}) {
      if (threads != 0) good = good && set_threads(threads);
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
    FAIL(WIFSIGNALED(status) ? say("the child of fork died of signal ", WTERMSIG(status))
                             : std::string("the child of fork computed something else"));
  }
  got = weights(n);
  apply_to(got.data(), n, 6, 0, terms);
  CHECK_SAME(got.data(), want.data(), n, "apply after fork, in the parent");
}
#endif

}  // namespace
}  // namespace pocketzo::test
