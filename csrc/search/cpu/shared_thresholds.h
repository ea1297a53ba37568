// Thresholds that threads tell each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "search/selection.h"

namespace tgq {

// What threads that scan different rows for the same queries know of the k-th best together: when each of T threads has
// ceil(k / T) keys that are not below L, no key below L is among the k best.
class SharedThresholds {
 public:
  SharedThresholds(int threads, std::int64_t queries)
      : threads_(threads), queries_(queries),
        keys_(new std::atomic<Key>[static_cast<std::size_t>(threads) * static_cast<std::size_t>(queries)]) {
    for (std::int64_t i = 0; i < threads * queries; ++i) keys_[static_cast<std::size_t>(i)].store(kNoKey, std::memory_order_relaxed);
  }
  int threads() const { return threads_; }
  void publish(int thread, std::int64_t query, Key key) { at(thread, query).store(key, std::memory_order_relaxed); }
  Key threshold(std::int64_t query) const {
    Key least = at(0, query).load(std::memory_order_relaxed);
    for (int t = 1; t < threads_; ++t) {
      const Key key = at(t, query).load(std::memory_order_relaxed);
      least = key < least ? key : least;
    }
    return least;
  }

 private:
  std::atomic<Key>& at(int thread, std::int64_t query) const {
    return keys_[static_cast<std::size_t>(thread * queries_ + query)];
  }
  int threads_;
  std::int64_t queries_;
  std::unique_ptr<std::atomic<Key>[]> keys_;
};

}  // namespace tgq
