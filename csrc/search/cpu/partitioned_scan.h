// One scan of a pool for a list of queries, partitioned into tiles of queries and ranges of rows that threads share.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "common/integers.h"
#include "common/thread_pool.h"
#include "search/cpu/scanner.h"

namespace tgq {

inline bool valid(const Matrix& m) {
  const int dtype = static_cast<int>(m.dtype);
  return m.rows >= 0 && m.cols >= 0 && dtype >= 0 && dtype <= 2 && (m.data != nullptr || m.rows * m.cols == 0);
}

class RowCandidates;

// How a scan is partitioned.
struct Partition {
  int threads = 1;
  std::int64_t tile = 1;   // queries scanned together, at most
  std::int64_t chunk = 1;  // rows that a thread claims at a time
};

// What a thread that leaves a tile has found there, query after query.
struct Share {
  std::vector<Key> keys;
  std::vector<Pending> pending;
  std::vector<std::size_t> keys_end, pending_end;  // [queries]
};

// A tile of queries that several threads may scan together, each other rows.
struct Tile {
  std::int64_t begin = 0, count = 0;
  std::mutex mutex;
  std::int64_t next_row = 0;  // first row that nobody has claimed
  int joined = 0;             // threads at work on it
  int started = 0;            // threads that have been
  std::unique_ptr<SharedThresholds> thresholds;
  std::vector<Share> shares;
  std::vector<unsigned char> nan;       // [count]
  std::atomic<bool> ready{false};       // all shares are there
  std::atomic<std::int64_t> next_query{0}, finished{0};
  std::vector<float> maxima, mean_margin, fine_margin;  // of a sample: the largest of all threads
};

// Threads claim ranges of rows of a tile from a common counter; each keeps its own buffers. When all rows of a tile are scanned,
// threads claim its queries and merge what all of them found. Subclasses say what becomes of the best keys of a query.
class PartitionedScan {
 public:
  // With `row_candidates` the scan is a self-join: a tile is scanned from its own first row on, and rows behind the tile collect
  // their hits in `row_candidates`, where the tile's own hits go too.
  PartitionedScan(const ScanPlan& plan, std::int64_t num_queries, const Partition& partition, Progress& progress, RowCandidates* row_candidates = nullptr);
  virtual ~PartitionedScan() = default;

  // The body of thread `index`.
  void work(int index);

  Counters counters;

 protected:
  // `keys` are the best of the query at `position`, descending; called once per query, from any thread.
  virtual void finish(std::int64_t position, const Key* keys, std::uint32_t count, bool has_nan) = 0;

  // Keeps a thread's share of a tile.
  virtual void leave(Tile& tile, Scanner& scanner);
  // Claims queries of a tile that all threads have left until none is there.
  virtual void merge(Tile& tile);

  ScanPlan plan_;
  Progress& progress_;
  std::mutex mutex_;

 private:
  bool claim(Tile& tile, std::int64_t* first, std::int64_t* last);
  void join(Tile& tile, Scanner& scanner);
  void scan(const Tile& tile, Scanner& scanner, std::int64_t first, std::int64_t last);
  bool none_allowed(std::int64_t first, std::int64_t last) const;

  Partition partition_;
  RowCandidates* row_candidates_;
  std::vector<Tile> tiles_;
  std::size_t num_tiles_ = 0;
};

}  // namespace tgq
