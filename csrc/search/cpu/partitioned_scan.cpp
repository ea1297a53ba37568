#include "search/cpu/partitioned_scan.h"

#include <algorithm>
#include <functional>
#include <thread>

#include "search/cpu/code_scanner.h"
#include "search/cpu/rerank.h"
#include "search/cpu/row_candidates.h"

namespace tgq {
namespace {

constexpr int kShareEvery = 3;  // chunks between two exchanges of thresholds
constexpr std::int64_t kMergeQueries = 8;  // queries that a thread claims at a time

}  // namespace

PartitionedScan::PartitionedScan(const ScanPlan& plan, std::int64_t num_queries, const Partition& partition, Progress& progress, RowCandidates* row_candidates)
    : plan_(plan), progress_(progress), partition_(partition), row_candidates_(row_candidates),
      tiles_(static_cast<std::size_t>(ceil_div(num_queries, partition.tile))) {
  // Equal tiles, so that the last one is no straggler.
  const auto most = static_cast<std::int64_t>(tiles_.size());
  const std::int64_t size = most == 0 ? 1 : round_up(ceil_div(num_queries, most), kPanel);
  for (std::int64_t begin = 0; begin < num_queries; begin += size) {
    Tile& tile = tiles_[num_tiles_++];
    tile.begin = begin;
    tile.count = std::min(size, num_queries - begin);
    tile.next_row = row_candidates_ == nullptr ? 0 : begin;
  }
  const auto threads = static_cast<int>(ceil_div(partition_.threads, static_cast<std::int64_t>(std::max<std::size_t>(num_tiles_, 1))));
  for (std::size_t i = 0; row_candidates_ == nullptr && i < num_tiles_; ++i)
    tiles_[i].thresholds = std::make_unique<SharedThresholds>(threads, tiles_[i].count);
  plan_.max_tile = std::min(size, num_queries);
}

void PartitionedScan::work(int index) {
  const std::unique_ptr<Scanner> own = plan_.codes == nullptr ? std::make_unique<Scanner>(plan_) : std::make_unique<CodeScanner>(plan_);
  Scanner& scanner = *own;
  if (plan_.filter != nullptr) plan_.filter->begin();
  if (plan_.codes != nullptr) plan_.code_kernels->begin();
  const std::size_t start = num_tiles_ * static_cast<std::size_t>(index) / static_cast<std::size_t>(partition_.threads);
  for (std::size_t i = 0; i < num_tiles_ && !progress_.stop; ++i) join(tiles_[(start + i) % num_tiles_], scanner);
  if (plan_.filter != nullptr) plan_.filter->end();
  if (plan_.codes != nullptr) plan_.code_kernels->end();
  // Whoever finds no more rows to scan waits for those that still do, and helps to merge.
  for (std::size_t i = 0; i < num_tiles_ && row_candidates_ == nullptr; ++i) {
    while (!tiles_[i].ready.load(std::memory_order_acquire) && !progress_.stop) std::this_thread::yield();
    if (!progress_.stop) merge(tiles_[i]);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  counters.filtered += scanner.counters().filtered;
  counters.direct += scanner.counters().direct;
  counters.rescored += scanner.counters().rescored;
}

bool PartitionedScan::claim(Tile& tile, std::int64_t* first, std::int64_t* last) {
  const std::lock_guard<std::mutex> lock(tile.mutex);
  if (tile.next_row >= plan_.pool.rows) return false;
  *first = tile.next_row;
  *last = tile.next_row = std::min(plan_.pool.rows, tile.next_row + partition_.chunk);
  return true;
}

void PartitionedScan::join(Tile& tile, Scanner& scanner) {
  int number = 0;
  {
    const std::lock_guard<std::mutex> lock(tile.mutex);
    if (tile.next_row >= plan_.pool.rows) return;
    ++tile.joined;
    number = tile.started++;
  }
  scanner.load_queries(tile.begin, tile.count);
  if (row_candidates_ != nullptr) scanner.raise_thresholds(*row_candidates_);
  std::int64_t first = 0, last = 0;
  for (int chunk = 1; !progress_.stop && claim(tile, &first, &last); ++chunk) {
    scan(tile, scanner, first, last);
    if (row_candidates_ == nullptr && plan_.slots == 0 && chunk % kShareEvery == 0) scanner.share_thresholds(*tile.thresholds, number);
  }
  leave(tile, scanner);
}

void PartitionedScan::scan(const Tile& tile, Scanner& scanner, std::int64_t first, std::int64_t last) {
  const std::int64_t own_end = row_candidates_ == nullptr ? 0 : tile.begin + tile.count;  // rows that are the tile's own queries
  while (first < last && !progress_.stop) {
    const std::int64_t end = std::min({last, first + scanner.next_rows(), first < own_end ? own_end : last});
    const std::int64_t ahead = std::min<std::int64_t>(last - end, plan_.block_rows);
    RowCandidates* row_candidates = first < own_end ? nullptr : row_candidates_;
    // Rows of a self-join that must not be returned are queries still.
    if (row_candidates != nullptr || !none_allowed(first, end)) scanner.scan_block(first, static_cast<int>(end - first), ahead, row_candidates);
    progress_.done += (end - first) * tile.count;
    progress_.tick();
    first = end;
  }
}

bool PartitionedScan::none_allowed(std::int64_t first, std::int64_t last) const {
  return plan_.allowed != nullptr && std::all_of(plan_.allowed + first, plan_.allowed + last, [](std::uint8_t a) { return a == 0; });
}

void PartitionedScan::leave(Tile& tile, Scanner& scanner) {
  Share share;
  for (std::int64_t q = 0; q < tile.count; ++q) {
    Candidates& best = scanner.candidates(q);
    best.compact();
    if (row_candidates_ != nullptr) {
      row_candidates_->add(tile.begin + q, best.keys, best.count);
      continue;
    }
    share.keys.insert(share.keys.end(), best.keys, best.keys + best.count);
    share.keys_end.push_back(share.keys.size());
    share.pending.insert(share.pending.end(), scanner.pending(q), scanner.pending(q) + scanner.pending_count(q));
    share.pending_end.push_back(share.pending.size());
  }
  if (row_candidates_ != nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(tile.mutex);
    if (tile.nan.empty())
      for (std::int64_t q = 0; q < tile.count; ++q) tile.nan.push_back(scanner.has_nan(q));
    tile.shares.push_back(std::move(share));
    if (--tile.joined > 0 || tile.next_row < plan_.pool.rows || progress_.stop) return;
  }
  tile.ready.store(true, std::memory_order_release);
  merge(tile);
}

void PartitionedScan::merge(Tile& tile) {
  const RowReader reader(plan_.queries, *plan_.kernels, plan_.width);
  const Buffer<float> query(static_cast<std::size_t>(plan_.width));
  const Buffer<Key> keys(plan_.capacity);
  std::vector<Pending> pending;
  Reranker reranker(plan_);
  std::int64_t rescored = 0;
  for (;;) {
    const std::int64_t first = tile.next_query.fetch_add(kMergeQueries);
    if (first >= tile.count) break;
    const std::int64_t last = std::min(first + kMergeQueries, tile.count);
    for (std::int64_t q = first; q < last; ++q) {
      const auto at = static_cast<std::size_t>(q);
      const std::int64_t position = tile.begin + q;
      Candidates best{keys.data(), plan_.capacity, plan_.k, 0, plan_.thresholds == nullptr ? kNoKey : plan_.thresholds[position]};
      if (tile.nan[at]) best.threshold = ~kNoKey;  // all its scores are NaN
      pending.clear();
      for (const Share& share : tile.shares) {
        for (std::size_t i = q == 0 ? 0 : share.keys_end[at - 1]; i < share.keys_end[at]; ++i) best.push(share.keys[i]);
        const auto from = share.pending.begin();
        pending.insert(pending.end(), from + static_cast<std::ptrdiff_t>(q == 0 ? 0 : share.pending_end[at - 1]),
                       from + static_cast<std::ptrdiff_t>(share.pending_end[at]));
      }
      if (!pending.empty()) {
        reader.read_row(plan_.query_id(position), query.data());
        rescored += reranker.rerank(query.data(), plan_.query_id(position), pending.data(),
                                   static_cast<std::uint32_t>(pending.size()), best);
      }
      best.compact();
      std::sort(best.keys, best.keys + best.count, std::greater<Key>());
      finish(position, best.keys, best.count, tile.nan[at] != 0);
    }
    if (tile.finished.fetch_add(last - first) + last - first == tile.count) std::vector<Share>().swap(tile.shares);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  counters.rescored += rescored;
}

}  // namespace tgq
