// Exact maximum inner product search: the C++ interface. docs/topk.md holds the contract.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "common/types.h"

namespace tgq {

// Codes of every pool row, made once and kept beside the pool: a search that has them reads the pool itself only where a row
// may be an answer. docs/topk.md describes the layout. Not owned; no bytes: no codes.
struct Codes {
  const std::uint8_t* bytes = nullptr;   // first level [first_lines, groups of 16 rows, 16 words, 16 rows, 4 columns]
  std::int64_t plane_stride = 0;         // bytes from one line of 64 columns to the next
  int first_lines = 0, lines = 0;        // of the first level; of all, D / 64 rounded up
  const std::uint16_t* second = nullptr;  // second level: those columns in half precision, in units of `scale`, per row; null: there is none
  const float* scale = nullptr;          // per row, padded to whole groups of rows, as `second` and `rest`
  const float* rest = nullptr;           // per row, upper bound of the norm beyond the first level
  const float* mean = nullptr;           // [D]
  const float* rotation = nullptr;       // [D, D]
  float defect = 0;                      // upper bound of the norm of RᵀR - I
  float step[2] = {}, norm[2] = {};      // per level, upper bounds of the norms of rounding errors and of codes, in units of `scale`
};

// Switches for tests and measurements; the defaults are right everywhere else. Answers never depend on them.
struct Tuning {
  int use_filter = -1;              // certified low-precision filter: 1 on, 0 off, -1 where it pays
  int use_codes = -1;               // stored codes: 1 on, 0 off, -1 where they pay
  int sample_stride = -1;           // one row in so many is sampled for a first threshold; 0 off, -1 where it pays
  float forced_threshold = 0.0f;        // with has_forced_threshold: taken instead of the sampled threshold (a failed sample)
  bool has_forced_threshold = false;
  int use_self_join = -1;           // upper triangle only where Request::self_join: 1 on, 0 off, -1 where it pays
  std::int64_t query_tile = 0;      // queries scanned together; 0: chosen
  std::int64_t row_chunk = 0;       // rows a thread claims at a time; 0: chosen
  std::int64_t spare_candidates = 0;  // candidate buffer beyond k; 0: chosen
};

// What a search did; counters for tests and measurements.
struct Counters {
  std::int64_t filtered = 0;   // scores that only the low-precision filter saw
  std::int64_t direct = 0;     // scores computed exactly in tiles
  std::int64_t rescored = 0;   // filter survivors scored exactly one by one
  std::int64_t rescanned = 0;  // queries whose sampled threshold failed
  std::int64_t coded = 0;      // queries that took the stored codes
};

// A condition that pool rows and a query meet together or not, tested on hits only. Not owned.
struct Rule {
  enum class Kind { differ, near };
  Kind kind = Kind::differ;
  // differ: labels [N] and [Q]; met where they differ or the row's is negative.
  const std::int64_t* row_labels = nullptr;
  const std::int64_t* query_labels = nullptr;
  // near: numbers [N], [Q] and [Q]; met where a row's number is no further from the query's than its reach; never by a NaN.
  const double* row_numbers = nullptr;
  const double* query_numbers = nullptr;
  const double* reach = nullptr;

  bool met(std::int64_t query, std::int64_t row) const {
    if (kind == Kind::differ) return row_labels[row] < 0 || row_labels[row] != query_labels[query];
    return std::fabs(row_numbers[row] - query_numbers[query]) <= reach[query];
  }
};

struct Request {
  Matrix queries;               // [Q, D]
  Matrix pool;                  // [N, D], N < 2^32
  Codes codes;                  // of the pool
  std::uint32_t k = 0;          // 1 … 2048
  const std::int64_t* exclude = nullptr;  // [Q, exclude_width], rows < 0 mean none
  std::int64_t exclude_width = 0;
  const std::uint8_t* allowed = nullptr;  // [N] rows with a zero are never returned; null: all are allowed
  const Rule* rules = nullptr;  // all must be met
  int num_rules = 0;
  std::uint32_t sampled_k = 0;  // the k that a sample assumes where rules keep few of the rows; 0: k
  float* scores = nullptr;      // [Q, k]
  std::int64_t* rows = nullptr;  // [Q, k]
  int threads = 1;
  bool self_join = false;       // queries and pool are the same memory
  const char* isa = nullptr;    // forces an instruction set; null: TGQ_ISA, else the best
  // Called on the calling thread a few times per second with the share done; returning false cancels.
  std::function<bool(double)> poll;
  Tuning tuning;
  Counters* counters = nullptr;
};

Status search_cpu(const Request& request);

// How many rows come before given ones in the order of a search. A mark is a score and a row; a row comes before it with a higher
// score, or the same one and a lower row; a NaN score never does. Scores are those of search_cpu, bit for bit, so counts of the
// parts of a pool add up to those of the whole.
struct CountRequest {
  Matrix queries;                        // [Q, D]
  Matrix pool;                           // [N, D]
  std::int64_t first_row = 0;            // of the pool among the rows that marks name
  const std::int64_t* starts = nullptr;  // [Q + 1] query q has the marks starts[q] … starts[q + 1]
  const float* scores = nullptr;         // [M], no NaN
  const std::int64_t* rows = nullptr;    // [M]
  std::int64_t* before = nullptr;        // [M]
  int threads = 1;
  const char* isa = nullptr;
  std::function<bool(double)> poll;
};

Status count_before(const CountRequest& request);

// scores[i] = what row i of `rows` scores with row i of `queries`.
Status score_rows(const Matrix& queries, const Matrix& rows, const char* isa, float* scores);

// Rows to encode in the first level, and the arrays of Codes to write to.
struct EncodeRequest {
  const double* turned;       // [count, 64 lines] centred and rotated, zeros where a row is not coded
  const std::uint8_t* coded;  // [count]
  std::int64_t count;
  std::int64_t first_row;     // where they go, a multiple of 16
  int first_lines, lines;
  double spread;              // norm of a row's codes above which the row gets coarser ones
  std::uint8_t* bytes;
  std::int64_t plane_stride;
  float* scale;
  float* rest;
};

// What holds for all rows encoded so far.
struct EncodedFacts {
  double step = 0, norm = 0;      // upper bounds of the norms of rounding errors and of codes, in codes
  double inside = 0, energy = 0;  // sums of squares in the first level, and in all
};

void encode_codes(const EncodeRequest& request, EncodedFacts& facts);

// Fixed-order fp32 inner product of two vectors, the one number that every path of the CPU search returns for a pair:
// sixteen partial sums by fused multiply-add (element i goes to sum i mod 16, in rising order of i), added as a binary
// tree (j + 8, j + 4, j + 2, j + 1).
float fixed_order_dot(const float* a, const float* b, std::int64_t size);

}  // namespace tgq
