#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/team.h"

namespace tgq {

Status parallel_for(std::int64_t count, std::int64_t grain, int threads, const Worker& worker,
                    const std::function<void(std::int64_t, std::int64_t)>& work) {
  if (count <= 0) return Status::ok;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  // Parts are claimed, so that any number of threads that the pool gives does all of them.
  const std::function<void()> body = [&] {
    worker.begin();
    try {
      for (std::int64_t i = next.fetch_add(grain); i < count; i = next.fetch_add(grain)) work(i, std::min(count, i + grain));
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      next = count;
    }
    worker.end();
  };
  const auto team = static_cast<int>(std::min<std::int64_t>(threads, (count + grain - 1) / grain));
  if (team <= 1) {
    body();
  } else if (const ParallelRegion region = process_pool()) {
    region([](void* data) { (*static_cast<const std::function<void()>*>(data))(); }, const_cast<std::function<void()>*>(&body),
           static_cast<unsigned>(team), 0);
  } else {
    Progress progress;
    const Status status = run_team(team, [&](int) { body(); }, progress, {});
    if (status != Status::ok) return status;
  }
  return out_of_memory ? Status::out_of_memory : Status::ok;
}

}  // namespace tgq
