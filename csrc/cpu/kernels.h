// The table of CPU kernels that one instruction set provides.
//
// Kernel files are compiled with their own target flags. They include this header and intrinsics only: an inline function
// of a library header compiled with AVX-512 could otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>

namespace tgq {

constexpr int kLanes = 16;      // partial sums of the fixed-order dot; widths are padded to a multiple with zeros
constexpr int kPanel = 32;      // queries, and rows, of one filter tile
constexpr int kTileRows = 16;   // rows of one matrix-unit tile
constexpr int kTileDepth = 32;  // bf16 values of one row of a tile
constexpr int kDense = 128;     // survivors of one 32 x 32 tile from which it is scored whole instead

// Upper bound of a norm from its computed sum of squares: covers the rounding of the sum (any D up to 2^17), underflow, and
// the rounding of the margin that it enters. Where a product of two norms could overflow the bound is infinite, and the
// filter keeps the pair.
static inline float norm_upper_bound(float squares) {
  if (!(squares < 0x1p120f)) return __builtin_inff();
  return __builtin_sqrtf(squares) * (1.0f + 0x1p-10f) + 0x1p-64f;
}

// What a filter score is compared with: floor - margin, rounded down.
static inline float filter_floor(float floor, float margin) {
  return floor - margin - __builtin_fabsf(floor) * 0x1p-22f;
}

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
  // Positions i with scores[i] >= floor or, with floors, scores[i] >= floors[i] (never NaN), in order; returns how many.
  int (*collect)(const float* scores, int count, float floor, const float* floors, uint32_t* positions);
  void (*half_to_float)(const uint16_t* from, int64_t count, float* to);
  void (*bfloat_to_float)(const uint16_t* from, int64_t count, float* to);
};

// Low-precision filter: bf16 tiles with a certified margin. `depth` is a multiple of kTileDepth.
struct Filter {
  const char* name;
  // Rounds rows [32 groups, width] to bf16 tiles [rows / 16][depth / 32][16][32] and measures, per row, upper bounds of the
  // norm of the rounded row and of the rounding error. Rows from num_rows up to a multiple of kPanel become zero.
  void (*round_rows)(const float* rows, int64_t row_stride, int num_rows, int64_t width, int64_t depth, uint16_t* tiles,
                     float* norm, float* error);
  // Packs up to 32 queries for the matrix unit: [depth / 32][2][16 pairs][16 queries][2]. `rounded` is bf16 row-major.
  void (*pack_panel)(const uint16_t* rounded_tiles, int64_t depth, uint16_t* panel);
  // Scores all row groups of a block against one panel; with
  //   margin = slope[q] * group_norm[g] + lift[q] * group_error[g] + constant
  // it appends the pairs whose score is not below filter_floor(floor[q], margin) and, with row_floor, also those whose
  // score plus margin, rounded up, is not below row_floor[r]. NaN is never below. A tile with more than kDense such pairs
  // appends none and sets dense[g]. `hits` has room for kDense per group and one tile more. Returns the hits appended.
  int (*filter_block)(const uint16_t* tiles, int groups, int64_t depth, const uint16_t* panel, const float* floor,
                      const float* slope, const float* lift, float constant, const float* group_norm,
                      const float* group_error, const float* row_floor, FilterHit* hits, uint8_t* dense);
  void (*begin)();  // on each thread before use
  void (*end)();
};

const Kernels& scalar_kernels();
const Filter& scalar_filter();
#if defined(TGQ_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Filter& amx_filter();
#endif

// What a search runs with.
struct Isa {
  const char* name;
  const Kernels* kernels;
  const Filter* filter;  // null: none that pays
};

// Null when the name is unknown or the machine cannot run it. A null name asks for TGQ_ISA, else the best.
const Isa* find_isa(const char* name);

}  // namespace tgq
