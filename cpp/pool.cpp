#include "pool.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "pocketzo/kernels.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif

namespace pocketzo {
namespace {

unsigned default_threads() noexcept {
  unsigned n = std::thread::hardware_concurrency();
#if defined(__linux__)
  cpu_set_t allowed;  // a container or an app in the background may use fewer cores than there are
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) n = static_cast<unsigned>(CPU_COUNT(&allowed));
#endif
  return std::clamp(n, 1u, kMaxThreads);
}

class Pool {
 public:
  explicit Pool(unsigned count) noexcept { start(count); }

  unsigned count() const noexcept { return static_cast<unsigned>(others_.size()) + 1; }

  void run(std::uint64_t units, Work work, const void* context) noexcept {
    const std::lock_guard<std::mutex> one_job(job_mutex_);
    Units left(units);
    if (others_.empty() || units < 2) {
      work(left, context);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      units_ = &left;
      ++job_;
    }
    wake_.notify_all();
    work(left, context);
    std::unique_lock<std::mutex> lock(mutex_);
    units_ = nullptr;  // all units are taken: do not wait for threads that have not been scheduled yet
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  bool resize(unsigned count) noexcept {
    const std::lock_guard<std::mutex> one_job(job_mutex_);
    if (count == this->count()) return true;
    const unsigned before = this->count();
    stop();
    if (start(count)) return true;
    stop();
    start(before);
    return false;
  }

 private:
  bool start(unsigned count) noexcept {
    stopping_ = false;
    try {
      others_.reserve(count - 1);
      while (others_.size() < count - 1) others_.emplace_back([this, seen = job_] { serve(seen); });
      return true;
    } catch (const std::system_error&) {  // no more threads: those that started are used
      return false;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  void stop() noexcept {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : others_) t.join();
    others_.clear();
  }

  void serve(std::uint64_t seen) noexcept {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || job_ != seen; });
      if (stopping_) return;
      seen = job_;
      if (units_ == nullptr) continue;
      const Work work = work_;
      const void* context = context_;
      Units& units = *units_;
      ++busy_;
      lock.unlock();
      work(units, context);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex job_mutex_;
  std::mutex mutex_;  // guards the following
  std::condition_variable wake_, done_;
  std::vector<std::thread> others_;
  Work work_ = nullptr;
  const void* context_ = nullptr;
  Units* units_ = nullptr;  // of the job that threads may still join
  std::size_t busy_ = 0;    // threads working on it, except the caller
  std::uint64_t job_ = 0;
  bool stopping_ = false;
};

// Never destroyed, because its threads may outlive static destructors. A child of fork() inherits the object without
// its threads, and perhaps a locked mutex, so it gets a new pool of the same size.
Pool& pool() noexcept {
  static std::mutex mutex;
  static Pool* instance = nullptr;
#if !defined(_WIN32)
  static pid_t owner = 0;
  static unsigned size = 0;
  static const bool registered = pthread_atfork(
                                     [] {
                                       mutex.lock();
                                       if (instance) size = instance->count();
                                     },
                                     [] { mutex.unlock(); }, [] { mutex.unlock(); }) == 0;
  static_cast<void>(registered);
#endif
  const std::lock_guard<std::mutex> lock(mutex);
#if !defined(_WIN32)
  if (instance != nullptr && owner != getpid()) instance = new Pool(size);
  owner = getpid();
#endif
  if (instance == nullptr) instance = new Pool(default_threads());
  return *instance;
}

}  // namespace

void run(std::uint64_t units, Work work, const void* context) noexcept { pool().run(units, work, context); }

bool set_threads(unsigned count) noexcept { return count >= 1 && count <= kMaxThreads && pool().resize(count); }

unsigned threads() noexcept { return pool().count(); }

}  // namespace pocketzo
