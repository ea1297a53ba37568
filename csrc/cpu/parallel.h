// Short parallel loops on the thread pool that is already in the process.
#pragma once

#include <cstdint>
#include <functional>

#include "tgq/search.h"

namespace tgq {

// Calls work(begin, end) for parts of [0, count), each at most `grain` long, on up to `threads` threads; work runs begin and
// finish of `worker` once per thread around them. Uses the OpenMP pool of the process (PyTorch's) where there is one: a second
// pool would compete with its workers, which spin between PyTorch's operators. Else threads of its own.
struct Worker {
  void (*begin)();
  void (*end)();
};
Status parallel_for(std::int64_t count, std::int64_t grain, int threads, const Worker& worker,
                    const std::function<void(std::int64_t, std::int64_t)>& work);

}  // namespace tgq
