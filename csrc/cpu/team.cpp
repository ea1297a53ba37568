#include "cpu/team.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

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

}  // namespace

Status run_team(int threads, const std::function<void(int)>& work, Progress& progress,
                const std::function<bool(double)>& poll) {
  if (threads <= 1 && !poll) return guarded(work, 0, progress);
  std::mutex mutex;
  std::condition_variable changed;
  int running = 0;
  Status status = Status::ok;
  std::vector<std::thread> team;
  team.reserve(static_cast<std::size_t>(threads));
  for (int t = 0; t < threads; ++t) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ++running;
    }
    try {
      team.emplace_back([&, t] {
        const Status result = guarded(work, t, progress);
        const std::lock_guard<std::mutex> lock(mutex);
        if (result != Status::ok && status == Status::ok) status = result;
        --running;
        changed.notify_one();
      });
    } catch (const std::system_error&) {  // no more threads to be had: those there are share the work
      const std::lock_guard<std::mutex> lock(mutex);
      --running;
      break;
    }
  }
  if (team.empty()) return guarded(work, 0, progress);
  std::unique_lock<std::mutex> lock(mutex);
  while (!changed.wait_for(lock, kPollInterval, [&] { return running == 0; })) {
    if (!poll || progress.stop) continue;
    const double share = std::min(1.0, static_cast<double>(progress.done) / static_cast<double>(progress.total));
    lock.unlock();
    if (!poll(share)) {
      progress.stop = true;
      lock.lock();
      if (status == Status::ok) status = Status::cancelled;
      continue;
    }
    lock.lock();
  }
  lock.unlock();
  for (std::thread& member : team) member.join();
  return status;
}

}  // namespace tgq
