#include "search/cpu/sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <mutex>

namespace tgq {
namespace {

// Of the proved margin: about six standard deviations of the filter's error, and three of the codes', whose margin is larger.
constexpr float kFilterSlack = 0.25f, kCodeSlack = 0.125f;

void raise(std::vector<float>& to, const std::vector<float>& from) {
  if (to.empty()) to = from;
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = from[i] > to[i] ? from[i] : to[i];
}

}  // namespace

void SampleScan::leave(Tile& tile, Scanner& scanner) {
  {
    const std::lock_guard<std::mutex> lock(tile.mutex);
    raise(tile.maxima, scanner.maxima());
    std::vector<float> margin(static_cast<std::size_t>(tile.count)), fine = margin;
    for (std::int64_t q = 0; q < tile.count; ++q) {
      margin[static_cast<std::size_t>(q)] = scanner.mean_margin(q);
      fine[static_cast<std::size_t>(q)] = scanner.fine_margin(q);
    }
    raise(tile.mean_margin, margin);
    raise(tile.fine_margin, fine);
    if (--tile.joined > 0 || tile.next_row < plan_.pool.rows || progress_.stop) return;
  }
  tile.ready.store(true, std::memory_order_release);
  merge(tile);
}

void SampleScan::merge(Tile& tile) {
  std::vector<float> best(static_cast<std::size_t>(plan_.slots));
  for (std::int64_t first = tile.next_query.fetch_add(kPanel); first < tile.count; first = tile.next_query.fetch_add(kPanel))
    for (std::int64_t q = first; q < std::min(first + kPanel, tile.count); ++q) {
      if (plan_.codes != nullptr) {
        std::copy_n(tile.maxima.data() + q * plan_.slots, plan_.slots, best.data());
      } else {
        const float* from = tile.maxima.data() + first * plan_.slots + q - first;
        for (int s = 0; s < plan_.slots; ++s) best[static_cast<std::size_t>(s)] = from[s * kPanel];
      }
      std::nth_element(best.begin(), best.begin() + rank_ - 1, best.end(), std::greater<float>());
      // Scores that differ by less than the filter's usual error are in no order: where many rows are as good as the k-th
      // best, the threshold must not be above all of them.
      const float margin = tile.mean_margin[static_cast<std::size_t>(q)], least = tile.fine_margin[static_cast<std::size_t>(q)];
      const float slack = (plan_.codes == nullptr ? kFilterSlack : kCodeSlack) * margin;
      const float score = best[static_cast<std::size_t>(rank_) - 1] - slack;
      if (score >= -FLT_MAX) thresholds_[static_cast<std::size_t>(tile.begin + q)] = threshold_at(score);
      if (plan_.codes == nullptr) continue;
      std::nth_element(best.begin(), best.begin() + hits_ - 1, best.begin() + rank_, std::greater<float>());
      const float last = best[static_cast<std::size_t>(hits_) - 1] - slack;
      const double reach = share(best, score - margin), remain = share(best, last - least);
      const std::lock_guard<std::mutex> lock(mutex_);
      left += reach;
      scored += remain;
    }
}

double SampleScan::share(const std::vector<float>& best, float score) const {
  const auto sets = static_cast<double>(best.size());
  const auto below = static_cast<double>(std::count_if(best.begin(), best.end(), [score](float s) { return s < score; }));
  if (below == 0) return 1.0;  // more than the sets can tell
  return std::min(1.0, sets / static_cast<double>(plan_.pool.rows) * std::log(sets / below));
}

}  // namespace tgq
