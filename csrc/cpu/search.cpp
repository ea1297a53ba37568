// The CPU search: sampled floors, one pass over the pool shared by all threads, exact merge, rescan of what failed.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/scan.h"
#include "cpu/team.h"

namespace tgq {
namespace {

constexpr std::int64_t kMaxTile = 1024;       // queries scanned together: bounds the traffic of reading the pool
constexpr std::int64_t kSmallQueries = 12;    // from so many on, rounding the pool for the filter pays
constexpr std::int64_t kMaxFilterDepth = 1 << 17;  // the margin's proof covers D up to here
constexpr std::int64_t kBlockBytes = 256 * 1024;  // rounded rows of a block: half of a small second-level cache
constexpr std::int64_t kMinRowsToSample = 4096;
constexpr int kSampleStride = 16;

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }
std::int64_t ceil_div(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit; }

bool valid(const Matrix& m) {
  const int dtype = static_cast<int>(m.dtype);
  return m.rows >= 0 && m.cols >= 0 && dtype >= 0 && dtype <= 2 && (m.data != nullptr || m.rows * m.cols == 0);
}

// A tile of queries that several threads may scan together, each other rows.
struct Tile {
  std::int64_t begin = 0, count = 0;
  std::mutex mutex;
  std::int64_t next_row = 0;  // first row that nobody has claimed
  int joined = 0;             // threads at work on it
  std::vector<std::vector<Key>> parts;  // per finished thread: [count, k + 1], first the number of keys
};

// One pass of a list of queries over a pool. Subclasses say what becomes of the best keys of a query.
class Pass {
 public:
  Pass(ScanPlan plan, std::int64_t num_queries, int threads, std::int64_t tile, std::int64_t chunk, Progress& progress)
      : plan_(std::move(plan)), threads_(threads), chunk_(chunk), progress_(progress) {
    tiles_ = std::vector<Tile>(static_cast<std::size_t>(ceil_div(num_queries, tile)));
    // Equal tiles, so that the last one is no straggler.
    const std::int64_t size = tiles_.empty() ? 1 : round_up(ceil_div(num_queries, static_cast<std::int64_t>(tiles_.size())), kPanel);
    std::int64_t begin = 0;
    std::size_t used = 0;
    for (; begin < num_queries; begin += size, ++used) {
      tiles_[used].begin = begin;
      tiles_[used].count = std::min(size, num_queries - begin);
    }
    num_tiles_ = used;
    plan_.max_tile = std::min(size, num_queries);
  }
  virtual ~Pass() = default;

  // The body of thread `index`.
  void work(int index) {
    Scanner scanner(plan_);
    if (plan_.filter != nullptr) plan_.filter->begin();
    std::vector<Key> merged;
    const std::size_t start = num_tiles_ * static_cast<std::size_t>(index) / static_cast<std::size_t>(threads_);
    for (std::size_t i = 0; i < num_tiles_ && !progress_.stop; ++i) join(tiles_[(start + i) % num_tiles_], scanner, merged);
    if (plan_.filter != nullptr) plan_.filter->end();
    const std::lock_guard<std::mutex> lock(mutex_);
    counters.filtered += scanner.counters().filtered;
    counters.direct += scanner.counters().direct;
    counters.rescored += scanner.counters().rescored;
  }

  Counters counters;

 protected:
  // `keys` are the best of the query at `position`, descending; called once per query, from any thread.
  virtual void finish(std::int64_t position, const Key* keys, std::uint32_t count, bool has_nan) = 0;

  ScanPlan plan_;
  std::mutex mutex_;

 private:
  bool claim(Tile& tile, std::int64_t* first, std::int64_t* last) {
    const std::lock_guard<std::mutex> lock(tile.mutex);
    if (tile.next_row >= plan_.pool.rows) return false;
    *first = tile.next_row;
    *last = tile.next_row = std::min(plan_.pool.rows, tile.next_row + chunk_);
    return true;
  }

  void join(Tile& tile, Scanner& scanner, std::vector<Key>& merged) {
    {
      const std::lock_guard<std::mutex> lock(tile.mutex);
      if (tile.next_row >= plan_.pool.rows) return;
      ++tile.joined;
    }
    scanner.load_queries(tile.begin, tile.count);
    std::int64_t first = 0, last = 0;
    while (!progress_.stop && claim(tile, &first, &last)) {
      for (std::int64_t row = first; row < last && !progress_.stop; row += plan_.block_rows) {
        const auto rows = static_cast<int>(std::min<std::int64_t>(plan_.block_rows, last - row));
        scanner.scan_block(row, rows);
        progress_.done += rows * tile.count;
      }
    }
    leave(tile, scanner, merged);
  }

  // Keeps this thread's share of a tile; the last thread to leave merges all shares.
  void leave(Tile& tile, Scanner& scanner, std::vector<Key>& merged) {
    const std::size_t k = plan_.k;
    for (std::int64_t q = 0; q < tile.count; ++q) {
      Candidates& best = scanner.candidates(q);
      best.compact();
      std::sort(best.keys, best.keys + best.count, std::greater<Key>());
    }
    bool last_one = false, alone = false;
    {
      const std::lock_guard<std::mutex> lock(tile.mutex);
      last_one = --tile.joined == 0 && tile.next_row >= plan_.pool.rows;
      alone = tile.parts.empty();
      if (!(last_one && alone)) {
        std::vector<Key> part(static_cast<std::size_t>(tile.count) * (k + 1));
        for (std::int64_t q = 0; q < tile.count; ++q) {
          const Candidates& best = scanner.candidates(q);
          Key* to = part.data() + static_cast<std::size_t>(q) * (k + 1);
          to[0] = best.count;
          std::copy(best.keys, best.keys + best.count, to + 1);
        }
        tile.parts.push_back(std::move(part));
      }
    }
    if (!last_one || progress_.stop) return;
    merged.resize(2 * k);
    for (std::int64_t q = 0; q < tile.count; ++q) {
      if (alone) {
        const Candidates& best = scanner.candidates(q);
        finish(tile.begin + q, best.keys, best.count, scanner.has_nan(q));
        continue;
      }
      Key *now = merged.data(), *next = merged.data() + k;
      std::uint32_t count = 0;
      for (const std::vector<Key>& part : tile.parts) {
        const Key* from = part.data() + static_cast<std::size_t>(q) * (k + 1);
        count = merge_descending(now, count, from + 1, static_cast<std::uint32_t>(from[0]), next, plan_.k);
        std::swap(now, next);
      }
      finish(tile.begin + q, now, count, scanner.has_nan(q));
    }
    std::vector<std::vector<Key>>().swap(tile.parts);
  }

  int threads_;
  std::int64_t chunk_;
  Progress& progress_;
  std::vector<Tile> tiles_;
  std::size_t num_tiles_ = 0;
};

// The pass over the sample: the last of the best keys becomes the floor.
class SamplePass : public Pass {
 public:
  SamplePass(ScanPlan plan, std::int64_t num_queries, int threads, std::int64_t tile, std::int64_t chunk, Progress& progress,
             std::vector<Key>& floors)
      : Pass(std::move(plan), num_queries, threads, tile, chunk, progress), floors_(floors) {}

 private:
  void finish(std::int64_t position, const Key* keys, std::uint32_t count, bool) override {
    if (count == plan_.k) floors_[static_cast<std::size_t>(position)] = floor_at(key_score(keys[count - 1]));
  }
  std::vector<Key>& floors_;
};

// The pass over the pool: writes answers, and lists the queries whose floor was too high.
class SearchPass : public Pass {
 public:
  SearchPass(ScanPlan plan, std::int64_t num_queries, int threads, std::int64_t tile, std::int64_t chunk, Progress& progress,
             const Request& request)
      : Pass(std::move(plan), num_queries, threads, tile, chunk, progress), request_(request) {}

  std::vector<std::int64_t> failed;

 private:
  void finish(std::int64_t position, const Key* keys, std::uint32_t count, bool has_nan) override {
    const std::int64_t id = plan_.query_id(position);
    if (count < plan_.k && !has_nan && plan_.floors != nullptr && plan_.floors[position] != kNoKey) {
      const std::lock_guard<std::mutex> lock(mutex_);
      failed.push_back(id);
      return;
    }
    float* scores = request_.scores + id * request_.k;
    std::int64_t* rows = request_.rows + id * request_.k;
    for (std::uint32_t i = 0; i < request_.k; ++i) {
      scores[i] = i < count ? key_score(keys[i]) : bits_float(0xff800000u);
      rows[i] = i < count ? static_cast<std::int64_t>(key_row(keys[i])) : -1;
    }
  }
  const Request& request_;
};

std::int64_t pick_block_rows(std::int64_t width) {
  const std::int64_t rows = kBlockBytes / (2 * std::max<std::int64_t>(width, 1)) / kPanel * kPanel;
  return std::clamp<std::int64_t>(rows, 2 * kPanel, 512);
}

// Rows a thread claims at a time: small enough that the threads end together.
std::int64_t pick_chunk(std::int64_t rows, std::int64_t block, int threads) {
  return std::max(block, round_up(ceil_div(rows, static_cast<std::int64_t>(threads) * 16), block));
}

std::int64_t pick_tile(std::int64_t queries, int threads, std::int64_t limit, bool split_queries) {
  if (split_queries) limit = std::min(limit, round_up(ceil_div(queries, threads), kPanel));
  return std::max<std::int64_t>(limit, 1);
}

class Search {
 public:
  Search(const Request& request, const Isa& isa) : request_(request), tuning_(request.tuning) {
    plan_.queries = request.queries;
    plan_.pool = request.pool;
    plan_.exclude = request.exclude_width > 0 ? request.exclude : nullptr;
    plan_.exclude_width = request.exclude_width;
    plan_.kernels = isa.kernels;
    plan_.width = round_up(request.pool.cols, kLanes);
    plan_.depth = round_up(request.pool.cols, kTileDepth);
    plan_.filter = isa.filter;
    if (tuning_.use_filter == 0 || (tuning_.use_filter < 0 && request.queries.rows < kSmallQueries)) plan_.filter = nullptr;
    if (tuning_.use_filter > 0 && plan_.filter == nullptr) plan_.filter = &scalar_filter();
    if (request.pool.cols > kMaxFilterDepth || request.pool.cols == 0) plan_.filter = nullptr;
    plan_.block_rows = static_cast<int>(pick_block_rows(plan_.width));
    progress_.total = std::max<std::int64_t>(1, request.queries.rows * request.pool.rows);
  }

  Status run() {
    if (request_.pool.rows == 0) return pad();
    Status status = sample();
    if (status != Status::ok) return status;
    std::vector<std::int64_t> failed;
    plan_.floors = floors_.empty() ? nullptr : floors_.data();
    status = pass(request_.queries.rows, &failed);
    if (status != Status::ok || failed.empty()) return status;
    if (request_.counters != nullptr) request_.counters->rescanned += static_cast<std::int64_t>(failed.size());
    std::sort(failed.begin(), failed.end());
    plan_.floors = nullptr;
    plan_.query_ids = failed.data();
    std::vector<std::int64_t> none;
    return pass(static_cast<std::int64_t>(failed.size()), &none);
  }

 private:
  int threads_for(std::int64_t queries, std::int64_t rows) const {
    // A thread is worth its start from a few million multiply-adds on.
    const double work = static_cast<double>(queries) * static_cast<double>(rows) * static_cast<double>(plan_.width + 32);
    const double useful = std::max(1.0, work / 4e6);
    return static_cast<int>(std::min<double>(request_.threads, useful));
  }

  std::function<bool(double)> poll_for(std::int64_t queries, std::int64_t rows) const {
    const double work = static_cast<double>(queries) * static_cast<double>(rows) * static_cast<double>(plan_.width + 32);
    return work < 4e8 ? std::function<bool(double)>() : request_.poll;
  }

  void count(const Counters& c) {
    if (request_.counters == nullptr) return;
    request_.counters->filtered += c.filtered;
    request_.counters->direct += c.direct;
    request_.counters->rescored += c.rescored;
  }

  // Floors from one row in `stride`, or from the caller of a test.
  Status sample() {
    const std::int64_t queries = request_.queries.rows;
    if (tuning_.has_forced_floor) {
      floors_.assign(static_cast<std::size_t>(queries), floor_at(tuning_.forced_floor));
      return Status::ok;
    }
    const int stride = tuning_.sample_stride < 0 ? kSampleStride : tuning_.sample_stride;
    if (stride == 0 || request_.pool.rows < stride) return Status::ok;
    const std::uint32_t rank = sample_rank(request_.k, static_cast<std::uint32_t>(stride));
    const std::int64_t rows = request_.pool.rows / stride;
    if (tuning_.sample_stride < 0 &&
        (request_.pool.rows < kMinRowsToSample || queries < kSmallQueries || rows < 4 * static_cast<std::int64_t>(rank)))
      return Status::ok;
    floors_.assign(static_cast<std::size_t>(queries), kNoKey);
    ScanPlan plan = plan_;
    plan.pool.rows = rows;
    plan.pool.row_stride *= stride;
    plan.pool.data = plan_.pool.data;
    plan.k = rank;
    plan.capacity = 2 * rank + 64;
    plan.approximate = true;
    plan.exclude = nullptr;
    const int threads = threads_for(queries, rows);
    const std::int64_t limit = tuning_.query_tile > 0 ? tuning_.query_tile : kMaxTile;
    SamplePass pass(plan, queries, threads, pick_tile(queries, threads, limit, true),
                    pick_chunk(rows, plan.block_rows, threads), progress_, floors_);
    progress_.total += queries * rows;
    const Status status = run_team(threads, [&](int i) { pass.work(i); }, progress_, poll_for(queries, rows));
    count(pass.counters);
    return status;
  }

  Status pass(std::int64_t queries, std::vector<std::int64_t>* failed) {
    const std::int64_t rows = request_.pool.rows;
    ScanPlan plan = plan_;
    plan.k = request_.k;
    const std::int64_t spare = tuning_.spare_candidates > 0 ? tuning_.spare_candidates : std::max<std::int64_t>(request_.k, 256);
    plan.capacity = static_cast<std::uint32_t>(request_.k + spare);
    const int threads = threads_for(queries, rows);
    const std::int64_t limit = tuning_.query_tile > 0 ? tuning_.query_tile : kMaxTile;
    const std::int64_t chunk = tuning_.row_chunk > 0 ? tuning_.row_chunk : pick_chunk(rows, plan.block_rows, threads);
    SearchPass pass(plan, queries, threads, pick_tile(queries, threads, limit, false), chunk, progress_, request_);
    const Status status = run_team(threads, [&](int i) { pass.work(i); }, progress_, poll_for(queries, rows));
    count(pass.counters);
    *failed = std::move(pass.failed);
    return status;
  }

  Status pad() {
    const std::int64_t size = request_.queries.rows * static_cast<std::int64_t>(request_.k);
    std::fill(request_.scores, request_.scores + size, bits_float(0xff800000u));
    std::fill(request_.rows, request_.rows + size, -1);
    return Status::ok;
  }

  const Request& request_;
  const Tuning& tuning_;
  ScanPlan plan_;
  Progress progress_;
  std::vector<Key> floors_;
};

}  // namespace

Status search_cpu(const Request& request) {
  const Matrix &queries = request.queries, &pool = request.pool;
  if (!valid(queries) || !valid(pool) || queries.cols != pool.cols || request.k < 1 || request.k > kMaxK ||
      pool.rows > 0xffffffffLL || request.threads < 1 || (queries.rows > 0 && request.exclude_width > 0 && request.exclude == nullptr) ||
      (queries.rows > 0 && (request.scores == nullptr || request.rows == nullptr)))
    return Status::bad_argument;
  const Isa* isa = find_isa(request.isa);
  if (isa == nullptr) return Status::unsupported;
  if (queries.rows == 0) return Status::ok;
  try {
    return Search(request, *isa).run();
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

}  // namespace tgq
