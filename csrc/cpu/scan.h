// One thread's scan of pool rows against one tile of queries.
#pragma once

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

 private:
  Matrix matrix_;
  const Kernels& kernels_;
  std::int64_t width_;
  bool in_place_;
};

// What all threads of one pass over the pool share.
struct ScanPlan {
  Matrix queries;
  Matrix pool;
  const std::int64_t* query_ids = nullptr;  // rows of `queries` to search; null: all, in order
  const Key* floors = nullptr;              // per position in that list; null: none known
  const std::int64_t* exclude = nullptr;
  std::int64_t exclude_width = 0;
  std::uint32_t k = 0;
  std::uint32_t capacity = 0;
  bool approximate = false;  // a sample: the filter's own scores will do, exclusions do not matter
  const Kernels* kernels = nullptr;
  const Filter* filter = nullptr;  // null: score everything exactly
  std::int64_t width = 0;          // D padded to kLanes
  std::int64_t depth = 0;          // D padded to kTileDepth
  int block_rows = 0;              // multiple of kPanel
  std::int64_t max_tile = 0;       // queries of the largest tile

  std::int64_t query_id(std::int64_t position) const { return query_ids == nullptr ? position : query_ids[position]; }
};

// Constants of the margin; docs/topk.md proves them.
struct MarginConstants {
  float filter_error;  // of the filter's accumulation, relative to the product of the norms
  float exact_error;   // of the fixed-order dot, likewise
  float absolute;      // underflow, both
};
MarginConstants margin_constants(std::int64_t dimensions);

class Columns;

class Scanner {
 public:
  explicit Scanner(const ScanPlan& plan);

  // Takes the queries at positions [begin, begin + count) of the plan's list.
  void load_queries(std::int64_t begin, std::int64_t count);
  // Takes over the floors that the queries reached as rows of a self-join.
  void raise_floors(const Columns& columns);
  // Scans pool rows [first, first + count), count <= block_rows. Calls must come in rising order of rows. With `columns`
  // the rows are queries too, and the scores count for both sides.
  void scan_block(std::int64_t first, int count, Columns* columns);

  std::int64_t num_queries() const { return num_queries_; }
  Candidates& candidates(std::int64_t q) { return candidates_[static_cast<std::size_t>(q)]; }
  bool has_nan(std::int64_t q) const { return nan_[static_cast<std::size_t>(q)] != 0; }
  const Counters& counters() const { return counters_; }

 private:
  void scan_direct(const float* rows, std::int64_t stride, std::int64_t first, int count, Columns* columns);
  void scan_filtered(const float* rows, std::int64_t stride, std::int64_t first, int count, Columns* columns);
  void score_dense(std::int64_t panel, int group, const float* rows, std::int64_t stride, std::int64_t first, int count,
                   Columns* columns);
  void rescore(std::int64_t panel, int hits, const float* rows, std::int64_t stride, std::int64_t first, int count,
               Columns* columns);
  void offer(std::int64_t q, std::int64_t row, float score, Columns* columns);
  void load_row_floors(const Columns& columns, std::int64_t first, int count);
  void update_floors(std::int64_t begin, std::int64_t end, std::int64_t next_row);
  bool excluded(std::int64_t q, std::int64_t row) const;
  void raise_all_floors();

  const ScanPlan& plan_;
  RowReader pool_;
  RowReader query_reader_;
  std::int64_t padded_tile_;
  Buffer<float> queries_;      // [tile, width]
  Buffer<float> row_scratch_;  // [block_rows, width]
  Buffer<float> scores_;       // scores of one direct tile
  Buffer<std::uint32_t> positions_;
  Buffer<Key> keys_;           // [tile, capacity]
  std::vector<Candidates> candidates_;
  std::vector<float> floor_;   // [tile] lowest score of interest; the largest float where nothing is
  std::vector<float> row_floor_;  // [block_rows] of the rows as queries, in a self-join
  std::vector<unsigned char> nan_;
  std::int64_t begin_ = 0, num_queries_ = 0;
  std::int64_t scanned_ = 0;   // rows since load_queries
  int direct_blocks_ = 0;      // blocks to score exactly before the filter is tried again
  MarginConstants margin_;
  Buffer<std::uint16_t> panels_;  // queries packed for the filter
  Buffer<std::uint16_t> tiles_;   // the block's rows, rounded
  std::vector<float> slope_, lift_, norm_, error_, group_norm_, group_error_;
  Buffer<FilterHit> hits_;
  std::vector<std::uint8_t> dense_;
  Counters counters_;
};

}  // namespace tgq
