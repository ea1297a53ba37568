// The scan of a sample of the pool: a first threshold for every query, and what stored codes leave of the rows.
#pragma once

#include <vector>

#include "search/cpu/partitioned_scan.h"

namespace tgq {

// A score near the `rank`-th best of the sample becomes the threshold; the k-th best score of all is about its `hits`-th best.
class SampleScan : public PartitionedScan {
 public:
  SampleScan(const ScanPlan& plan, std::int64_t num_queries, const Partition& partition, Progress& progress, int rank, int hits, std::vector<Key>& thresholds)
      : PartitionedScan(plan, num_queries, partition, progress), rank_(rank), hits_(hits), thresholds_(thresholds) {}

  // With codes: shares of the rows whose bound from the first level reaches the threshold, and whose best bound reaches the k-th best score,
  // of all queries together.
  double left = 0, scored = 0;

 private:
  void finish(std::int64_t, const Key*, std::uint32_t, bool) override {}
  void leave(Tile& tile, Scanner& scanner) override;
  void merge(Tile& tile) override;
  // Share of the sample's rows that are not below `score`, from the largest of each of its sets.
  double share(const std::vector<float>& best, float score) const;

  int rank_, hits_;
  std::vector<Key>& thresholds_;
};

}  // namespace tgq
