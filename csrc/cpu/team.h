// Threads of one call: started, watched and joined here, so that nothing survives a call (or a fork).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "tgq/search.h"

namespace tgq {

// Shared by the workers of one call.
struct Progress {
  std::atomic<bool> stop{false};
  std::atomic<std::int64_t> done{0};
  std::int64_t total = 1;
};

// Runs work(0) … work(threads - 1), each on its own thread, and polls on the calling thread meanwhile. With one thread
// and no poll it runs in place. Work must watch progress.stop. The first failure stops all and is returned.
Status run_team(int threads, const std::function<void(int)>& work, Progress& progress,
                const std::function<bool(double)>& poll);

}  // namespace tgq
