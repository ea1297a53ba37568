// The other half of a self-join: hits of pool rows that are queries themselves, offered by every thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "search/cpu/rerank.h"
#include "search/cpu/scanner.h"
#include "search/selection.h"

namespace tgq {

class RowCandidates {
 public:
  // One candidate buffer per query, from the sampled thresholds where there are some.
  RowCandidates(std::int64_t queries, std::uint32_t capacity, const ScanPlan& plan)
      : plan_(plan), keys_(static_cast<std::size_t>(queries) * capacity),
        candidates_(static_cast<std::size_t>(queries)),
        thresholds_(std::make_unique<std::atomic<Key>[]>(static_cast<std::size_t>(queries))),
        locks_(std::make_unique<std::atomic<unsigned char>[]>(static_cast<std::size_t>(queries))) {
    for (std::size_t q = 0; q < candidates_.size(); ++q) {
      candidates_[q] = {keys_.data() + q * capacity, capacity, plan.k, 0, plan.thresholds == nullptr ? kNoKey : plan.thresholds[q]};
      thresholds_[q].store(candidates_[q].threshold, std::memory_order_relaxed);
      locks_[q].store(0, std::memory_order_relaxed);
    }
  }

  // The threshold of a query as it was a moment ago: a threshold only rises, so an old one lets more pass, never less.
  Key threshold(std::int64_t query) const { return thresholds_[static_cast<std::size_t>(query)].load(std::memory_order_relaxed); }

  // Row `row` scored `score` with `query`.
  void offer(std::int64_t query, std::int64_t row, float score) {
    const Key key = make_key(score, static_cast<std::uint32_t>(row));
    if (key <= threshold(query)) return;
    if (!is_excluded(plan_, query, row)) add(query, &key, 1);
  }

  // Hits that a scan of `query` itself kept.
  void add(std::int64_t query, const Key* keys, std::uint32_t count) {
    const auto q = static_cast<std::size_t>(query);
    while (locks_[q].exchange(1, std::memory_order_acquire) != 0) std::this_thread::yield();
    for (std::uint32_t i = 0; i < count; ++i) candidates_[q].push(keys[i]);
    thresholds_[q].store(candidates_[q].threshold, std::memory_order_relaxed);
    locks_[q].store(0, std::memory_order_release);
  }

  // Only when no other thread is at work.
  Candidates& candidates(std::int64_t query) { return candidates_[static_cast<std::size_t>(query)]; }

 private:
  const ScanPlan& plan_;
  Buffer<Key> keys_;
  std::vector<Candidates> candidates_;
  std::unique_ptr<std::atomic<Key>[]> thresholds_;
  std::unique_ptr<std::atomic<unsigned char>[]> locks_;
};

}  // namespace tgq
