#include "common/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace tgq {
namespace {

constexpr auto kPollInterval = std::chrono::milliseconds(50);

// The contract's arithmetic: round to nearest, denormals kept. A caller may have switched its thread to flush them.
class DefaultArithmetic {
 public:
#if defined(__SSE__)
  DefaultArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

Status guarded(const std::function<void(int)>& work, int index, Progress& progress) {
  const DefaultArithmetic arithmetic;
  try {
    work(index);
    return Status::ok;
  } catch (const std::bad_alloc&) {
    progress.stop = true;
    return Status::out_of_memory;
  }
}

std::atomic<bool> forked{false};

#if defined(__linux__)
// From the start: a fork may come before the first search.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

bool has_other_threads() {
  struct stat tasks;
  return stat("/proc/self/task", &tasks) == 0 && tasks.st_nlink > 3;  // two links of the folder itself
}
#endif

// GNU's (and LLVM's, and Intel's) entry point of an OpenMP parallel region, stable since gcc 4.9.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

// That of the OpenMP pool in the process, PyTorch's as a rule: its workers spin for milliseconds after each of PyTorch's
// operators, and threads beside them would get half of a core. Null where there is none, where the process has no other thread
// (nobody spins), and in a forked child, where a pool has lost its workers.
ParallelRegion process_pool() {
#if defined(__linux__)
  static const auto found = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static std::atomic<bool> running{false};  // a pool that was used once stays, and asking takes a search of one query too long
  if (found == nullptr || forked) return nullptr;
  if (!running) running = has_other_threads();
  return running ? found : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace

void Progress::tick() {
  if (poll_ == nullptr || stop || std::this_thread::get_id() != caller_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now < due_) return;
  due_ = now + kPollInterval;
  if ((*poll_)(std::min(1.0, static_cast<double>(done) / static_cast<double>(total)))) return;
  cancelled_ = true;
  stop = true;
}

Status run_in_pool(int threads, const std::function<void(int)>& work, Progress& progress,
                const std::function<bool(double)>& poll) {
  progress.caller_ = std::this_thread::get_id();
  progress.due_ = std::chrono::steady_clock::now() + kPollInterval;
  progress.poll_ = poll ? &poll : nullptr;
  std::mutex mutex;
  std::condition_variable changed;
  int running = 0;
  std::atomic<int> next{0};
  Status status = Status::ok;
  const std::function<void()> member = [&] {
    const Status result = guarded(work, next++, progress);
    const std::lock_guard<std::mutex> lock(mutex);
    if (result != Status::ok && status == Status::ok) status = result;
  };
  if (threads <= 1) {
    member();
  } else if (const ParallelRegion region = process_pool()) {
    region([](void* data) { (*static_cast<const std::function<void()>*>(data))(); }, const_cast<std::function<void()>*>(&member),
           static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(threads));
    for (int t = 1; t < threads; ++t) {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        ++running;
      }
      try {
        others.emplace_back([&] {
          member();
          const std::lock_guard<std::mutex> lock(mutex);
          --running;
          changed.notify_one();
        });
      } catch (const std::system_error&) {  // no more threads to be had: those there are share the work
        const std::lock_guard<std::mutex> lock(mutex);
        --running;
        break;
      }
    }
    member();
    std::unique_lock<std::mutex> lock(mutex);
    while (!changed.wait_for(lock, kPollInterval, [&] { return running == 0; })) {
      lock.unlock();
      progress.tick();
      lock.lock();
    }
    lock.unlock();
    for (std::thread& other : others) other.join();
  }
  progress.poll_ = nullptr;
  return status == Status::ok && progress.cancelled() ? Status::cancelled : status;
}

}  // namespace tgq
