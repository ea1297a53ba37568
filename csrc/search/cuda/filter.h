// What every filter kernel takes, and what it does with the scores: the epilogue that two matrix engines share.
#pragma once

#include <cstdint>

#include "search/cuda/margin.h"
#include "search/search.h"
#include "search/search_cuda.h"
#include "search/selection.h"

namespace tgq::cuda {

constexpr std::uint32_t kBoundRows = 128;  // rows that share one bound of their norms: the width of a filter tile

// Most queries of one launch of the skinny filter.
constexpr std::int64_t kSkinnyQueries = 64;

// Scores of 16-bit queries [num_queries, depth] against rows [num_rows, depth]. Row i stands for pool row first_row +
// i * row_step. Rows that reach their query's threshold are appended to its hits.
struct FilterJob {
  DType code_dtype;  // of the queries, and what is multiplied
  DType dtype;   // of the rows: the skinny filter rounds them itself, to the others they come rounded
  const void* queries;
  const void* rows;
  std::int64_t query_stride;  // elements, a multiple of 8; memory is 16-byte aligned
  std::int64_t row_stride;
  std::uint32_t num_queries, num_rows, depth;  // depth: a multiple of 8
  std::uint32_t first_row, row_step;
  const float *threshold_score, *slope, *lift;  // [num_queries]
  const float *tile_norm, *tile_error;      // [num_rows / kBoundRows, rounded up]; null: bounded by the filter itself
  float absolute;
  std::uint32_t* hit_count;  // [num_queries]; counts on beyond the capacity: nothing is lost unnoticed
  Key* hits;                 // [num_queries, hit_capacity], pool rows until they are rescored
  std::uint32_t hit_capacity;
  // Where the rows are queries of later tiles of a self-join: the same scores are tested for them. Else null.
  const float *row_threshold, *row_slope, *row_lift;  // [num_rows]
  const float *query_norm, *query_error;          // [num_queries / kBoundRows, rounded up]: of the queries as rows
  std::uint32_t first_query;                      // pool row that query 0 is
  std::uint32_t* pending_count;                   // [num_rows]; counts on like hit_count
  std::uint32_t* pending;                         // [num_rows, pending_capacity]
  std::uint32_t pending_capacity;
};

// Threshold of one query for one tile of rows. Queries beyond the last never pass.
TGQ_HD inline float tile_threshold(const FilterJob& job, std::uint32_t query, std::uint32_t tile) {
  if (query >= job.num_queries) return bits_float(0x7f800000u);
  return filter_threshold(job.threshold_score[query], job.slope[query], job.lift[query], job.absolute, job.tile_norm[tile],
                   job.tile_error[tile]);
}

// Threshold of row `index` as a query, for the queries of one bound as rows.
TGQ_HD inline float row_threshold(const FilterJob& job, std::uint32_t index, std::uint32_t query) {
  if (index >= job.num_rows) return bits_float(0x7f800000u);
  const std::uint32_t bound = query / kBoundRows;
  return filter_threshold(job.row_threshold[index], job.row_slope[index], job.row_lift[index], job.absolute, job.query_norm[bound],
                   job.query_error[bound]);
}

#if defined(__CUDACC__)
// Appends row `index` of the job for `query`.
__device__ inline void append_hit(const FilterJob& job, std::uint32_t query, std::uint32_t index) {
  if (query >= job.num_queries || index >= job.num_rows) return;  // padding of a tile
  const std::uint32_t slot = atomicAdd(job.hit_count + query, 1u);
  if (slot < job.hit_capacity)
    job.hits[static_cast<std::size_t>(query) * job.hit_capacity + slot] = job.first_row + index * job.row_step;
}

// Appends `query` to what row `index` is to be tried against when its turn as a query comes.
__device__ inline void append_pending(const FilterJob& job, std::uint32_t query, std::uint32_t index) {
  if (query >= job.num_queries || index >= job.num_rows) return;
  const std::uint32_t slot = atomicAdd(job.pending_count + index, 1u);
  if (slot < job.pending_capacity)
    job.pending[static_cast<std::size_t>(index) * job.pending_capacity + slot] = job.first_query + query;
}
#endif

// Runs a filter on `stream`; returns the first CUDA error, as an integer, 0 when there is none.
int launch_portable_filter(const FilterJob& job, void* stream);
// For few queries, and rows that are 16-byte aligned and a multiple of 8 long.
int launch_skinny_filter(const FilterJob& job, int multiprocessors, void* stream);
// TMA and wgmma; only where built for sm_90a.
int launch_hopper_filter(const FilterJob& job, HopperTile tile, int multiprocessors, void* stream);

}  // namespace tgq::cuda
