#include "common/parallel.h"

#include <algorithm>
#include <atomic>

#include "common/thread_pool.h"

namespace tgq {
namespace {

// A thread's time with the matrix unit, however it ends.
class Shift {
 public:
  explicit Shift(const Worker& worker) : worker_(worker) { worker_.begin(); }
  ~Shift() { worker_.end(); }
  Shift(const Shift&) = delete;
  Shift& operator=(const Shift&) = delete;

 private:
  const Worker& worker_;
};

}  // namespace

Status parallel_for(std::int64_t count, std::int64_t grain, int threads, const Worker& worker,
                    const std::function<void(std::int64_t, std::int64_t)>& work) {
  if (count <= 0) return Status::ok;
  std::atomic<std::int64_t> next{0};
  Progress progress;
  // Parts are claimed, so that any number of threads that the pool gives does all of them.
  const auto claim = [&](int) {
    const Shift shift(worker);
    for (std::int64_t i = next.fetch_add(grain); i < count && !progress.stop; i = next.fetch_add(grain))
      work(i, std::min(count, i + grain));
  };
  return run_in_pool(static_cast<int>(std::min<std::int64_t>(threads, (count + grain - 1) / grain)), claim, progress, {});
}

}  // namespace tgq
