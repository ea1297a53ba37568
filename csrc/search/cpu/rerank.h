// Exact scores for what the filter let through, best first.
#pragma once

#include <cstdint>
#include <vector>

#include "search/cpu/scanner.h"
#include "search/selection.h"

namespace tgq {

// Scores the rows that one query has pending. Those with the highest bounds come first: their exact scores raise the threshold,
// and the bounds of most others, from the first level or else from the second, are then below it, so that they need not be read.
class Reranker {
 public:
  explicit Reranker(const ScanPlan& plan);

  // `query` has the kernels' width, `id` is its row in the query matrix. What may be among the k best goes to `best`. `pending` is reordered. Returns the rows scored.
  std::int64_t rerank(const float* query, std::int64_t id, Pending* pending, std::uint32_t count, Candidates& best);

 private:
  void score(const float* query, std::int64_t id, const Pending* pending, std::uint32_t count, Candidates& best);

  const ScanPlan& plan_;
  RowReader pool_;
  CodeRows rows_{};  // all of the pool
  Buffer<float> scratch_;  // rows that have to be converted
};

// Whether pool row `row` must not be returned for query row `id`.
bool is_excluded(const ScanPlan& plan, std::int64_t id, std::int64_t row);

}  // namespace tgq
