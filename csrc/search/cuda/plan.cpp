// Plans a CUDA search: engine, tiles, passes over the pool, workspace. Host code without CUDA, so that it is tested
// everywhere.
#include <algorithm>
#include <cmath>

#include "common/integers.h"
#include "search/cuda/filter.h"
#include "search/cuda/job.h"

namespace tgq::cuda {
namespace {

constexpr std::int64_t kDirectQueries = 8;        // up to here reading the pool bounds the exact scan
constexpr std::int64_t kDirectRows = 4096;        // smaller pools are not worth several launches
constexpr std::int64_t kMaxFilterDepth = 1 << 17;  // the margin's proof covers D up to here
constexpr std::int64_t kTileQueries = 4096;
constexpr std::int64_t kMaxTileQueries = 65535;   // they are one dimension of a grid
constexpr std::int64_t kHitBytes = 64 << 20;     // of all hit buffers
constexpr std::int64_t kCodeBytes = 64 << 20;   // of the rows of one pass in 16 bits
constexpr std::int64_t kOwnedBytes = 32 << 20;    // of the lists of the exact scan
constexpr std::int64_t kSkinnyBytes = 64 << 10;   // of the queries in shared memory
constexpr std::int64_t kMinChunk = 1 << 16;
constexpr std::int64_t kChunks = 3;               // passes over the pool: the thresholds rise in between
constexpr std::int64_t kMaxBoundTiles = 1 << 21;  // of norms that are kept for later tiles of queries: 16 MB
constexpr std::int64_t kSelfJoinRows = 1 << 17;   // below that the triangle saves less than its additional steps cost
constexpr std::int64_t kPendingBytes = std::int64_t{8} << 30;  // of what waits in a self-join that nobody asked for

// Rows that are scored exactly to get a first threshold: for few queries launches weigh more, for many those exact scores do.
std::int64_t first_rows(std::int64_t queries) { return queries <= 32 ? 2048 : queries < 1024 ? 512 : 128; }

std::uint32_t power_of_two(std::uint32_t least) {
  std::uint32_t size = 1;
  while (size < least) size *= 2;
  return size;
}

bool fits_filter(const Matrix& pool, DType code_dtype) {
  return pool.dtype == code_dtype && pool.col_stride == 1 && pool.cols % 8 == 0 && pool.row_stride % 8 == 0 &&
         pool.row_stride >= pool.cols && reinterpret_cast<std::uintptr_t>(pool.data) % 16 == 0;
}

bool fits_skinny(const Matrix& pool, std::int64_t queries) {
  const std::int64_t element = pool.dtype == DType::f32 ? 4 : 2, groups = queries <= 16 ? 2 : queries <= 32 ? 4 : 8;
  return pool.col_stride == 1 && pool.cols % 8 == 0 && pool.row_stride * element % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(pool.data) % 16 == 0 && groups * 8 * round_up(pool.cols, 32) * 2 <= kSkinnyBytes;
}

std::int64_t sample_stride(const CudaRequest& request, bool self_join) {
  if (request.tuning.has_forced_threshold) return 0;
  const std::int64_t rows = request.pool.rows, wish = request.tuning.sample_stride;
  // A part of a larger pool has thresholds already; the sample keeps a pool in rising order from overflowing every part.
  // What waits in a self-join grows with the spread of the thresholds: a denser sample for them.
  const std::int64_t large = self_join ? 32 : 64;
  const std::int64_t stride = wish >= 0 ? wish : rows >= 1 << 18 ? large : rows >= 1 << 15 || request.resume ? 16 : 0;
  if (stride < 2 || rows < stride) return 0;
  const std::uint32_t rank = sample_rank(request.k, static_cast<std::uint32_t>(stride));
  if (rank > kMaxK || (wish < 0 && rows / stride < 4 * static_cast<std::int64_t>(rank))) return 0;
  return stride;
}

// First the sample, then every row once. No pass of either is expected to fill more than half of the hit buffers; the
// very first pass of a search without thresholds has so few rows that it cannot overflow.
void add_phases(Plan& plan, const CudaRequest& request, std::int64_t stride) {
  const std::int64_t rows = request.pool.rows;
  const std::int64_t wish = request.tuning.first_rows;
  const auto first_of = [&](std::int64_t least) {
    return std::min<std::int64_t>(wish > 0 ? wish : std::max(first_rows(plan.tile_queries), least), plan.hit_capacity);
  };
  if (stride > 0) {
    const std::uint32_t rank = sample_rank(request.k, static_cast<std::uint32_t>(stride));
    const std::int64_t sampled = rows / stride, first = first_of(2 * rank);
    for (std::int64_t at = 0, next = first; at < sampled; next = 7 * at) {
      const std::int64_t count = std::min({next, sampled - at, plan.chunk_rows});
      plan.phases.push_back({at * stride, stride, count, rank, at + count == sampled});
      at += count;
    }
  }
  if (plan.self_join) return;
  const bool thresholds = stride > 0 || request.tuning.has_forced_threshold || request.resume;
  const std::int64_t first = first_of(2 * static_cast<std::int64_t>(request.k));
  const std::int64_t passes = plan.engine == Engine::skinny ? 1 : kChunks;
  const std::int64_t even = std::max(kMinChunk, round_up(ceil_div(rows, passes), kBoundRows));
  for (std::int64_t at = 0; at < rows;) {
    const std::int64_t next = thresholds ? even : at == 0 ? first : at;
    const std::int64_t count = std::min({next, rows - at, plan.chunk_rows});
    plan.phases.push_back({at, 1, count, request.k, false});
    at += count;
  }
}

// What is expected to wait for a query at most: rows above the r-th best of a sample, and four standard deviations more.
std::uint32_t pending_capacity(const CudaRequest& request, std::int64_t stride) {
  if (request.tuning.hit_capacity > 0) return request.tuning.hit_capacity;
  if (stride == 0) return 1024;
  const double rank = sample_rank(request.k, static_cast<std::uint32_t>(stride));
  const double rows = static_cast<double>(stride) * (rank + 4 * std::sqrt(rank));
  return static_cast<std::uint32_t>(round_up(static_cast<std::int64_t>(rows), 64));
}

// Whether a search of a pool for its own rows goes over one triangle.
bool takes_triangle(const CudaRequest& request, Engine engine) {
  const std::int64_t rows = request.pool.rows;
  if (!request.self_join || request.resume || request.first_row != 0 || request.tuning.self_join == 0 || rows == 0 ||
      (engine != Engine::portable && engine != Engine::hopper))
    return false;
  if (request.tuning.self_join > 0) return true;
  const std::int64_t stride = sample_stride(request, true);
  return rows >= kSelfJoinRows && stride > 0 && rows * pending_capacity(request, stride) * 4 <= kPendingBytes;
}

}  // namespace

std::vector<Phase> triangle_phases(const Plan& plan, const CudaRequest& request, std::int64_t begin) {
  std::vector<Phase> phases;
  const std::int64_t rows = request.pool.rows, own_end = std::min(rows, begin + plan.tile_queries);
  const std::int64_t even = std::max(kMinChunk, round_up(ceil_div(rows - own_end, kChunks), kBoundRows));
  for (std::int64_t at = begin; at < rows;) {
    const std::int64_t left = at < own_end ? own_end - at : std::min(even, rows - at);
    const std::int64_t count = std::min(left, plan.chunk_rows);
    phases.push_back({at, 1, count, request.k, false, static_cast<std::uint32_t>(at / kBoundRows)});
    at += count;
  }
  return phases;
}

Plan make_plan(const CudaRequest& request, const DeviceFacts& facts) {
  const CudaTuning& tuning = request.tuning;
  const std::int64_t queries = request.queries.rows, rows = request.pool.rows, cols = request.pool.cols;
  const std::uint32_t k = request.k;
  Plan plan;
  plan.engine = tuning.engine;
  if (plan.engine == Engine::automatic)
    plan.engine = rows <= kDirectRows                                                ? Engine::direct
                  : queries <= kSkinnyQueries && fits_skinny(request.pool, queries) ? Engine::skinny
                  : queries <= kDirectQueries                                       ? Engine::direct
                  : facts.hopper                                                    ? Engine::hopper
                                                                                    : Engine::portable;
  if (cols == 0 || cols > kMaxFilterDepth || rows == 0) plan.engine = Engine::direct;
  if (plan.engine == Engine::skinny && !fits_skinny(request.pool, std::min(queries, kSkinnyQueries)))
    plan.engine = Engine::portable;
  const bool filtered = plan.engine != Engine::direct, skinny = plan.engine == Engine::skinny;

  plan.code_dtype = request.queries.dtype == DType::f16 && request.pool.dtype == DType::f16 ? DType::f16 : DType::bf16;
  plan.depth = static_cast<std::uint32_t>(round_up(cols, 8));
  plan.coded_rows = filtered && !skinny && !fits_filter(request.pool, plan.code_dtype);

  plan.self_join = takes_triangle(request, plan.engine);
  const std::int64_t stride = filtered ? sample_stride(request, plan.self_join) : 0;
  plan.best_capacity = std::max(k, stride > 0 ? sample_rank(k, static_cast<std::uint32_t>(stride)) : 0u);
  plan.hit_capacity = !filtered ? 0 : tuning.hit_capacity > 0 ? tuning.hit_capacity : std::max(skinny ? 16384u : 2048u, power_of_two(4 * k));
  if (plan.self_join) plan.pending_capacity = pending_capacity(request, stride);
  plan.hit_capacity = std::max(plan.hit_capacity, plan.pending_capacity);
  plan.tile_queries = tuning.tile_queries > 0 ? tuning.tile_queries : kTileQueries;
  if (skinny) plan.tile_queries = std::min(plan.tile_queries, kSkinnyQueries);
  const std::int64_t hit_bytes = std::max<std::int64_t>(1, plan.hit_capacity) * static_cast<std::int64_t>(sizeof(Key));
  plan.tile_queries = std::max<std::int64_t>(1, std::min({plan.tile_queries, queries, kMaxTileQueries, kHitBytes / hit_bytes}));
  // Tiles of queries are whole bounds of the norms: they are rows, too.
  if (plan.self_join) plan.tile_queries = std::max<std::int64_t>(1, plan.tile_queries / kBoundRows) * kBoundRows;

  if (filtered) {
    const std::int64_t fit = plan.coded_rows ? kCodeBytes / (2 * static_cast<std::int64_t>(plan.depth)) : skinny ? 1 << 30 : 1 << 22;
    plan.chunk_rows = std::max<std::int64_t>(kBoundRows, fit / kBoundRows * kBoundRows);
    if (tuning.chunk_rows > 0) plan.chunk_rows = std::min(plan.chunk_rows, tuning.chunk_rows);
    if (plan.self_join) plan.chunk_rows = std::max<std::int64_t>(1, plan.chunk_rows / kBoundRows) * kBoundRows;
    add_phases(plan, request, stride);
    std::int64_t most = 1, tiles = 0;
    const auto bound_tiles = [](const Phase& phase) { return round_up(phase.rows, kBoundRows) / kBoundRows; };
    for (const Phase& phase : plan.phases) {
      most = std::max(most, phase.rows);
      tiles += bound_tiles(phase);
    }
    if (plan.self_join) {
      for (const Phase& phase : triangle_phases(plan, request, 0)) most = std::max(most, phase.rows);
      plan.bound_tiles = static_cast<std::uint32_t>(round_up(rows, kBoundRows) / kBoundRows);  // the sample's come behind
    }
    plan.chunk_rows = most;
    const bool tiled = !skinny && !plan.coded_rows && queries > plan.tile_queries && tiles <= kMaxBoundTiles;
    plan.keep_bounds = plan.self_join || tiled;
    for (Phase& phase : plan.phases) {
      if (skinny) break;
      if (plan.keep_bounds) phase.first_tile = plan.bound_tiles;
      const auto here = static_cast<std::uint32_t>(bound_tiles(phase));
      plan.bound_tiles = plan.keep_bounds ? plan.bound_tiles + here : std::max(plan.bound_tiles, here);
    }
  }

  plan.direct_queries = (!filtered || skinny) && queries <= 2 * kDirectQueries ? 8 : 32;
  plan.owned_capacity = std::max(2 * k, k + 256);
  const std::int64_t list_bytes = static_cast<std::int64_t>(plan.direct_queries) * plan.owned_capacity * static_cast<std::int64_t>(sizeof(Key));
  const std::int64_t blocks = tuning.direct_blocks > 0 ? tuning.direct_blocks : 2 * facts.multiprocessors;
  plan.direct_blocks = static_cast<std::uint32_t>(std::clamp<std::int64_t>(kOwnedBytes / list_bytes, 1, blocks));
  plan.workspace_bytes = carve(plan, request, nullptr, nullptr);
  return plan;
}

std::size_t carve(const Plan& plan, const CudaRequest& request, void* workspace, Job* job) {
  Job unused{};
  Job& j = job == nullptr ? unused : *job;
  std::size_t used = 0;
  const auto take = [&](auto*& array, std::size_t count) {
    using Element = std::remove_reference_t<decltype(*array)>;
    array = workspace == nullptr ? nullptr : reinterpret_cast<Element*>(static_cast<char*>(workspace) + used);
    used += (count * sizeof(Element) + 255) / 256 * 256;
  };
  const auto q = static_cast<std::size_t>(plan.tile_queries), d = static_cast<std::size_t>(request.queries.cols);
  const bool direct = plan.engine == Engine::direct;
  const auto chunk = static_cast<std::size_t>(plan.chunk_rows);
  const std::size_t lists = static_cast<std::size_t>(plan.direct_blocks) * plan.direct_queries;

  j.queries = request.queries;
  j.pool = request.pool;
  j.exclude_width = request.exclude == nullptr ? 0 : request.exclude_width;
  j.k = request.k;
  j.first_row = static_cast<std::uint32_t>(request.first_row);
  j.resume = request.resume;
  j.depth = plan.depth;
  j.code_dtype = plan.code_dtype;
  j.direct = direct;
  j.has_forced_threshold = request.tuning.has_forced_threshold && !direct;
  j.forced_threshold = request.tuning.forced_threshold;
  j.margin = margin_for(request.pool.cols);
  j.best_capacity = plan.best_capacity;
  j.hit_capacity = plan.hit_capacity;
  j.owned_capacity = plan.owned_capacity;
  j.direct_blocks = plan.direct_blocks;
  j.direct_queries = plan.direct_queries;
  j.pending_capacity = plan.pending_capacity;

  // In a self-join thresholds are known for all queries before the first tile of them is searched.
  const std::size_t all = plan.self_join ? static_cast<std::size_t>(request.queries.rows) : q;
  take(j.query_values, q * d);
  take(j.threshold, all);
  take(j.kept, q);
  take(j.state, all);
  take(j.best, q * plan.best_capacity);
  take(j.listed, q);
  take(j.num_listed, 1);
  take(j.owned, lists * plan.owned_capacity);
  take(j.owned_count, lists);
  if (!direct) {
    take(j.query_codes, q * plan.depth);
    take(j.threshold_score, all);
    take(j.slope, all);
    take(j.lift, all);
    take(j.hit_count, q);
    take(j.hits, q * plan.hit_capacity);
    if (plan.bound_tiles > 0) {
      take(j.tile_norm, plan.bound_tiles);
      take(j.tile_error, plan.bound_tiles);
    }
    if (plan.coded_rows) take(j.row_codes, chunk * plan.depth);
    if (plan.self_join) {
      take(j.pending_count, all);
      take(j.pending, all * plan.pending_capacity);
    }
  }
  return used;
}

}  // namespace tgq::cuda
