// One thread's scan of pool rows against one tile of queries.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "tgq/search.h"
#include "tgq/selection.h"

namespace tgq {

// 64-byte aligned array without initial values.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size)
      : memory_(static_cast<T*>(::operator new[](size * sizeof(T) + sizeof(T), std::align_val_t{64}))) {}
  T* data() const { return memory_.get(); }
  T& operator[](std::size_t i) const { return memory_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete[](static_cast<void*>(p), std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Hands out rows of a strided matrix as fp32, padded with zeros to the kernels' width; in place where the memory allows.
class RowReader {
 public:
  RowReader(const Matrix& matrix, const Kernels& kernels, std::int64_t width)
      : matrix_(matrix), kernels_(kernels), width_(width),
        in_place_(matrix.dtype == DType::f32 && matrix.col_stride == 1 && matrix.cols == width && width > 0) {}

  // Rows [first, first + count): a pointer to the first and the distance between two. `scratch` holds count * width.
  const float* read(std::int64_t first, std::int64_t count, float* scratch, std::int64_t* stride) const;
  void read_row(std::int64_t row, float* to) const;
  bool in_place() const { return in_place_; }
  // The memory of rows [first, first + count) as it is stored; nothing where a row is not one piece.
  Ahead memory(std::int64_t first, std::int64_t count) const;
  const std::uint16_t* halves(std::int64_t row) const {
    return static_cast<const std::uint16_t*>(matrix_.data) + row * matrix_.row_stride;
  }

 private:
  Matrix matrix_;
  const Kernels& kernels_;
  std::int64_t width_;
  bool in_place_;
};

// A hit of the code filter whose exact score is not known yet.
struct Pending {
  float bound;  // not below the exact score
  std::uint32_t row;
};

struct CodeKernels;
class PreparedQueries;
class Settler;

// What all threads of one pass over the pool share.
struct ScanPlan {
  Matrix queries;
  Matrix pool;
  const std::int64_t* query_ids = nullptr;  // rows of `queries` to search; null: all, in order
  const Key* floors = nullptr;              // per position in that list; null: none known
  const std::int64_t* exclude = nullptr;
  std::int64_t exclude_width = 0;
  const std::uint8_t* allowed = nullptr;    // per pool row, zero: never a hit; null: all may be
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
  std::int64_t query_id(std::int64_t position) const { return query_ids == nullptr ? position : query_ids[position]; }
};

// Constants of the margin; docs/topk.md proves them.
struct MarginConstants {
  float filter_error;  // of the filter's accumulation, relative to the product of the norms
  float exact_error;   // of the fixed-order dot, likewise
  float absolute;      // underflow, both
};
MarginConstants margin_constants(const Filter& filter, std::int64_t dimensions);

// Packs kPanel queries' codes, row_bytes apart, for the filters: FilterPanel::codes.
void pack_panel(const std::uint8_t* codes, std::int64_t row_bytes, std::uint32_t* panel);

// What threads that scan different rows for the same queries know of the k-th best together: when each of T threads has
// ceil(k / T) keys that are not below L, no key below L is among the k best.
class SharedFloors {
 public:
  SharedFloors(int threads, std::int64_t queries)
      : threads_(threads), queries_(queries),
        keys_(new std::atomic<Key>[static_cast<std::size_t>(threads) * static_cast<std::size_t>(queries)]) {
    for (std::int64_t i = 0; i < threads * queries; ++i) keys_[static_cast<std::size_t>(i)].store(kNoKey, std::memory_order_relaxed);
  }
  int threads() const { return threads_; }
  void publish(int thread, std::int64_t query, Key key) { at(thread, query).store(key, std::memory_order_relaxed); }
  Key floor(std::int64_t query) const {
    Key least = at(0, query).load(std::memory_order_relaxed);
    for (int t = 1; t < threads_; ++t) {
      const Key key = at(t, query).load(std::memory_order_relaxed);
      least = key < least ? key : least;
    }
    return least;
  }

 private:
  std::atomic<Key>& at(int thread, std::int64_t query) const {
    return keys_[static_cast<std::size_t>(thread * queries_ + query)];
  }
  int threads_;
  std::int64_t queries_;
  std::unique_ptr<std::atomic<Key>[]> keys_;
};

class Columns;

class Scanner {
 public:
  explicit Scanner(const ScanPlan& plan);
  virtual ~Scanner();

  // Takes the queries at positions [begin, begin + count) of the plan's list.
  virtual void load_queries(std::int64_t begin, std::int64_t count);
  // Takes over the floors that the queries reached as rows of a self-join.
  void raise_floors(const Columns& columns);
  // Exchanges with the other threads what is known of the k-th best. `thread` is this one's number among them; one
  // beyond those that `shared` counts only listens.
  void share_floors(SharedFloors& shared, int thread);
  // Rows to scan next at most.
  int next_rows() const;
  // Scans pool rows [first, first + count), count <= next_rows(). Calls must come in rising order of rows; those of the next
  // one follow, `ahead` of them. With `columns` the rows are queries too, and the scores count for both sides.
  virtual void scan_block(std::int64_t first, int count, std::int64_t ahead, Columns* columns);

  std::int64_t num_queries() const { return num_queries_; }
  Candidates& candidates(std::int64_t q) { return candidates_[static_cast<std::size_t>(q)]; }
  // Hits not scored yet.
  const Pending* pending(std::int64_t q) const { return pending_.data() + q * plan_.pending; }
  std::uint32_t pending_count(std::int64_t q) const { return pending_count_[static_cast<std::size_t>(q)]; }
  // Of a sample: [padded queries / kPanel][slots][kPanel], with codes [padded queries][slots]
  const std::vector<float>& maxima() const { return maxima_; }
  // Of a sample: the margin of the query's filter scores, for rows of the average norm.
  virtual float mean_margin(std::int64_t q) const;
  // Likewise of what stored codes know best.
  virtual float fine_margin(std::int64_t q) const { return mean_margin(q); }
  bool has_nan(std::int64_t q) const { return nan_[static_cast<std::size_t>(q)] != 0; }
  const Counters& counters() const { return counters_; }

 protected:
  bool cold() const;
  void scan_direct(std::int64_t first, int count, Columns* columns);
  void scan_filtered(std::int64_t first, int count, std::int64_t ahead, Columns* columns);
  void scan_sample(std::int64_t first, int count, std::int64_t ahead);
  FilterPanel panel(std::int64_t begin) const;
  // The rows as fp32, in place where they are: `rows_`.
  void read_rows(std::int64_t first, int count);
  // Makes `block_` out of the rows.
  void encode(std::int64_t first, int count);
  Ahead memory_ahead(std::int64_t first, std::int64_t count) const;
  Ahead share_ahead(std::int64_t first, std::int64_t count, std::int64_t panel) const;
  const float* row(std::int64_t first, int at, int slot);
  // Rows [begin, begin + part) of the block, against the panel's queries.
  void score_dense(std::int64_t panel, int begin, int part, std::int64_t first, Columns* columns);
  // Scores hits exactly, a batch of a block's panels together.
  void rescore(std::int64_t q, int row, std::int64_t first, int count, Columns* columns);
  void score_batch(std::int64_t first, Columns* columns);
  // After the filter has been through a block: what it left is scored and floors rise; where most groups were dense, the filter
  // rests for some blocks.
  void end_filtered(std::int64_t first, int count, std::int64_t dense, std::int64_t groups, Columns* columns);
  void offer(std::int64_t q, std::int64_t row, float score, Columns* columns);
  void load_row_floors(const Columns& columns, std::int64_t first, int count);
  void update_floors(std::int64_t begin, std::int64_t end, std::int64_t next_row);
  void raise_all_floors();

  const ScanPlan& plan_;
  RowReader pool_;
  RowReader query_reader_;
  std::int64_t padded_tile_;
  Buffer<float> queries_;      // [tile, width]
  Buffer<float> row_scratch_;  // [block_rows, width]
  const float* rows_ = nullptr;  // the block's rows as fp32 where they are at hand, else null
  std::int64_t row_stride_ = 0;
  Buffer<float> scores_;       // scores of one direct tile
  Buffer<std::uint32_t> positions_;
  Buffer<Key> keys_;           // [tile, capacity]
  std::vector<Candidates> candidates_;
  std::vector<float> floor_;   // [tile] lowest score of interest; the largest float where nothing is
  std::vector<std::int64_t> risen_;  // queries whose candidates' floor has risen since `floor_` was brought up to date
  std::vector<float> row_floor_;  // [block_rows] of the rows as queries, in a self-join
  std::vector<unsigned char> nan_;
  std::int64_t begin_ = 0, num_queries_ = 0;
  std::int64_t scanned_ = 0;   // rows since load_queries
  int direct_blocks_ = 0;      // blocks to score exactly before the filter is tried again
  MarginConstants margin_;
  Buffer<std::uint32_t> panels_;  // queries packed for the filter
  Buffer<std::uint8_t> codes_;    // the block's rows, encoded
  std::vector<std::int32_t> offset_;
  std::vector<float> unit_, slope_, lift_;                       // of the queries
  std::vector<float> scale_, norm_, error_, group_norm_, group_error_;  // of the block's rows
  FilterBlock block_{};
  bool stored_codes_;             // the pool's own memory serves as codes
  Buffer<FilterHit> hits_;
  struct Pair {
    std::int64_t query;
    int row;  // of the block
  };
  std::vector<Pair> batch_;
  std::vector<std::uint8_t> dense_;
  Buffer<Pending> pending_;                     // [tile, pending]
  std::vector<std::uint32_t> pending_count_;
  std::vector<float> maxima_;
  double norm_sum_ = 0, error_sum_ = 0;  // of the sample's groups
  std::int64_t groups_ = 0;
  Counters counters_;
};

}  // namespace tgq
