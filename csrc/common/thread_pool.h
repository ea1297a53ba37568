// The threads of one call: those of the process' own pool, or some that are started and joined here.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

#include "common/types.h"

namespace tgq {

// Shared by the workers of one call.
class Progress {
 public:
  std::atomic<bool> stop{false};
  std::atomic<std::int64_t> done{0};
  std::int64_t total = 1;

  // Workers call it often; on the calling thread it polls a few times per second.
  void tick();
  bool cancelled() const { return cancelled_; }

 private:
  friend Status run_in_pool(int, const std::function<void(int)>&, Progress&, const std::function<bool(double)>&);
  const std::function<bool(double)>* poll_ = nullptr;
  std::thread::id caller_;
  std::chrono::steady_clock::time_point due_;
  bool cancelled_ = false;
};

// Runs work(0) … work(threads - 1), or fewer where there are not so many threads, on the calling thread and others. Work must
// watch progress.stop and tick. The first failure stops all and is returned.
Status run_in_pool(int threads, const std::function<void(int)>& work, Progress& progress,
                const std::function<bool(double)>& poll);

}  // namespace tgq
