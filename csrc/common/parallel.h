// Short parallel loops on the thread pool that is already in the process.
#pragma once

#include <cstdint>
#include <functional>

#include "common/types.h"

namespace tgq {

// Calls work(begin, end) for parts of [0, count), each at most `grain` long, on up to `threads` threads
// (common/thread_pool.h); begin and end of `worker` run once per thread around them.
struct Worker {
  void (*begin)();
  void (*end)();
};
Status parallel_for(std::int64_t count, std::int64_t grain, int threads, const Worker& worker,
                    const std::function<void(std::int64_t, std::int64_t)>& work);

}  // namespace tgq
