// The order in which the steps of engine.h run: of a search, and of a self-join over the upper triangle.
#pragma once

#include <algorithm>
#include <cstdint>

#include "search/cuda/engine.h"

namespace tgq::cuda {

// The rows of a phase as the filter takes them.
inline FilterJob filter_job(const Job& job, const Phase& phase) {
  FilterJob filter{};
  filter.code_dtype = job.code_dtype;
  filter.dtype = job.row_codes != nullptr ? job.code_dtype : job.pool.dtype;
  filter.queries = job.query_codes;
  filter.query_stride = job.depth;
  if (job.row_codes != nullptr) {
    filter.rows = job.row_codes;
    filter.row_stride = job.depth;
  } else {
    const std::int64_t element = job.pool.dtype == DType::f32 ? 4 : 2;
    filter.rows = static_cast<const char*>(job.pool.data) + phase.first * job.pool.row_stride * element;
    filter.row_stride = job.pool.row_stride * phase.step;
  }
  filter.num_queries = job.num_queries;
  filter.num_rows = static_cast<std::uint32_t>(phase.rows);
  filter.depth = job.depth;
  filter.first_row = static_cast<std::uint32_t>(phase.first);
  filter.row_step = static_cast<std::uint32_t>(phase.step);
  filter.threshold_score = job.threshold_score;
  filter.slope = job.slope;
  filter.lift = job.lift;
  if (job.tile_norm != nullptr) {
    filter.tile_norm = job.tile_norm + phase.first_tile;
    filter.tile_error = job.tile_error + phase.first_tile;
  }
  filter.absolute = job.margin.absolute;
  filter.hit_count = job.hit_count;
  filter.hits = job.hits;
  filter.hit_capacity = job.hit_capacity;
  return filter;
}

// The scores of tile `begin` against rows behind it count for both sides: each row is a query of a later tile.
inline void test_rows_too(FilterJob& filter, const Job& all, const Phase& phase, std::int64_t begin) {
  filter.row_threshold = all.threshold_score + phase.first;
  filter.row_slope = all.slope + phase.first;
  filter.row_lift = all.lift + phase.first;
  filter.query_norm = all.tile_norm + begin / kBoundRows;
  filter.query_error = all.tile_error + begin / kBoundRows;
  filter.first_query = static_cast<std::uint32_t>(begin);
  filter.pending_count = all.pending_count + phase.first;
  filter.pending = all.pending + phase.first * all.pending_capacity;
  filter.pending_capacity = all.pending_capacity;
}

// The job of the tile of queries that begins at `begin`.
inline Job tile_job(const Job& all, const Plan& plan, const CudaRequest& request, std::int64_t begin) {
  Job job = all;
  const std::int64_t element = request.queries.dtype == DType::f32 ? 4 : 2;
  job.num_queries = static_cast<std::uint32_t>(std::min(plan.tile_queries, request.queries.rows - begin));
  job.queries.data = static_cast<const char*>(request.queries.data) + begin * request.queries.row_stride * element;
  job.queries.rows = job.num_queries;
  job.exclude = request.exclude == nullptr ? nullptr : request.exclude + begin * request.exclude_width;
  job.scores = request.scores + begin * request.k;
  job.indices = request.rows + begin * request.k;
  if (!plan.self_join) return job;
  job.threshold += begin;  // these are kept for all queries at once
  job.state += begin;
  job.threshold_score += begin;
  job.slope += begin;
  job.lift += begin;
  job.pending_count += begin;
  job.pending += begin * job.pending_capacity;
  return job;
}

// One pass over rows; `bounds`: of their norms, which are not known yet (or whose rounded rows are gone).
template <class Device>
int run_phase(Device& device, const Job& job, const Phase& phase, const FilterJob& filter, bool bounds) {
  if (job.tile_norm != nullptr && bounds)
    if (const int error = device.prepare_rows(job, phase)) return error;
  if (const int error = device.filter(filter)) return error;
  if (const int error = device.rescore(job)) return error;
  return device.merge(job, phase);
}

template <class Device>
int end_tile(Device& device, const Job& job) {
  if (const int error = device.scan(job)) return error;
  return device.finish(job);
}

// Queries are the pool. First the thresholds of all from the sample; then tile after tile against the rows from its own on.
template <class Device>
int run_self_join(Device& device, const Plan& plan, const CudaRequest& request, const Job& all) {
  const std::int64_t rows = request.pool.rows;
  for (std::int64_t begin = 0; begin < rows; begin += plan.tile_queries) {
    const Job job = tile_job(all, plan, request, begin);
    if (const int error = device.prepare_queries(job)) return error;
    for (const Phase& phase : plan.phases) {
      const FilterJob filter = filter_job(job, phase);
      if (const int error = run_phase(device, job, phase, filter, begin == 0 || plan.coded_rows)) return error;
    }
  }
  const Phase waiting{0, 1, 0, request.k, false, 0};
  for (std::int64_t begin = 0; begin < rows; begin += plan.tile_queries) {
    Job job = tile_job(all, plan, request, begin);
    job.known_thresholds = true;
    if (const int error = device.prepare_queries(job)) return error;
    if (const int error = device.rescore(job)) return error;
    if (const int error = device.merge(job, waiting)) return error;
    for (const Phase& phase : triangle_phases(plan, request, begin)) {
      FilterJob filter = filter_job(job, phase);
      if (phase.first >= begin + plan.tile_queries) test_rows_too(filter, all, phase, begin);
      if (const int error = run_phase(device, job, phase, filter, begin == 0 || plan.coded_rows)) return error;
    }
    if (const int error = end_tile(device, job)) return error;
  }
  return 0;
}

// Runs a search on `device`, which has one method per step; each returns 0 or an error that ends the search.
template <class Device>
int run(Device& device, const Plan& plan, const CudaRequest& request) {
  Job all{};
  carve(plan, request, request.workspace, &all);
  if (plan.self_join) return run_self_join(device, plan, request, all);
  for (std::int64_t begin = 0; begin < request.queries.rows; begin += plan.tile_queries) {
    const Job job = tile_job(all, plan, request, begin);
    if (const int error = device.prepare_queries(job)) return error;
    for (const Phase& phase : plan.phases) {
      const FilterJob filter = filter_job(job, phase);
      if (const int error = run_phase(device, job, phase, filter, begin == 0 || !plan.keep_bounds)) return error;
    }
    if (const int error = end_tile(device, job)) return error;
  }
  return 0;
}

}  // namespace tgq::cuda
