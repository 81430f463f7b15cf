// A noise pass over the weights on simulated fast and slow cores; run by bench/mixed.py.
//
//   mixed FAST SLOW RATIO spin|sleep ROUNDS
//
// Threads past the first FAST ones are RATIO times as slow:
//   spin    each call of the kernel is followed by idling for RATIO - 1 times as long; for as many threads as cores
//   sleep   a call lasts 1 ms a unit of 2^16 elements, or RATIO ms, most of it asleep; for more threads than cores
// Each round prints the seconds of a pass by the fast threads alone, by all with an equal share each, and by all as
// `apply` shares the work.

#include <pocketzo/kernels.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "kernel_set.h"

namespace {

using Clock = std::chrono::steady_clock;
using pocketzo::Key;
using pocketzo::Walk;

constexpr std::uint64_t kBlock = 64, kUnitBlocks = 1024;
constexpr std::chrono::duration<double> kUnitTime = std::chrono::milliseconds(1);
constexpr float kScale = 1e-3f;

const pocketzo::KernelSet& fast_set = pocketzo::current();
unsigned fast;
double ratio;
bool sleeps;
std::atomic<unsigned> pass{0}, next_thread{0};
thread_local unsigned my_pass = 0, my_number = 0;
thread_local Clock::time_point my_end;  // when this thread's work in this pass is due

// Numbers threads in the order of their first call in a pass. Without affinity any order will do.
void number_this_thread() {
  if (my_pass == pass) return;
  my_pass = pass;
  my_number = next_thread++;
  my_end = Clock::now();
}

void gaussian(const Walk& walk, const Key& key, const float* scale) noexcept {
  number_this_thread();
  const double slowness = my_number < fast ? 1.0 : ratio;
  const auto began = Clock::now();
  fast_set.gaussian[1](walk, key, scale);
  if (sleeps) {
    // Counted from when the last unit was due, so that oversleeping shortens the next unit.
    const auto lasts = kUnitTime * (slowness * static_cast<double>(walk.count) / kUnitBlocks);
    my_end += std::chrono::duration_cast<Clock::duration>(lasts);
    std::this_thread::sleep_until(my_end);
  } else {
    const auto until = began + std::chrono::duration_cast<Clock::duration>(slowness * (Clock::now() - began));
    while (Clock::now() < until) {
    }
  }
}

double seconds(const std::function<void()>& work) {
  ++pass;
  next_thread = 0;
  const auto began = Clock::now();
  work();
  return std::chrono::duration<double>(Clock::now() - began).count();
}

// A parallel loop with a static schedule.
void equal_split(std::vector<float>& w, unsigned threads) {
  const std::uint64_t units = w.size() / kBlock / kUnitBlocks;
  const Key key = pocketzo::subkey(1, 2, 3, 0);
  std::vector<std::thread> running;
  for (std::uint64_t t = 0; t < threads; ++t) {
    running.emplace_back([&w, &key, begin = units * t / threads, end = units * (t + 1) / threads] {
      for (std::uint64_t unit = begin; unit < end; ++unit) {
        const std::uint64_t first = unit * kUnitBlocks;
        gaussian({w.data() + first * kBlock, 16, kBlock, first, 1, kUnitBlocks}, key, &kScale);
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s FAST SLOW RATIO spin|sleep ROUNDS\n", argv[0]);
    return 2;
  }
  fast = static_cast<unsigned>(std::atoi(argv[1]));
  const unsigned all = fast + static_cast<unsigned>(std::atoi(argv[2]));
  ratio = std::atof(argv[3]);
  sleeps = std::strcmp(argv[4], "sleep") == 0;
  const int rounds = std::atoi(argv[5]);

  pocketzo::KernelSet mixed = fast_set;
  mixed.gaussian[1] = gaussian;
  pocketzo::use(mixed);
  std::vector<float> w((sleeps ? 352 : 1024) * kUnitBlocks * kBlock);  // MiniLM's 23 M, or 67 M
  const pocketzo::Segment segment{w.data(), w.size(), 0, 2};
  pocketzo::Term term{};
  term.scale[0] = kScale;
  term.count = 1;
  const auto shared = [&] { pocketzo::apply(&segment, 1, &term, 1); };
  for (int round = -1; round < rounds; ++round) {
    pocketzo::set_threads(fast);
    const double alone = seconds(shared);
    const double split = seconds([&] { equal_split(w, all); });
    pocketzo::set_threads(all);
    const double units = seconds(shared);
    if (round >= 0) std::printf("%.9f %.9f %.9f\n", alone, split, units);  // the first round is a warm-up
  }
  return 0;
}
