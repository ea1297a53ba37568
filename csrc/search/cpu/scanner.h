// One thread's scan of pool rows against one tile of queries.
#pragma once

#include <cstdint>
#include <vector>

#include "search/cpu/buffer.h"
#include "search/cpu/filter.h"
#include "search/cpu/kernels.h"
#include "search/cpu/row_reader.h"
#include "search/cpu/scan_plan.h"
#include "search/cpu/shared_thresholds.h"
#include "search/search.h"
#include "search/selection.h"

namespace tgq {

class RowCandidates;

class Scanner {
 public:
  explicit Scanner(const ScanPlan& plan);
  virtual ~Scanner();

  // Takes the queries at positions [begin, begin + count) of the plan's list.
  virtual void load_queries(std::int64_t begin, std::int64_t count);
  // Takes over the thresholds that the queries reached as rows of a self-join.
  void raise_thresholds(const RowCandidates& row_candidates);
  // Exchanges with the other threads what is known of the k-th best. `thread` is this one's number among them; one
  // beyond those that `shared` counts only listens.
  void share_thresholds(SharedThresholds& shared, int thread);
  // Rows to scan next at most.
  int next_rows() const;
  // Scans pool rows [first, first + count), count <= next_rows(). Calls must come in rising order of rows; those of the next
  // one follow, `ahead` of them. With `row_candidates` the rows are queries too, and the scores count for both sides.
  virtual void scan_block(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates);

  std::int64_t num_queries() const { return num_queries_; }
  Candidates& candidates(std::int64_t q) { return candidates_[static_cast<std::size_t>(q)]; }
  // Hits not scored yet.
  const Pending* pending(std::int64_t q) const { return pending_.data() + q * plan_.pending; }
  std::uint32_t pending_count(std::int64_t q) const { return pending_count_[static_cast<std::size_t>(q)]; }
  // Of a sample: [padded queries / kPanel][slots][kPanel], with codes [padded queries][slots]
  const std::vector<float>& maxima() const { return maxima_; }
  // Of a sample: the margin of the query's filter scores, for rows of the average norm.
  virtual float mean_margin(std::int64_t q) const;
  // Likewise of what stored codes know best.
  virtual float fine_margin(std::int64_t q) const { return mean_margin(q); }
  bool has_nan(std::int64_t q) const { return nan_[static_cast<std::size_t>(q)] != 0; }
  const Counters& counters() const { return counters_; }

 protected:
  bool cold() const;
  void scan_direct(std::int64_t first, int count, RowCandidates* row_candidates);
  void scan_filtered(std::int64_t first, int count, std::int64_t ahead, RowCandidates* row_candidates);
  void scan_sample(std::int64_t first, int count, std::int64_t ahead);
  FilterPanel panel(std::int64_t begin) const;
  // The rows as fp32, in place where they are: `rows_`.
  void read_rows(std::int64_t first, int count);
  // Makes `block_` out of the rows.
  void encode(std::int64_t first, int count);
  Ahead memory_ahead(std::int64_t first, std::int64_t count) const;
  Ahead share_ahead(std::int64_t first, std::int64_t count, std::int64_t panel) const;
  const float* row(std::int64_t first, int at, int slot);
  // Rows [begin, begin + part) of the block, against the panel's queries.
  void score_dense(std::int64_t panel, int begin, int part, std::int64_t first, RowCandidates* row_candidates);
  // Scores hits exactly, a batch of a block's panels together.
  void rescore(std::int64_t q, int row, std::int64_t first, int count, RowCandidates* row_candidates);
  void score_batch(std::int64_t first, RowCandidates* row_candidates);
  // After the filter has been through a block: what it left is scored and thresholds rise; where most groups were dense, the filter
  // rests for some blocks.
  void end_filtered(std::int64_t first, int count, std::int64_t dense, std::int64_t groups, RowCandidates* row_candidates);
  void offer(std::int64_t q, std::int64_t row, float score, RowCandidates* row_candidates);
  void load_row_thresholds(const RowCandidates& row_candidates, std::int64_t first, int count);
  void update_thresholds(std::int64_t begin, std::int64_t end, std::int64_t next_row);
  void raise_all_thresholds();

  const ScanPlan& plan_;
  RowReader pool_;
  RowReader query_reader_;
  std::int64_t padded_tile_;
  Buffer<float> queries_;      // [tile, width]
  Buffer<float> row_scratch_;  // [block_rows, width]
  const float* rows_ = nullptr;  // the block's rows as fp32 where they are at hand, else null
  std::int64_t row_stride_ = 0;
  Buffer<float> scores_;       // scores of one direct tile
  Buffer<std::uint32_t> positions_;
  Buffer<Key> keys_;           // [tile, capacity]
  std::vector<Candidates> candidates_;
  std::vector<float> threshold_;   // [tile] lowest score of interest; the largest float where nothing is
  std::vector<std::int64_t> risen_;  // queries whose candidates' threshold has risen since `threshold_` was brought up to date
  std::vector<float> row_threshold_;  // [block_rows] of the rows as queries, in a self-join
  std::vector<unsigned char> nan_;
  std::int64_t begin_ = 0, num_queries_ = 0;
  std::int64_t scanned_ = 0;   // rows since load_queries
  std::int64_t raise_at_ = 0;  // rows scanned at which the first thresholds are raised again
  int direct_blocks_ = 0;      // blocks to score exactly before the filter is tried again
  MarginConstants margin_;
  Buffer<std::uint32_t> panels_;  // queries packed for the filter
  Buffer<std::uint8_t> codes_;    // the block's rows, encoded
  std::vector<std::int32_t> offset_;
  std::vector<float> unit_, slope_, lift_;                       // of the queries
  std::vector<float> scale_, norm_, error_, group_norm_, group_error_;  // of the block's rows
  FilterBlock block_{};
  bool stored_codes_;             // the pool's own memory serves as codes
  Buffer<FilterHit> hits_;
  struct Pair {
    std::int64_t query;
    int row;  // of the block
  };
  std::vector<Pair> batch_;
  std::vector<std::uint8_t> dense_;
  Buffer<Pending> pending_;                     // [tile, pending]
  std::vector<std::uint32_t> pending_count_;
  std::vector<float> maxima_;
  double norm_sum_ = 0, error_sum_ = 0;  // of the sample's groups
  std::int64_t groups_ = 0;
  Counters counters_;
};

}  // namespace tgq
