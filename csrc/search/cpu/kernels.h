// The table of CPU kernels that one instruction set provides.
//
// Kernel files are compiled with their own target flags. They include this header and intrinsics only: an inline function
// of a library header compiled with AVX-512 could otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>

namespace tgq {

constexpr int kLanes = 16;       // partial sums of the fixed-order dot; widths are padded to a multiple with zeros
constexpr int kPanel = 32;       // queries, and rows, of one filter tile
constexpr int kCodeLine = 64;    // bytes; rows of codes are padded to a multiple with codes of zero
constexpr int kDense = 128;      // survivors of one 32 x 32 tile from which it is scored whole instead
constexpr int kByteZero = 128;   // the code of zero in the rows of a byte filter
constexpr int kByteLimit = 127;  // largest magnitude of a row's code

// Upper bound of a norm from its computed sum of squares: covers the rounding of the sum (any D up to 2^16), underflow, and
// the rounding of the margin that it enters. Where a product of two norms could overflow the bound is infinite, and the
// filter keeps the pair.
static inline float norm_upper_bound(float squares) {
  if (!(squares < 0x1p120f)) return __builtin_inff();
  return __builtin_sqrtf(squares) * (1.0f + 0x1p-10f) + 0x1p-64f;
}

// What a filter score is compared with: threshold - margin, rounded down.
static inline float filter_threshold(float threshold, float margin) {
  return threshold - margin - __builtin_fabsf(threshold) * 0x1p-22f;
}

// Scale of the codes of a vector whose largest magnitude is `largest`; 0 where that is too small to divide by (all codes are
// zero then and the whole vector is error), infinite or NaN.
static inline float code_scale(float largest, int limit) {
  return largest > 0x1p-100f && largest < 0x1p126f ? largest / static_cast<float>(limit) : 0.0f;
}

// Memory of which the rows will be read next.
struct Ahead {
  const char* at;
  int64_t stride;  // bytes between rows
  int64_t bytes;   // of one row
  int64_t rows;
};

namespace {  // every kernel file its own copy

// Asks for what lies ahead, a few lines at a time.
class Prefetcher {
 public:
  Prefetcher(const Ahead& ahead, int64_t turns)
      : at_(ahead.at), stride_(ahead.stride), bytes_(ahead.bytes), rows_(ahead.bytes > 0 ? ahead.rows : 0),
        lines_((rows_ * ((bytes_ + 63) / 64) + turns - 1) / turns) {}
  void turn() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; ++i) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ < bytes_) continue;
      offset_ = 0;
      at_ += stride_;
      --rows_;
    }
  }

 private:
  const char* at_;
  int64_t stride_, bytes_, rows_, lines_, offset_ = 0;
};

}  // namespace

// A pair that passed the filter.
struct FilterHit {
  uint16_t query;  // within the panel
  uint16_t row;    // within the block
  float score;     // the filter's own, approximate score
};

// Exact kernels. `width` is a multiple of kLanes; operands need no alignment.
struct Kernels {
  const char* name;
  // out[q * out_stride + r] = fixed-order dot of query q and row r.
  void (*score_tile)(const float* queries, int64_t query_stride, int num_queries, const float* rows, int64_t row_stride,
                     int num_rows, int64_t width, float* out, int64_t out_stride);
  // out[i] = fixed-order dot of a[i] and b[i].
  void (*score_pairs)(const float* const* a, const float* const* b, int count, int64_t width, float* out);
  // Positions i with scores[i] >= threshold or, with thresholds, scores[i] >= thresholds[i] (never NaN), in order; returns how many.
  int (*collect)(const float* scores, int count, float threshold, const float* thresholds, uint32_t* positions);
  void (*half_to_float)(const uint16_t* from, int64_t count, float* to);
  void (*bfloat_to_float)(const uint16_t* from, int64_t count, float* to);
};

// Pool rows as a filter reads them: a multiple of kPanel.
struct FilterBlock {
  const uint8_t* codes;
  int64_t stride;      // bytes between rows of codes
  int64_t row_bytes;   // of one row, a multiple of kCodeLine
  int groups;          // of kPanel rows
  const float* scale;  // per row, byte codes only
  const float *group_norm, *group_error;  // per group, the largest
  const float* row_threshold;  // per row, in a self-join; else null
  float constant;          // of the margin
  Ahead ahead;
};

// Up to kPanel queries as a filter reads them.
struct FilterPanel {
  const uint32_t* codes;  // [row_bytes / 64][2][16 words][16 queries], a word being two bf16 or four byte codes
  const int32_t* offset;  // [kPanel] what a byte sum starts from: -kByteZero times the sum of the query's codes
  const float* scale;     // [kPanel] byte codes only
  const float *threshold, *slope, *lift;  // [kPanel]
};

// What a sample keeps of its scores: rows are dealt out to `slots` sets in turn, `run` rows at a time (1, 2, … kPanel), and
// of each set a query's largest score is kept. No k-th largest of these exceeds the k-th largest of all.
struct Maxima {
  float* best;  // [slots][kPanel]
  int slots;
  int run;
  int next;     // set of the block's first row
  float* turn() {
    float* at = best + next * kPanel;
    next = next + 1 == slots ? 0 : next + 1;
    return at;
  }
};

// Low-precision filter with a certified margin; docs/topk.md proves it. Two kinds of codes: bf16, and bytes with a scale per
// vector (rows: kByteZero + value, 1 ... 255; queries: signed, as large as the filter's products allow).
struct Filter {
  const char* name;
  int code_bytes;  // 2: bf16, 1: bytes
  // Codes of `num_rows` fp32 vectors of `width` values, row_bytes apart, with the scale and upper bounds of the norm of
  // the coded vector and of the coding error. Rows from num_rows up to a multiple of kPanel become zero.
  void (*encode_rows)(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes,
                      uint8_t* codes, float* scale, float* norm, float* error);
  void (*encode_queries)(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t row_bytes,
                         uint8_t* codes, float* scale, float* norm, float* error);
  // Norm bounds of rows that are stored as bf16 and serve as codes themselves; null where codes are not bf16.
  void (*measure_rows)(const uint16_t* rows, int64_t row_stride, int num_rows, int64_t width, float* norm, float* error);
  // Scores all row groups of a block against one panel; with
  //   margin = slope[q] * group_norm[g] + lift[q] * group_error[g] + constant
  // it appends the pairs whose score is not below filter_threshold(threshold[q], margin) and, with row_threshold, also those whose
  // score plus margin, rounded up, is not below row_threshold[r]. NaN is never below. A tile with more than kDense such pairs
  // appends none and sets dense[g]. `hits` has room for kDense per group and one tile more. Returns the hits appended.
  int (*filter_block)(const FilterBlock& block, const FilterPanel& panel, FilterHit* hits, uint8_t* dense);
  // Scores all row groups of a block against one panel and raises `maxima` to the scores that are not NaN.
  void (*raise_maxima)(const FilterBlock& block, const FilterPanel& panel, Maxima maxima);
  void (*begin)();  // on each thread before use
  void (*end)();
};

const Kernels& scalar_kernels();
const Filter& scalar_filter();
#if defined(TGQ_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Filter& avx2_filter();
const Filter& avx2vnni_filter();
const Filter& avx512vnni_filter();
const Filter& amx_filter();
#endif

}  // namespace tgq
