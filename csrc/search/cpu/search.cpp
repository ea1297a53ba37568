// The CPU search: sampled thresholds, one scan of the pool shared by all threads, exact merge, rescan of what failed.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "common/thread_pool.h"
#include "search/cpu/code_queries.h"
#include "search/cpu/codes.h"
#include "search/cpu/kernel_set.h"
#include "search/cpu/partitioned_scan.h"
#include "search/cpu/row_candidates.h"
#include "search/cpu/sample.h"

namespace tgq {
namespace {

constexpr std::int64_t kMaxTile = 1024;       // queries scanned together: bounds the traffic of reading the pool
constexpr std::int64_t kTileBytes = 768 * 1024;   // of their codes, which every block of rows meets: they stay in the second-level cache
constexpr std::int64_t kSmallQueries = 12;    // from so many on, rounding the pool for the filter pays
constexpr std::int64_t kMaxFilterDepth = 1 << 16;  // the margin's proof covers D up to here
constexpr std::int64_t kBlockBytes = 256 * 1024;  // fp32 rows of a block: a quarter of a small second-level cache
constexpr std::int64_t kCodeBytes = 32 * 1024;    // codes of a block: most of a small first-level cache
constexpr std::int64_t kStoredBytes = 64 * 1024;  // of a block of stored codes, which several panels of queries go through
constexpr std::int64_t kCodeRows = 512;           // rows of such a block at most
constexpr std::int64_t kMaxChunk = 1 << 16;       // rows that threads may wait for at the end
constexpr std::int64_t kMinRowsToSample = 4096;
constexpr std::int64_t kFewRows = 32;             // times k
constexpr std::int64_t kMinSelfJoin = 2048;
constexpr int kSampleStride = 16, kSparseStride = 64;  // the latter for the fewest queries, whose sample only waits for memory
constexpr std::int64_t kFewest = 4, kSparseRows = 1 << 16;  // of so many rows enough are sampled for every k
constexpr std::int64_t kProbe = 64;               // of more queries than kAll so many say whether stored codes pay; else all do
constexpr std::int64_t kAll = 256;
constexpr std::int64_t kSmallPool = 40000, kProbedRows = 512, kLeastProbe = 16;  // of a small pool one for so many rows, if that is half of them
constexpr std::int64_t kResample = 128;           // more queries than that get new thresholds where codes are left aside
constexpr double kAdvantage = 1.1;                // of them by the model, so that its errors make no call slower
constexpr double kUnpolled = 1.6e8;  // ns of work that need no poll
constexpr double kThread = 2e5;  // that a thread is worth its start for
constexpr std::int64_t kPutOff = 4096;  // hits at most that a thread puts off for a query; more than a few k
constexpr int kSlotsPerRank = 8;         // few enough of the best scores meet in one slot
constexpr int kMinSlots = 256;

// The scan of the pool: writes answers, and lists the queries whose threshold was too high.
class SearchScan : public PartitionedScan {
 public:
  SearchScan(const ScanPlan& plan, std::int64_t num_queries, const Partition& partition, Progress& progress, const Request& request,
             RowCandidates* row_candidates)
      : PartitionedScan(plan, num_queries, partition, progress, row_candidates), request_(request), row_candidates_(row_candidates) {}

  std::vector<std::int64_t> failed;

  // Writes the answers of a self-join, when all its tiles are done; each thread claims queries until none is left.
  void finish_self_join() {
    constexpr std::int64_t kClaim = 256;
    const std::int64_t queries = plan_.queries.rows;
    for (std::int64_t first = unfinished_.fetch_add(kClaim); first < queries; first = unfinished_.fetch_add(kClaim))
      for (std::int64_t q = first; q < std::min(first + kClaim, queries); ++q) {
        Candidates& best = row_candidates_->candidates(q);
        best.compact();
        std::sort(best.keys, best.keys + best.count, std::greater<Key>());
        finish(q, best.keys, best.count, false);
      }
  }

 private:
  void finish(std::int64_t position, const Key* keys, std::uint32_t count, bool has_nan) override {
    const std::int64_t id = plan_.query_id(position);
    if (count < plan_.k && !has_nan && plan_.thresholds != nullptr && plan_.thresholds[position] != kNoKey) {
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
  RowCandidates* row_candidates_;
  std::atomic<std::int64_t> unfinished_{0};  // queries of a self-join from here on are not written yet
};

// Rows of a block. Scored exactly, they stay in the second-level cache. For a filter their codes stay in the first, since tile
// loads that miss it wait for the same fill buffers as the rows that are fetched meanwhile.
std::int64_t pick_block_rows(std::int64_t width, std::int64_t row_bytes) {
  const std::int64_t rows = row_bytes > 0 ? kCodeBytes / row_bytes : kBlockBytes / (4 * std::max<std::int64_t>(width, 1));
  return std::clamp<std::int64_t>(rows / kPanel * kPanel, kPanel, 512);
}

// Rows a thread claims at a time: small enough that the threads end together.
std::int64_t pick_chunk(std::int64_t rows, std::int64_t block, int threads) {
  const std::int64_t share = std::min(kMaxChunk, ceil_div(rows, static_cast<std::int64_t>(threads) * 16));
  return std::max(block, round_up(share, block));
}

class Search {
 public:
  Search(const Request& request, Isa isa) : request_(request), tuning_(request.tuning), set_(kernel_set(isa)) {
    plan_.queries = request.queries;
    plan_.pool = request.pool;
    plan_.exclude = request.exclude_width > 0 ? request.exclude : nullptr;
    plan_.exclude_width = request.exclude_width;
    plan_.allowed = request.allowed;
    plan_.rules = request.rules;
    plan_.num_rules = request.num_rules;
    plan_.kernels = set_.kernels;
    plan_.width = round_up(request.pool.cols, kLanes);
    const bool tiny = tuning_.use_codes < 0 && tuning_.sample_stride < 0 && request.pool.rows < kMinRowsToSample;  // not worth asking its codes
    if (request.codes.bytes != nullptr && tuning_.use_codes != 0 && !tiny && request.pool.cols <= kMaxFilterDepth) {
      plan_.codes = &request.codes;
      plan_.code_kernels = set_.code_kernels;
      const std::int64_t fit = kStoredBytes / (request.codes.first_lines * kCodeLine) / kPanel * kPanel;
      plan_.block_rows = static_cast<int>(std::clamp<std::int64_t>(fit, 2 * kPanel, kCodeRows));
    } else {
      choose_filter();
    }
    progress_.total = std::max<std::int64_t>(1, request.queries.rows * request.pool.rows);
  }

  Status run() {
    if (request_.pool.rows == 0) return pad();
    Status status = Status::ok;
    const bool small = request_.pool.rows < kSmallPool;
    const std::int64_t probed = small ? std::clamp(request_.pool.rows / kProbedRows, kLeastProbe, kProbe) : kProbe;
    if (undecided() && request_.queries.rows >= (small ? 2 * probed : kAll + 1)) status = probe(probed);
    const bool open = undecided();
    if (status == Status::ok) status = prepare();
    if (status == Status::ok) status = sample();
    // Codes were asked and left aside: scores that only know a first level are too low for good thresholds.
    const bool partial = request_.codes.first_lines < request_.codes.lines && request_.queries.rows > kResample;
    if (status == Status::ok && open && plan_.codes == nullptr && partial) {
      thresholds_.clear();
      status = sample();
    }
    if (status != Status::ok) return status;
    if (request_.counters != nullptr && plan_.codes != nullptr) request_.counters->coded = request_.queries.rows;
    std::vector<std::int64_t> failed;
    plan_.thresholds = thresholds_.empty() ? nullptr : thresholds_.data();
    status = scan(request_.queries.rows, self_join(), &failed);
    if (status != Status::ok || failed.empty()) return status;
    if (request_.counters != nullptr) request_.counters->rescanned += static_cast<std::int64_t>(failed.size());
    std::sort(failed.begin(), failed.end());
    plan_.thresholds = nullptr;
    plan_.query_ids = failed.data();
    std::vector<std::int64_t> none;
    return scan(static_cast<std::int64_t>(failed.size()), false, &none);
  }

 private:
  std::uint32_t sampled_k() const { return std::max(request_.k, request_.sampled_k); }

  // For rows that are scored as they are stored.
  void choose_filter() {
    plan_.codes = nullptr;
    plan_.filter = set_.filter;
    const bool few = request_.queries.rows < kSmallQueries;
    if (tuning_.use_filter == 0 || (tuning_.use_filter < 0 && few)) plan_.filter = nullptr;
    if (tuning_.use_filter > 0 && plan_.filter == nullptr) plan_.filter = &scalar_filter();
    if (request_.pool.cols > kMaxFilterDepth || request_.pool.cols == 0) plan_.filter = nullptr;
    if (plan_.filter != nullptr) plan_.row_bytes = round_up(request_.pool.cols * plan_.filter->code_bytes, kCodeLine);
    plan_.block_rows = static_cast<int>(pick_block_rows(plan_.width, plan_.filter == nullptr ? 0 : plan_.row_bytes));
  }

  // Whether it is open if stored codes pay.
  bool undecided() const { return plan_.codes != nullptr && tuning_.use_codes < 0 && !weighed_; }

  // Asks a sample of the queries.
  Status probe(std::int64_t queries) {
    plan_.queries.rows = queries;
    plan_.queries.row_stride *= request_.queries.rows / queries;
    Status status = prepare();
    if (status == Status::ok) status = sample();
    plan_.queries = request_.queries;
    thresholds_.clear();
    return status;
  }

  Status prepare() {
    if (plan_.codes == nullptr) return Status::ok;
    prepared_ = std::make_unique<PreparedQueries>(plan_, *plan_.codes, plan_.code_kernels->narrow);
    plan_.prepared = prepared_.get();
    return prepared_->prepare(threads_for(rows_work(static_cast<double>(plan_.queries.rows), static_cast<double>(request_.pool.cols), static_cast<double>(plan_.width))));
  }

  // Below that the triangle saves less than its shared buffers cost.
  bool self_join() const {
    return request_.self_join && (tuning_.use_self_join > 0 || (tuning_.use_self_join < 0 && request_.pool.rows >= kMinSelfJoin));
  }

  // Queries of a tile.
  std::int64_t most_queries() const {
    if (tuning_.query_tile > 0) return tuning_.query_tile;
    return plan_.filter == nullptr ? kMaxTile : std::clamp(kTileBytes / plan_.row_bytes / kPanel * kPanel, kMaxTile / 4, kMaxTile);
  }

  // Nanoseconds of one thread, about.
  double work(std::int64_t queries, std::int64_t rows) const {
    const auto q = static_cast<double>(queries), n = static_cast<double>(rows);
    return plan_.codes == nullptr ? rows_work(q, n, static_cast<double>(plan_.width)) : codes_work(*set_.costs, q, n, plan_.codes->first_lines);
  }

  int threads_for(double work) const { return static_cast<int>(std::min<double>(request_.threads, std::max(1.0, work / kThread))); }

  std::function<bool(double)> poll_for(std::int64_t queries, std::int64_t rows) const {
    return work(queries, rows) < kUnpolled ? std::function<bool(double)>() : request_.poll;
  }

  void count(const Counters& c) {
    if (request_.counters == nullptr) return;
    request_.counters->filtered += c.filtered;
    request_.counters->direct += c.direct;
    request_.counters->rescored += c.rescored;
  }

  // Every `stride`-th of the allowed rows.
  std::vector<std::uint32_t> sample_ids(int stride) const {
    std::vector<std::uint32_t> ids;
    std::int64_t seen = 0;
    for (std::int64_t row = 0; request_.allowed != nullptr && row < request_.pool.rows; ++row)
      if (request_.allowed[row] != 0 && seen++ % stride == 0) ids.push_back(static_cast<std::uint32_t>(row));
    return ids;
  }

  // What hides rows that are not allowed from a sample of one group in `stride`, and how many it leaves.
  std::vector<float> sample_bias(int stride, std::int64_t* counted) const {
    std::vector<float> bias(static_cast<std::size_t>(round_up(request_.pool.rows, kGroup)), bits_float(0xff800000u));
    *counted = 0;
    for (std::int64_t row = 0; row < request_.pool.rows; ++row) {
      if (request_.allowed[row] == 0) continue;
      bias[static_cast<std::size_t>(row)] = 0.0f;
      if (row / kGroup % stride == 0) ++*counted;
    }
    return bias;
  }

  // Thresholds from one row in `stride`, or from the caller of a test.
  Status sample() {
    const std::int64_t queries = plan_.queries.rows;
    if (tuning_.has_forced_threshold) {
      thresholds_.assign(static_cast<std::size_t>(queries), threshold_at(tuning_.forced_threshold));
      return Status::ok;
    }
    const bool sparse = plan_.codes != nullptr && queries <= kFewest && request_.allowed == nullptr && request_.pool.rows >= kSparseRows;
    const int stride = tuning_.sample_stride >= 0 ? tuning_.sample_stride : sparse ? kSparseStride : kSampleStride;
    if (stride == 0) return Status::ok;
    const auto rank = static_cast<int>(sample_rank(sampled_k(), static_cast<std::uint32_t>(stride)));
    ScanPlan plan = plan_;
    std::vector<std::uint32_t> ids;
    std::vector<float> bias;
    std::int64_t rows = request_.pool.rows / stride / kPanel * kPanel, counted = rows;
    if (plan.codes != nullptr) {
      if (request_.allowed != nullptr) bias = sample_bias(stride, &counted);
      plan.group_step = stride;
      plan.bias = bias.empty() ? nullptr : bias.data();
    } else if (request_.allowed != nullptr) {
      ids = sample_ids(stride);
      plan.row_ids = ids.data();
      counted = rows = static_cast<std::int64_t>(ids.size()) / kPanel * kPanel;
    } else {
      plan.pool.row_stride *= stride;
    }
    const bool few = plan.codes == nullptr && queries < kSmallQueries;
    if (counted < rank || (tuning_.sample_stride < 0 && (request_.pool.rows < kMinRowsToSample || few || counted < 4 * rank))) {
      if (undecided() && tuning_.sample_stride < 0) choose_filter();  // as is one with so few allowed rows
      return Status::ok;
    }
    thresholds_.assign(static_cast<std::size_t>(queries), kNoKey);
    plan.pool.rows = rows;
    plan.exclude = nullptr;
    plan.allowed = nullptr;
    plan.num_rules = 0;
    plan.k = 1;
    plan.capacity = 2;
    plan.slots = std::max(kMinSlots, kSlotsPerRank * rank);
    if (plan.codes != nullptr) {  // a slot for every row of some groups
      plan.slots = static_cast<int>(std::min(round_up(plan.slots, kGroup), rows / kGroup * kGroup));
    } else {
      plan.run = kPanel;
      while (plan.run > 1 && rows / plan.run < plan.slots) plan.run /= 2;
      plan.slots = static_cast<int>(std::min<std::int64_t>(plan.slots, rows / plan.run));
    }
    const int threads = threads_for(work(queries, rows));
    const std::int64_t limit = most_queries();
    const Partition partition{threads, std::min(limit, queries), pick_chunk(rows, plan.block_rows, threads)};
    const int hits = std::clamp(static_cast<int>(sampled_k()) / std::max(stride, 1), 1, rank);
    SampleScan sample(plan, queries, partition, progress_, rank, hits, thresholds_);
    progress_.total += queries * rows;
    const Status status = run_in_pool(threads, [&](int i) { sample.work(i); }, progress_, poll_for(queries, rows));
    count(sample.counters);
    const auto all = static_cast<double>(queries);
    if (status == Status::ok && undecided()) weigh(sample.left / all, sample.scored / all);
    return status;
  }

  // Leaves stored codes aside where the rows themselves are the quicker way. The first level leaves a share `left` of the rows, and
  // `scored` is scored in the end.
  void weigh(double left, double scored) {
    weighed_ = true;
    expected_ = static_cast<std::int64_t>(1.25 * left * static_cast<double>(request_.pool.rows));
    Call call{};
    call.queries = static_cast<double>(request_.queries.rows);
    call.rows = static_cast<double>(request_.pool.rows);
    call.dims = static_cast<double>(request_.pool.cols);
    call.item_bytes = request_.pool.dtype == DType::f32 ? 4 : 2;
    call.hits = sampled_k();
    call.triangle = self_join();
    call.lines = plan_.codes->first_lines;
    call.second = plan_.codes->second != nullptr;
    call.left = std::min(1.0, left);
    call.rescored = std::max(sampled_k() / call.rows, std::min(1.0, scored));
    call.few = request_.queries.rows < kSmallQueries;
    if (kAdvantage * cost_with_codes(*set_.costs, call) > cost_without(*set_.costs, call)) choose_filter();
  }

  // Hits of a query that a thread puts off: most of what the first level is said to leave. One that is scored before the others are known
  // costs as much as thirty put off. An odd number of cache lines, so that the buffers' ends do not share a set.
  std::int64_t put_off() const {
    const std::int64_t least = 2 * static_cast<std::int64_t>(request_.k) + 448;
    return round_up(std::clamp<std::int64_t>(expected_, least, std::max(least, kPutOff)), 16) + 8;
  }

  Status scan(std::int64_t queries, bool self_join, std::vector<std::int64_t>* failed) {
    const std::int64_t rows = request_.pool.rows;
    ScanPlan plan = plan_;
    plan.k = request_.k;
    const std::int64_t spare = tuning_.spare_candidates > 0 ? tuning_.spare_candidates : std::max<std::int64_t>(request_.k, 256);
    plan.capacity = static_cast<std::uint32_t>(request_.k + spare);
    // With codes nobody has read the rows, so it pays to read few: those that are left at the end. Hits of a self-join raise
    // the thresholds of other queries: their scores are wanted at once.
    if (!self_join && plan.codes != nullptr) plan.pending = static_cast<std::uint32_t>(tuning_.spare_candidates > 0 ? spare : put_off());
    const int threads = threads_for(work(queries, rows));
    std::int64_t limit = most_queries();
    if (self_join && tuning_.query_tile == 0) limit = std::min(limit, round_up(ceil_div(queries, 16), kPanel));
    // Threads that share queries each look for their k best: of few rows that is most of the work.
    if (!self_join && tuning_.query_tile == 0 && plan.thresholds == nullptr && rows <= kFewRows * static_cast<std::int64_t>(plan.k))
      limit = std::min(limit, round_up(ceil_div(queries, threads), kPanel));
    std::int64_t chunk = tuning_.row_chunk > 0 ? tuning_.row_chunk : pick_chunk(rows, plan.block_rows, threads);
    if (plan.codes != nullptr) chunk = round_up(chunk, kPanel);
    std::unique_ptr<RowCandidates> row_candidates;
    if (self_join) {
      // As large as half of the answer, not more: every query has a buffer at the same time.
      const auto capacity = static_cast<std::uint32_t>(request_.k + std::max<std::int64_t>(16, request_.k / 2));
      row_candidates = std::make_unique<RowCandidates>(queries, capacity, plan);
      progress_.total -= queries * rows / 2;
    }
    SearchScan search(plan, queries, {threads, limit, chunk}, progress_, request_, row_candidates.get());
    Status status = run_in_pool(threads, [&](int i) { search.work(i); }, progress_, poll_for(queries, rows));
    if (self_join && status == Status::ok)
      status = run_in_pool(threads, [&](int) { search.finish_self_join(); }, progress_, {});
    count(search.counters);
    *failed = std::move(search.failed);
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
  const KernelSet set_;
  bool weighed_ = false;
  std::int64_t expected_ = kPutOff;  // rows per query that the first level leaves
  ScanPlan plan_;
  std::unique_ptr<PreparedQueries> prepared_;
  Progress progress_;
  std::vector<Key> thresholds_;
};

}  // namespace

Status search_cpu(const Request& request) {
  const Matrix &queries = request.queries, &pool = request.pool;
  if (!valid(queries) || !valid(pool) || queries.cols != pool.cols || request.k < 1 || request.k > kMaxK ||
      pool.rows > 0xffffffffLL || request.threads < 1 || (queries.rows > 0 && request.exclude_width > 0 && request.exclude == nullptr) ||
      (request.self_join && (queries.data != pool.data || queries.rows != pool.rows || queries.dtype != pool.dtype ||
                             queries.row_stride != pool.row_stride || queries.col_stride != pool.col_stride)) ||
      !valid(request.codes, pool.cols) || (request.num_rules > 0 && request.rules == nullptr) ||
      (queries.rows > 0 && (request.scores == nullptr || request.rows == nullptr)))
    return Status::bad_argument;
  Isa isa;
  if (!find_isa(request.isa, &isa)) return Status::unsupported;
  if (queries.rows == 0) return Status::ok;
  try {
    return Search(request, isa).run();
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
}

}  // namespace tgq
