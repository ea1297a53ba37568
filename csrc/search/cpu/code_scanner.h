// The scan of stored codes: rows are read only where the bounds of their scores leave a question.
#pragma once

#include "search/cpu/code_queries.h"
#include "search/cpu/rerank.h"
#include "search/cpu/scanner.h"

namespace tgq {

class CodeScanner : public Scanner {
 public:
  explicit CodeScanner(const ScanPlan& plan);

  void load_queries(std::int64_t begin, std::int64_t count) override;
  void scan_block(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates) override;
  float mean_margin(std::int64_t q) const override;
  float fine_margin(std::int64_t q) const override;

 private:
  CodeRows block(std::int64_t first, int count) const;
  CodeQueries panel(std::int64_t begin) const;
  void sample(std::int64_t first, int count, std::int64_t ahead);
  void filter(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates);
  void fetch(std::int64_t first, std::int64_t count, std::int64_t panel) const;
  void put_off(std::int64_t q, std::int64_t row, float bound);
  void rerank(std::int64_t q);

  QueryCodes queries_of_tile_;
  Reranker reranker_;
  Buffer<CodeHit> code_hits_;
  std::vector<std::uint8_t> dense_groups_;
  std::vector<float> inverse_scale_, scaled_rest_;  // of the block's rows
  double scale_sum_ = 0, rest_sum_ = 0;  // of the sampled rows
  std::int64_t sampled_ = 0;
};

}  // namespace tgq
