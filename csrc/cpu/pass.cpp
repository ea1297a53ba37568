#include "cpu/pass.h"

#include <algorithm>
#include <functional>

#include "cpu/columns.h"

namespace tgq {
namespace {

constexpr int kShareEvery = 4;  // chunks between two exchanges of floors

}  // namespace

Pass::Pass(const ScanPlan& plan, std::int64_t num_queries, const Cut& cut, Progress& progress, Columns* columns)
    : plan_(plan), progress_(progress), cut_(cut), columns_(columns),
      tiles_(static_cast<std::size_t>(ceil_div(num_queries, cut.tile))) {
  // Equal tiles, so that the last one is no straggler.
  const auto most = static_cast<std::int64_t>(tiles_.size());
  const std::int64_t size = most == 0 ? 1 : round_up(ceil_div(num_queries, most), kPanel);
  for (std::int64_t begin = 0; begin < num_queries; begin += size) {
    Tile& tile = tiles_[num_tiles_++];
    tile.begin = begin;
    tile.count = std::min(size, num_queries - begin);
    tile.next_row = columns_ == nullptr ? 0 : begin;
  }
  const auto threads = static_cast<int>(ceil_div(cut_.threads, static_cast<std::int64_t>(std::max<std::size_t>(num_tiles_, 1))));
  for (std::size_t i = 0; columns_ == nullptr && i < num_tiles_; ++i)
    tiles_[i].floors = std::make_unique<SharedFloors>(threads, tiles_[i].count);
  plan_.max_tile = std::min(size, num_queries);
}

void Pass::work(int index) {
  Scanner scanner(plan_);
  if (plan_.filter != nullptr) plan_.filter->begin();
  std::vector<Key> merged;
  const std::size_t start = num_tiles_ * static_cast<std::size_t>(index) / static_cast<std::size_t>(cut_.threads);
  for (std::size_t i = 0; i < num_tiles_ && !progress_.stop; ++i) join(tiles_[(start + i) % num_tiles_], scanner, merged);
  if (plan_.filter != nullptr) plan_.filter->end();
  const std::lock_guard<std::mutex> lock(mutex_);
  counters.filtered += scanner.counters().filtered;
  counters.direct += scanner.counters().direct;
  counters.rescored += scanner.counters().rescored;
}

bool Pass::claim(Tile& tile, std::int64_t* first, std::int64_t* last) {
  const std::lock_guard<std::mutex> lock(tile.mutex);
  if (tile.next_row >= plan_.pool.rows) return false;
  *first = tile.next_row;
  *last = tile.next_row = std::min(plan_.pool.rows, tile.next_row + cut_.chunk);
  return true;
}

void Pass::join(Tile& tile, Scanner& scanner, std::vector<Key>& merged) {
  int number = 0;
  {
    const std::lock_guard<std::mutex> lock(tile.mutex);
    if (tile.next_row >= plan_.pool.rows) return;
    ++tile.joined;
    number = tile.started++;
  }
  scanner.load_queries(tile.begin, tile.count);
  if (columns_ != nullptr) scanner.raise_floors(*columns_);
  std::int64_t first = 0, last = 0;
  for (int chunk = 1; !progress_.stop && claim(tile, &first, &last); ++chunk) {
    scan(tile, scanner, first, last);
    if (columns_ == nullptr && plan_.slots == 0 && chunk % kShareEvery == 0) scanner.share_floors(*tile.floors, number);
  }
  leave(tile, scanner, merged);
}

void Pass::scan(const Tile& tile, Scanner& scanner, std::int64_t first, std::int64_t last) {
  const std::int64_t own_end = columns_ == nullptr ? 0 : tile.begin + tile.count;  // rows that are the tile's own queries
  while (first < last && !progress_.stop) {
    const std::int64_t end = std::min({last, first + scanner.next_rows(), first < own_end ? own_end : last});
    const std::int64_t ahead = std::min<std::int64_t>(last - end, plan_.block_rows);
    scanner.scan_block(first, static_cast<int>(end - first), ahead, first < own_end ? nullptr : columns_);
    progress_.done += (end - first) * tile.count;
    first = end;
  }
}

void Pass::leave(Tile& tile, Scanner& scanner, std::vector<Key>& merged) {
  const std::size_t k = plan_.k;
  for (std::int64_t q = 0; q < tile.count; ++q) {
    Candidates& best = scanner.candidates(q);
    best.compact();
    if (columns_ != nullptr) columns_->add(tile.begin + q, best.keys, best.count);
    else std::sort(best.keys, best.keys + best.count, std::greater<Key>());
  }
  if (columns_ != nullptr) return;
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

}  // namespace tgq
