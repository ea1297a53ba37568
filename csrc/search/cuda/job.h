// The plan of a search and the device memory of one tile of queries. Plain data: kernels take it by value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "search/cuda/margin.h"
#include "search/search.h"
#include "search/search_cuda.h"
#include "search/selection.h"

namespace tgq::cuda {

// Rows first, first + step, … of the pool, scanned by one launch of the filter.
struct Phase {
  std::int64_t first = 0, step = 1, rows = 0;
  std::uint32_t limit = 0;   // keys to keep: k, or the rank taken from a sample
  bool ends_sample = false;  // the lowest key kept becomes the threshold and the keys are forgotten
  std::uint32_t first_tile = 0;  // of its bounds of norms
};

// State of a query.
constexpr std::uint32_t kDead = 1;      // holds NaN: no row can be a hit
constexpr std::uint32_t kOverflow = 2;  // more hits than the buffer takes: to be rescanned
constexpr std::uint32_t kSampled = 4;   // its threshold came from a sample (or was forced): to be verified

struct Job {
  Matrix queries, pool;  // of this tile; strides in elements
  const std::int64_t* exclude;  // [num_queries, exclude_width] or null
  std::int64_t exclude_width;
  std::uint32_t num_queries, k;
  std::uint32_t first_row;  // what pool row 0 is called in keys
  bool resume;              // scores and indices hold the answer so far
  std::uint32_t depth;   // D rounded up to 8
  DType code_dtype;          // type that the filter multiplies
  bool direct;           // no filter: every query is scanned exactly
  bool has_forced_threshold;
  float forced_threshold;
  Margin margin;
  // Per query.
  float* query_values;          // [num_queries, D]
  std::uint16_t* query_codes;  // [num_queries, depth]
  float *threshold_score, *slope, *lift;
  Key* threshold;                   // only larger keys can be hits
  std::uint32_t *kept, *state;  // number of keys in best; flags
  Key* best;                    // [num_queries, best_capacity]
  std::uint32_t best_capacity;
  std::uint32_t* hit_count;
  Key* hits;                    // [num_queries, hit_capacity]
  std::uint32_t hit_capacity;
  // Self-join: queries of earlier tiles that reached this one's threshold; null without.
  std::uint32_t *pending_count, *pending;  // [num_queries], [num_queries, pending_capacity]
  std::uint32_t pending_capacity;
  bool known_thresholds;            // a query's threshold and state were found before: its turn in a self-join
  // Queries to scan exactly, in any order.
  std::uint32_t* listed;        // [num_queries]
  std::uint32_t* num_listed;
  std::uint16_t* row_codes;    // rows of the current phase: [chunk rows, depth], null where the pool itself will do
  float *tile_norm, *tile_error;  // [bound tiles], null where the filter bounds norms itself
  // Lists of the exact scan: one of owned_capacity keys for every query of every block.
  Key* owned;
  std::uint32_t* owned_count;
  std::uint32_t owned_capacity, direct_blocks, direct_queries;  // direct_queries: of one block
  float* scores;                // [num_queries, k]
  std::int64_t* indices;
};

// How the listed queries are spread over the blocks of the exact scan; the same on host and device.
struct Split {
  std::uint32_t groups, splits;
  TGQ_HD std::uint32_t items() const { return groups * splits; }
};
constexpr std::int64_t kMinSplitRows = 256;

TGQ_HD inline Split split_work(std::uint32_t listed, std::uint32_t group_size, std::uint32_t blocks, std::int64_t rows) {
  const std::uint32_t groups = (listed + group_size - 1) / group_size;
  std::uint32_t splits = groups == 0 || groups >= blocks ? 1 : blocks / groups;
  const std::int64_t most = rows / kMinSplitRows;
  if (splits > most) splits = most < 1 ? 1u : static_cast<std::uint32_t>(most);
  return {groups, splits};
}

// First row of part `i` of `splits`: parts are multiples of kMinSplitRows, but the last.
TGQ_HD inline std::int64_t split_begin(std::int64_t rows, std::uint32_t splits, std::uint32_t i) {
  if (i >= splits) return rows;
  return rows / kMinSplitRows * i / splits * kMinSplitRows;
}

struct DeviceFacts {
  int multiprocessors;
  bool hopper;  // compute capability 9.0, and built for it
};

struct Plan {
  Engine engine = Engine::direct;
  std::int64_t tile_queries = 0;
  std::vector<Phase> phases;
  bool coded_rows = false;
  bool keep_bounds = false;  // every phase has its own bounds of norms: later tiles of queries find them
  bool self_join = false;    // phases are the sample's; triangle_phases has the others
  std::uint32_t bound_tiles = 0;
  DType code_dtype = DType::bf16;
  std::uint32_t depth = 0, best_capacity = 0, hit_capacity = 0, owned_capacity = 0, direct_blocks = 0, direct_queries = 0;
  std::uint32_t pending_capacity = 0;
  std::int64_t chunk_rows = 0;
  std::size_t workspace_bytes = 0;
};

// Passes of a self-join over the rows from `begin`, the first row of a tile of queries, on: the tile itself, whose scores
// are computed for both sides, then the rows behind it.
std::vector<Phase> triangle_phases(const Plan& plan, const CudaRequest& request, std::int64_t begin);

// Decides how to search; needs no device.
Plan make_plan(const CudaRequest& request, const DeviceFacts& facts);

// Points the job's arrays into `workspace` (which may be null) and returns the bytes that they take.
std::size_t carve(const Plan& plan, const CudaRequest& request, void* workspace, Job* job);

}  // namespace tgq::cuda
