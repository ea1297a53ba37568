// What a scan does.
#pragma once

#include <cstdint>

#include "search/cpu/codes.h"
#include "search/cpu/kernels.h"
#include "search/search.h"
#include "search/selection.h"

namespace tgq {

class PreparedQueries;

// What all threads of one scan share.
struct ScanPlan {
  Matrix queries;
  Matrix pool;
  const std::int64_t* query_ids = nullptr;  // rows of `queries` to search; null: all, in order
  const Key* thresholds = nullptr;              // per position in that list; null: none known
  const std::int64_t* exclude = nullptr;
  std::int64_t exclude_width = 0;
  const std::uint8_t* allowed = nullptr;    // per pool row, zero: never a hit; null: all may be
  const Rule* rules = nullptr;
  int num_rules = 0;
  const std::uint32_t* row_ids = nullptr;   // a sample: row i is row row_ids[i] of the pool; null: row i itself
  std::uint32_t k = 0;
  std::uint32_t capacity = 0;
  std::uint32_t pending = 0;  // hits of a query that a thread puts off; 0: each is scored at once
  int slots = 0;             // a sample: only so many of its largest scores are kept, Maxima::slots
  int run = 0;               // Maxima::run
  const Kernels* kernels = nullptr;
  const Filter* filter = nullptr;  // null: score everything exactly
  const Codes* codes = nullptr;    // of the pool; then `filter` is null
  const CodeKernels* code_kernels = nullptr;
  const PreparedQueries* prepared = nullptr;
  std::int64_t group_step = 1;     // a sample of codes: group g is group g * group_step of the pool
  const float* bias = nullptr;     // a sample of codes: per pool row, -infinity where it is not allowed
  std::int64_t width = 0;          // D padded to kLanes
  std::int64_t row_bytes = 0;      // of a row of codes
  int block_rows = 0;              // multiple of kPanel
  std::int64_t max_tile = 0;       // queries of the largest tile

  bool is_allowed(std::int64_t row) const { return allowed == nullptr || allowed[row] != 0; }
  // Whether row `row` may be a hit of query `id`, exclusions aside.
  bool may_hit(std::int64_t id, std::int64_t row) const {
    if (!is_allowed(row)) return false;
    for (int r = 0; r < num_rules; ++r)
      if (!rules[r].met(id, row)) return false;
    return true;
  }
  std::int64_t query_id(std::int64_t position) const { return query_ids == nullptr ? position : query_ids[position]; }
};

}  // namespace tgq
